"""The store's promises: bounded, and every failure a miss."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from node.compute.features import disk, packs
from node.compute.features.codec import CODECS
from node.compute.features.gdsf import Gdsf
from node.compute.features.store import Entry, LocalStore

ROWS, WIDTH = 8, 64
ENTRY_BYTES = CODECS["raw"].encode(torch.zeros(ROWS, WIDTH)).n_bytes


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def entry(number: int, recompute_s: float = 1.0) -> Entry:
    return Entry(CODECS["raw"].encode(torch.full((ROWS, WIDTH), float(number))), recompute_s)


def entries(*numbers: int, recompute_s: float = 1.0) -> dict[bytes, Entry]:
    return {key(number): entry(number, recompute_s) for number in numbers}


def held(kept: LocalStore, *numbers: int) -> list[int]:
    """Which of ``numbers`` are there; what comes back is what was put."""
    found = kept.get([key(number) for number in numbers])
    for number, one in zip(numbers, found, strict=True):
        if one is not None:
            assert torch.equal(
                CODECS["raw"].decode(one.encoded, WIDTH), torch.full((ROWS, WIDTH), float(number))
            )
    return [number for number, one in zip(numbers, found, strict=True) if one is not None]


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.pack"))


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_put_is_there_and_what_was_not_is_a_miss(tmp_path: Path) -> None:
    for kept in (LocalStore(None, 1 << 20, 0), LocalStore(tmp_path, 0, 1 << 20)):
        kept.put(entries(1, 2))
        assert held(kept, 1, 2, 3) == [1, 2]
        assert kept.get([]) == []
        assert kept.get([key(2), key(2), key(3)])[:2] != [None, None]


def test_without_any_room_everything_is_a_miss(tmp_path: Path) -> None:
    kept = LocalStore(tmp_path, 0, 0)
    kept.put(entries(1))
    assert held(kept, 1) == [] and not list(tmp_path.iterdir())


def test_memory_stays_within_its_budget_and_keeps_what_saves_most() -> None:
    kept = LocalStore(None, 3 * ENTRY_BYTES, 0)
    kept.put(entries(1, recompute_s=9.0) | entries(2, 3, recompute_s=1.0))
    kept.put(entries(4, 5, recompute_s=2.0))
    assert kept.catalogue().memory_bytes <= 3 * ENTRY_BYTES
    assert held(kept, 1, 2, 3, 4, 5) == [1, 4, 5]
    kept.put(entries(6, recompute_s=0.001))
    assert held(kept, 6) == [], "worth less than anything it would push out"


def test_what_is_used_often_stays() -> None:
    kept = LocalStore(None, 2 * ENTRY_BYTES, 0)
    kept.put(entries(1, 2))
    for _ in range(5):
        held(kept, 1)
    kept.put(entries(3))
    assert held(kept, 1, 2, 3) == [1, 3]


def test_what_was_precious_once_goes_in_the_end() -> None:
    kept = LocalStore(None, 2 * ENTRY_BYTES, 0)
    kept.put(entries(1, recompute_s=4.0))
    for number in range(2, 40):
        kept.put(entries(number))
    assert held(kept, 1) == [], "the age of the cache has passed its value"


def test_pinned_entries_are_not_evicted_and_the_budget_still_holds(tmp_path: Path) -> None:
    kept = LocalStore(tmp_path, 2 * ENTRY_BYTES, 6 * ENTRY_BYTES)
    with kept.pinned([key(1), key(2)]):
        kept.put(entries(1, recompute_s=0.01))
        kept.put(entries(2, recompute_s=0.01))
        for number in range(3, 20):
            kept.put(entries(number, recompute_s=50.0))
            assert kept.catalogue().memory_bytes <= 2 * ENTRY_BYTES
            assert disk_bytes(tmp_path) <= 6 * ENTRY_BYTES
        assert held(kept, 1, 2) == [1, 2]
    for number in range(20, 40):
        kept.put(entries(number, recompute_s=50.0))
    assert held(kept, 1, 2) == []


def test_the_disk_stays_within_its_budget_and_evicts_by_seconds_per_byte(tmp_path: Path) -> None:
    budget = 12 * ENTRY_BYTES
    kept = LocalStore(tmp_path, 0, budget)
    kept.put(entries(0, recompute_s=100.0))
    for number in range(1, 60):
        kept.put(entries(number))
        assert disk_bytes(tmp_path) <= budget
    assert 0 in held(kept, *range(60))
    assert len(held(kept, *range(60))) > 6, "and it is used"


def test_many_small_entries_share_a_file(tmp_path: Path) -> None:
    kept = LocalStore(tmp_path, 0, 1 << 26)
    kept.put(entries(*range(500)))
    assert len(files(tmp_path)) == 1
    assert len(held(kept, *range(500))) == 500


def test_a_restart_keeps_the_disk_and_does_not_read_it_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LocalStore(tmp_path, 1 << 20, 1 << 20).put(entries(1, 2, 3))
    reads: list[int] = []
    real = packs.read_entries
    monkeypatch.setattr(
        disk, "read_entries", lambda path, places: (reads.append(len(places)), real(path, places))[1]
    )
    again = LocalStore(tmp_path, 1 << 20, 1 << 20)
    assert held(again, 2) == [2] and reads == [1]
    assert held(again, 2) == [2] and reads == [1], "it is in memory now"
    assert again.catalogue().keys == {key(1), key(2), key(3)}
    found = again.get([key(3)])[0]
    assert found is not None and found.recompute_s == 1.0


@pytest.mark.parametrize("where", ["payload", "index", "magic", "length"])
def test_a_damaged_file_is_a_miss_and_is_removed_with_a_line_in_the_log(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    LocalStore(tmp_path, 0, 1 << 20).put(entries(1, 2))
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    at = {"payload": len(content) - 5, "index": 20, "magic": 0, "length": 0}[where]
    content[at] ^= 4
    path.write_bytes(content[:-7] if where == "length" else content)
    kept = LocalStore(tmp_path, 0, 1 << 20)
    with caplog.at_level(logging.WARNING):
        assert held(kept, 2) == []
    assert not files(tmp_path) and "computed again" in caplog.text
    kept.put(entries(2))
    assert held(kept, 2) == [2]


def test_a_file_cut_short_while_it_is_known_is_a_miss(tmp_path: Path) -> None:
    kept = LocalStore(tmp_path, 0, 1 << 20)
    kept.put(entries(1, 2))
    (path,) = files(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    assert held(kept, 2) == [] and not files(tmp_path)


def test_a_full_disk_is_a_miss_said_once_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = LocalStore(tmp_path, 0, 1 << 20)
    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        kept.put(entries(1))
        kept.put(entries(2))
    assert held(kept, 1, 2) == [] and not list(tmp_path.iterdir())
    assert caplog.text.count("is full") == 1


def test_a_directory_that_cannot_be_made_leaves_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = LocalStore(tmp_path / "file" / "features", 1 << 20, 1 << 20)
    kept.put(entries(1))
    assert held(kept, 1, 2) == [1]


def test_another_process_is_seen_and_its_eviction_is_a_miss(tmp_path: Path) -> None:
    clock = Clock()
    kept = LocalStore(tmp_path, 0, 1 << 20, clock)
    assert held(kept, 1) == []
    LocalStore(tmp_path, 0, 1 << 20).put(entries(1, 2))
    clock.now += 10
    assert held(kept, 1) == [1]
    for path in files(tmp_path):
        path.unlink()
    assert held(kept, 1, 2) == []
    kept.put(entries(1))
    assert held(kept, 1) == [1]


def test_what_a_dead_writer_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    old, new = tmp_path / ".aaaa.1.partial", tmp_path / ".bbbb.2.partial"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    LocalStore(tmp_path, 0, 1 << 20)
    assert not old.exists() and new.exists()


_WRITER = """
import sys
from pathlib import Path
from tests.unit.test_feature_store import ENTRY_BYTES, entries, held
from node.compute.features.store import LocalStore
kept = LocalStore(Path(sys.argv[1]), 0, 30 * ENTRY_BYTES, iter(range(10**6)).__next__)
for round in range(60):
    number = (round * 7 + int(sys.argv[2])) % 40
    if not held(kept, number):
        kept.put(entries(number))
"""


def test_processes_that_share_a_directory_never_get_a_wrong_value(tmp_path: Path) -> None:
    """Two processes put, get and evict at once; ``held`` compares every value with what belongs there."""
    root = Path(__file__).resolve().parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(number)],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=110)
        assert writer.returncode == 0, errors
    kept = LocalStore(tmp_path, 0, 30 * ENTRY_BYTES)
    assert held(kept, *range(40))
    assert not list(tmp_path.glob(".*.partial"))


def test_gdsf_gives_the_least_valuable_first_and_stays_small() -> None:
    order: Gdsf[str] = Gdsf()
    order.add("cheap", 100, 1.0)
    order.add("dear", 100, 5.0)
    order.add("big", 1000, 5.0)
    assert list(order.least()) == ["big", "cheap", "dear"]
    for _ in range(1000):
        order.use("big")
    assert list(order.least())[-1] == "big"
    assert len(order._heap) < 200
    order.let_go("cheap")
    assert order.n_bytes == 1100 and list(order.least()) == ["dear", "big"]
