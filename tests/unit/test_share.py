"""A node's share: within its quota whoever sends, second copies go first, and every failure is a miss."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from mesh.cache.ring import SPARE_WORTH
from mesh.digests import digest_of
from mesh.transport.bulk.blobs import Block, PutVerdict
from node.cache import share as share_file
from node.cache.share import Share
from node.compute.features.codec import CODECS
from node.compute.features.packs import read_index
from node.compute.features.store import Entry, LocalStore
from tests.unit.test_feature_store import Clock, entries, key

PAYLOAD_BYTES = 1000
SPARE = 1000
"""Keys from here on are second copies in these tests."""


def block(number: int, n_bytes: int = PAYLOAD_BYTES) -> Block:
    payload = number.to_bytes(4, "big") * (n_bytes // 4)
    return Block(key(number), digest_of(payload), payload)


def blocks(numbers: Sequence[int]) -> list[Block]:
    return [block(number) for number in numbers]


def worth(of: bytes) -> float:
    return SPARE_WORTH if int.from_bytes(of, "big") >= SPARE else 1.0


def files_in(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def share(tmp_path: Path, clock: Clock) -> AsyncIterator[Share]:
    one = Share(tmp_path, 100_000, worth=worth, clock=clock)
    yield one
    await one.close()


async def held(share: Share, numbers: Sequence[int]) -> list[int]:
    """Which are served; what comes is what was put, with its digest."""
    found = await share.get_many([key(number) for number in numbers], 1 << 20)
    for number, one in zip(numbers, found, strict=True):
        if one is not None:
            assert isinstance(one, Block) and one.key == key(number)
            assert one.digest == digest_of(one.payload) == digest_of(block(number).payload)
    served = [number for number, one in zip(numbers, found, strict=True) if one is not None]
    assert all(share.holds(key(number)) for number in served)
    return served


async def test_what_peers_put_is_served_at_once_and_lies_in_one_pack_a_moment_later(
    share: Share, clock: Clock, tmp_path: Path
) -> None:
    for number in range(5):
        assert await share.put([block(number)]) == [PutVerdict.STORED]
    assert await held(share, range(6)) == [0, 1, 2, 3, 4] and not files_in(tmp_path)
    clock.now += share_file.GATHER_S
    await share.news()
    (pack,) = files_in(tmp_path)
    assert await held(share, range(6)) == [0, 1, 2, 3, 4]
    assert {place.digest for place in read_index(pack).values()} == {block(n).digest for n in range(5)}
    assert await share.put(blocks([2, 7])) == [PutVerdict.HELD, PutVerdict.STORED]


async def test_what_the_compute_process_writes_is_served_with_its_digest(
    share: Share, clock: Clock, tmp_path: Path
) -> None:
    LocalStore(tmp_path, 0, 100_000).put(entries(1, 2))
    clock.now += share_file.LOOK_S
    news = await share.news()
    assert {of: known and known.digest for of, known in news.items()} == {
        key(number): digest_of(entries(number)[key(number)].encoded.payload) for number in (1, 2)
    }
    assert not await share.news(), "said once"
    (one,) = await share.get_many([key(1)], 1 << 20)
    assert isinstance(one, Block) and one.digest == digest_of(one.payload)
    assert bytes(one.payload) == bytes(entries(1)[key(1)].encoded.payload)


async def test_the_compute_process_finds_what_peers_sent(share: Share, tmp_path: Path) -> None:
    payload = bytes(entries(3)[key(3)].encoded.payload)
    await share.put([Block(key(3), digest_of(payload), payload)])
    await share.flush()
    (entry,) = LocalStore(tmp_path, 0, 100_000).get([key(3)])
    assert isinstance(entry, Entry) and bytes(entry.encoded.payload) == payload
    assert entry.recompute_s == pytest.approx(entry.encoded.n / share_file.PACE_TOKENS_PER_S)


async def test_a_batch_holds_no_more_than_asked_and_says_what_is_left(share: Share) -> None:
    await share.put(blocks(range(3)))
    found = await share.get_many([key(0), key(1), key(1), key(9), key(2)], 2 * PAYLOAD_BYTES)
    kinds = [type(one) for one in found]
    assert kinds == [Block, Block, type(None), type(None), int] and found[4] == PAYLOAD_BYTES


@pytest.mark.parametrize(("lot", "looks"), [(1, True), (7, True), (7, False)])
async def test_the_quota_holds_with_all_that_is_on_its_way(
    share: Share, clock: Clock, tmp_path: Path, lot: int, looks: bool
) -> None:
    for start in range(0, 300, lot):
        await share.put(blocks(range(start, start + lot)))
        on_disk = sum(path.stat().st_size for path in files_in(tmp_path))
        assert on_disk + share._intake.reserved_bytes <= share.quota_bytes
        clock.now += 0.1
        if looks:
            await share.news()
    assert share.n_bytes > share.quota_bytes // 2, "and it is used"


async def test_second_copies_go_before_first_ones(share: Share, clock: Clock) -> None:
    await share.put(blocks(range(SPARE, SPARE + 60)))
    await share.put(blocks(range(20)))
    await share.flush()
    for number in range(20, 70):
        await share.put([block(number)])
        clock.now += share_file.GATHER_S
        await share.news()
    assert len(await held(share, range(70))) == 70
    assert len(await held(share, range(SPARE, SPARE + 60))) < 60
    for start in range(SPARE + 100, SPARE + 400, 30):
        await share.put(blocks(range(start, start + 30)))
        await share.flush()
    assert len(await held(share, range(70))) == 70, "whatever comes of second copies"


async def test_what_becomes_a_second_copy_goes_when_room_is_needed(tmp_path: Path) -> None:
    owned = set(range(80))
    share = Share(tmp_path, 100_000, worth=lambda of: 1.0 if int.from_bytes(of, "big") in owned else 0.01)
    for start in range(0, 80, 10):
        await share.put(blocks(range(start, start + 10)))
        await share.flush()
    owned -= set(range(40))
    owned |= set(range(200, 230))
    await share.reweigh()
    for start in range(200, 230, 10):
        assert await share.put(blocks(range(start, start + 10))) == [PutVerdict.STORED] * 10
        await share.flush()
    assert await held(share, range(40, 80)) == list(range(40, 80))
    assert len(await held(share, range(40))) < 40
    await share.close()


async def test_a_full_disk_refuses_puts_with_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share = Share(tmp_path, 100_000, free_bytes_left=1 << 62)
    with caplog.at_level(logging.WARNING):
        assert await share.put(blocks([1, 2])) == [PutVerdict.NO_ROOM] * 2
        assert await share.put(blocks([3])) == [PutVerdict.NO_ROOM]
    assert caplog.text.count("the disk is full") == 1 and await held(share, [1, 2, 3]) == []
    await share.close()


async def test_a_disk_that_fills_up_meanwhile_is_a_miss_and_leaves_nothing(
    share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert await share.put(blocks([1])) == [PutVerdict.STORED]
    with caplog.at_level(logging.WARNING):
        await share.flush()
    assert "cannot be kept" in caplog.text and not files_in(tmp_path)
    assert await held(share, [1]) == [] and not share.holds(key(1))
    assert await share.news() == {key(1): None}
    monkeypatch.undo()
    assert await share.put(blocks([1])) == [PutVerdict.STORED], "its room is free again"


@pytest.mark.parametrize("harm", ["gone", "short"])
async def test_a_pack_that_is_gone_or_cut_short_is_a_miss_and_not_listed_any_more(
    share: Share, tmp_path: Path, harm: str
) -> None:
    await share.put(blocks([1, 2]))
    await share.flush()
    (pack,) = files_in(tmp_path)
    await share.news()
    if harm == "gone":
        pack.unlink()
    else:
        os.truncate(pack, pack.stat().st_size - PAYLOAD_BYTES - 10)
    assert await held(share, [1, 2]) in ([], [1])
    assert await share.news() == {key(1): None, key(2): None}
    assert await held(share, [1, 2]) == [] and not files_in(tmp_path)


async def test_a_node_that_gives_nothing_keeps_nothing(tmp_path: Path) -> None:
    share = Share(tmp_path / "features", 0)
    assert not share.has_room(1) and await share.put(blocks([1])) == [PutVerdict.NO_ROOM]
    assert await share.get_many([key(1)], 100) == [None]
    await share.news()
    await share.close()
    assert not (tmp_path / "features").exists()


async def test_puts_and_gets_at_once_never_mix_up_blocks(share: Share) -> None:
    async def one(first: int) -> None:
        for number in range(first, first + 30):
            await share.put(blocks([number, number + SPARE]))
            await held(share, range(first, number + 1))

    await asyncio.gather(*(one(100 * n) for n in range(4)))


async def test_a_block_too_large_to_travel_is_not_listed(tmp_path: Path) -> None:
    import torch

    share = Share(tmp_path, 1 << 27)
    large = CODECS["raw"].encode(torch.zeros(2100, 1024))
    LocalStore(tmp_path, 0, 1 << 27).put({key(1): Entry(large, 1.0)} | entries(2))
    news = await share.news()
    assert news[key(1)] is None and news[key(2)] is not None
    assert await share.get_many([key(1)], 1 << 23) == [None]
    await share.close()
