"""The mesh as one memory: what one node has, others read; whatever goes wrong is a miss and a log line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mesh.cache import catalogue
from mesh.transport.bulk.blobs import Block
from mesh.transport.bulk.client import PutRefusal
from node.cache import assembly, rounds
from tests.integration.bulk_world import BulkWorld, batch_answer
from tests.integration.cache_nodes import BLOCK_BYTES, CacheMesh, some_blocks, soon

QUOTA = 4_000_000
THREE = {"a": QUOTA, "b": QUOTA, "c": QUOTA}


def keys_of(blocks: Sequence[Block]) -> list[bytes]:
    return [block.key for block in blocks]


async def test_what_one_node_computed_goes_to_its_owners_and_a_third_reads_it_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, absent = some_blocks(0, 300), some_blocks(5000, 20)
    async with CacheMesh(tmp_path, {**THREE, "reader": 0}, monkeypatch) as mesh:
        mesh["a"].write(written)
        await mesh.twice(written)
        assert set(mesh.copies(written).values()) <= {2, 3} and not mesh["reader"].holds(written)
        reader = mesh["reader"]
        asked = [*written[:150], *absent, *written[150:]]
        assert reader.cache.reads.claimed(keys_of(written)) == [True] * 300
        answers = await reader.read(asked)
        assert [answer is not None for answer in answers] == [True] * 150 + [False] * 20 + [True] * 150
        stats = reader.cache.reads.stats
        assert (stats.peers.hits, stats.peers.n_bytes) == (300, 300 * BLOCK_BYTES) and stats.saved_s > 0
        assert 0 < reader.cache.reads.expected_s(10**6) < 5


async def test_a_key_that_nobody_claims_costs_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with CacheMesh(tmp_path, THREE, monkeypatch) as mesh:

        async def read_blocks(*asked: object, **more: object) -> dict[bytes, Block]:
            raise AssertionError("nobody said that it has that")

        monkeypatch.setattr(mesh["a"].cache.client, "read_blocks", read_blocks)
        blocks = some_blocks(0, 50)
        assert mesh["a"].cache.reads.claimed(keys_of(blocks)) == [False] * 50
        assert await mesh["a"].read(blocks) == [None] * 50


async def test_one_of_four_dies_and_nothing_is_lost_and_everything_lies_twice_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = some_blocks(0, 400)
    async with CacheMesh(tmp_path, {**THREE, "d": QUOTA}, monkeypatch) as mesh:
        mesh["a"].write(blocks[:200])
        mesh["b"].write(blocks[200:])
        await mesh.twice(blocks)
        await mesh.kill("b")
        for name in ("a", "c", "d"):
            mine = mesh[name].holds(blocks)
            others = [block for block in blocks if block.key not in mine]
            assert None not in await mesh[name].read(others), "readable at once, before anything is repaired"
        await mesh.agreed()
        await mesh.twice(blocks)


async def test_a_newcomer_gets_its_arcs_and_reads_before_they_have_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = some_blocks(0, 200)
    async with CacheMesh(tmp_path, {"a": QUOTA, "b": QUOTA}, monkeypatch) as mesh:
        mesh["a"].write(blocks)
        await mesh.twice(blocks)
        newcomer = await mesh.join("c", QUOTA)
        await soon(lambda: all(newcomer.cache.reads.claimed(keys_of(blocks))), "catalogues at the newcomer")
        assert None not in await newcomer.read(blocks)
        await mesh.agreed()
        await mesh.twice(blocks)
        view = newcomer.core.ring.view
        assert view is not None
        owned = {block.key for block in blocks if newcomer.name in view.owners(block.key)}
        assert owned and owned <= newcomer.holds(blocks)


async def test_what_comes_to_an_owner_that_lacked_it_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = some_blocks(0, 60)
    async with CacheMesh(tmp_path, {"a": QUOTA, "b": QUOTA}, monkeypatch) as mesh:
        monkeypatch.setattr(mesh["a"].cache.client, "put_blocks", lambda *more: asyncio.Event().wait())
        mesh["a"].write(blocks)
        await soon(lambda: all(mesh["b"].cache.reads.claimed(keys_of(blocks))), "the catalogue")
        assert None not in await mesh["b"].read(blocks)
        await soon(lambda: len(mesh["b"].holds(blocks)) == 60, "the pull-through")


async def test_a_pack_that_is_removed_is_unlisted_at_once_and_lies_twice_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = some_blocks(0, 100)
    async with CacheMesh(tmp_path, {"a": QUOTA, "b": QUOTA}, monkeypatch) as mesh:
        mesh["a"].write(blocks)
        await mesh.twice(blocks)
        await soon(lambda: mesh["b"].cache.share.n_blocks == 100, "all of it in packs")
        client = mesh["a"].cache.client
        with monkeypatch.context() as patch:  # the repair would be quicker than we look

            async def refused(*more: object) -> PutRefusal:
                return PutRefusal("not now", 503)

            patch.setattr(client, "put_blocks", refused)
            for pack in list_packs(mesh["b"].directory):
                pack.unlink()
            await soon(lambda: not any(mesh["a"].cache.reads.claimed(keys_of(blocks))), "the news")
        await mesh.twice(blocks)


async def test_a_filter_that_claims_wrongly_keeps_no_block_from_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key in a hundred: nobody would send it, and one death would lose it."""
    blocks = some_blocks(0, 60)
    has = catalogue._Peer.has
    wrong = {block.key for block in blocks[::6]}
    monkeypatch.setattr(catalogue._Peer, "has", lambda peer, key: key in wrong or has(peer, key))
    monkeypatch.setattr(rounds, "PROVE_S", 0.1)
    monkeypatch.setattr(rounds, "PROVE_IDLE_S", 0.1)
    async with CacheMesh(tmp_path, THREE, monkeypatch) as mesh:
        mesh["a"].write(blocks)
        await mesh.twice(blocks)


