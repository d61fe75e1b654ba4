"""Coordinators come and go: what that does to tasks, over a bag of messages."""

from __future__ import annotations

from coordinator.scheduler import Mode
from mesh.core import Broadcast
from mesh.facts import Deposed, LinkUp, MemberChanged
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import (
    TaskRecord,
    TaskResult,
    TaskStatus,
)
from tests.unit.task_world import ask, held_by, mesh

# ── coordinators come and go ────────────────────────────────────────────────────────────────────────


def test_a_new_coordinator_carries_on_what_was_acknowledged() -> None:
    world = mesh(3, service_s=3, slots=1)
    for i in range(9):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(1)
    world.kill("n0")
    world.bury("n0")
    world.elect("n1")
    world.run(60)
    for i in range(9):
        assert {result.text for result in world.results(f"t{i}")} == {f"answer to p{i}"}


def test_a_change_of_coordinator_disturbs_no_running_work() -> None:
    world = mesh(3, service_s=5, slots=1)
    for i in range(3):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(1)
    world.learn("n0", Deposed(Epoch(1, NodeId("n0"))))
    world.elect("n1")
    world.run(20)
    assert len(world.started) == 3
    assert all(world.results(f"t{i}")[0].attempt == 1 for i in range(3))


def test_a_submission_during_a_failover_is_neither_lost_nor_doubled() -> None:
    world = mesh(3)
    world.say(ask("before"))  # no id: only its body and age can tell it
    world.run(0.2)
    world.kill("n0")
    world.say(ask("during"))
    world.say(ask("during"))  # two clients may ask the same
    world.bury("n0")
    world.run(2)
    world.elect("n1")
    world.run(20)
    prompts = sorted(assign.submit.prompt or "" for _, _, assign in world.started)
    assert prompts.count("during") == 2
    assert len({result.task for result in world.heard(TaskResult) if result.text == "answer to before"}) == 1


def test_a_submission_said_while_recovering_is_taken_when_recovered() -> None:
    world = mesh(3)
    world.kill("n2")  # its inventory will not come, and nobody knows that it is dead
    world.learn("n0", Deposed(Epoch(1, NodeId("n0"))))
    world.elect("n1")
    assert world.scheduler.mode is Mode.RECOVERING
    world.say(ask(id=TaskId("t1")))
    world.run(5)
    assert world.states("t1")[-1] == "done"


def test_recovered_work_waits_for_a_live_node_whose_answer_is_late() -> None:
    """That node is the only one left which knows that the task is done."""
    world = mesh(4, service_s=0.5)
    task = held_by("n2", ["n1", "n2", "n3"], "t")
    world.say(ask(id=task))
    world.run(1)
    assert len(world.started) == 1
    world.kill("n0")
    world.bury("n0")
    world.cut.add(frozenset((NodeId("n1"), NodeId("n2"))))
    world.elect("n1")
    world.run(3.1)  # long enough that n3 was asked to hold what n1 only remembers having heard
    assert world.scheduler.mode is Mode.ACTIVE
    world.say(ask("new", id=TaskId("new")))
    world.cut.clear()
    world.run(10)
    assert [assign.task for _, _, assign in world.started] == [task, "new"]
    assert {result.epoch.term for result in world.results(task)} == {1}


def test_a_fenced_coordinator_can_do_no_harm() -> None:
    world = mesh(3, service_s=1)
    world.elect("n1", told=False)  # n0 goes on believing in itself
    world.run(3)
    world.say(ask(id=TaskId("t1")))
    world.run(5)
    publishers = {
        node for _, node, m in world.said if isinstance(m, TaskStatus | TaskResult) and m.task == "t1"
    }
    assert publishers == {"n1"}
    assert len(world.started) == 1


def test_an_old_disk_does_not_bring_a_settled_task_back_to_life() -> None:
    world = mesh(3, service_s=2, slots=1)
    for i in range(6):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(1)
    world.kill("n2")
    world.bury("n2")
    world.run(30)
    n_started = len(world.started)
    world.start("n2")
    world.run(10)
    assert len(world.started) == n_started
    for key, record in world.hosts[NodeId("n2")].journal.items():
        if isinstance(record, TaskRecord):
            assert record.outcome is not None, f"{key} is still open on the disk that was away"


def test_parts_that_settled_one_task_differently_end_with_one_outcome() -> None:
    world = mesh(2, service_s=1, slots=1)
    world.say(ask("a", id=TaskId("a"), deadline_s=30))
    world.say(ask("b", id=TaskId("b"), deadline_s=30))
    world.run(0.2)
    world.cut.add(frozenset((NodeId("n0"), NodeId("n1"))))
    world.bury("n1")  # n0 and n1 each think the other is dead
    world.bury("n0")
    world.elect("n1", told=False)
    world.run(60)
    world.cut.clear()
    world.learn("n0", Deposed(Epoch(1, NodeId("n0"))))
    world.learn("n0", MemberChanged(NodeId("n1"), "alive", 2))
    world.learn("n1", MemberChanged(NodeId("n0"), "alive", 2))
    world.run(10)
    for task in "ab":
        outcomes = [host.journal[f"task/{task}"].outcome for host in world.up]
        assert outcomes[0] is not None and outcomes[0] == outcomes[1]


def test_a_new_broker_hears_everything_retained_again() -> None:
    world = mesh(3, slots=1)
    world.say(ask(id=TaskId("done")))
    world.run(5)
    effects = world.hosts[NodeId("n0")].stack.learn(LinkUp(2, NodeId("n1")), world.now)
    said = [effect.message for effect in effects if isinstance(effect, Broadcast)]
    assert {type(message) for message in said if getattr(message, "task", None) == "done"} >= {
        TaskResult,
        TaskStatus,
    }
