"""Promises of the mesh's cache under churn, over many seeds; and, for each, a planted bug that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from mesh.cache.bloom import contains, probes
from mesh.cache.catalogue import Catalogues, CatalogueWriter
from mesh.cache.intake import Intake
from mesh.cache.moves import Moves
from mesh.cache.ring import Ring
from mesh.ids import NodeId
from tests.property.cache_world import CacheWorld
from tests.unit import test_catalogue, test_moves

MIB = 1 << 20
SEEDS = range(6)

NODES = tuple(NodeId(f"n{index}") for index in range(6))


def world_of(n: int, seed: int, quota: int = 400 * MIB, bytes_per_s: float = 40e6) -> CacheWorld:
    """Unequal quotas, from one to two times ``quota``; everybody knows the ring and each other."""
    rng = Random(seed)
    world = CacheWorld({node: int(quota * rng.choice((1, 1.5, 2))) for node in NODES[:n]}, seed, bytes_per_s)
    world.run(6.0)
    return world


def nothing_is_lost_when_one_of_four_dies(seed: int) -> None:
    world = world_of(4, seed)
    keys = world.put(60)
    world.run(8.0)
    assert all(world.copies(key) >= 2 for key in keys), "everything is there twice"
    world.kill(world.rng.choice(NODES[:4]))
    lost = [key for key in keys if world.copies(key) == 0]
    assert not lost, f"{seed=}: {len(lost)} keys lost at the death"
    world.run(30.0)
    once = [key for key in keys if world.copies(key) < 2]
    assert not once, f"{seed=}: {len(once)} keys were not repaired"
    world.kill(world.alive()[-1].name)
    assert all(world.copies(key) >= 1 for key in keys), f"{seed=}: repaired, so a second death loses nothing"


def churn(world: CacheWorld, keys: list[bytes], *, may_kill: bool) -> None:
    """Something happens every few seconds; never two deaths within a repair."""
    for _ in range(4):
        event = world.rng.choice(("join", "leave", "kill", "restart", "put"))
        alive = [node.name for node in world.alive()]
        absent = [node for node in NODES if node not in world.nodes]
        if event == "join" and absent:
            world.join(absent[0], world.alive()[0].quota)
        elif event == "kill" and may_kill and len(alive) > 3:
            world.kill(world.rng.choice(alive))
            world.run(20.0)
        elif event == "restart" and len(alive) > 2:
            name = world.rng.choice(alive)
            world.kill(name)
            world.run(world.rng.uniform(0.5, 12.0))
            world.restart(name)
        elif event == "leave" and len(alive) > 3:
            world.leave(world.rng.choice(alive))
            world.run(20.0)
        else:
            keys += world.put(15)
        world.run(world.rng.uniform(1.0, 10.0))


def views_converge_and_every_live_copy_is_found(seed: int) -> None:
    world = world_of(3 + seed % 2, seed)
    keys = world.put(40)
    world.run(8.0)
    churn(world, keys, may_kill=True)
    world.run(30.0)
    assert len(world.views()) == 1, f"{seed=}: {world.views()}"
    (spec,) = world.views()
    assert [name for name, _ in spec.quotas] == [node.name for node in world.alive()], f"{seed=}"
    for key in keys:
        if world.copies(key):
            for reader in world.alive():
                # A node distrusted for an honest false positive is asked again after a while.
                found = reader.finds(key) or reader.finds_later(key)
                assert found, f"{seed=}: {reader.name} misses a live copy"


def bytes_are_never_over_quota(seed: int) -> None:
    """The world asserts it at every step; here far more comes in than there is room for."""
    world = world_of(4, seed, quota=2 * MIB)
    keys: list[bytes] = []
    for _ in range(6):
        keys += world.put(80)
        world.run(1.0)
    churn(world, keys, may_kill=True)
    held = sum(node.order.n_bytes for node in world.alive())
    assert held >= 0.6 * sum(node.quota for node in world.alive()), f"{seed=}: and the room is used"


def a_read_finds_what_a_join_has_not_moved_yet(seed: int) -> None:
    world = world_of(3, seed, bytes_per_s=50_000.0)  # a block in twenty seconds
    keys = world.put(60, n_bytes=1_000_000)
    world.run(8.0)
    world.join(NODES[3], 800 * MIB)
    world.run(5.0)
    joined = world.nodes[NODES[3]]
    assert joined.ring.view is not None and NODES[3] in joined.ring.view.quotas
    assert len(joined.store) < 15, "little has moved yet"
    assert all(joined.finds(key) for key in keys), f"{seed=}"
    assert all(node.finds(key) for node in world.alive() for key in keys), f"{seed=}"


PROMISES = [
    nothing_is_lost_when_one_of_four_dies,
    views_converge_and_every_live_copy_is_found,
    bytes_are_never_over_quota,
    a_read_finds_what_a_join_has_not_moved_yet,
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise_holds_for_every_seed(promise: Callable[[int], None]) -> None:
    for seed in SEEDS:
        promise(seed)


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise_holds_for_many_more_seeds(promise: Callable[[int], None]) -> None:
    for seed in range(100, 160):
        promise(seed)


# ── planted bugs: each turns its promise red ───────────────────────────────────────────────────────────


def a_dead_owner_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Whoever is said to have a copy is counted on, though it is in no ring any more."""
    patch.setattr("mesh.cache.catalogue.Catalogues.forget", lambda self, node: None)

    def sources(self: Ring, key: bytes) -> list[NodeId]:
        views = [self.view, *self.earlier] if self.view else []
        return sorted({node for view in views for node in view.owners(key)})

    patch.setattr(Ring, "sources", sources)


