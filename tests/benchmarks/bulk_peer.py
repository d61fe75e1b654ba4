"""One end of a bulk transfer as a process of its own, for ``dataplane``; it speaks in JSON lines.

python -m tests.benchmarks.bulk_peer serve|serve-files|serve-raw DIRECTORY ADDRESS
python -m tests.benchmarks.bulk_peer read|read-raw DIRECTORY ADDRESS PORT N_BATCHES
python -m tests.benchmarks.bulk_peer read-small DIRECTORY ADDRESS PORT
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesh.ids import NodeId
from mesh.transport.bulk.blobs import Block, Holder, PutVerdict
from mesh.transport.bulk.client import BulkClient
from mesh.transport.bulk.server import BulkServer
from mesh.transport.streams import PeerServer
from mesh.units import KIB, MIB
from node.cache.share import Share
from tests.integration.bulk_world import VIEW, BulkWorld, block_of, hello_of

BLOCK_BYTES = 128 * KIB  # 64 tokens of a hidden state of 512 floats
BLOCKS_PER_BATCH = 8
BATCH_BYTES = BLOCK_BYTES * BLOCKS_PER_BATCH
N_BLOCKS = 64
RAW_CHUNK_BYTES = 256 * KIB
N_SMALL = 200


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system


class MemoryStore:
    """Blocks as a node's memory tier holds them; the raw copy is from memory, too."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = {block.key: block for block in blocks}

    async def open(self, digest: bytes) -> None:
        return None

    async def get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        return [self._blocks.get(key) for key in keys]

    def has_room(self, n_bytes: int) -> bool:
        return False

    async def put(self, blocks: Sequence[Block]) -> list[PutVerdict]:
        return [PutVerdict.NO_ROOM] * len(blocks)


async def share_of(blocks: Sequence[Block], directory: Path) -> Share:
    """As a node keeps them on disk: in packs."""
    await asyncio.to_thread(directory.mkdir, exist_ok=True)
    share = Share(directory, 64 * MIB)
    assert PutVerdict.NO_ROOM not in await share.put(blocks)
    await share.flush()
    return share


async def serve(world: BulkWorld, address: str, *, from_files: bool) -> None:
    blocks = [block_of(seed, BLOCK_BYTES) for seed in range(N_BLOCKS)] + [block_of(N_BLOCKS, 1 * KIB)]
    store = await share_of(blocks, world.directory / "share") if from_files else MemoryStore(blocks)
    bulk = BulkServer(store, lambda: VIEW)
    context = world.identity("pi").server_context()
    async with PeerServer(
        context, lambda: hello_of("pi"), hosts=(address,), port=0, routes=bulk.routes()
    ) as server:
        say(port=server.port)
        while await asyncio.to_thread(sys.stdin.readline):
            say(cpu_s=cpu_s(), bytes_peak=bulk.budget.bytes_peak)
        await asyncio.Event().wait()  # nobody to ask: until it is killed


def serve_raw(world: BulkWorld, address: str) -> None:
    """What a TLS socket can do: asked with a byte, it sends a batch from memory."""
    context = world.identity("pi").server_context()
    content = memoryview(os.urandom(BATCH_BYTES))
    with socket.create_server((address, 0)) as listener:
        say(port=listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began_s = cpu_s()
            with context.wrap_socket(connection, server_side=True) as stream:
                while batches := stream.recv(1):
                    for _ in batches:
                        for start in range(0, BATCH_BYTES, RAW_CHUNK_BYTES):
                            stream.sendall(content[start : start + RAW_CHUNK_BYTES])
            say(cpu_s=cpu_s() - began_s)


async def read(world: BulkWorld, address: str, port: int, n_batches: int) -> None:
    keys = [block_of(seed, 0).key for seed in range(N_BLOCKS)]
    each = [keys[start : start + BLOCKS_PER_BATCH] for start in range(0, N_BLOCKS, BLOCKS_PER_BATCH)]
    batches = [each[k % len(each)] for k in range(n_batches)]
    owner = Holder(NodeId("pi"), address, port)
    async with BulkClient(world.identity("asker").client_context(), lambda: VIEW) as client:
        async for _ in client.read_in_order(each[:3], [owner], bytes_max=BATCH_BYTES, within_s=30):
            pass  # connections are made and waits learned
        cpu_before_s, began = cpu_s(), time.perf_counter()
        n_missed = 0
        async for batch in client.read_in_order(batches, [owner], bytes_max=BATCH_BYTES, within_s=30):
            n_missed += batch.count(None)
        wall_s = time.perf_counter() - began
        used_s = cpu_s() - cpu_before_s
        say(wall_s=wall_s, cpu_s=used_s, n_bytes=n_batches * BATCH_BYTES, n_missed=n_missed)


async def read_small(world: BulkWorld, address: str, port: int) -> None:
    owner = Holder(NodeId("pi"), address, port)
    key = block_of(N_BLOCKS, 0).key
    n_missed, lengths_s = 0, []
    async with BulkClient(world.identity("asker").client_context(), lambda: VIEW) as client:
        for _ in range(N_SMALL):
            asked = time.perf_counter()
            n_missed += not await client.read_blocks([key], [owner])
            lengths_s.append(time.perf_counter() - asked)
    say(n_missed=n_missed, p50_ms=1000 * sorted(lengths_s)[N_SMALL // 2])


def read_raw(world: BulkWorld, address: str, port: int, n_batches: int) -> None:
    context: ssl.SSLContext = world.identity("asker").client_context()
    place = memoryview(bytearray(BATCH_BYTES))
    with context.wrap_socket(socket.create_connection((address, port))) as stream:
        for k in range(n_batches + 3):
            if k == 3:
                cpu_before_s, began = cpu_s(), time.perf_counter()
            # As many batches are asked for ahead as the other side asks for.
            if k <= n_batches:
                stream.sendall(b"+" if k else b"+++")
            n_bytes = 0
            while n_bytes < BATCH_BYTES:
                n_bytes += stream.recv_into(place[n_bytes:])
        say(
            wall_s=time.perf_counter() - began,
            cpu_s=cpu_s() - cpu_before_s,
            n_bytes=n_batches * BATCH_BYTES,
            n_missed=0,
        )


def main(role: str, directory: str, address: str, *numbers: str) -> None:
    world = BulkWorld(Path(directory))
    if role in ("serve", "serve-files"):
        asyncio.run(serve(world, address, from_files=role == "serve-files"))
    elif role == "serve-raw":
        serve_raw(world, address)
    elif role == "read-small":
        asyncio.run(read_small(world, address, *map(int, numbers)))
    elif role == "read":
        asyncio.run(read(world, address, *map(int, numbers)))
    else:
        read_raw(world, address, *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
