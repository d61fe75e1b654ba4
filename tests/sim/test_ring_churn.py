"""The ring under everything that can go wrong: it goes up only, and afterwards all nodes have the same.

The promises are numbered in ``docs/failure-semantics.md``. ``EDGEMESH_SIM_SEED=n`` replays one seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any
from unittest.mock import patch

import pytest

from mesh import packets
from mesh.cache.ring import RingKeeper, RingSpec
from mesh.cache.sharding import RING_KEY, Sharding
from mesh.core import Effect, Fact, Save
from mesh.facts import Deposed
from mesh.ids import MeshName, NodeId
from mesh.messages import RingRecord
from mesh.topics import CATALOGUE, INBOX, RING, topic_of
from tests.sim import ring_checkers
from tests.sim.faults import CALM
from tests.sim.meshes import Mesh, mesh_world
from tests.sim.mutants import RingsGoBack
from tests.sim.sharing import SharingShell, sharding_of, sharing_disagreements
from tests.sim.test_mesh_safety import HEALS_WITHIN_S, STORM_S, report
from tests.sim.world import seeds

# Verdict, grace and settling after the last fault, a fetch that waits its turn, and room for late clocks.
AGREES_WITHIN_S = 40.0
N_SEEDS_MAX = 60


def storm(seed: int, **how: object) -> Mesh:
    mesh = mesh_world(seed, length_s=STORM_S, is_shared=True, **how)  # type: ignore[arg-type]
    mesh.storm(STORM_S)
    return mesh


def shell_of(mesh: Mesh) -> SharingShell:
    assert isinstance(mesh.world.shell, SharingShell)
    return mesh.world.shell


def disagreements(mesh: Mesh) -> list[str]:
    """Of what is left once stores rest. Heals the mesh first."""
    wrong = mesh.heal(within_s=HEALS_WITHIN_S)
    shell = shell_of(mesh)
    shell.is_changing = False
    mesh.world.run_until(
        lambda: not sharing_disagreements(mesh.world, shell.quotas), within_s=AGREES_WITHIN_S
    )
    return [*([wrong] if wrong else []), *sharing_disagreements(mesh.world, shell.quotas)]


def violations(mesh: Mesh) -> list[str]:
    found = disagreements(mesh)
    history = mesh.world.history
    return [
        *found,
        *ring_checkers.rings_only_grow(history),
        *ring_checkers.one_ring_per_epoch(history),
        *ring_checkers.made_while_elected(history),
    ]


@pytest.mark.parametrize("block", range(2))
def test_after_a_storm_all_nodes_have_one_ring_and_true_catalogues(block: int) -> None:
    for seed in seeds(30, block * 30):
        mesh = storm(seed)
        found = violations(mesh)
        assert not found, report(seed, mesh, found)


def test_split_over_three_brokers_and_merged_all_nodes_have_one_ring() -> None:
    for seed in seeds(20):
        mesh = storm(seed, n_brokers=3)
        found = violations(mesh)
        assert not found, report(seed, mesh, found)


def test_a_mesh_whose_brokers_die_with_their_hosts_keeps_one_ring() -> None:
    """A new broker has kept nothing: who coordinates, and who holds what, is said again."""
    for seed in seeds(20):
        mesh = storm(seed, is_hosted=True)
        found = violations(mesh)
        assert not found, report(seed, mesh, found)


def test_what_is_said_of_the_ring_and_of_catalogues_survives_the_wire_unchanged() -> None:
    kinds: Counter[str] = Counter()

    def through(sender: str, key: Hashable, message: Any) -> Any:
        to = NodeId(str(key)) if topic_of(message) is INBOX else None
        (packet,) = packets.outgoing(message, mesh=MeshName("sim"), me=NodeId(sender), to=to)
        heard = packets.read(packet, mesh=MeshName("sim"))
        assert heard is not None and heard.message == message
        kinds[type(message).__name__] += 1
        return heard.message

    for seed in range(2):
        mesh = mesh_world(seed, length_s=STORM_S, is_shared=True)
        mesh.world.network.wire = through
        mesh.storm(STORM_S)
        assert not violations(mesh)
    assert {"RingRecord", "CatalogueDelta", "CatalogueWhole", "CatalogueVersion"} <= set(kinds)


# ── a calm mesh: what one change costs ──────────────────────────────────────────────────────────────


def calm(n_nodes: int, seed: int = 0, **how: object) -> tuple[Mesh, Counter[str]]:
    """A mesh at rest, and what is said in it of the ring and of catalogues from now on, by kind."""
    said: Counter[str] = Counter()

    def count(sender: str, key: Hashable, message: Any) -> Any:
        if topic_of(message) in (RING, CATALOGUE):
            said[type(message).__name__] += 1
        return message

    mesh = mesh_world(seed, n_nodes=n_nodes, faults=CALM, n_tasks=1, is_shared=True, **how)  # type: ignore[arg-type]
    mesh.world.start_all()
    mesh.world.run(20.0)
    shell_of(mesh).is_changing = False
    mesh.world.run(10.0)
    assert not disagreements(mesh)
    mesh.world.network.wire = count
    return mesh, said


def rings_made(mesh: Mesh, since: float) -> list[float]:
    """When each new ring was made."""
    made: dict[tuple[object, int], float] = {}
    for entry in mesh.world.history:
        if isinstance(entry.what, Save) and entry.what.key == RING_KEY:
            assert isinstance(entry.what.record, RingRecord)
            made.setdefault((entry.what.record.epoch, entry.what.record.change), entry.at)
    return [at for at in made.values() if at >= since]


def bystander(mesh: Mesh) -> NodeId:
    """A node that gives, and does not coordinate."""
    quotas = shell_of(mesh).quotas
    return next(node for node in mesh.world.remaining if quotas[node] and node != mesh.world.last_elected)


def test_nodes_that_start_together_join_together() -> None:
    mesh, _ = calm(5)
    assert len(rings_made(mesh, since=0.0)) <= 2, "those that come within settle_s of the first, and the rest"


@pytest.mark.parametrize("is_hosted", [False, True])
def test_a_mesh_at_rest_says_nothing_of_its_memory(is_hosted: bool) -> None:
    mesh, said = calm(4, is_hosted=is_hosted)
    mesh.world.run(60.0)
    assert not said


def test_a_death_makes_one_new_ring_ten_seconds_later_and_the_return_one_more() -> None:
    mesh, said = calm(5)
    world, node = mesh.world, bystander(mesh)
    died_at = world.now
    world.kill(node)
    world.run(30.0)
    (made_at,) = rings_made(mesh, since=died_at)
    assert 5.0 < made_at - died_at < 11.0, "verdict and grace"
    assert said == {"RingRecord": 1}
    back_at = world.now
    world.start(node)
    world.run(30.0)
    (made_at,) = rings_made(mesh, since=back_at)
    assert 2.0 <= made_at - back_at < 4.0, "settled"
    assert not disagreements(mesh)


def test_a_restart_within_the_grace_changes_no_ring() -> None:
    mesh, _ = calm(5)
    world, node = mesh.world, bystander(mesh)
    killed_at = world.now
    world.kill(node)
    world.run(4.0)
    world.start(node)
    world.run(30.0)
    assert not rings_made(mesh, since=killed_at)
    assert not disagreements(mesh)


def test_a_goodbye_makes_one_new_ring_at_once() -> None:
    mesh, _ = calm(5)
    world, node = mesh.world, bystander(mesh)
    left_at = world.now
    world.leave(node)
    world.run(30.0)
    (made_at,) = rings_made(mesh, since=left_at)
    assert made_at - left_at < 1.0


def test_a_new_coordinator_numbers_the_ring_anew_and_moves_nothing_at_once() -> None:
    mesh, _ = calm(5)
    world = mesh.world
    died = world.last_elected
    assert died is not None
    before = {node: sharding_of(core).spec for node, core in world.cores().items()}
    died_at = world.now
    world.kill(died)
    world.run(4.0)
    for node, core in world.cores().items():
        was, now = before[node], sharding_of(core).spec
        assert was is not None and now is not None
        assert now.quotas == was.quotas and now.epoch.claim > was.epoch.claim
    world.run(30.0)
    assert len(rings_made(mesh, since=died_at)) == 2, "the new number, and later the new members"


def test_after_a_power_cut_nodes_go_on_with_the_ring_their_disks_know() -> None:
    """The broker has forgotten everything, too; nodes come back one by one, within the grace of a member."""
    mesh, _ = calm(5, is_hosted=True)
    world = mesh.world
    before = {sharding_of(core).spec for core in world.cores().values()}
    (was,) = {spec.quotas for spec in before if spec is not None}
    for node in world.remaining:
        world.kill(node, is_power_cut=True)
    world.run(60.0)
    back_at = world.now
    for index, node in enumerate(world.remaining):
        world.queue.after(0.5 * index, world.start, node)
    world.run(40.0)
    assert not disagreements(mesh)
    for entry in world.history:
        if entry.at >= back_at and isinstance(entry.what, Save) and entry.what.key == RING_KEY:
            assert isinstance(entry.what.record, RingRecord)
            assert tuple(entry.what.record.quotas.items()) == was, "nobody was taken out meanwhile"


def test_a_mesh_that_has_lost_its_disks_makes_the_same_ring_again() -> None:
    mesh, _ = calm(4)
    world = mesh.world
    was = sharding_of(world.cores()[NodeId("node-0")]).spec
    for node in world.remaining:
        world.kill(node)
        world.hosts[node].disk.clear()
    world.network.brokers["site"].retained.clear()
    world.run(20.0)
    world.start_all()
    world.run(30.0)
    assert not disagreements(mesh)
    now = sharding_of(world.cores()[NodeId("node-0")]).spec
    assert was is not None and now is not None and now.quotas == was.quotas


# ── planted bugs ────────────────────────────────────────────────────────────────────────────────────


def planted(
    target: str,
    bug: object,
    checker: Callable[[Mesh], list[str]],
    run: Callable[[int], Mesh] = storm,
    first: int = 0,
) -> None:
    """Fail unless some seed turns the checker red. ``first``: one that is known to, to be quick."""
    for seed in range(first, first + N_SEEDS_MAX):
        with patch(target, bug):
            try:
                if checker(run(seed)):
                    return
            except AssertionError:
                continue  # a core's own assertion saw it first; the checker must see it too
    pytest.fail(f"{N_SEEDS_MAX} seeds without a violation: the checker is blind")


def over(checker: Callable[..., list[str]]) -> Callable[[Mesh], list[str]]:
    return lambda mesh: checker(mesh.world.history)


def test_a_node_that_takes_whatever_came_last_turns_the_growth_checker_red() -> None:
    planted("coordinator.stack.Sharding", RingsGoBack, over(ring_checkers.rings_only_grow), first=26)


def test_a_coordinator_that_goes_on_after_its_end_turns_the_maker_checker_red() -> None:
    learn = Sharding.learn

    def deaf(sharding: Sharding, fact: Fact, now: float) -> list[Effect]:
        return [] if isinstance(fact, Deposed) else learn(sharding, fact, now)

    with patch("mesh.agreement.fence.Fence.admits", lambda fence, epoch: True):
        planted("mesh.cache.sharding.Sharding.learn", deaf, over(ring_checkers.made_while_elected), first=14)


def test_a_coordinator_that_does_not_count_turns_the_epoch_checker_red() -> None:
    next_spec = RingKeeper.next_spec

    def uncounted(keeper: RingKeeper, current: RingSpec | None, *args: Any) -> RingSpec | None:
        spec = next_spec(keeper, current, *args)
        if spec is None or current is None:
            return spec
        again = RingSpec(current.epoch, spec.quotas)
        return again if again.rank > current.rank else spec  # nodes take what outranks what they have

    target = "mesh.cache.ring.RingKeeper.next_spec"
    planted(target, uncounted, over(ring_checkers.one_ring_per_epoch), first=6)


def test_a_coordinator_that_does_not_number_the_ring_anew_is_seen() -> None:
    with (
        patch("mesh.cache.sharding.Sharding._renumbered", lambda sharding, claim: None),
        pytest.raises(AssertionError),
    ):
        test_a_new_coordinator_numbers_the_ring_anew_and_moves_nothing_at_once()


def test_a_node_that_never_asks_for_the_whole_turns_the_catalogue_check_red() -> None:
    planted("mesh.cache.exchange.Exchange.want", lambda *args: [], disagreements, first=1)


def test_a_node_that_does_not_say_its_version_on_a_new_broker_turns_the_catalogue_check_red() -> None:
    def mute(exchange: object, is_up: bool, now: float) -> list[Effect]:
        exchange._is_linked = is_up  # type: ignore[attr-defined]
        return []

    planted(
        "mesh.cache.exchange.Exchange.on_link",
        mute,
        disagreements,
        lambda seed: storm(seed, is_hosted=True),
        first=5,
    )