def any_view_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ring, "is_newer", lambda self, spec: self.view is None or spec != self.view.spec)


def a_dropped_key_takes_the_bits_of_others_along(patch: pytest.MonkeyPatch) -> None:
    def drop(self: CatalogueWriter, key: bytes) -> None:
        if key in self._keys:
            self._keys.remove(key)
            for position in probes(key, len(self._counts), self._salt):
                if self._counts[position]:
                    self._counts[position] = 0
                    self._flip(position)

    patch.setattr(CatalogueWriter, "drop", drop)


def every_offer_is_taken(patch: pytest.MonkeyPatch) -> None:
    """What is set aside already is not counted: each sender alone has room, all together have not."""
    real = Intake.offered

    def offered(self: Intake, blocks: Any, has: Any, free_bytes: int, now: float) -> Any:
        return real(self, blocks, has, free_bytes + self.reserved_bytes, now)

    patch.setattr(Intake, "offered", offered)


def only_new_owners_are_asked(patch: pytest.MonkeyPatch) -> None:
    """No pull-through: neither earlier views nor other nodes' catalogues."""

    def holders(self: Any, key: bytes, sources: Any, now: float) -> list[NodeId]:
        return [node for node in list(sources)[:1] if self.claims(node, key)]

    patch.setattr("mesh.cache.catalogue.Catalogues.holders", holders)


@pytest.mark.parametrize(
    ("bug", "promise"),
    [
        (a_dead_owner_is_waited_for, nothing_is_lost_when_one_of_four_dies),
        (any_view_is_taken, views_converge_and_every_live_copy_is_found),
        (every_offer_is_taken, bytes_are_never_over_quota),
        (only_new_owners_are_asked, a_read_finds_what_a_join_has_not_moved_yet),
    ],
    ids=lambda value: value.__name__,
)
def test_a_planted_bug_breaks_its_promise(
    bug: Callable[[pytest.MonkeyPatch], None],
    promise: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in SEEDS:
            promise(seed)


def test_a_planted_bug_in_the_catalogue_makes_live_copies_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same promise without the bug: ``test_catalogue``, deltas lead where a whole one leads."""
    a_dropped_key_takes_the_bits_of_others_along(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in SEEDS:
            rng, writer = Random(seed), CatalogueWriter(1, seed)
            keys = [rng.randbytes(32) for _ in range(300)]
            for key in keys:
                writer.add(key)
            for key in keys[:100]:
                writer.drop(key)
            writer.next_version()
            assert all(contains(writer.whole().bits, key, seed) for key in keys[100:])


def test_a_planted_bug_in_the_rate_lets_bytes_leave_too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def earn(self: Moves, now: float) -> None:
        self._credit = 1e12

    monkeypatch.setattr(Moves, "_earn", earn)
    with pytest.raises(AssertionError):
        test_moves.test_bytes_leave_no_faster_than_the_rate(0)


def test_a_planted_bug_in_trust_lets_a_lie_cost_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalogues, "_distrust", lambda self, peer, now: None)
    with pytest.raises(AssertionError):
        test_catalogue.test_a_lying_catalogue_costs_one_miss_and_is_then_distrusted_for_a_while()
