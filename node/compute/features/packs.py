"""Many small entries in one file: an index, then the entries, each with its digest.

    magic, version, number of entries │ (key, digest, size, seconds) of each │ digest of all before │ entries

Digests are those of ``mesh.digests``, as between nodes: what a peer asks for leaves with the one it has here.

A file appears whole (written beside, synced, renamed) and never changes afterwards, so processes that share
a directory need no lock: what one of them removes is a miss to the others.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.digests import DIGEST_BYTES, digest_of
from mesh.errors import DecodeError
from node.compute.features.key import KEY_BYTES

__all__ = [
    "ENTRIES_MAX",
    "SUFFIX",
    "Place",
    "read_entries",
    "read_index",
    "read_unchecked",
    "write_pack",
]

SUFFIX = ".pack"
ENTRIES_MAX = 1 << 16
"""In one pack; a hostile index is refused before more than 5 MB of it are read."""

_MAGIC, _VERSION = b"EMFP", 3
_HEAD = struct.Struct("<4sHxxI")
_ENTRY = struct.Struct(f"<{KEY_BYTES}s{DIGEST_BYTES}sIf")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry lies in its pack."""

    start: int
    n_bytes: int
    digest: bytes
    """Of the entry."""
    recompute_s: float
    """What it took to make, or would."""


def write_pack(
    directory: Path, entries: Mapping[bytes, tuple[bytes | bytearray | memoryview, float]]
) -> tuple[Path, dict[bytes, Place]]:
    """A new pack of ``entries``: key -> (payload, seconds it took to make).

    Raises:
        OSError: The disk is full, or the directory cannot be written; nothing is left behind then.
    """
    assert 0 < len(entries) <= ENTRIES_MAX, "the store cuts batches"
    index = bytearray(_HEAD.pack(_MAGIC, _VERSION, len(entries)))
    places = {}
    start = _HEAD.size + _ENTRY.size * len(entries) + DIGEST_BYTES
    for key, (payload, recompute_s) in entries.items():
        n_bytes, digest = len(memoryview(payload)), digest_of(payload)
        index += _ENTRY.pack(key, digest, n_bytes, recompute_s)
        places[key] = Place(start, n_bytes, digest, recompute_s)
        start += n_bytes
    index += digest_of(index)
    name = secrets.token_hex(12)
    path, partial = directory / f"{name}{SUFFIX}", directory / f".{name}.{os.getpid()}.partial"
    try:
        with partial.open("xb") as file:
            file.write(index)
            for payload, _ in entries.values():
                file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path, places


def read_index(path: Path) -> dict[bytes, Place]:
    """What is in a pack, without reading the entries.

    Raises:
        OSError: It is gone.
        DecodeError: It is damaged; ``path`` should be removed.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise DecodeError(f"{path.name} is shorter than its header")
        magic, version, n = _HEAD.unpack(head)
        if magic != _MAGIC or version != _VERSION or not 0 < n <= ENTRIES_MAX:
            raise DecodeError(f"{path.name} is no feature pack of this version")
        listing = file.read(_ENTRY.size * n)
        if len(listing) < _ENTRY.size * n or not _is(file.read(DIGEST_BYTES), head + listing):
            raise DecodeError(f"the index of {path.name} is damaged")
    places = {}
    start = _HEAD.size + _ENTRY.size * n + DIGEST_BYTES
    for key, digest, n_bytes, recompute_s in _ENTRY.iter_unpack(listing):
        places[key] = Place(start, n_bytes, digest, recompute_s)
        start += n_bytes
    if start != size:
        raise DecodeError(f"{path.name} has {size} bytes instead of {start}")
    return places


def read_entries(path: Path, places: Sequence[Place]) -> Iterator[bytearray]:
    """The payloads at ``places``, in their order, each held against its digest.

    Raises:
        OSError: The pack is gone, or cannot be read.
        DecodeError: An entry is not what was written; ``path`` should be removed.
    """
    with path.open("rb") as file:
        for place in places:
            payload = bytearray(place.n_bytes)
            file.seek(place.start)
            if file.readinto(payload) != place.n_bytes or not _is(place.digest, payload):
                raise DecodeError(f"an entry of {path.name} is damaged")
            yield payload


def read_unchecked(path: Path, places: Sequence[Place]) -> Iterator[bytes]:
    """The payloads at ``places``, in their order, for a reader who holds them against their digests itself.

    Raises:
        OSError: The pack is gone, shorter than it was, or cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        for place in places:
            payload = os.pread(file.fileno(), place.n_bytes, place.start)
            if len(payload) != place.n_bytes:
                raise OSError(errno.EIO, f"{path.name} ends early")
            yield payload


def _is(digest: bytes, content: bytes | bytearray) -> bool:
    return digest == digest_of(content)
