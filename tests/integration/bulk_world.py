"""Nodes that serve blobs and blocks on loopback, with real certificates, and peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from mesh.cache.ring import RingEpoch
from mesh.digests import digest_of
from mesh.ids import Boot, Epoch, NodeId
from mesh.messages import PeerHello
from mesh.transport.bulk.blobs import BlobRef, Block, Holder, PutVerdict
from mesh.transport.bulk.budget import Budget
from mesh.transport.bulk.frames import BlockStatus, Row, encode_rows
from mesh.transport.bulk.server import BulkServer
from mesh.transport.bulk.store import BlobStore
from mesh.transport.identity import Identity, MeshKey, issue
from mesh.transport.streams import PeerServer
from mesh.units import MIB
from tests.integration.directory_store import DirectoryStore

VIEW = RingEpoch(Epoch(3, NodeId("pi")), 7)
KEY = MeshKey.create("home", bytes(range(32)))

Misbehaviour = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Called per request with its head."""


def content_of(seed: int, n_bytes: int) -> bytes:
    return random.Random(seed).randbytes(n_bytes)


def blob_of(content: bytes) -> BlobRef:
    return BlobRef(digest_of(content), len(content))


def block_of(seed: int, n_bytes: int) -> Block:
    payload = content_of(seed, n_bytes)
    return Block(content_of(~seed & 0xFFFF, 32), digest_of(payload), payload)


class BulkWorld:
    """Certificates and directories of one mesh below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def identity(self, name: str) -> Identity:
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        return issue(KEY, name, directory)

    def store(self, name: str, quota_bytes: int = 256 * MIB) -> DirectoryStore:
        return DirectoryStore(self.directory / f"{name}-store", quota_bytes, free_bytes_left=0)

    async def filled(
        self, name: str, blobs: Iterable[bytes] = (), blocks: Iterable[Block] = ()
    ) -> DirectoryStore:
        store = self.store(name)
        for content in blobs:
            with store.receiving(blob_of(content)) as sink:
                assert sink is not None and await sink.write(0, content) and await sink.is_right()
        assert PutVerdict.NO_ROOM not in await store.put(list(blocks))
        return store

    @contextlib.asynccontextmanager
    async def serving(
        self,
        name: str,
        store: BlobStore,
        *,
        view: Callable[[], RingEpoch] = lambda: VIEW,
        on_view: Callable[[RingEpoch, NodeId], None] = lambda view, peer: None,
        budget: Budget | None = None,
    ) -> AsyncIterator[Holder]:
        bulk = BulkServer(store, view, on_view=on_view, budget=budget)
        server = PeerServer(
            self.identity(name).server_context(), lambda: hello_of(name), hosts=("127.0.0.1",), port=0,
            routes=bulk.routes(),
        )  # fmt: skip
        async with server:
            yield Holder(NodeId(name), "127.0.0.1", server.port)

    @contextlib.asynccontextmanager
    async def misbehaving(self, name: str, misbehave: Misbehaviour) -> AsyncIterator[Holder]:
        """A member with a good certificate and a program of its own."""
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = re.search(rb"Content-Length: (\d+)", head)
                    head += await reader.readexactly(int(length[1]) if length else 0)
                    await misbehave(head, reader, writer)
                    await writer.drain()

        context = self.identity(name).server_context()
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        try:
            yield Holder(NodeId(name), "127.0.0.1", server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def get_blob(content: bytes, more: str = "") -> bytes:
    """A whole request, for askers with a program of their own."""
    name = digest_of(content).hex()
    return f"GET /blob/{name} HTTP/1.1\r\nHost: pi\r\nEdgemesh-View: {VIEW}\r\n{more}\r\n".encode()


def post(path: str, n_bytes: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: pi\r\nEdgemesh-View: {VIEW}\r\n"
    return f"{head}Content-Length: {n_bytes}\r\n\r\n".encode()


def range_of(head: bytes) -> tuple[int, int]:
    match = re.search(rb"Range: bytes=(\d+)-(\d+)", head)
    assert match is not None
    return int(match[1]), int(match[2]) + 1


def range_head(head: bytes, blob: BlobRef, n_bytes: int | None = None, view: RingEpoch = VIEW) -> bytes:
    """What an honest holder would say before the bytes; ``n_bytes`` = what it announces instead."""
    start, stop = range_of(head)
    return (
        f'HTTP/1.1 206 Partial Content\r\nEdgemesh-View: {view}\r\nETag: "{blob.digest.hex()}"\r\n'
        f"Content-Range: bytes {start}-{stop - 1}/{blob.size}\r\n"
        f"Content-Length: {stop - start if n_bytes is None else n_bytes}\r\n\r\n"
    ).encode()


def batch_answer(blocks: Iterable[Block], view: RingEpoch = VIEW) -> bytes:
    blocks = list(blocks)
    rows = [Row(BlockStatus.FOUND, len(block.payload), block.digest) for block in blocks]
    body = encode_rows(rows) + b"".join(block.payload for block in blocks)
    return f"HTTP/1.1 200 OK\r\nEdgemesh-View: {view}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def hello_of(node: str) -> PeerHello:
    return PeerHello(
        node=NodeId(node), boot=Boot("b1"), incarnation=3, mesh="home", port=1, addresses=["127.0.0.1"],
        broker_epoch=2, broker_host=NodeId("pi"), broker_addresses=["127.0.0.1"], broker_port=8883,
        broker_connected=True, peers={},
    )  # fmt: skip
