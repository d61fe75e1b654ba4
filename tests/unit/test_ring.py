"""Promises of ``mesh.cache.ring`` and of the lottery below it, ``mesh.cache.straws``."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from random import Random

import numpy as np
import pytest

from mesh.cache.ring import Ring, RingConfig, RingEpoch, RingKeeper, RingSpec, RingView, arc_of
from mesh.cache.straws import LOAD_MAX, N_ARCS, deal, minus_log, shares
from mesh.ids import Epoch, NodeId

GIB = 1 << 30
CLAIM = Epoch(1, NodeId("n0"))


def node(index: int) -> NodeId:
    return NodeId(f"n{index}")


def spec_of(quotas: dict[NodeId, int], change: int = 1, claim: Epoch = CLAIM) -> RingSpec:
    return RingSpec.of(RingEpoch(claim, change), quotas)


def keys(n: int, seed: int = 1) -> list[bytes]:
    return [hashlib.blake2b(struct.pack("<2Q", seed, index), digest_size=32).digest() for index in range(n)]


def unequal(n: int, seed: int) -> dict[NodeId, int]:
    rng = Random(seed)
    return {node(index): int(GIB * 2 ** rng.uniform(0, 4)) for index in range(n)}


def slow_owners(arc: int, names: list[str], weights: list[int]) -> tuple[int, int]:
    """The rule of ``straws`` in plain Python, without the bound on load."""

    def mix(word: int) -> int:
        word = word * 0x9E3779B97F4A7C15 % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    both = []
    for name in names:
        digest = hashlib.blake2b(name.encode(), digest_size=8, person=b"edgemesh-ring").digest()
        hashed = mix((arc + int.from_bytes(digest, "little")) % 2**64)
        both.append([-math.log((half + 0.5) / 2**32) for half in (hashed >> 32, hashed & 0xFFFFFFFF)])
    everyone = range(len(names))
    first, second = (min(everyone, key=lambda k: both[k][kind] / weights[k]) for kind in (0, 1))
    if first == second:
        others = [k for k in everyone if k != first]
        second = min(others, key=lambda k: min(both[k]) / weights[k] ** 1.75)
    return first, second


def test_the_fast_table_is_the_rule_in_plain_python() -> None:
    quotas = unequal(7, seed=3)
    names, weights = list(quotas), list(quotas.values())
    table = deal(names, weights)
    for arc in Random(1).sample(range(N_ARCS), 2000):
        assert tuple(table[:, arc]) == slow_owners(arc, names, weights)


def test_the_logarithm_is_right_to_thirteen_digits() -> None:
    rng = Random(1)
    halves = [0, 1, 2**31, 2**32 - 1, *(rng.getrandbits(32) for _ in range(5000))]
    for half, found in zip(halves, minus_log(np.array(halves, np.uint64)), strict=True):
        assert found == pytest.approx(-math.log((half + 0.5) / 2**32), rel=1e-12)
        assert found > 0


def test_the_same_members_and_quotas_give_the_same_table_on_every_machine() -> None:
    """Pinned: a mesh of mixed machines and versions must agree. Change it only together with the protocol."""
    table = deal(["a", "b", "c"], [GIB, 3 * GIB, 2 * GIB])
    digest = hashlib.blake2b(table.astype("<u2").tobytes(), digest_size=8).hexdigest()
    assert digest == "62c2683d85df43c1"


def test_the_order_in_which_members_are_named_does_not_matter() -> None:
    quotas = unequal(5, seed=2)
    shuffled = dict(sorted(quotas.items(), key=lambda item: item[1]))
    here, there = RingView(spec_of(quotas)), RingView(spec_of(shuffled))
    assert here.spec == there.spec
    assert all(here.owners(key) == there.owners(key) for key in keys(1000))


def test_owners_are_two_different_members_or_all_there_are() -> None:
    for n in (1, 2, 3, 9):
        view = RingView(spec_of(unequal(n, seed=n)))
        for key in keys(500):
            owners = view.owners(key)
            assert len(set(owners)) == len(owners) == min(n, 2)
            assert set(owners) <= set(view.members)


def test_nobody_owns_anything_in_a_ring_of_nobody() -> None:
    view = RingView(spec_of({node(0): 0}))
    assert view.members == () and view.owners(keys(1)[0]) == ()


@pytest.mark.parametrize("n", [3, 8, 24])
def test_load_follows_quota_and_first_owners_do_too(n: int) -> None:
    quotas = unequal(n, seed=n)
    view = RingView(spec_of(quotas))
    fair = shares(list(quotas.values()))
    for name, share in zip(quotas, fair, strict=True):
        assert view.arcs_of(name) == pytest.approx(share, rel=0.1 if n >= 8 else 0.25)
    firsts = Counter(view.owners_of_arc(arc)[0] for arc in range(N_ARCS))
    for name, quota in quotas.items():
        assert firsts[name] / N_ARCS == pytest.approx(
            quota / sum(quotas.values()), rel=0.1 if n >= 8 else 0.25
        )


def test_no_node_has_more_than_its_bound_however_small_it_is() -> None:
    quotas = {node(index): GIB for index in range(20)}
    quotas |= {NodeId(f"tiny-{index}"): GIB // 2000 for index in range(12)}
    spec = spec_of(quotas)
    view = RingView(spec)
    fair = dict(zip((name for name, _ in spec.quotas), shares([q for _, q in spec.quotas]), strict=True))
    loads = {name: view.arcs_of(name) for name in quotas}
    assert all(loads[name] <= math.ceil(LOAD_MAX * fair[name]) for name in quotas)
    assert sum(loads.values()) == 2 * N_ARCS
    assert any(loads[name] == math.ceil(LOAD_MAX * fair[name]) for name in quotas), "it was needed here"


def test_a_node_with_most_of_the_quota_holds_everything_once_at_most() -> None:
    quotas = {node(0): 100 * GIB, node(1): GIB, node(2): GIB}
    view = RingView(spec_of(quotas))
    assert view.arcs_of(node(0)) <= N_ARCS
    assert view.arcs_of(node(0)) > 0.9 * N_ARCS


def test_a_join_moves_to_the_joiner_and_next_to_nothing_between_others() -> None:
    quotas = unequal(9, seed=5)
    after = RingView(spec_of(quotas))
    for joiner in (node(0), node(4), node(8)):
        before = RingView(spec_of({name: quota for name, quota in quotas.items() if name != joiner}))
        to_joiner = between = 0
        for arc in range(0, N_ARCS, 4):
            for name in set(after.owners_of_arc(arc)) - set(before.owners_of_arc(arc)):
                to_joiner += name == joiner
                between += name != joiner
        assert between <= 0.02 * to_joiner


def test_keys_of_one_arc_have_one_pair_of_owners() -> None:
    view = RingView(spec_of(unequal(4, seed=1)))
    for key in keys(200):
        assert 0 <= arc_of(key) < N_ARCS
        assert view.owners(key) == view.owners_of_arc(arc_of(key))


# ── epochs ─────────────────────────────────────────────────────────────────────────────────────────────


def test_views_converge_whatever_the_order_and_however_often_they_come() -> None:
    specs = [
        spec_of({node(index): GIB for index in range(1 + change % 3)}, change, Epoch(term, node(claimant)))
        for term in (1, 2) for claimant in (0, 1) for change in (1, 2, 3)
    ]  # fmt: skip
    specs.append(spec_of({node(7): GIB}, 3, Epoch(2, node(1))))  # one epoch twice, which should never be
    views = [RingView(spec) for spec in specs]
    ends = set()
    for seed in range(30):
        rng, ring = Random(seed), Ring()
        order = [*views, *views]
        rng.shuffle(order)
        highest: RingSpec | None = None
        for view in order:
            took = ring.take(view)
            assert ring.view is not None
            assert took == (highest is None or view.spec.rank > highest.rank)
            assert highest is None or ring.view.spec.rank >= highest.rank, "a view never goes back"
            highest = ring.view.spec
        ends.add(highest)
    assert len(ends) == 1


def test_what_has_not_moved_yet_is_looked_for_where_it_was_unless_that_node_is_gone() -> None:
    ring = Ring()
    four = {node(index): GIB for index in range(4)}
    before, after = RingView(spec_of(four, 1)), RingView(spec_of({**four, node(4): GIB}, 2))
    ring.take(before)
    ring.take(after)
    moved = next(key for key in keys(1000) if set(before.owners(key)) - set(after.owners(key)))
    assert ring.sources(moved)[:2] == list(after.owners(moved))
    assert set(ring.sources(moved)) == {*after.owners(moved), *before.owners(moved)}
    ring.settle()
    assert ring.sources(moved) == list(after.owners(moved))
    gone = next(iter(set(before.owners(moved)) - set(after.owners(moved))))
    ring = Ring()
    for view in (before, RingView(spec_of({n: GIB for n in (*four, node(4)) if n != gone}, 2))):
        ring.take(view)
    assert gone not in ring.sources(moved)


@pytest.mark.parametrize(
    "quotas",
    [
        (("n1", 1), ("n0", 1)),
        (("n0", 1), ("n0", 2)),
        (("n0", 0),),
        (("n0", -5),),
        (("n0", 2**53),),
        (("N 0", 1),),
        (("a/b", 1),),
    ],
)
def test_a_spec_that_is_no_ring_cannot_be_made(quotas: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ValueError):
        RingSpec(RingEpoch(CLAIM, 1), tuple((NodeId(name), quota) for name, quota in quotas))


# ── the keeper ─────────────────────────────────────────────────────────────────────────────────────────


def test_nodes_that_start_together_join_together() -> None:
    keeper = RingKeeper(RingConfig(settle_s=2.0))
    present = {node(0): GIB}
    assert keeper.next_spec(None, present, (), CLAIM, now=0.0) is None
    assert keeper.wake_at == 2.0
    present[node(1)] = GIB
    assert keeper.next_spec(None, present, (), CLAIM, now=0.5) is None
    first = keeper.next_spec(None, present, (), CLAIM, now=2.0)
    assert first is not None and [name for name, _ in first.quotas] == [node(0), node(1)]
    present[node(2)] = GIB
    assert keeper.next_spec(first, present, (), CLAIM, now=2.5) is None and keeper.wake_at == 4.5
    second = keeper.next_spec(first, present, (), CLAIM, now=4.5)
    assert second is not None and second.epoch > first.epoch
    assert dict(second.quotas) == present
    assert keeper.next_spec(second, present, (), CLAIM, now=9.0) is None, "a calm ring does not change"


def test_a_dead_node_keeps_its_arcs_for_a_while_and_one_that_said_goodbye_does_not() -> None:
    present = {node(0): GIB, node(1): GIB}
    everyone = spec_of({**present, node(2): GIB})
    keeper = RingKeeper(RingConfig(grace_s=5.0))
    assert keeper.next_spec(everyone, present, (), CLAIM, now=10.0) is None
    assert keeper.next_spec(everyone, {**present, node(2): GIB}, (), CLAIM, now=14.0) is None, "it came back"
    assert keeper.next_spec(everyone, present, (), CLAIM, now=15.0) is None, "the clock starts over"
    smaller = keeper.next_spec(everyone, present, (), CLAIM, now=20.0)
    assert smaller is not None and dict(smaller.quotas) == present
    at_once = RingKeeper().next_spec(everyone, present, (node(2),), CLAIM, now=10.0)
    assert at_once is not None and dict(at_once.quotas) == present


def test_a_coordinator_that_was_outranked_publishes_nothing() -> None:
    current = spec_of({node(0): GIB}, 4, Epoch(7, node(1)))
    keeper = RingKeeper(RingConfig(settle_s=0.0))
    assert keeper.next_spec(current, {node(5): GIB}, (), Epoch(6, node(9)), now=0.0) is None
    later = keeper.next_spec(current, {node(5): GIB}, (node(0),), Epoch(8, node(0)), now=0.0)
    assert later is not None and later.epoch == RingEpoch(Epoch(8, node(0)), 5)


def test_a_quota_that_hardly_changes_moves_nothing() -> None:
    current = spec_of({node(0): 100 * GIB, node(1): GIB})
    keeper = RingKeeper()
    assert keeper.next_spec(current, {node(0): 105 * GIB, node(1): GIB}, (), CLAIM, now=0.0) is None
    halved = keeper.next_spec(current, {node(0): 50 * GIB, node(1): 0}, (), CLAIM, now=0.0)
    assert halved is not None and dict(halved.quotas) == {node(0): 50 * GIB}
