"""What went wrong once and was understood, each as the shortest story that shows it."""

from __future__ import annotations

from dataclasses import replace

from mesh import topics
from mesh.facts import Elected
from mesh.ids import Epoch, NodeId
from mesh.messages import LeaseRecord
from tests.sim import checkers
from tests.sim.elections import election_of, election_world, is_settled
from tests.sim.engine import info_of
from tests.sim.faults import CALM
from tests.sim.meshes import mesh_world


def test_a_term_won_twice_after_a_missed_claim_still_gives_two_epochs_in_order() -> None:
    """Found by seeds 0 and 486 of the first election storms.

    ``b`` is cut off while ``a`` wins the next term; before ``b`` is back, a late copy of an old claim is what
    the broker retains. ``b`` cannot know of the new term and wins it again under its own name. The promise is
    one node per *epoch*: the two are different, in order, and all end above both.
    """
    world = election_world(1, n_nodes=2, faults=CALM)
    world.start_all()
    assert world.run_until(lambda: is_settled(world), within_s=10)
    a = world.last_elected
    assert a is not None
    b = next(node for node in world.hosts if node != a)
    term = election_of(world.cores()[a]).epoch.term
    old = LeaseRecord(kind="claim", epoch=Epoch(term, b), ttl_s=2.5, beat=0)

    world.cut_off(b, 12.0)
    world.restart(a)
    assert world.run_until(lambda: election_of(world.cores()[a]).epoch == Epoch(term + 1, a), within_s=10)
    world.run(1.0)
    world.kill(a)
    site = world.network.brokers["site"]
    world.network._at_broker(site, topics.COORDINATOR, None, old, b)
    world.run(14.0)
    world.start(a)
    assert world.run_until(lambda: is_settled(world), within_s=12)

    winners = {e.what.epoch for e in world.history if isinstance(e.what, Elected)}
    assert {Epoch(term + 1, a), Epoch(term + 1, b)} <= winners
    assert not checkers.one_life_per_epoch(world.history)
    assert not checkers.epochs_only_grow(world.history)
    assert not checkers.commands_obeyed_in_order(world.history)
    assert election_of(world.cores()[a]).epoch > max(Epoch(term + 1, a), Epoch(term + 1, b))


def test_an_older_description_that_comes_back_late_does_not_idle_a_node_for_ever() -> None:
    """Found by seed 246: a copy of ``slots=0``, from before the model was loaded, overtook ``slots=2``.

    It was the same incarnation, so everybody believed it, the retained topic kept it, and the only worker
    never got a task. A node now repeats what it is when it hears an older version of it.
    """
    mesh = mesh_world(5, n_nodes=1, faults=CALM, n_tasks=3, length_s=10.0)
    world = mesh.world
    node = NodeId("node-0")
    world.start_all()
    world.run(5.0)
    site = world.network.brokers["site"]
    _, current, _ = site.retained["INFO", node]
    assert current.slots > 0
    late = replace(info_of(node), incarnation=current.incarnation)
    world.network._at_broker(site, topics.INFO, node, late, node)
    world.run(10.0)
    assert site.retained["INFO", node][1] == current
    assert mesh.heal(within_s=30) is None and mesh.are_clients_content
