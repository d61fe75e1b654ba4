"""The table of a task's moves, the digest of a submission, and the order of outcomes."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from coordinator.task import (
    TERMINAL_STATES,
    TRANSITIONS,
    Task,
    aged,
    digest_of,
    outcome_rank,
    record_of,
    result_of,
    task_from,
)
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import ChatMessage, Outcome, Submit, TaskState

STATES = get_args(TaskState)
EPOCH = Epoch(1, NodeId("n0"))


def task_in(state: TaskState) -> Task:
    submit = Submit(prompt="hello")
    return Task(id=TaskId("t1"), submit=submit, digest=digest_of(submit), accepted_at=10.0, state=state)


def outcome(
    state: TaskState = "done", *, term: int = 1, node: str = "n0", attempt: int = 1, text: str = ""
) -> Outcome:
    return Outcome(
        state=state,
        text=text,
        finish_reason=None,
        reason=None,
        node=NodeId(node),
        attempt=attempt,
        epoch=Epoch(term, NodeId(node)),
    )


def test_every_state_has_a_row_and_terminal_states_have_no_way_out() -> None:
    assert set(TRANSITIONS) == set(STATES)
    assert {state for state, moves in TRANSITIONS.items() if not moves} == TERMINAL_STATES


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_a_move_that_is_not_in_the_table_raises_and_changes_nothing(
    before: TaskState, after: TaskState
) -> None:
    task = task_in(before)
    if after in TRANSITIONS[before]:
        task.move(after)
        assert task.state == after
    else:
        with pytest.raises(AssertionError, match=f"may not go from {before} to {after}"):
            task.move(after)
        assert task.state == before


def test_a_task_is_settled_once() -> None:
    task = task_in("queued")
    task.settle(outcome("done"), now=11.0)
    with pytest.raises(AssertionError):
        task.settle(outcome("failed"), now=12.0)
    assert task.outcome is not None and task.outcome.state == "done"


def test_who_asks_and_where_the_answer_goes_is_not_part_of_the_body() -> None:
    plain = Submit(prompt="hello")
    assert digest_of(plain) == digest_of(
        Submit(prompt="hello", id=TaskId("a"), reply_to="b/c", correlation="d")
    )


@pytest.mark.parametrize(
    "other",
    [
        Submit(prompt="hello!"),
        Submit(messages=[ChatMessage(role="user", content="hello")]),
        Submit(prompt="hello", max_tokens=255),
        Submit(prompt="hello", temperature=0.5),
        Submit(prompt="hello", seed=0),
        Submit(prompt="hello", stop=["x"]),
        Submit(prompt="hello", deadline_s=1.0),
        Submit(prompt="hello", value=2.0),
        Submit(prompt="hello", adapter="a"),
        Submit(prompt="hello", model="a"),
        Submit(prompt="hello", stream=False),
    ],
)
def test_everything_else_is_part_of_the_body(other: Submit) -> None:
    assert digest_of(other) != digest_of(Submit(prompt="hello"))


def test_the_earliest_coordinator_outranks_and_among_equals_an_answer_does() -> None:
    ranked = [
        outcome("expired", term=1, node="a"),
        outcome("done", term=1, node="b"),
        outcome("done", term=2, attempt=1),
        outcome("expired", term=2, attempt=1),
        outcome("done", term=2, attempt=2),
    ]
    assert sorted(reversed(ranked), key=outcome_rank) == ranked


def test_a_record_carries_remaining_time_not_points_on_a_clock() -> None:
    task = task_in("queued")
    task.deadline_at = 40.0
    record = record_of(task, EPOCH, now=25.0)
    assert (record.budget_s, record.age_s) == (15.0, 15.0)
    elsewhere = task_from(aged(record, by_s=5.0), now=1000.0)
    assert (elsewhere.deadline_at, elsewhere.accepted_at) == (1010.0, 980.0)


def test_remaining_time_never_goes_below_zero() -> None:
    task = task_in("queued")
    task.deadline_at = 11.0
    assert record_of(task, EPOCH, now=50.0).budget_s == 0.0
    assert aged(record_of(task, EPOCH, now=10.5), by_s=60.0).budget_s == 0.0


def test_two_coordinators_publish_the_same_result_for_one_outcome() -> None:
    first = task_in("queued")
    first.settle(outcome("done", text="yes"), now=11.0)
    second = task_from(record_of(first, EPOCH, now=12.0), now=7.0)
    assert result_of(first) == result_of(second)
