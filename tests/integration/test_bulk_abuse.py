"""Who may ask for bulk bytes, how much is held for them, and what nonsense gets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from mesh.ids import NodeId
from mesh.transport.bulk import server
from mesh.transport.bulk.blobs import KEYS_MAX, Holder
from mesh.transport.bulk.budget import Budget, BudgetConfig
from mesh.transport.bulk.client import BulkClient, PutRefusal
from mesh.transport.identity import MeshKey, issue, issue_client
from mesh.units import MIB
from tests.integration.bulk_world import (
    KEY,
    VIEW,
    BulkWorld,
    block_of,
    content_of,
    get_blob,
    post,
)


@pytest.fixture
def world(tmp_path: Path) -> BulkWorld:
    return BulkWorld(tmp_path)


@pytest.fixture
async def client(world: BulkWorld) -> AsyncIterator[BulkClient]:
    async with BulkClient(world.identity("asker").client_context(), lambda: VIEW) as client:
        yield client


# ── who may ask, and how much is held for them ──────────────────────────────────────────────────────


async def test_strangers_and_clients_get_nothing(world: BulkWorld, tmp_path: Path) -> None:
    block = block_of(1, 1000)
    other = tmp_path / "other"
    other.mkdir()
    store = await world.filled("pi", blocks=[block])
    async with world.serving("pi", store) as pi:
        for identity in (
            issue(MeshKey.create("home", bytes(32)), "asker", other),
            issue_client(KEY, "shell", tmp_path),
        ):
            async with BulkClient(identity.client_context(), lambda: VIEW) as client:
                assert await client.read_blocks([block.key], [pi]) == {}
                assert isinstance(await client.put_blocks([block_of(2, 10)], pi), PutRefusal)
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
        async with BulkClient(bare, lambda: VIEW) as client:
            assert await client.read_blocks([block.key], [pi]) == {}


async def test_who_took_over_an_address_is_not_taken_for_its_former_owner(
    world: BulkWorld, client: BulkClient
) -> None:
    block = block_of(1, 1000)
    async with world.serving("jetson", await world.filled("jetson", blocks=[block])) as jetson:
        assert (
            await client.read_blocks([block.key], [Holder(NodeId("pi"), jetson.address, jetson.port)]) == {}
        )


async def test_readers_that_stand_still_make_the_server_hold_a_bounded_amount(
    world: BulkWorld, client: BulkClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(1, 16 * MIB)
    block = block_of(1, 1000)
    budget = Budget(BudgetConfig(bytes_max=16 * MIB, peer_bytes_max=9 * MIB, wait_s=0.05))
    transports: list[asyncio.Transport] = []
    send = server._send

    async def watched(response: web.StreamResponse, content: bytes) -> None:
        assert response._req is not None and response._req.transport is not None
        transports.append(response._req.transport)
        await send(response, content)

    monkeypatch.setattr(server, "_send", watched)
    store = await world.filled("pi", [content], [block])
    async with world.serving("pi", store, budget=budget) as pi:
        context = world.identity("sloth").client_context()
        readers = []
        for _ in range(12):
            reader, writer = await asyncio.open_connection("127.0.0.1", pi.port, ssl=context, limit=1024)
            writer.write(get_blob(content))
            head = await reader.readuntil(b"\r\n\r\n")
            readers.append((head.split()[1], writer))
        statuses = [status for status, _ in readers]
        assert (statuses.count(b"200"), statuses.count(b"503")) == (5, 7)  # its share, whatever it asks for
        assert budget.bytes_peak <= 9 * MIB
        assert block.key in await client.read_blocks([block.key], [pi])  # the others do not notice
        buffered = sum(transport.get_write_buffer_size() for transport in set(transports))
        assert 0 < buffered <= budget.n_bytes  # what is counted is what is held
        for _, writer in readers:
            writer.transport.abort()
        async with asyncio.timeout(10):
            while budget.n_bytes:  # noqa: ASYNC110 - a count, not an event
                await asyncio.sleep(0.01)


async def test_a_reader_that_stands_still_is_cut_off(
    world: BulkWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PIECE_TIMEOUT_S", 0.3)
    content = content_of(1, 16 * MIB)
    budget = Budget()
    async with world.serving("pi", await world.filled("pi", [content]), budget=budget) as pi:
        context = world.identity("sloth").client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", pi.port, ssl=context, limit=1024)
        writer.write(get_blob(content))
        await reader.readuntil(b"\r\n\r\n")
        assert budget.n_bytes > 0
        async with asyncio.timeout(10):
            while budget.n_bytes:  # noqa: ASYNC110 - a count, not an event
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_an_upload_that_drips_is_cut_off(world: BulkWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PIECE_TIMEOUT_S", 0.3)
    budget = Budget()
    async with world.serving("pi", world.store("pi"), budget=budget) as pi:
        context = world.identity("sloth").client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", pi.port, ssl=context)
        writer.write(post("/blocks/put", 5000))
        ended = asyncio.create_task(reader.read())
        async with asyncio.timeout(10):
            while not ended.done():
                writer.write(b"\0\x01" if not budget.bytes_peak else b"\0")
                await asyncio.wait([ended], timeout=0.05)
        assert budget.n_bytes == 0 and budget.bytes_peak == 5000
        writer.transport.abort()
        await asyncio.gather(ended, return_exceptions=True)


@pytest.mark.parametrize(
    ("request_line", "body", "status"),
    [
        ("GET /blob/../../etc/passwd", b"", b"404"),
        ("GET /blob/%2e%2e%2f%2e%2e%2fetc%2fpasswd", b"", b"400"),
        ("GET /blob/" + "A" * 64, b"", b"400"),
        ("GET /blob/" + "ab" * 32, b"", b"404"),
        ("POST /blocks/get?bytes_max=99999999999", b"k" * 32, b"400"),
        ("POST /blocks/get?bytes_max=1000", b"k" * 31, b"400"),
        ("POST /blocks/get?bytes_max=1000", b"k" * 32 * (KEYS_MAX + 1), b"400"),
        ("POST /blocks/put", b"\xff\xff" + b"k" * 400, b"400"),
        ("POST /blocks/put", b"\0\x01" + b"k" * 64 + b"\xff\xff\xff\xff", b"400"),
        ("POST /blocks/put", b"\0\x02" + b"k" * 68, b"400"),
    ],
)
async def test_nonsense_is_refused_in_words(
    world: BulkWorld, request_line: str, body: bytes, status: bytes
) -> None:
    async with world.serving("pi", world.store("pi")) as pi:
        context = world.identity("vandal").client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", pi.port, ssl=context)
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        writer.write(
            f"{request_line} HTTP/1.1\r\nHost: pi\r\nEdgemesh-View: {VIEW}\r\n{length}\r\n".encode() + body
        )
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split()[1] == status
        writer.transport.abort()


@pytest.mark.parametrize(
    "wanted", ["bytes=0-16777216", "bytes=5-4", "bytes=100-200", "bytes=-5", "bytes=0-1,3-4", "x"]
)
async def test_a_range_outside_the_blob_or_the_bound_is_refused(world: BulkWorld, wanted: str) -> None:
    content = content_of(1, 100)
    async with world.serving("pi", await world.filled("pi", [content])) as pi:
        context = world.identity("vandal").client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", pi.port, ssl=context)
        writer.write(get_blob(content, f"Range: {wanted}\r\n"))
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split()[1] == b"416"
        writer.transport.abort()