# ── what may go wrong ───────────────────────────────────────────────────────────────────────────────


async def test_a_stale_catalogue_costs_one_question_and_a_lying_one_is_distrusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = some_blocks(0, 40)
    async with CacheMesh(tmp_path, {"a": QUOTA, "liar": QUOTA}, monkeypatch) as mesh:
        mesh["liar"].claims(blocks)
        reads = mesh["a"].cache.reads
        await soon(lambda: all(reads.claimed(keys_of(blocks))), "its catalogue")
        with caplog.at_level(logging.WARNING):
            assert await mesh["a"].read(blocks[:5]) == [None] * 5
        assert not any(reads.claimed(keys_of(blocks[:5]))), "it is known now that these are not there"
        assert caplog.text.count("cache_distrust node=liar") == 1
        assert not any(reads.claimed(keys_of(blocks))), "nor is anything else asked of it for a while"


@pytest.mark.parametrize("has_replica", [True, False])
async def test_a_damaged_copy_is_a_miss_or_comes_from_the_other_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_replica: bool
) -> None:
    blocks = some_blocks(0, 30)
    givers = {"a": QUOTA, "b": QUOTA} if has_replica else {"a": QUOTA}
    async with CacheMesh(tmp_path, {**givers, "reader": 0}, monkeypatch) as mesh:
        mesh["a"].write(blocks)
        await (mesh.twice(blocks) if has_replica else mesh.agreed())
        await soon(lambda: all(mesh["reader"].cache.reads.claimed(keys_of(blocks))), "the catalogue")
        damage(mesh["a"].directory)
        with caplog.at_level(logging.WARNING):
            answers = await mesh["reader"].read(blocks)  # compares what comes with what belongs there
        assert "wrong digest" in caplog.text
        assert (None not in answers) if has_replica else None in answers


