"""A directory's files from several peers at once. Every byte's digest is checked before anybody reads it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.digests import Buffer
from mesh.errors import DecodeError
from mesh.transport.bulk.blobs import BlobRef, Holder
from mesh.transport.bulk.client import BulkClient
from mesh.transport.bulk.files import FREE_BYTES_LEFT, FileSink
from mesh.transport.bulk.ranges import Spans
from mesh.transport.bulk.store import BlobSink, MemorySink
from mesh.units import bytes_text
from node.files.file_list import FileEntry, FileList, blob_of_file

__all__ = ["Holders", "fetch_files", "fetch_list"]

log = logging.getLogger(__name__)

Holders = Callable[[], Sequence[Holder]]
"""Who has it now: asked again before each try."""

LIST_WITHIN_S = 10.0
TRIES = 6
PAUSE_S = 0.5
"""Before the second try; doubles. Six tries outlast a broker's move and a node's restart (15 s)."""


async def fetch_list(
    bulk: BulkClient, blob: BlobRef, holders: Sequence[Holder], is_wanted: Callable[[str], bool]
) -> FileList | None:
    """The list of files that a digest names; ``None``, and a line in the log, where there is none."""
    sink = MemorySink(blob)
    if not await bulk.fetch(blob, holders, sink, within_s=LIST_WITHIN_S):
        return None
    try:
        return FileList.parse(bytes(sink.content), is_wanted)
    except DecodeError as error:
        log.warning("files_refused digest=%s why=%s", blob, error)
        return None


async def fetch_files(
    bulk: BulkClient,
    files: FileList,
    holders: Holders,
    into: Path,
    on_bytes: Callable[[int], None] = lambda n_bytes: None,
    *,
    tries: int = TRIES,
) -> bool:
    """Whether every file of the list is in the directory ``into``, whole, right and synced.

    What is there already from an earlier, broken fetch is looked at and kept if it is right. A holder that
    breaks off or a link that is gone for seconds costs what was under way. ``on_bytes`` is told how many
    bytes are there.

    Raises:
        OSError: The disk has no room, or fails.
    """
    await asyncio.to_thread(_check_room, into, files)
    n_done = 0
    for file in files.files:
        path = into / file.name
        if not await asyncio.to_thread(_is_there, path, file):
            await asyncio.to_thread(path.unlink, missing_ok=True)
            if not await _fetch_file(bulk, file, holders, path, _Sum(on_bytes, n_done), tries):
                return False
        n_done += file.size
        on_bytes(n_done)
    return True


async def _fetch_file(
    bulk: BulkClient,
    file: FileEntry,
    holders: Holders,
    path: Path,
    on_bytes: Callable[[int], None],
    tries: int,
) -> bool:
    had = Spans()
    sink = FileSink(file.blob, path, lambda: True)
    counted = _Counted(sink, on_bytes)
    try:
        for k in range(tries):
            if k:
                await asyncio.sleep(PAUSE_S * 2 ** (k - 1))
                log.info("files_again file=%s try=%d had=%d of=%d", file.name, k + 1, len(had), file.size)
            counted.n_bytes = len(had)
            if (now := holders()) and await bulk.fetch(file.blob, now, counted, had=had):
                return True
        return False
    finally:
        sink.close()
        if not sink.is_kept:
            await asyncio.to_thread(path.unlink, missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Sum:
    """Counts on from what the files before had."""

    on_bytes: Callable[[int], None]
    n_before: int

    def __call__(self, n_bytes: int) -> None:
        self.on_bytes(self.n_before + n_bytes)


class _Counted:
    """Implements ``BlobSink``: tells how far another sink is."""

    def __init__(self, sink: BlobSink, on_bytes: Callable[[int], None]) -> None:
        self._sink = sink
        self._on_bytes = on_bytes
        self.n_bytes = 0

    async def write(self, start: int, content: Buffer) -> bool:
        is_written = await self._sink.write(start, content)
        if is_written:
            self.n_bytes += len(content)
            self._on_bytes(self.n_bytes)
        return is_written

    async def is_right(self) -> bool:
        is_right = await self._sink.is_right()
        if not is_right:
            self.n_bytes = 0
        return is_right


def _is_there(path: Path, file: FileEntry) -> bool:
    try:
        return path.stat().st_size == file.size and blob_of_file(path).digest == file.digest
    except OSError:
        return False


def _check_room(into: Path, files: FileList) -> None:
    there = sum(path.stat().st_size for path in into.iterdir() if path.is_file())
    needed = files.n_bytes - there + FREE_BYTES_LEFT
    free = shutil.disk_usage(into).free
    if needed > free:
        text = f"{os.strerror(errno.ENOSPC)}: {bytes_text(needed)} are needed, {bytes_text(free)} are free"
        raise OSError(errno.ENOSPC, text, str(into))
