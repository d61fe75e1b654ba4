"""Blobs as files: one that is served, and one that arrives, beside where it will lie until it is right."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from mesh.digests import Buffer, RunningDigest
from mesh.transport.bulk.blobs import PIECE_BYTES, BlobRef
from mesh.units import MIB

__all__ = ["FREE_BYTES_LEFT", "FileSink", "OpenFile"]

log = logging.getLogger(__name__)

FREE_BYTES_LEFT = 64 * MIB
"""Never the last of a disk: journals of the same machine must still be written."""


class OpenFile:
    """Implements ``BlobReader``: one file, readable also when it is removed meanwhile.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._fd).st_size

    @property
    def size(self) -> int:
        return self._size

    async def read(self, start: int, n_bytes: int) -> Buffer:
        return await asyncio.to_thread(os.pread, self._fd, n_bytes, start)

    def close(self) -> None:
        os.close(self._fd)


class FileSink:
    """Implements ``BlobSink``: a file beside the store, renamed into it when its digest is right."""

    def __init__(self, blob: BlobRef, path: Path, place: Callable[[], bool]) -> None:
        self._blob = blob
        self._place = place
        # A write that its asker gave up on may still be under way in its thread: it must neither change
        # what was checked nor meet another file under our number.
        self._lock = threading.Lock()
        self._is_sealed = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.is_kept = False

    async def write(self, start: int, content: Buffer) -> bool:
        return await asyncio.to_thread(self._write, start, content)

    async def is_right(self) -> bool:
        return await asyncio.to_thread(self._keep_if_right)

    def close(self) -> None:
        with self._lock:
            self._is_sealed = True
            os.close(self._fd)

    def _write(self, start: int, content: Buffer) -> bool:
        assert start >= 0 and start + len(content) <= self._blob.size, "a blob has its size"
        view = memoryview(content)
        try:
            with self._lock:
                while view and not self._is_sealed:
                    n_written = os.pwrite(self._fd, view, start)
                    start, view = start + n_written, view[n_written:]
                return not view
        except OSError as error:  # the disk is full: the blob is a miss
            log.warning("cannot write blob %s: %s", self._blob, error)
            return False

    def _keep_if_right(self) -> bool:
        with self._lock:
            self._is_sealed = True
        try:
            if self._digest() != self._blob.digest:
                self._is_sealed = False
                return False
            os.fsync(self._fd)
            self.is_kept = self._place()  # False: another transfer was faster, and ours gives its room back
        except OSError as error:
            log.warning("cannot keep blob %s: %s", self._blob, error)
            return False
        return True

    def _digest(self) -> bytes:
        digest = RunningDigest()
        for start in range(0, self._blob.size, PIECE_BYTES):
            digest.update(os.pread(self._fd, min(PIECE_BYTES, self._blob.size - start), start))
        return digest.digest()
