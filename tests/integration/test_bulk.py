"""Bulk bytes between real servers on loopback: what works, and what misbehaving holders can and cannot do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.cache.ring import RingEpoch
from mesh.digests import digest_of
from mesh.ids import Epoch, NodeId
from mesh.transport.bulk import exchange
from mesh.transport.bulk.blobs import KEYS_MAX, Block, Holder, PutVerdict
from mesh.transport.bulk.client import BulkClient, PutRefusal
from mesh.transport.bulk.store import MemorySink
from mesh.transport.bulk.waits import WaitConfig, Waits
from mesh.units import KIB, MIB
from tests.integration.bulk_world import (
    VIEW,
    BulkWorld,
    batch_answer,
    blob_of,
    block_of,
    content_of,
    range_head,
    range_of,
)

SMALL_RANGE = 64 * KIB


@pytest.fixture
def world(tmp_path: Path) -> BulkWorld:
    return BulkWorld(tmp_path)


@pytest.fixture
async def client(world: BulkWorld) -> AsyncIterator[BulkClient]:
    async with BulkClient(world.identity("asker").client_context(), lambda: VIEW) as client:
        yield client


def misses(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [
        record.message
        for record in caplog.records
        if "bulk_miss" in record.message and word in record.message
    ]


# ── blobs ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_blob_comes_from_all_its_holders_at_once(world: BulkWorld, client: BulkClient) -> None:
    content = content_of(1, 3 * MIB + 17)
    heads: dict[str, int] = {}

    async def count(
        head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str
    ) -> None:
        heads[name] = heads.get(name, 0) + 1
        start, stop = range_of(head)
        writer.write(range_head(head, blob_of(content)) + content[start:stop])

    async with (
        world.misbehaving("one", lambda *request: count(*request, "one")) as one,
        world.misbehaving("two", lambda *request: count(*request, "two")) as two,
        world.serving("three", await world.filled("three", [content])) as three,
    ):
        sink = MemorySink(blob_of(content))
        assert await client.fetch(blob_of(content), [one, two, three], sink, range_bytes=SMALL_RANGE)
        assert sink.content == content
        assert heads["one"] > 1 and heads["two"] > 1
        assert sum(heads.values()) < 3 * MIB // SMALL_RANGE + 2  # the third brought some, nothing came twice


@pytest.mark.parametrize("n_bytes", [0, 1, 1000, SMALL_RANGE, 5 * MIB])
async def test_blobs_of_any_size_land_in_a_directory(
    world: BulkWorld, client: BulkClient, n_bytes: int
) -> None:
    content = content_of(2, n_bytes)
    store = world.store("asker")
    async with world.serving("pi", await world.filled("pi", [content])) as pi:
        with store.receiving(blob_of(content)) as sink:
            assert sink is not None
            assert await client.fetch(blob_of(content), [pi], sink)
    reader = await store.open(digest_of(content))
    assert reader is not None
    assert bytes(await reader.read(0, n_bytes + 1)) == content
    reader.close()


async def test_a_cut_connection_is_resumed_where_it_broke(world: BulkWorld, client: BulkClient) -> None:
    content = content_of(3, 1 * MIB)
    asked: list[tuple[int, int]] = []

    async def cut(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, stop = range_of(head)
        asked.append((start, stop))
        half = max(1, (stop - start) // 2) if stop - start > 20_000 else stop - start
        writer.write(range_head(head, blob_of(content)) + content[start : start + half])
        await writer.drain()
        writer.close()

    async with world.misbehaving("pi", cut) as pi:
        sink = MemorySink(blob_of(content))
        assert await client.fetch(blob_of(content), [pi], sink, range_bytes=MIB)
    assert sink.content == content
    assert sum(stop - start for start, stop in asked) < 2.1 * MIB  # 1 + 1/2 + 1/4 …: nothing is asked twice


async def test_a_holder_that_dies_in_mid_blob_is_replaced(
    world: BulkWorld, client: BulkClient, caplog: pytest.LogCaptureFixture
) -> None:
    content = content_of(4, 2 * MIB)
    n_requests = 0

    async def die(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal n_requests
        n_requests += 1
        start, stop = range_of(head)
        writer.write(range_head(head, blob_of(content)) + content[start : (start + stop) // 2])
        await writer.drain()
        writer.transport.abort()

    async with (
        world.misbehaving("mortal", die) as mortal,
        world.serving("pi", await world.filled("pi", [content])) as pi,
    ):
        sink = MemorySink(blob_of(content))
        assert await client.fetch(blob_of(content), [mortal, pi], sink, range_bytes=SMALL_RANGE)
        assert sink.content == content
    assert n_requests and misses(caplog, "mortal")


async def test_a_wrong_digest_is_a_miss_and_another_holder_is_asked(
    world: BulkWorld, client: BulkClient, caplog: pytest.LogCaptureFixture
) -> None:
    content = content_of(5, 1 * MIB)

    async def lie(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, stop = range_of(head)
        writer.write(range_head(head, blob_of(content)) + bytes(stop - start))

    async with (
        world.misbehaving("liar", lie) as liar,
        world.serving("pi", await world.filled("pi", [content])) as pi,
    ):
        for holders in ([liar, pi], [pi, liar]):  # together they make a wrong blob: then each one alone
            sink = MemorySink(blob_of(content))
            assert await client.fetch(blob_of(content), holders, sink, range_bytes=SMALL_RANGE)
            assert sink.content == content
        assert misses(caplog, "wrong digest")
        store = world.store("asker")
        with store.receiving(blob_of(content)) as place:
            assert place is not None
            assert not await client.fetch(blob_of(content), [liar], place)
        assert await store.open(digest_of(content)) is None
        assert store.n_bytes == 0


@pytest.mark.parametrize("too_many", [1, 10**12])
async def test_a_holder_that_sends_more_than_was_asked_is_not_believed(
    world: BulkWorld, client: BulkClient, caplog: pytest.LogCaptureFixture, too_many: int
) -> None:
    content = content_of(6, 256 * KIB)

    async def pour(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, stop = range_of(head)
        n_bytes = stop - start + (too_many if too_many > 1 else 0)  # announced, or simply sent
        writer.write(
            range_head(head, blob_of(content), n_bytes) + content[start:stop] + b"!" * min(too_many, MIB)
        )

    async with (
        world.misbehaving("hose", pour) as hose,
        world.serving("pi", await world.filled("pi", [content])) as pi,
    ):
        sink = MemorySink(blob_of(content))
        assert await client.fetch(blob_of(content), [hose, pi], sink, range_bytes=SMALL_RANGE)
        assert sink.content == content


async def test_a_truncated_range_is_a_miss(
    world: BulkWorld, client: BulkClient, caplog: pytest.LogCaptureFixture
) -> None:
    content = content_of(7, 256 * KIB)

    async def shorten(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, stop = range_of(head)
        n_bytes = (stop - start) // 2
        writer.write(range_head(head, blob_of(content), n_bytes) + content[start : start + n_bytes])

    async with world.misbehaving("short", shorten) as short:
        assert not await client.fetch(blob_of(content), [short], MemorySink(blob_of(content)))
    assert misses(caplog, "short")


async def test_a_holder_that_drips_is_given_up_and_costs_a_bounded_wait(
    world: BulkWorld, client: BulkClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(8, 1 * MIB)

    async def drip(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start, stop = range_of(head)
        writer.write(range_head(head, blob_of(content)))
        for place in range(start, stop):
            writer.write(content[place : place + 1])
            await writer.drain()
            await asyncio.sleep(0.02)

    async def say_nothing(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    for misbehave in (drip, say_nothing):
        async with world.misbehaving("sloth", misbehave) as sloth:
            with monkeypatch.context() as patient:
                patient.setattr(exchange, "PACE_WINDOW_S", 0.1)
                patient.setattr(exchange, "SILENCE_S", 0.3)
                began = time.monotonic()
                assert not await client.fetch(blob_of(content), [sloth], MemorySink(blob_of(content)))
                assert time.monotonic() - began < 15
            store = await world.filled("pi", [content])
            async with world.serving("pi", store) as pi:
                sink = MemorySink(blob_of(content))
                assert await client.fetch(blob_of(content), [sloth, pi], sink, range_bytes=SMALL_RANGE)
                assert sink.content == content


async def test_a_blob_nobody_has_is_a_miss(
    world: BulkWorld, client: BulkClient, caplog: pytest.LogCaptureFixture
) -> None:
    blob = blob_of(b"never stored")
    nobody = Holder(NodeId("nobody"), "127.0.0.1", 1)
    async with world.serving("pi", world.store("pi")) as pi:
        assert not await client.fetch(blob, [pi, nobody], MemorySink(blob))
        assert not await client.fetch(blob, [], MemorySink(blob))
    assert misses(caplog, "holder=pi") and misses(caplog, "holder=nobody")


async def test_a_full_disk_is_a_miss_and_leaves_nothing_behind(
    world: BulkWorld, client: BulkClient, tmp_path: Path
) -> None:
    content = content_of(9, 256 * KIB)
    store = world.store("small", quota_bytes=100 * KIB)
    with store.receiving(blob_of(content)) as sink:
        assert sink is None
    lying_about_room = world.store("asker")
    async with world.serving("pi", await world.filled("pi", [content])) as pi:
        with lying_about_room.receiving(blob_of(content)) as sink:
            assert sink is not None
            full = _FullAfter(sink, n_writes=2)
            assert not await client.fetch(blob_of(content), [pi], full, range_bytes=SMALL_RANGE)
    assert lying_about_room.n_bytes == 0
    assert not list((tmp_path / "asker-store" / "scratch").iterdir())


class _FullAfter:
    """The disk fills while a blob arrives: the write that does not fit says so, as ``FileSink`` does."""

    def __init__(self, sink: object, n_writes: int) -> None:
        self._sink, self._n_left = sink, n_writes

    async def write(self, start: int, content: object) -> bool:
        self._n_left -= 1
        return self._n_left >= 0 and await self._sink.write(start, content)  # type: ignore[attr-defined]

    async def is_right(self) -> bool:
        raise AssertionError("half a blob is not checked")


# ── blocks ──────────────────────────────────────────────────────────────────────────────────────────


async def test_many_blocks_come_in_few_requests_and_missing_ones_are_said_so(
    world: BulkWorld, client: BulkClient
) -> None:
    blocks = [block_of(seed, 10_000 + seed) for seed in range(300)]
    absent = [content_of(seed, 32) for seed in range(5000, 5010)]
    async with world.serving("pi", await world.filled("pi", blocks=blocks)) as pi:
        keys = [block.key for block in blocks]
        found = await client.read_blocks([*absent[:5], *keys, *absent[5:]], [pi])
        assert set(found) == set(keys)
        assert all(found[block.key].payload == block.payload for block in blocks)
        assert await client.read_blocks(absent, [pi]) == {}
        assert await client.read_blocks([], [pi]) == {}


async def test_more_keys_than_one_batch_may_hold_are_asked_for_in_several(
    world: BulkWorld, client: BulkClient
) -> None:
    blocks = [block_of(seed, 8) for seed in range(KEYS_MAX + 100)]
    async with world.serving("pi", await world.filled("pi", blocks=blocks)) as pi:
        assert len(await client.read_blocks([block.key for block in blocks], [pi], within_s=20)) == len(
            blocks
        )


async def test_a_block_larger_than_the_batch_still_comes(world: BulkWorld, client: BulkClient) -> None:
    blocks = [block_of(1, 3 * MIB), block_of(2, 100)]
    async with world.serving("pi", await world.filled("pi", blocks=blocks)) as pi:
        found = await client.read_blocks([block.key for block in blocks], [pi], bytes_max=64 * KIB)
        assert len(found) == 2


async def test_what_the_owner_lacks_comes_from_the_replica(world: BulkWorld, client: BulkClient) -> None:
    one, two = block_of(1, 5000), block_of(2, 5000)
    async with (
        world.serving("owner", await world.filled("owner", blocks=[one])) as owner,
        world.serving("replica", await world.filled("replica", blocks=[one, two])) as replica,
    ):
        assert set(await client.read_blocks([one.key, two.key], [owner, replica])) == {one.key, two.key}


async def test_a_dead_or_silent_owner_costs_a_bounded_wait_and_then_the_replica_answers(
    world: BulkWorld, caplog: pytest.LogCaptureFixture
) -> None:
    block = block_of(1, 5000)
    waits = Waits(WaitConfig(start_s=0.2))

    async def say_nothing(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with (
        BulkClient(world.identity("asker").client_context(), lambda: VIEW, waits=waits) as client,
        world.misbehaving("silent", say_nothing) as silent,
        world.serving("replica", await world.filled("replica", blocks=[block])) as replica,
    ):
        for owner in (silent, Holder(NodeId("dead"), "127.0.0.1", 1)):
            began = time.monotonic()
            assert block.key in await client.read_blocks([block.key], [owner, replica])
            assert time.monotonic() - began < 1.5
        began = time.monotonic()
        assert await client.read_blocks([block.key], [silent], within_s=0.3) == {}
        assert time.monotonic() - began < 1.5
        assert misses(caplog, "holder=silent") and misses(caplog, "holder=dead")


async def test_an_owner_that_stops_in_mid_answer_is_hedged_too(world: BulkWorld) -> None:
    block = block_of(1, 500_000)

    async def stop(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(batch_answer([block])[:100_000])
        await writer.drain()
        await asyncio.Event().wait()

    async with (
        BulkClient(world.identity("asker").client_context(), lambda: VIEW) as client,
        world.misbehaving("sleepy", stop) as sleepy,
        world.serving("replica", await world.filled("replica", blocks=[block])) as replica,
    ):
        began = time.monotonic()
        assert block.key in await client.read_blocks([block.key], [sleepy, replica])
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("how", ["payload", "digest", "row", "garbage", "length"])
async def test_a_wrong_block_is_a_miss_and_the_replica_is_asked(
    world: BulkWorld, client: BulkClient, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    block, other = block_of(1, 5000), block_of(2, 5000)

    async def lie(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = bytearray(batch_answer([block]))
        match how:
            case "payload":
                answer[-1] ^= 1
            case "digest":  # right in itself, and not what the asker knows it should be
                answer[:] = batch_answer([Block(block.key, other.digest, other.payload)])
            case "row":
                answer[answer.index(b"\r\n\r\n") + 4] = 9
            case "garbage":
                answer[:] = bytes(range(256)) * 40
            case "length":
                answer[:] = answer.replace(b"Content-Length: 50", b"Content-Length: 49")
        writer.write(answer)

    async with (
        world.misbehaving("liar", lie) as liar,
        world.serving("replica", await world.filled("replica", blocks=[block])) as replica,
    ):
        found = await client.read_blocks([block.key], [liar, replica], expect={block.key: block.digest})
        assert found[block.key].payload == block.payload
        assert misses(caplog, "liar")
        assert await client.read_blocks([block.key], [liar], expect={block.key: block.digest}) == {}


async def test_batches_come_in_order_and_not_faster_than_they_are_used(
    world: BulkWorld, client: BulkClient
) -> None:
    blocks = [block_of(seed, 10_000) for seed in range(40)]
    batches = [[block.key for block in blocks[start : start + 4]] for start in range(0, 40, 4)]
    batches[3] = [content_of(9999, 32)]
    n_asked = 0
    store = await world.filled("pi", blocks=blocks)

    class Counted(type(store)):  # type: ignore[misc]
        async def get_many(self, keys: list[bytes], bytes_max: int) -> list[Block | int | None]:
            nonlocal n_asked
            n_asked += 1
            return await super().get_many(keys, bytes_max)

    store.__class__ = Counted
    async with world.serving("pi", store) as pi:
        got: list[list[Block | None]] = []
        async for batch in client.read_in_order(batches, [pi], ahead=2):
            got.append(batch)
            assert n_asked <= len(got) + 2
        assert got[3] == [None]
        keys = [[block.key if block else None for block in batch] for batch in got]
        assert keys[:3] + keys[4:] == batches[:3] + batches[4:]


# ── puts ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_peer_stores_blocks_here_and_learns_what_became_of_each(
    world: BulkWorld, client: BulkClient
) -> None:
    blocks = [block_of(seed, 50_000) for seed in range(8)]
    wrong = Block(blocks[7].key, blocks[0].digest, blocks[7].payload)
    store = world.store("pi", quota_bytes=450_000)
    async with world.serving("pi", store) as pi:
        assert await client.put_blocks(blocks[:2], pi) == [PutVerdict.STORED] * 2
        assert await client.put_blocks([blocks[1], blocks[2], wrong], pi) == [
            PutVerdict.HELD, PutVerdict.STORED, PutVerdict.WRONG_DIGEST,
        ]  # fmt: skip
        assert set(await client.read_blocks([block.key for block in blocks], [pi])) == {
            block.key for block in blocks[:3]
        }
        refusal = await client.put_blocks([block_of(99, 400_000)], pi)
        assert isinstance(refusal, PutRefusal) and refusal.status == 507 and "room" in refusal.reason
        assert await client.put_blocks(blocks[3:7], pi) == [PutVerdict.STORED] * 4
    assert store.n_bytes == 7 * 50_032


async def test_a_put_for_an_old_view_is_refused_and_both_sides_learn(world: BulkWorld) -> None:
    newer, older = RingEpoch(Epoch(4, NodeId("pi")), 8), VIEW
    learnt: list[tuple[RingEpoch, str]] = []
    block = block_of(1, 1000)

    def learn(view: RingEpoch, peer: NodeId) -> None:
        learnt.append((view, peer))

    store = await world.filled("pi", blocks=[block])
    async with (
        BulkClient(world.identity("asker").client_context(), lambda: older, on_view=learn) as client,
        world.serving("pi", store, view=lambda: newer, on_view=learn) as pi,
    ):
        refusal = await client.put_blocks([block_of(2, 1000)], pi)
        assert isinstance(refusal, PutRefusal) and refusal.status == 409 and str(newer) in refusal.reason
        assert block.key in await client.read_blocks(
            [block.key], [pi]
        )  # what has a digest is right in any view
    assert learnt == [(older, "asker"), (newer, "pi")] * 2
