"""What a node serves in bulk, as the data plane sees it: ``directory`` is one, the node's cache another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from mesh.digests import Buffer, digest_of
from mesh.transport.bulk.blobs import BlobRef, Block, PutVerdict

__all__ = ["BlobReader", "BlobSink", "BlobStore", "MemorySink"]


class BlobReader(Protocol):
    """An open blob: its bytes stay readable until ``close``, also when it is removed meanwhile."""

    @property
    def size(self) -> int: ...

    async def read(self, start: int, n_bytes: int) -> Buffer:
        """Up to ``n_bytes`` from ``start``; fewer only at the end. An ``OSError`` ends the answer there."""

    def close(self) -> None: ...


class BlobStore(Protocol):
    """All of it may be called by many requests at once. Nothing is raised for what is not there."""

    async def open(self, digest: bytes) -> BlobReader | None: ...

    async def get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        """One answer per key, in order: the block; ``None`` if it is not here; its size if it is here and no
        longer fits into the ``bytes_max`` of all payloads."""

    def has_room(self, n_bytes: int) -> bool:
        """A guess before they are sent; ``put`` decides."""

    async def put(self, blocks: Sequence[Block]) -> list[PutVerdict]:
        """Keep what a peer sent, as far as there is room. Digests are checked before."""


class BlobSink(Protocol):
    """Where an arriving blob goes. Spans of it come in any order, each byte at least once."""

    async def write(self, start: int, content: Buffer) -> bool:
        """Whether it was written; ``False`` = no room (any more), which ends the transfer."""

    async def is_right(self) -> bool:
        """Whether all that was written has the digest. A sink that says no may be written again."""


class MemorySink:
    """For blobs that are used at once and fit: adapters, manifests."""

    def __init__(self, blob: BlobRef) -> None:
        self._blob = blob
        self.content = bytearray(blob.size)

    async def write(self, start: int, content: Buffer) -> bool:
        self.content[start : start + len(content)] = content
        return True

    async def is_right(self) -> bool:
        return await asyncio.to_thread(digest_of, self.content) == self._blob.digest
