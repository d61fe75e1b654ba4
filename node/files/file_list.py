"""A directory as a list of names, sizes and digests: small, and itself named by a digest.

What comes from a peer is looked at here before a byte of it is written: names are plain file names with a
known ending, so nothing can leave the directory it is for, and their number and sizes are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mesh.digests import RunningDigest, digest_of
from mesh.errors import DecodeError
from mesh.messages.files import MANIFEST_BYTES_MAX
from mesh.transport.bulk.blobs import PIECE_BYTES, BlobRef

__all__ = ["ADAPTER_FILES", "FILES_MAX", "FileEntry", "FileList", "blob_of_file", "is_model_file"]

FILES_MAX = 64
FILE_BYTES_MAX = 1 << 37
"""128 GiB: a shard of the largest models is 10."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "edgemesh.json")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODEL_ENDINGS = (".safetensors", ".json", ".jinja", ".txt", ".model")
_OURS = frozenset({"manifest.json", "files.json"})
"""What this machine writes beside a model; never a peer's."""
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class FileEntry:
    name: str
    size: int
    digest: bytes

    @property
    def blob(self) -> BlobRef:
        return BlobRef(self.digest, self.size)


@dataclass(frozen=True, slots=True)
class FileList:
    """Files sorted by name. Two directories with one ``digest`` hold the same."""

    files: tuple[FileEntry, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def content(self) -> bytes:
        """As it travels: one way to write it, so that its digest says what the files are."""
        files = [
            {"name": file.name, "size": file.size, "digest": file.digest.hex()} for file in sorted(self.files)
        ]
        return json.dumps({"files": files}, sort_keys=True, separators=(",", ":")).encode()

    @property
    def blob(self) -> BlobRef:
        content = self.content
        return BlobRef(digest_of(content), len(content))

    @classmethod
    def of(cls, paths: Iterable[Path]) -> FileList:
        """Reads every file.

        Raises:
            OSError: One cannot be read.
        """
        return cls(tuple(sorted(FileEntry(path.name, *_size_and_digest(path)) for path in paths)))

    @classmethod
    def parse(cls, content: bytes, is_wanted: Callable[[str], bool]) -> FileList:
        """What a peer sent.

        Raises:
            DecodeError: It is no such list, or names a file that ``is_wanted`` does not.
        """
        if len(content) > MANIFEST_BYTES_MAX:
            raise DecodeError(f"a list of files of {len(content)} bytes; at most {MANIFEST_BYTES_MAX}")
        try:
            files = json.loads(content)["files"]
            if not isinstance(files, list) or not 0 < len(files) <= FILES_MAX:
                raise ValueError(f"1 to {FILES_MAX} files")
            found = cls(tuple(sorted(_entry(file) for file in files)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DecodeError(f"no list of files: {str(error)[:120]}") from None
        names = [file.name for file in found.files]
        if len({name.lower() for name in names}) < len(names):
            raise DecodeError("no list of files: two of one name")
        for name in names:
            if not is_wanted(name):
                raise DecodeError(f"a file that does not belong there: {name!r}")
        if found.content != content:
            raise DecodeError("no list of files: not written as we write it")
        return found


def is_model_file(name: str) -> bool:
    """Whether a peer may give us a file of this name as part of a model."""
    return name.endswith(_MODEL_ENDINGS) and name not in _OURS


def blob_of_file(path: Path) -> BlobRef:
    """Reads it.

    Raises:
        OSError: It cannot be read.
    """
    size, digest = _size_and_digest(path)
    return BlobRef(digest, size)


def _entry(file: object) -> FileEntry:
    if not isinstance(file, dict) or set(file) != {"name", "size", "digest"}:
        raise ValueError("a file has a name, a size and a digest")
    name, size, digest = file["name"], file["size"], file["digest"]
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"no file name: {str(name)[:40]!r}")
    if type(size) is not int or not 0 <= size <= FILE_BYTES_MAX:
        raise ValueError(f"no size of a file: {str(size)[:40]}")
    if not isinstance(digest, str) or _HEX.fullmatch(digest) is None:
        raise ValueError("no digest of a file")
    return FileEntry(name, size, bytes.fromhex(digest))


def _size_and_digest(path: Path) -> tuple[int, bytes]:
    digest, size = RunningDigest(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.digest()
