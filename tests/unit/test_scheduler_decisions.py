"""What the coordinator decides by value and deadline, as client and workers see it."""

from __future__ import annotations

import re

from coordinator.policy.policies import policy_named
from mesh.ids import TaskId
from mesh.messages import (
    Assign,
    Outcome,
)
from tests.unit.task_world import World, answer_of, ask

# ── decisions, through the whole coordinator ───────────────────────────────────────────────


def five_seconds(assign: Assign) -> Outcome:
    return answer_of(assign, service_s=5.0)


def test_what_cannot_be_done_in_time_is_rejected_at_once_and_the_client_is_told_the_numbers() -> None:
    world = World(slots=1, service_s=5.0, answer=five_seconds).start("n0")
    world.elect("n0")
    for k in range(3):  # what a node takes is believed once three answers have been seen
        world.say(ask(f"lesson {k}"))
        world.run(6)
    world.say(ask(id=TaskId("hopeless"), deadline_s=3.0, reply_to="me/replies"))
    assert world.states("hopeless") == ["rejected"]
    (status,) = world.replies("me/replies")
    assert re.fullmatch(r"best node needs [45]\.\d s, 3\.0 s left", status.reason or "")
    assert not [assign for _, _, assign in world.started if assign.task == "hopeless"]


def test_a_task_that_becomes_hopeless_while_it_waits_is_rejected_before_its_deadline() -> None:
    world = World(slots=1, service_s=5.0, answer=five_seconds).start("n0", "n1")
    world.elect("n0")
    for k in range(8):
        world.say(ask(f"lesson {k}"))
    world.run(40)
    for k in range(2):
        world.say(ask(f"keeps the slot {k}"))
    world.say(ask(id=TaskId("waits"), deadline_s=8.0))
    world.run(1)
    assert world.states("waits") == ["queued"]
    world.run(6)
    assert world.states("waits") == ["queued", "rejected"]
    (result,) = world.results("waits")
    assert re.fullmatch(r"best node needs [45]\.\d s, [2345]\.\d s left", result.reason or "")


def test_the_denser_task_goes_first_and_the_decision_is_kept_for_people() -> None:
    world = World(slots=1, service_s=1.0, policy=policy_named("vdf")).start("n0")
    world.elect("n0")
    world.say(ask("keeps the slot", id=TaskId("first")))
    world.say(ask("cheap", id=TaskId("cheap"), value=1.0))
    world.say(ask("dear", id=TaskId("dear"), value=9.0))
    world.run(3)
    assert [assign.task for _, _, assign in world.started] == ["first", "dear", "cheap"]
    (noted,) = world.scheduler.explanations.of(TaskId("dear"))
    assert "first of 2 by vdf" in noted.decision.why.words


def test_an_urgent_task_may_stand_in_for_a_running_one_and_the_worker_is_told_whom() -> None:
    world = World(slots=1, service_s=20.0, policy=policy_named("vdf+preempt")).start("n0")
    world.elect("n0")
    world.say(ask("long", id=TaskId("long"), max_tokens=2000, deadline_s=10_000.0))
    world.run(0.1)
    world.say(ask("urgent", id=TaskId("urgent"), max_tokens=10, deadline_s=4.0, value=50.0))
    world.run(0.1)
    orders = [assign for _, _, assign in world.started]
    assert [(order.task, order.pauses) for order in orders] == [("long", None), ("urgent", "long")]


def test_what_was_learned_meanwhile_makes_no_newcomer_of_a_waiting_task() -> None:
    """A newcomer may stand in for a running one. It came before what runs now, and was no reason then."""
    world = World(slots=1, service_s=20.0, policy=policy_named("vdf+preempt")).start("n0")
    world.elect("n0")
    world.say(ask("keeps the slot", id=TaskId("first"), value=100.0, max_tokens=2000, deadline_s=10_000.0))
    world.run(0.1)
    world.say(ask("waits", id=TaskId("waits"), max_tokens=1000, deadline_s=9000.0))
    world.run(0.1)
    waiting = world.scheduler._placing._dispatcher.waiting(TaskId("waits"))
    world.scheduler._cost.learn_answer(max_tokens=100, n_tokens=1)
    world.run(3)  # everything about the task that falls due
    assert world.scheduler._placing._dispatcher.waiting(TaskId("waits")) is waiting
    assert [assign.task for _, _, assign in world.started] == ["first"]
