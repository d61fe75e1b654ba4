"""Answers peers who ask for a file of this node by its digest; nothing is copied for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mesh.digests import Buffer
from mesh.transport.bulk.blobs import Block, PutVerdict
from mesh.transport.bulk.files import OpenFile
from mesh.transport.bulk.store import BlobReader, BlobStore

__all__ = ["FileBlobs", "WithFiles"]

log = logging.getLogger(__name__)


class FileBlobs:
    """By digest: the path of a file, or a few bytes. What a path holds is not hashed again for each asker.

    A file that has changed since is served as it is: whoever receives it sees that its digest is another
    and drops it, and the next look at the directory puts our table right.
    """

    def __init__(self) -> None:
        self._tables: dict[str, Mapping[bytes, Path | bytes]] = {}

    def put(self, owner: str, table: Mapping[bytes, Path | bytes]) -> None:
        """Replace what ``owner`` had put before."""
        self._tables[owner] = dict(table)

    async def open(self, digest: bytes) -> BlobReader | None:
        for table in self._tables.values():
            match table.get(digest):
                case bytes() as content:
                    return _Bytes(content)
                case Path() as path:
                    try:
                        return await asyncio.to_thread(OpenFile, path)
                    except OSError as error:
                        log.info("cannot give %s: %s", path.name, error)
                case None:
                    continue
        return None


class WithFiles:
    """Implements ``BlobStore``: blocks of one store, and files beside its own blobs."""

    def __init__(self, store: BlobStore, files: FileBlobs) -> None:
        self._store = store
        self._files = files

    async def open(self, digest: bytes) -> BlobReader | None:
        return await self._files.open(digest) or await self._store.open(digest)

    async def get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        return await self._store.get_many(keys, bytes_max)

    def has_room(self, n_bytes: int) -> bool:
        return self._store.has_room(n_bytes)

    async def put(self, blocks: Sequence[Block]) -> list[PutVerdict]:
        return await self._store.put(blocks)


class _Bytes:
    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)

    @property
    def size(self) -> int:
        return len(self._content)

    async def read(self, start: int, n_bytes: int) -> Buffer:
        return self._content[start : start + n_bytes]

    def close(self) -> None:
        pass
