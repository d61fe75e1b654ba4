"""A ``BlobStore`` for tests of the data plane: one directory, under a quota. A full disk is a miss.

    blobs/ab/<64 hex of the digest>         the bytes themselves
    blocks/ab/<64 hex of the key>           digest (32), then the payload
    scratch/<random>                        what is being written; emptied at the start

Names are made here from 32 bytes, never taken from a peer. A file appears whole (written beside, renamed)
and never changes; blobs are synced before, since nobody reads them again to check. Blocks are not: whoever
asks for one checks its digest, and one that a power cut shortened is a miss there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mesh.digests import DIGEST_BYTES
from mesh.transport.bulk.blobs import BLOCK_BYTES_MAX, BlobRef, Block, PutVerdict
from mesh.transport.bulk.files import FREE_BYTES_LEFT, FileSink, OpenFile
from mesh.units import bytes_text

__all__ = ["DirectoryStore"]

log = logging.getLogger(__name__)


class DirectoryStore:
    """Implements ``BlobStore``. One process writes a directory; blocking work runs in threads.

    Raises:
        OSError: The directory cannot be made or read.
    """

    def __init__(self, root: Path, quota_bytes: int, *, free_bytes_left: int = FREE_BYTES_LEFT) -> None:
        assert quota_bytes >= 0
        self._root = root
        self._quota_bytes = quota_bytes
        self._free_bytes_left = free_bytes_left
        self._lock = threading.Lock()
        self._is_full_said = False
        shutil.rmtree(root / "scratch", ignore_errors=True)
        for name in ("scratch", "blobs", "blocks"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._n_bytes = sum(
            path.stat().st_size for name in ("blobs", "blocks") for path in (root / name).glob("*/*")
        )
        """On disk and promised to what is being written."""

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    # ── serving ─────────────────────────────────────────────────────────────────────────────────────

    async def open(self, digest: bytes) -> OpenFile | None:
        return await asyncio.to_thread(self._open, digest)

    async def get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        return await asyncio.to_thread(self._get_many, keys, bytes_max)

    def has_room(self, n_bytes: int) -> bool:
        return self._n_bytes + n_bytes <= self._quota_bytes

    async def put(self, blocks: Sequence[Block]) -> list[PutVerdict]:
        return await asyncio.to_thread(lambda: [self._put(block) for block in blocks])

    # ── receiving and removing ──────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def receiving(self, blob: BlobRef) -> Iterator[FileSink | None]:
        """A place for an arriving blob; it is in the store once ``is_right`` said so. ``None`` = no room."""
        if not self._reserve(blob.size):
            yield None
            return
        path = self._scratch()
        sink: FileSink | None = None
        try:
            sink = FileSink(blob, path, lambda: self._place(path, self._path("blobs", blob.digest)))
            yield sink
        except OSError as error:
            if sink is not None:
                raise
            self._say_full(error)
            yield None
        finally:
            if sink is not None:
                sink.close()
            if sink is None or not sink.is_kept:
                self._free(blob.size)
                with contextlib.suppress(OSError):
                    path.unlink()

    def remove_blob(self, digest: bytes) -> bool:
        """Whether it was there. Who is reading it reads on."""
        return self._remove(self._path("blobs", digest))

    def remove_block(self, key: bytes) -> bool:
        return self._remove(self._path("blocks", key))

    # ── files ───────────────────────────────────────────────────────────────────────────────────────

    def _path(self, kind: str, name: bytes) -> Path:
        assert len(name) == DIGEST_BYTES
        text = name.hex()
        return self._root / f"{kind}/{text[:2]}/{text}"

    def _scratch(self) -> Path:
        return self._root / "scratch" / secrets.token_hex(8)

    def _open(self, digest: bytes) -> OpenFile | None:
        try:
            return OpenFile(self._path("blobs", digest))
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read blob %s: %s", digest.hex()[:12], error)
            return None

    def _get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        found: list[Block | int | None] = []
        n_left = bytes_max
        for key in keys:
            entry = self._get(key, n_left)
            if isinstance(entry, Block):
                n_left -= len(entry.payload)
            found.append(entry)
        return found

    def _get(self, key: bytes, bytes_max: int) -> Block | int | None:
        try:
            fd = os.open(self._path("blocks", key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read block %s: %s", key.hex()[:12], error)
            return None
        try:
            size = os.fstat(fd).st_size - DIGEST_BYTES
            if not 0 <= size <= BLOCK_BYTES_MAX:
                return None
            if size > bytes_max:
                return size
            content = os.read(fd, DIGEST_BYTES + size)
        except OSError as error:
            log.warning("cannot read block %s: %s", key.hex()[:12], error)
            return None
        finally:
            os.close(fd)
        if len(content) != DIGEST_BYTES + size:
            return None
        return Block(key, content[:DIGEST_BYTES], memoryview(content)[DIGEST_BYTES:])

    def _put(self, block: Block) -> PutVerdict:
        path, size = self._path("blocks", block.key), DIGEST_BYTES + len(block.payload)
        if path.exists():
            return PutVerdict.HELD
        if not self._reserve(size):
            return PutVerdict.NO_ROOM
        scratch = self._scratch()
        try:
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(block.digest)
                file.write(block.payload)
            is_new = self._place(scratch, path)
        except OSError as error:
            self._free(size)
            with contextlib.suppress(OSError):
                scratch.unlink()
            self._say_full(error)
            return PutVerdict.NO_ROOM
        if not is_new:
            self._free(size)
        return PutVerdict.STORED if is_new else PutVerdict.HELD

    def _place(self, scratch: Path, path: Path) -> bool:
        """Whether it is there now because of us: two peers may bring the same at once, and it counts once."""
        path.parent.mkdir(exist_ok=True, mode=0o700)
        with self._lock:
            if path.exists():
                scratch.unlink()
                return False
            scratch.replace(path)
            return True

    def _remove(self, path: Path) -> bool:
        try:
            size = path.stat().st_size
            path.unlink()
        except OSError:
            return False
        self._free(size)
        return True

    def _reserve(self, n_bytes: int) -> bool:
        with self._lock:
            if self._n_bytes + n_bytes > self._quota_bytes:
                return False
            try:
                free_bytes = shutil.disk_usage(self._root).free
            except OSError:
                return False
            if free_bytes - n_bytes < self._free_bytes_left:
                if not self._is_full_said:
                    log.warning("the disk is full: %s are free, blocks are refused", bytes_text(free_bytes))
                self._is_full_said = True
                return False
            self._is_full_said = False
            self._n_bytes += n_bytes
            return True

    def _free(self, n_bytes: int) -> None:
        with self._lock:
            self._n_bytes -= n_bytes

    def _say_full(self, error: OSError) -> None:
        if not self._is_full_said:
            log.warning("cannot write below %s: %s", self._root, error)
        self._is_full_said = True
