"""Promises of ``mesh.cache.moves`` and ``mesh.cache.intake``."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Collection
from functools import cache
from random import Random

import pytest

from mesh.cache.intake import Intake, IntakeConfig
from mesh.cache.moves import Block, Moves, MovesConfig, Parcel, errands, is_surplus
from mesh.cache.ring import Ring, RingEpoch, RingSpec, RingView
from mesh.core import FOREVER
from mesh.ids import Epoch, NodeId

GIB = 1 << 30
A, B, C, D = (NodeId(name) for name in "abcd")


def blocks(n: int, n_bytes: int = 1000, seed: int = 1) -> list[Block]:
    digests = [hashlib.blake2b(struct.pack("<2Q", seed, k), digest_size=32).digest() for k in range(n)]
    return [Block(digest, digest[::-1], n_bytes) for digest in digests]


@cache
def view_of(nodes: str, change: int) -> RingView:
    return RingView(RingSpec.of(RingEpoch(Epoch(1, A), change), {NodeId(name): GIB for name in nodes}))


def ring_of(*views: str) -> Ring:
    ring = Ring()
    for change, nodes in enumerate(views, 1):
        assert ring.take(view_of(nodes, change))
    return ring


class Holdings:
    """Who holds what, and what the catalogues say: here the same."""

    def __init__(self) -> None:
        self.of: dict[NodeId, set[bytes]] = {}

    def put(self, node: NodeId, held: Collection[Block]) -> None:
        self.of.setdefault(node, set()).update(block.key for block in held)

    def claims(self, node: NodeId, key: bytes) -> bool:
        return key in self.of.get(node, ())


def placed(ring: Ring, held: Collection[Block]) -> Holdings:
    holdings = Holdings()
    assert ring.view is not None
    for block in held:
        for owner in ring.view.owners(block.key):
            holdings.put(owner, [block])
    return holdings


def run(moves: Moves, ring: Ring, holdings: Holdings, now: float = 0.0) -> tuple[list[Parcel], float]:
    """Let all parcels arrive at once, until nothing is due before the next sweep."""
    sent = []
    while not moves.is_idle:
        assert moves.wake_at < FOREVER, "nothing is on its way, so something must be due"
        now = max(now, moves.wake_at)
        parcels = moves.tick(ring, holdings.claims, now)
        sent += parcels
        for parcel in parcels:
            moves.done(parcel.number, parcel.n_bytes, now)
    return sent, now


def pairs(parcels: Collection[Parcel]) -> set[tuple[NodeId, bytes]]:
    return {(parcel.to, block.key) for parcel in parcels for block in parcel.blocks}


# ── the rule ───────────────────────────────────────────────────────────────────────────────────────────


def test_after_a_join_exactly_one_old_owner_sends_to_each_new_one() -> None:
    everything = blocks(2000)
    ring = ring_of("abc", "abcd")
    holdings = placed(ring_of("abc"), everything)
    assert ring.view is not None
    for block in everything:
        missing = [n for n in ring.view.owners(block.key) if not holdings.claims(n, block.key)]
        holders = [node for node in (A, B, C) if holdings.claims(node, block.key)]
        sent = [to for node in holders for to in errands(block.key, node, ring, holdings.claims)]
        assert sorted(sent) == sorted(missing)


def test_after_a_death_the_survivor_sends_to_the_heir() -> None:
    everything = blocks(2000)
    ring = ring_of("abcd", "abc")
    holdings = placed(ring_of("abcd"), everything)  # what the dead one's catalogue says is still known
    assert ring.view is not None
    for block in everything:
        survivors = [node for node in (A, B, C) if holdings.claims(node, block.key)]
        assert survivors, "two owners, one death"
        sent = [to for node in survivors for to in errands(block.key, node, ring, holdings.claims)]
        heirs = [owner for owner in ring.view.owners(block.key) if not holdings.claims(owner, block.key)]
        assert sorted(sent) == sorted(heirs)
        if holdings.claims(D, block.key):
            assert sent, "the dead node is not waited for"


def test_a_copy_that_only_a_reader_kept_comes_back_to_its_owners() -> None:
    (block,) = blocks(1)
    ring = ring_of("abcd")
    assert ring.view is not None
    owners = ring.view.owners(block.key)
    reader = next(node for node in (A, B, C, D) if node not in owners)
    holdings = Holdings()
    holdings.put(reader, [block])
    assert errands(block.key, reader, ring, holdings.claims) == list(owners)
    assert not is_surplus(block.key, reader, ring, holdings.claims)
    for owner in owners:
        holdings.put(owner, [block])
    assert errands(block.key, reader, ring, holdings.claims) == []
    assert is_surplus(block.key, reader, ring, holdings.claims)
    assert not is_surplus(block.key, owners[0], ring, holdings.claims)


def test_without_a_ring_nothing_is_sent() -> None:
    moves, holdings = Moves(A), Holdings()
    moves.start(blocks(10), Ring(), holdings.claims, 0.0)
    assert run(moves, Ring(), holdings)[0] == []


# ── the sweep ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_sends_everything_that_is_due_and_nothing_twice() -> None:
    everything = blocks(3000)
    ring = ring_of("abc", "abcd")
    holdings = placed(ring_of("abc"), everything)
    found: set[tuple[NodeId, bytes]] = set()
    n_sent = 0
    for node in (A, B, C):
        moves = Moves(node)
        moves.start([b for b in everything if holdings.claims(node, b.key)], ring, holdings.claims, 0.0)
        parcels, _ = run(moves, ring, holdings)
        found |= pairs(parcels)
        n_sent += sum(len(parcel.blocks) for parcel in parcels)
        assert all(parcel.epoch == ring.view.epoch for parcel in parcels if ring.view)
    assert ring.view is not None
    assert found == {
        (n, b.key) for b in everything for n in ring.view.owners(b.key) if not holdings.claims(n, b.key)
    }
    assert n_sent == len(found)


def test_blocks_with_one_living_copy_go_first() -> None:
    everything = blocks(1500)
    ring = ring_of("abc", "abcd")
    holdings = placed(ring_of("abc"), everything)
    alone = {block.key for block in everything[::10]}
    for node in (B, C):
        holdings.of[node] -= alone
    holdings.put(A, everything[::10])
    moves = Moves(A, MovesConfig(parcel_bytes=10_000))
    moves.start([b for b in everything if holdings.claims(A, b.key)], ring, holdings.claims, 0.0)
    sent, _ = run(moves, ring, holdings)
    order = [block.key in alone for parcel in sent for block in parcel.blocks]
    # Receivers' parcels fill up side by side, so a few of the others may be among the last of the urgent.
    assert any(order) and not all(order)
    assert sum(order[: sum(order)]) >= 0.95 * sum(order)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_leave_no_faster_than_the_rate(seed: int) -> None:
    rng = Random(seed)
    config = MovesConfig(bytes_per_s=1e6, parcel_bytes=50_000, in_flight=3)
    everything = blocks(3000, rng.choice((500, 2000, 90_000)) if seed else 2000, seed)
    ring, holdings = ring_of("ab", "abcd"), placed(ring_of("ab"), everything)
    moves = Moves(A, config)
    moves.start(everything, ring, holdings.claims, 0.0)
    now, sent = 0.0, 0
    in_flight: list[Parcel] = []
    while now < 20.0 and not moves.is_idle:
        now += rng.choice((0.001, 0.01, 0.05))
        parcels = moves.tick(ring, holdings.claims, now)
        sent += sum(parcel.n_bytes for parcel in parcels)
        in_flight += parcels
        assert len(in_flight) <= config.in_flight
        assert len({parcel.to for parcel in in_flight}) == len(in_flight)
        burst = 2 * config.parcel_bytes + max(block.n_bytes for block in everything)
        assert sent <= config.bytes_per_s * now + burst
        while in_flight and rng.random() < 0.9:
            parcel = in_flight.pop(0)
            moves.done(parcel.number, parcel.n_bytes, now)


def test_the_rate_is_used() -> None:
    config = MovesConfig(bytes_per_s=1e6, parcel_bytes=50_000)
    everything = blocks(3000, 2000)
    ring, holdings = ring_of("ab", "abcd"), placed(ring_of("ab"), everything)
    moves = Moves(A, config)
    moves.start(everything, ring, holdings.claims, 0.0)
    sent, now = run(moves, ring, holdings)
    assert sum(parcel.n_bytes for parcel in sent) == moves.n_bytes_sent >= 0.95 * config.bytes_per_s * now


def test_what_the_receiver_had_already_costs_no_credit() -> None:
    everything = blocks(100, 10_000)
    ring, holdings = ring_of("ab", "abcd"), placed(ring_of("ab"), everything)
    moves = Moves(A, MovesConfig(bytes_per_s=1.0, parcel_bytes=20_000))
    moves.start(everything, ring, holdings.claims, 0.0)
    n_sent = 0
    while parcels := moves.tick(ring, holdings.claims, 0.0):
        for parcel in parcels:
            n_sent += len(parcel.blocks)
            moves.done(parcel.number, 0, 0.0)
    assert moves.is_idle and n_sent > 20


def test_a_node_that_fails_is_left_alone_and_tried_again_later() -> None:
    everything = blocks(200)
    ring, holdings = ring_of("ab", "abc"), placed(ring_of("ab"), everything)
    config = MovesConfig(retry_s=2.0, sweep_s=60.0)
    moves = Moves(A, config)
    now, tries = 0.0, []
    moves.start(everything, ring, holdings.claims, now)
    for _ in range(400):
        if moves.wants_sweep(now):
            moves.start(everything, ring, holdings.claims, now)
        for parcel in moves.tick(ring, holdings.claims, now):
            tries.append(now)
            moves.failed(parcel.number, now)
        assert not moves.is_idle, "there is something left to send"
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps[:5] == [2.0, 4.0, 8.0, 16.0, 32.0] and max(gaps) <= config.sweep_s + 1
    moves.start(everything, ring, holdings.claims, now + 100)
    sent, _ = run(moves, ring, holdings, now + 100)
    assert sent and moves.is_idle


def test_a_new_sweep_replaces_the_one_under_way_and_late_answers_are_harmless() -> None:
    everything = blocks(500)
    first, second = ring_of("ab", "abc"), ring_of("ab", "abc", "abcd")
    holdings = placed(ring_of("ab"), everything)
    moves = Moves(A)
    moves.start(everything, first, holdings.claims, 0.0)
    under_way = moves.tick(first, holdings.claims, 0.0)
    moves.start(everything, second, holdings.claims, 0.1)
    moves.done(999, 5, 0.1)
    moves.failed(999, 0.1)
    for parcel in under_way:
        moves.done(parcel.number, parcel.n_bytes, 0.1)
        moves.done(parcel.number, parcel.n_bytes, 0.1)
        holdings.put(parcel.to, parcel.blocks)
    sent, _ = run(moves, second, holdings, 0.1)
    assert not pairs(sent) & pairs(under_way)
    assert {parcel.to for parcel in sent} >= {D}


def test_a_sweep_comes_again_after_its_time_and_the_core_sleeps_until_then() -> None:
    ring, holdings = ring_of("ab"), placed(ring_of("ab"), blocks(5))
    moves = Moves(A, MovesConfig(sweep_s=60.0))
    assert moves.wake_at == FOREVER and moves.is_idle
    moves.start(blocks(5), ring, holdings.claims, 10.0)
    assert run(moves, ring, holdings, 10.0)[0] == []
    assert moves.wake_at == 70.0
    assert not moves.wants_sweep(69.9) and moves.wants_sweep(70.0)


def test_one_tick_looks_at_so_many_blocks_and_no_more() -> None:
    ring, everything = ring_of("ab"), blocks(5000)
    holdings = placed(ring, everything)
    n_looked = 0

    def claims(node: NodeId, key: bytes) -> bool:
        nonlocal n_looked
        n_looked += 1
        return holdings.claims(node, key)

    moves = Moves(A, MovesConfig(scan_blocks=100))
    moves.start(everything, ring, claims, 0.0)
    moves.tick(ring, claims, 0.0)
    assert n_looked <= 100 * 6 and moves.wake_at <= 0.0


# ── the intake ─────────────────────────────────────────────────────────────────────────────────────────


def test_offers_at_the_same_time_never_exceed_the_room() -> None:
    intake = Intake()
    wanted = []
    for sender in range(4):
        wanted += intake.offered(blocks(10, 100, seed=sender), lambda key: False, 1500, 0.0)
        assert intake.reserved_bytes <= 1500
    assert len(wanted) == 15
    assert intake.arrived(wanted[0].key, wanted[0].digest, 100, 1.0)
    assert intake.reserved_bytes == 1400
    # What arrived is the store's now: it has 100 bytes less.
    assert intake.offered(blocks(10, 100, seed=9), lambda key: False, 1400, 1.0) == []


def test_only_what_was_announced_is_taken() -> None:
    intake = Intake()
    one, two, three, _ = offered = blocks(4, 100)
    assert intake.offered(offered[:3], lambda key: False, 1000, 0.0) == [one, two, three]
    assert not intake.arrived(offered[3].key, offered[3].digest, 100, 0.0), "never announced"
    assert not intake.arrived(one.key, two.digest, 100, 0.0), "another digest"
    assert not intake.arrived(two.key, two.digest, 99, 0.0), "another size"
    assert intake.arrived(three.key, three.digest, 100, 0.0)
    assert not intake.arrived(three.key, three.digest, 100, 0.0), "a second time"
    assert intake.reserved_bytes == 0


def test_what_is_held_or_on_its_way_already_is_not_wanted_again() -> None:
    intake = Intake()
    held, coming, new = blocks(3, 100)
    assert intake.offered([coming], lambda key: False, 1000, 0.0) == [coming]
    assert intake.offered([held, coming, new], lambda key: key == held.key, 1000, 0.0) == [new]


def test_a_slow_sender_keeps_room_for_a_while_only() -> None:
    intake = Intake(IntakeConfig(patience_s=30.0))
    (block,) = blocks(1, 1000)
    assert intake.offered([block], lambda key: False, 1000, 0.0)
    assert intake.offered(blocks(1, 1000, seed=2), lambda key: False, 1000, 29.0) == []
    assert intake.offered(blocks(1, 1000, seed=2), lambda key: False, 1000, 30.0)
    assert not intake.arrived(block.key, block.digest, 1000, 30.0), "too late"


def test_blocks_that_are_no_blocks_are_not_wanted() -> None:
    (good,) = blocks(1, 100)
    wrong = [
        Block(good.key[:-1], good.digest, 100), Block(good.key, b"", 100), Block(good.key, good.digest, -100),
        Block(good.key, good.digest, 1 << 40),
    ]  # fmt: skip
    assert Intake().offered(wrong, lambda key: False, 1 << 50, 0.0) == []


def test_there_is_a_bound_on_what_is_expected_at_once() -> None:
    intake = Intake(IntakeConfig(expected_max=5))
    assert len(intake.offered(blocks(20, 1), lambda key: False, 1000, 0.0)) == 5
