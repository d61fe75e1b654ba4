"""Promises of ``mesh.cache.catalogue`` and of the filter below it, ``mesh.cache.bloom``."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from mesh.cache.bloom import BITS_MAX, BITS_MIN, FALSE_POSITIVES_MAX, capacity, probes
from mesh.cache.catalogue import (
    CatalogueConfig,
    CatalogueDelta,
    Catalogues,
    CatalogueWhole,
    CatalogueWriter,
    Outcome,
    misses_allowed,
)
from mesh.ids import NodeId

HOLDER = NodeId("holder")
OTHER = NodeId("other")


def keys(n: int, seed: int = 1) -> list[bytes]:
    return [hashlib.blake2b(struct.pack("<2Q", seed, index), digest_size=32).digest() for index in range(n)]


def writer_of(held: list[bytes], life: int = 1, salt: int = 7) -> CatalogueWriter:
    writer = CatalogueWriter(life, salt)
    for key in held:
        assert writer.add(key)
    return writer


def told(writer: CatalogueWriter, readers: Catalogues, now: float = 0.0, node: NodeId = HOLDER) -> Outcome:
    message = writer.next_version()
    assert message is not None
    return readers.take(node, message, now)


# ── the filter ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, capacity(BITS_MIN), 4000, 13_107])
def test_nothing_held_is_denied_and_at_most_one_in_a_hundred_absent_keys_is_claimed(n: int) -> None:
    held, absent = keys(n), keys(20_000, seed=2)
    readers = Catalogues()
    assert told(writer_of(held), readers) is Outcome.TAKEN
    assert all(readers.claims(HOLDER, key) for key in held)
    wrong = sum(readers.claims(HOLDER, key) for key in absent)
    assert wrong <= 1.25 * FALSE_POSITIVES_MAX * len(absent), "a quarter more is five deviations of chance"


def test_keys_that_share_their_first_bytes_are_told_apart() -> None:
    """All keys of one arc begin alike."""
    tails = keys(2000)
    held, absent = ([bytes(8) + key[8:] for key in part] for part in (tails[:400], tails[400:]))
    readers = Catalogues()
    told(writer_of(held), readers)
    assert sum(readers.claims(HOLDER, key) for key in absent) <= 0.02 * len(absent)


def test_another_salt_is_wrong_about_other_keys() -> None:
    held, absent = keys(capacity(BITS_MIN)), keys(20_000, seed=2)
    writer, readers = writer_of(held), Catalogues()
    told(writer, readers)
    first = {key for key in absent if readers.claims(HOLDER, key)}
    writer.rewrite(salt=8)
    told(writer, readers)
    assert all(readers.claims(HOLDER, key) for key in held)
    second = {key for key in absent if readers.claims(HOLDER, key)}
    assert first and len(first & second) <= 0.1 * len(first)


def test_a_key_has_seven_different_bits() -> None:
    assert all(len(set(probes(key, BITS_MIN, 3))) == 7 for key in keys(500))


# ── the writer ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(3))
def test_deltas_lead_where_a_whole_one_leads(seed: int) -> None:
    rng = Random(seed)
    pool = keys(1200, seed)
    writer, step_by_step = CatalogueWriter(1, seed), Catalogues()
    held: set[bytes] = set()
    n_deltas = 0
    for _ in range(25):
        for key in rng.sample(pool, rng.choice((1, 10, 40))):
            if key in held and rng.random() < 0.7:
                held.discard(key)
                writer.drop(key)
            else:
                held.add(key)
                writer.add(key)
        message = writer.next_version()
        if message is None:
            continue
        n_deltas += isinstance(message, CatalogueDelta)
        assert step_by_step.take(HOLDER, message, 0.0) is Outcome.TAKEN
        at_once = Catalogues()
        assert at_once.take(HOLDER, writer.whole(), 0.0) is Outcome.TAKEN
        assert all(step_by_step.claims(HOLDER, key) for key in held)
        claims = [(step_by_step.claims(HOLDER, key), at_once.claims(HOLDER, key)) for key in pool]
        assert all(a == b for a, b in claims)
        absent = len(pool) - len(held)
        assert sum(a for a, _ in claims) - len(held) <= 0.04 * absent + 5
    assert n_deltas >= 10
    assert writer.n_keys == len(held)


def test_adding_twice_is_adding_once_and_dropping_what_is_not_there_is_nothing() -> None:
    (key,) = keys(1)
    writer, readers = CatalogueWriter(1, 1), Catalogues()
    writer.add(key)
    writer.add(key)
    told(writer, readers)
    writer.drop(key)
    writer.drop(key)
    told(writer, readers)
    assert not readers.claims(HOLDER, key)
    assert writer.next_version() is None


def test_there_and_back_between_two_versions_is_nothing() -> None:
    writer = writer_of(keys(10))
    writer.next_version()
    for key in keys(5, seed=3):
        writer.add(key)
        writer.drop(key)
    assert writer.next_version() is None


def test_a_delta_is_small_and_no_catalogue_is_larger_than_its_bound() -> None:
    held = keys(capacity(BITS_MIN) * 8)
    writer = writer_of(held)
    whole = writer.next_version()
    assert isinstance(whole, CatalogueWhole) and len(whole.bits) == BITS_MIN  # eight times the bits, in bytes
    writer.add(keys(1, seed=5)[0])
    delta = writer.next_version()
    assert isinstance(delta, CatalogueDelta) and len(delta.flips) <= 7 * 3


def test_a_full_catalogue_lists_no_more_and_does_not_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.cache.catalogue.BITS_MAX", 2 * BITS_MIN)
    held = keys(2 * capacity(BITS_MIN) + 50)
    writer = CatalogueWriter(1, 1)
    listed = [key for key in held if writer.add(key)]
    assert len(listed) == capacity(2 * BITS_MIN) and writer.n_unlisted == len(held) - len(listed)
    readers = Catalogues()
    told(writer, readers)
    assert all(readers.claims(HOLDER, key) for key in listed)
    absent = keys(10_000, seed=9)
    assert sum(readers.claims(HOLDER, key) for key in absent) <= 1.25 * FALSE_POSITIVES_MAX * len(absent)
    writer.drop(listed[0])
    assert writer.add(held[-1]), "there is room again"


@pytest.mark.slow
def test_the_largest_catalogue_keeps_its_word() -> None:
    held = keys(capacity(BITS_MAX))
    writer, readers = writer_of(held), Catalogues()
    told(writer, readers)
    assert len(writer.whole().bits) == BITS_MAX // 8 == 256 * 1024
    absent = keys(100_000, seed=2)
    assert sum(readers.claims(HOLDER, key) for key in absent) <= 1.1 * FALSE_POSITIVES_MAX * len(absent)


# ── versions ───────────────────────────────────────────────────────────────────────────────────────────


def test_readers_agree_whatever_comes_twice_late_or_not_at_all() -> None:
    for seed in range(20):
        rng = Random(seed)
        pool = keys(400, seed)
        writer, reader = CatalogueWriter(1, seed), Catalogues()
        sent: list[CatalogueWhole | CatalogueDelta] = []
        for turn in range(40):
            for key in rng.sample(pool, 4):
                writer.drop(key) if key in writer else writer.add(key)
            message = writer.next_version()
            if message is not None:
                sent.append(message)
            for message in rng.sample(sent, min(len(sent), rng.randrange(4))):
                if reader.take(HOLDER, message, float(turn)) is Outcome.NEEDS_WHOLE and rng.random() < 0.5:
                    reader.take(HOLDER, writer.whole(), float(turn))
        reader.take(HOLDER, writer.whole(), 99.0)
        exact = Catalogues()
        exact.take(HOLDER, writer.whole(), 0.0)
        assert [reader.claims(HOLDER, key) for key in pool] == [exact.claims(HOLDER, key) for key in pool]


def test_a_later_life_replaces_all_that_the_earlier_one_said() -> None:
    before, after = keys(50), keys(50, seed=2)
    readers = Catalogues()
    old, new = writer_of(before, life=1), writer_of(after, life=2)
    for _ in range(5):
        old.add(keys(1, seed=old.n_keys)[0])
        told(old, readers)
    assert told(new, readers) is Outcome.TAKEN, "though its version is lower"
    assert sum(readers.claims(HOLDER, key) for key in before) <= 2
    assert readers.take(HOLDER, old.whole(), 0.0) is Outcome.OLD
    assert all(readers.claims(HOLDER, key) for key in after)


def test_messages_that_are_no_catalogue_cannot_be_made() -> None:
    good = writer_of(keys(3)).next_version()
    assert isinstance(good, CatalogueWhole)
    for change in (
        {"bits": good.bits[:-1]}, {"bits": b""}, {"bits": bytes(BITS_MAX // 4)}, {"life": -1},
        {"version": 2**60}, {"salt": -1}, {"n_keys": capacity(BITS_MIN) + 1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            replace(good, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        CatalogueDelta(life=1, version=1, n_keys=1, flips=b"12")
    with pytest.raises(ValueError):
        CatalogueDelta(life=1, version=0, n_keys=1, flips=b"123")


def test_a_delta_beyond_the_filter_is_refused() -> None:
    readers = Catalogues()
    told(writer_of(keys(3)), readers)
    beyond = CatalogueDelta(life=1, version=2, n_keys=3, flips=BITS_MIN.to_bytes(3, "little"))
    assert readers.take(HOLDER, beyond, 0.0) is Outcome.REFUSED


def test_there_is_room_for_so_many_nodes_and_no_more() -> None:
    readers = Catalogues(CatalogueConfig(nodes_max=2))
    for name in ("a", "b"):
        assert told(writer_of(keys(3)), readers, node=NodeId(name)) is Outcome.TAKEN
    assert told(writer_of(keys(3)), readers, node=NodeId("c")) is Outcome.REFUSED
    readers.forget(NodeId("a"))
    assert told(writer_of(keys(3)), readers, node=NodeId("c")) is Outcome.TAKEN


# ── whom to ask ────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_that_nobody_holds_costs_no_round_trip() -> None:
    readers = Catalogues()
    for index in range(8):
        told(writer_of(keys(100, seed=index), salt=index), readers, node=NodeId(f"n{index}"))
    absent = keys(5000, seed=77)
    sources = [NodeId("n0"), NodeId("n1"), NodeId("unheard-of")]
    asked = sum(len(readers.holders(key, sources, 0.0)) for key in absent)
    assert asked <= 8 * FALSE_POSITIVES_MAX * len(absent)


def test_owners_are_asked_first_then_whoever_else_has_it() -> None:
    (key,) = keys(1)
    readers = Catalogues()
    for name in ("a", "b", "c"):
        told(writer_of([key]), readers, node=NodeId(name))
    assert readers.holders(key, [NodeId("c"), NodeId("x")], 0.0) == ["c", "a", "b"]


def test_a_stale_catalogue_costs_one_round_trip_and_is_forgiven_by_the_next_version() -> None:
    held = keys(50)
    writer, readers = writer_of(held), Catalogues()
    told(writer, readers)
    gone = held[0]
    writer.drop(gone)
    asked = 0
    for now in range(100):  # the next version does not come yet
        if HOLDER in readers.holders(gone, [HOLDER], float(now)):
            asked += 1
            readers.answered(HOLDER, 0, [gone], float(now))
    assert asked == 1
    told(writer, readers, now=100.0)
    assert readers.is_trusted(HOLDER, 100.0)
    assert readers.holders(held[1], [HOLDER], 100.0) == [HOLDER]


def test_a_catalogue_that_claims_everything_is_refused_unasked() -> None:
    readers = Catalogues()
    everything = CatalogueWhole(life=1, version=1, salt=0, n_keys=5, bits=b"\xff" * (BITS_MIN // 8))
    assert readers.take(HOLDER, everything, 0.0) is Outcome.REFUSED
    assert readers.holders(keys(1)[0], [HOLDER], 0.0) == []


def test_a_lying_catalogue_costs_one_miss_and_is_then_distrusted_for_a_while() -> None:
    config = CatalogueConfig(distrust_s=5.0, distrust_s_max=40.0)
    claimed = keys(300)
    readers = Catalogues(config)
    told(writer_of(claimed), readers)
    asked_at = []
    for now in range(400):  # it holds nothing of what it claims, and never says anything new
        key = claimed[now % len(claimed)]
        if readers.holders(key, [HOLDER], float(now)):
            asked_at.append(now)
            readers.answered(HOLDER, 0, [key], float(now))
    gaps = [b - a for a, b in pairwise(asked_at)]
    assert gaps[:4] == [5, 10, 20, 40], "twice as long each time, up to the bound"
    assert len(asked_at) <= 13


def test_an_honest_node_with_false_positives_is_trusted() -> None:
    held, absent = keys(capacity(BITS_MIN)), keys(10_000, seed=2)
    readers = Catalogues()
    told(writer_of(held), readers)
    rng, distrusted = Random(1), 0
    for start in range(0, len(absent), 50):  # requests of 50 keys, half of them there
        wanted = [*rng.sample(held, 50), *absent[start : start + 50]]
        now = start / 50
        asked = [key for key in wanted if readers.holders(key, [HOLDER], now)]
        missing = [key for key in asked if key not in set(held)]
        if asked:
            readers.answered(HOLDER, len(asked) - len(missing), missing, now)
        distrusted += not readers.is_trusted(HOLDER, now)
    assert distrusted <= 0.05 * len(absent) / 50


@pytest.mark.parametrize(
    ("n_looked", "least", "most"), [(0, 0, 0), (99, 0, 0), (100, 4, 4), (10_000, 120, 140)]
)
def test_misses_that_false_positives_explain(n_looked: float, least: float, most: float) -> None:
    assert least <= misses_allowed(n_looked) <= most


def test_distrust_ends_with_the_life_that_earned_it() -> None:
    held = keys(10)
    readers = Catalogues()
    told(writer_of(held), readers)
    readers.answered(HOLDER, 0, held[:1], 0.0)
    assert not readers.is_trusted(HOLDER, 0.0)
    assert told(writer_of(held, life=2), readers) is Outcome.TAKEN
    assert readers.is_trusted(HOLDER, 0.0)


def test_answers_of_unknown_nodes_and_distrust_of_one_change_nothing_for_others() -> None:
    held = keys(10)
    readers = Catalogues()
    assert readers.answered(OTHER, 0, held, 0.0)
    told(writer_of(held), readers)
    told(writer_of(held), readers, node=OTHER)
    readers.answered(HOLDER, 0, held[:1], 0.0)
    assert readers.holders(held[1], [HOLDER, OTHER], 0.0) == [OTHER]
