"""What went wrong once and was understood, each as the shortest story that shows it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from coordinator.scheduler import Mode, Scheduler
from coordinator.store import RecordStore
from coordinator.task import CANCELLED_BY_CLIENT, digest_of
from mesh import topics
from mesh.agreement.fence import Fence
from mesh.core import Broadcast, Effect, Send
from mesh.facts import Elected, MemberChanged
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import (
    Assign,
    AttemptEnded,
    AttemptId,
    AttemptsRunning,
    CancelTask,
    Held,
    Inventory,
    LeaseRecord,
    Outcome,
    Recall,
    Submit,
    TaskRecord,
    TaskResult,
    TaskStatus,
)
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


def _recovering_scheduler(*, hears_cancel: bool = True) -> tuple[Scheduler, list[Effect], TaskRecord]:
    """A new coordinator ``a`` with an open record, a client's cancel, and ``b`` that has not answered yet."""
    a, b = NodeId("a"), NodeId("b")
    record = TaskRecord(
        task=TaskId("t"),
        submit=Submit(prompt="hi", id=TaskId("t")),
        digest=digest_of(Submit(prompt="hi")),
        budget_s=None,
        outcome=None,
        epoch=Epoch(1, b),
    )
    store = RecordStore(now=0.0, journal={"task/t": record})
    scheduler = Scheduler(me=a, fence=Fence(), store=store, rng=Random(0))
    scheduler.learn(MemberChanged(b, "alive", 1), 0.0)
    if hears_cancel:
        scheduler.receive(CancelTask(task=TaskId("t")), NodeId("client"), 0.0)
    effects = scheduler.learn(Elected(Epoch(2, a)), 0.0)
    effects += scheduler.tick(scheduler.wake_at)
    while scheduler.mode is not Mode.ACTIVE:
        effects += scheduler.tick(scheduler.wake_at)
    return scheduler, effects, record


def test_a_cancel_during_a_failover_waits_for_the_node_that_knows_how_the_task_ended() -> None:
    """Found by seed 1117 with one node in trouble at a time: a client read ``cancelled``, then ``done``."""
    scheduler, effects, record = _recovering_scheduler()
    assert "cancelled" not in scheduler.counts
    recalls = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Recall)]
    done = Outcome(
        state="done",
        text="hello",
        finish_reason="stop",
        reason=None,
        node=NodeId("b"),
        attempt=1,
        epoch=Epoch(1, NodeId("b")),
    )
    effects += scheduler.receive(
        Inventory(
            epoch=Epoch(2, NodeId("a")),
            records=[replace(record, outcome=done)],
            running=[],
            ended=[],
            is_last=True,
            round=recalls[-1].round,
        ),
        NodeId("b"),
        2.0,
    )
    results = [e.message for e in effects if isinstance(e, Broadcast) and isinstance(e.message, TaskResult)]
    assert [result.state for result in results] == ["done"]


def test_a_cancel_during_a_failover_is_not_put_off_for_ever() -> None:
    scheduler, _, _ = _recovering_scheduler()
    while scheduler.counts.get("cancelled") != 1:
        assert scheduler.wake_at < 6.0
        scheduler.tick(scheduler.wake_at)


def test_an_attempt_stopped_for_its_client_ends_the_task_under_the_next_coordinator() -> None:
    """Found by seed 2525: it settled the task in its own words, and would have run it again without them."""
    scheduler, effects, _ = _recovering_scheduler(hears_cancel=False)
    stopped = Outcome(
        state="cancelled",
        text="hel",
        finish_reason=None,
        reason=CANCELLED_BY_CLIENT,
        node=NodeId("b"),
        attempt=1,
        epoch=Epoch(1, NodeId("b")),
    )
    ended = AttemptEnded(task=TaskId("t"), attempt=1, epoch=stopped.epoch, outcome=stopped)
    effects += scheduler.receive(ended, NodeId("b"), 2.0)
    results = [e.message for e in effects if isinstance(e, Broadcast) and isinstance(e.message, TaskResult)]
    assert [(result.state, result.text) for result in results] == [("cancelled", "hel")]


def test_a_worker_that_starts_anew_with_a_task_not_yet_durable_does_not_end_the_coordinator() -> None:
    """Found by a storm: said again during a failover, adopted because it ran, and its worker restarted."""
    a, b = NodeId("a"), NodeId("b")
    scheduler = Scheduler(me=a, fence=Fence(), store=RecordStore(now=0.0), rng=Random(0))
    scheduler.learn(MemberChanged(b, "alive", 1), 0.0)
    effects = scheduler.learn(Elected(Epoch(2, a)), 0.0)
    (recall,) = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Recall)]
    empty = Inventory(epoch=recall.epoch, records=[], running=[], ended=[], is_last=True, round=recall.round)
    scheduler.receive(empty, b, 0.1)
    scheduler.receive(Submit(prompt="hi", id=TaskId("t")), NodeId("client"), 0.2)
    running = AttemptId(task=TaskId("t"), attempt=1, epoch=Epoch(1, b))
    scheduler.receive(AttemptsRunning(attempts=[running]), b, 0.3)
    effects = scheduler.learn(MemberChanged(b, "alive", 2), 0.4)
    assert not [e for e in effects if isinstance(e, Send) and isinstance(e.message, Assign)]
    effects = scheduler.receive(Held(epoch=Epoch(2, a), task=TaskId("t"), settled=False), b, 0.5)
    said = [e.message for e in effects if isinstance(e, Broadcast) and isinstance(e.message, TaskStatus)]
    assert [status.state for status in said] == ["queued"]