async def test_a_pack_cut_short_is_a_miss_there_and_comes_from_the_other_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = some_blocks(0, 30)
    async with CacheMesh(tmp_path, {"a": QUOTA, "b": QUOTA, "reader": 0}, monkeypatch) as mesh:
        mesh["a"].write(blocks)
        await mesh.twice(blocks)
        for pack in list_packs(mesh["a"].directory):
            os.truncate(pack, pack.stat().st_size // 2)
        with caplog.at_level(logging.WARNING):
            assert None not in await mesh["reader"].read(blocks)
        assert "cache_miss pack=" in caplog.text


async def test_a_holder_that_says_nothing_costs_a_bounded_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def silent(*request: object) -> None:
        await asyncio.Event().wait()

    blocks = some_blocks(0, 30)
    async with CacheMesh(tmp_path, {"a": QUOTA, "b": QUOTA, "reader": 0}, monkeypatch) as mesh:
        mesh["a"].write(blocks)
        await mesh.twice(blocks)
        async with BulkWorld(tmp_path).misbehaving("a", silent) as holder:
            mesh.places[mesh["a"].name] = holder
            started_at = time.monotonic()
            assert None not in await mesh["reader"].read(blocks)
            assert time.monotonic() - started_at < 10.0, "a second, on a machine with nothing else to do"
            async with BulkWorld(tmp_path).misbehaving("b", silent) as other:
                mesh.places[mesh["b"].name] = other
                with caplog.at_level(logging.WARNING):
                    assert await mesh["reader"].read(blocks, within_s=0.5) == [None] * 30
        assert "not all within" in caplog.text


async def test_a_member_that_answers_with_other_blocks_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks, others = some_blocks(0, 3), some_blocks(900, 3)

    async def forge(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pairs = zip(blocks, others, strict=True)
        forged = [Block(block.key, block.digest, other.payload) for block, other in pairs]
        writer.write(batch_answer(forged))

    async with CacheMesh(tmp_path, {"a": QUOTA, "liar": QUOTA}, monkeypatch) as mesh:
        mesh["liar"].claims(blocks)
        await soon(lambda: all(mesh["a"].cache.reads.claimed(keys_of(blocks))), "its catalogue")
        async with BulkWorld(tmp_path).misbehaving("liar", forge) as holder:
            mesh.places[mesh["liar"].name] = holder
            with caplog.at_level(logging.WARNING):
                assert await mesh["a"].read(blocks) == [None] * 3
        assert "wrong digest" in caplog.text and "cache_distrust node=liar" in caplog.text


async def test_a_full_disk_refuses_copies_and_readers_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = some_blocks(0, 50)
    async with CacheMesh(tmp_path, {"a": QUOTA, "full": QUOTA, "reader": 0}, monkeypatch) as mesh:
        mesh["full"].cache.share._free_bytes_left = 1 << 62
        with caplog.at_level(logging.WARNING):
            mesh["a"].write(blocks)
            await soon(lambda: "the disk is full" in caplog.text, "a line in the log")
        assert caplog.text.count("the disk is full") == 1 and not mesh["full"].holds(blocks)
        await soon(lambda: all(mesh["reader"].cache.reads.claimed(keys_of(blocks))), "the catalogue")
        assert None not in await mesh["reader"].read(blocks)


async def test_a_fault_of_the_cache_is_a_line_in_the_log_and_the_node_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = some_blocks(0, 30)
    monkeypatch.setattr(assembly, "AGAIN_S", 0.05)
    async with CacheMesh(tmp_path, {"a": QUOTA, "b": QUOTA}, monkeypatch) as mesh:
        news = mesh["a"].cache.share.news
        faults = iter([ZeroDivisionError("a mistake of ours")])

        async def faulty() -> Any:
            for fault in faults:
                raise fault
            return await news()

        monkeypatch.setattr(mesh["a"].cache.share, "news", faulty)
        mesh["a"].write(blocks)
        await mesh.twice(blocks)
        assert "cache_failed" in caplog.text


async def test_bytes_stay_within_every_quota_when_there_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = 100_000
    async with CacheMesh(tmp_path, {"a": quota, "b": quota, "c": quota}, monkeypatch) as mesh:
        for start in range(0, 200, 10):
            node = mesh["abc"[start // 10 % 3]]
            node.write(some_blocks(start, 10))
            await asyncio.sleep(0.03)
            for other in mesh.nodes.values():
                n_bytes = bytes_in(other.directory)
                assert n_bytes <= quota + 12 * BLOCK_BYTES, "but for what the compute process just wrote"
        await soon(lambda: all(node.cache.share.n_bytes <= quota for node in mesh.nodes.values()), "room")
        assert sum(node.cache.share.n_bytes for node in mesh.nodes.values()) > 1.5 * quota, "and it is used"


def list_packs(directory: Path) -> list[Path]:
    return sorted((directory / "features").glob("*.pack"))


def bytes_in(directory: Path) -> int:
    n_bytes = 0
    for pack in list_packs(directory):
        with contextlib.suppress(FileNotFoundError):  # it made room at this moment
            n_bytes += pack.stat().st_size
    return n_bytes


def damage(directory: Path) -> None:
    """A bit of an entry in the middle of every pack is another."""
    for pack in list_packs(directory):
        content = bytearray(pack.read_bytes())
        content[-BLOCK_BYTES // 2] ^= 1
        pack.write_bytes(content)
