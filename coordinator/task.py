"""What a task is to its coordinator, and the only moves it may make.

             ┌────────── refused, lost, engine failed: next attempt ──────────┐
             ▼                                                                │
    ──▶ queued ──Assign──▶ assigned ──AttemptsRunning──▶ running ─────────────┤
          │                   │                             │                 │
          └───────────────────┴───── done · failed · rejected · expired · cancelled   (final)

Every move goes through ``Task.move``, which asserts ``TRANSITIONS``: a terminal state has no way out,
which is half of "exactly one terminal state". The other half is ``outcome_rank``: where two parts of a
split mesh settled one task differently, every node keeps the outcome of lowest rank, so all of them end
with the same one in whatever order they hear of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Final

from mesh.core import FOREVER
from mesh.ids import EPOCH_ZERO, Epoch, NodeId, TaskId
from mesh.messages import Outcome, Submit, TaskRecord, TaskResult, TaskState, TaskStatus

__all__ = [
    "CANCELLED_BY_CLIENT",
    "TERMINAL_STATES",
    "TRANSITIONS",
    "Task",
    "aged",
    "digest_of",
    "is_same",
    "outcome_rank",
    "record_of",
    "result_of",
    "status_of",
    "task_from",
]

_FINAL: Final = frozenset[TaskState]({"done", "failed", "rejected", "expired", "cancelled"})
TERMINAL_STATES = _FINAL

TRANSITIONS: Final[dict[TaskState, frozenset[TaskState]]] = {
    # queued -> running: a new coordinator finds the attempt running. queued -> done: the outcome of an
    # attempt that was given up arrives after all; the first terminal state wins.
    "queued": frozenset[TaskState]({"assigned", "running"}) | _FINAL,
    # assigned -> assigned: a silent worker is asked again, under the next attempt number.
    "assigned": frozenset[TaskState]({"queued", "assigned", "running"}) | _FINAL,
    "running": frozenset[TaskState]({"queued", "assigned", "running"}) | _FINAL,
    "done": frozenset(),
    "failed": frozenset(),
    "rejected": frozenset(),
    "expired": frozenset(),
    "cancelled": frozenset(),
}

CANCELLED_BY_CLIENT: Final = "cancelled by the client"
"""Why an attempt is stopped that its client no longer wants. Travels to the worker and back in its outcome,
which by this says that it ends the task: other stops only end an attempt."""

# How a client may be reached and what it calls the task say nothing about the work.
_NOT_BODY = frozenset({"id", "reply_to", "correlation"})


def digest_of(submit: Submit) -> str:
    """SHA-256 of the body: equal digests are the same work. Field order is the class's own.

    >>> digest_of(Submit(prompt="hi", reply_to="a")) == digest_of(Submit(prompt="hi"))
    True
    """
    names = (f.name for f in fields(submit) if f.name not in _NOT_BODY)
    # A field that came later is no part of the bodies that do not have it: their digests are on disks.
    body = [(name, getattr(submit, name)) for name in names if name != "features" or submit.features]
    if submit.tune is not None:
        body = [(name, _Body(value) if name == "tune" else value) for name, value in body]
    # repr of str, int, float, bool, None, lists of those, ChatMessage and TuneSpec is injective and stable.
    return hashlib.sha256(repr(body).encode("utf-8", "surrogatepass")).hexdigest()


class _Body:
    """A ``TuneSpec`` as it was written before some of its last fields came, where they say nothing."""

    def __init__(self, spec: object) -> None:
        self._text = repr(spec).removesuffix(", nodes=1, part=None)").removesuffix(")") + ")"

    def __repr__(self) -> str:
        return self._text


# An answer is worth more to everybody than any reason there is none.
_STATE_RANK: Final[dict[TaskState, int]] = {
    "done": 0,
    "failed": 1,
    "rejected": 2,
    "cancelled": 3,
    "expired": 4,
}


def outcome_rank(outcome: Outcome) -> tuple[Epoch, int, int, str, str]:
    """The total order by which two settlements of one task become one: the lowest wins.

    The earlier epoch comes first, because its coordinator was there first. Equal ranks are one outcome.
    """
    text = hashlib.sha256(outcome.text.encode("utf-8", "surrogatepass")).hexdigest()
    return outcome.epoch, outcome.attempt, _STATE_RANK[outcome.state], outcome.node or "", text


def is_same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes are one settlement."""
    return outcome_rank(one) == outcome_rank(other)


@dataclass(slots=True, kw_only=True)
class Task:
    """One task in the coordinator's ledger. Times are on the coordinator's own monotonic clock."""

    id: TaskId
    submit: Submit
    digest: str
    accepted_at: float
    deadline_at: float = FOREVER
    state: TaskState = "queued"
    outcome: Outcome | None = None
    settled_at: float = FOREVER
    is_acknowledged: bool = False
    is_recovered: bool = False
    """From disks, at an election or later: another disk may know more of it."""
    is_published: bool = False
    """The result went out (or went out before this node coordinated)."""

    # where it runs
    node: NodeId | None = None
    attempt: int = 0
    """The highest number known; the next attempt takes the one after."""
    attempt_number: int = 0
    """Of the attempt it has now: lower than ``attempt`` when an older one turned out to run still."""
    attempt_epoch: Epoch = EPOCH_ZERO
    assigned_at: float = FOREVER
    heard_at: float = FOREVER
    """When the worker last said that it runs this."""
    assign_again_at: float = FOREVER
    asked: int = 0
    """``Assign``s sent for this attempt."""
    pauses: TaskId | None = None
    """Which attempt on the node stands still for this one, if its slots were taken."""
    failures: int = 0
    refusals: int = 0
    over: list[tuple[int, Epoch]] = field(default_factory=list)
    """Attempts known to have ended without settling the task; a late report does not revive them."""
    avoid: dict[NodeId, float] = field(default_factory=dict)
    """Nodes that refused or failed it, and until when not to ask them again."""
    cancel_at: float = FOREVER
    """When a client's wish to cancel is settled without the worker's answer."""
    cancel_again_at: float = FOREVER

    # who else has it on disk
    copies: dict[NodeId, bool] = field(default_factory=dict)
    """Nodes that have it or may have it -> whether their copy is known to be the present version."""
    hold_at: float = FOREVER
    holds_sent: int = 0
    ended_by: dict[NodeId, int] = field(default_factory=dict)
    """Workers whose ``AttemptEnded`` waits for ``OutcomeTaken``."""
    is_witnessed: bool = False
    """A worker other than this node has the outcome on disk."""

    forget_at: float = FOREVER
    """When the retained topics are cleared."""
    replies: list[tuple[str, str | None]] = field(default_factory=list)
    """Topics of clients that want acknowledgement and result, with their correlation."""
    waits_for: str | None = None
    """Why it could not start when it was accepted; until its first attempt."""
    due_at: float = FOREVER
    """The earliest time this task is on the scheduler's list to look at."""

    @property
    def is_open(self) -> bool:
        return self.outcome is None

    @property
    def is_cancelling(self) -> bool:
        return self.cancel_at != FOREVER

    def budget_s(self, now: float) -> float | None:
        """Seconds left to the deadline, at least 0; ``None`` without one."""
        return None if self.deadline_at == FOREVER else max(0.0, self.deadline_at - now)

    def queue_s(self, now: float) -> float:
        """Seconds it waited for the attempt it has, or waits until now."""
        return max(0.0, min(self.assigned_at, now) - self.accepted_at)

    def move(self, state: TaskState) -> None:
        """The only place a task's state changes."""
        assert state in TRANSITIONS[self.state], f"task {self.id} may not go from {self.state} to {state}"
        self.state = state

    def see_age(self, record: TaskRecord, now: float) -> None:
        """Of two memories of one task, the older is right: a disk's clock stands while its node is down."""
        self.accepted_at = min(self.accepted_at, now - record.age_s)
        if record.budget_s is not None:
            self.deadline_at = min(self.deadline_at, now + record.budget_s)

    def assign(self, node: NodeId, attempt: int, epoch: Epoch, now: float) -> None:
        self.move("assigned")
        self.node, self.attempt, self.attempt_epoch = node, attempt, epoch
        self.attempt_number = attempt
        self.assigned_at = now
        self.heard_at = FOREVER
        self.asked = 0

    def run(self, node: NodeId, attempt: int, epoch: Epoch, now: float) -> None:
        """The worker says it runs this attempt, which may be one an earlier coordinator assigned."""
        self.move("running")
        self.node, self.attempt, self.attempt_epoch = node, max(attempt, self.attempt), epoch
        self.attempt_number = attempt
        self.assigned_at = min(self.assigned_at, now)
        self.heard_at = now
        self.assign_again_at = FOREVER

    def requeue(self) -> None:
        """Give up the attempt; the task waits for the next one."""
        self.over = [
            *self.over[-15:],
            (self.attempt_number, self.attempt_epoch),
        ]  # 8 failures and some refusals
        self.move("queued")
        self.node = None
        self.assigned_at = self.heard_at = self.assign_again_at = FOREVER

    def settle(self, outcome: Outcome, now: float) -> None:
        assert self.outcome is None, f"task {self.id} is settled once"
        self.move(outcome.state)
        self.outcome = outcome
        self.settled_at = now
        self.copies = dict.fromkeys(self.copies, False)
        self.assign_again_at = self.heard_at = self.cancel_again_at = FOREVER

    def resettle(self, outcome: Outcome) -> None:
        """Another part of a split mesh settled the task first; its outcome counts for all."""
        assert self.outcome is not None and outcome_rank(outcome) < outcome_rank(self.outcome)
        self.state = outcome.state
        self.outcome = outcome
        self.copies = dict.fromkeys(self.copies, False)


def task_from(record: TaskRecord, now: float) -> Task:
    """The task of a record that was durable somewhere, as far as the record tells."""
    task = Task(
        id=record.task,
        submit=record.submit,
        digest=record.digest,
        accepted_at=now - record.age_s,
        deadline_at=FOREVER if record.budget_s is None else now + record.budget_s,
        is_recovered=True,
        is_acknowledged=True,  # perhaps it was: an acknowledged task must never be taken for another
    )
    if record.submit.reply_to is not None:
        task.replies.append((record.submit.reply_to, record.submit.correlation))
    if record.outcome is not None:
        task.settle(record.outcome, now - record.settled_s)
        task.attempt = task.attempt_number = record.outcome.attempt
        task.attempt_epoch = record.outcome.epoch
        task.node = record.outcome.node
    return task


def record_of(task: Task, epoch: Epoch, now: float) -> TaskRecord:
    return TaskRecord(
        task=task.id,
        submit=task.submit,
        digest=task.digest,
        budget_s=task.budget_s(now),
        outcome=task.outcome,
        epoch=epoch,
        age_s=max(0.0, now - task.accepted_at),
        settled_s=0.0 if task.is_open else max(0.0, now - task.settled_at),
    )


def aged(record: TaskRecord, by_s: float) -> TaskRecord:
    """The record as it would be written ``by_s`` seconds later: remaining time is what travels."""
    return TaskRecord(
        task=record.task,
        submit=record.submit,
        digest=record.digest,
        budget_s=None if record.budget_s is None else max(0.0, record.budget_s - by_s),
        outcome=record.outcome,
        epoch=record.epoch,
        age_s=record.age_s + by_s,
        settled_s=0.0 if record.outcome is None else record.settled_s + by_s,
    )


def status_of(task: Task, epoch: Epoch, now: float) -> TaskStatus:
    """What clients see. ``epoch`` is the publishing coordinator's."""
    return TaskStatus(
        task=task.id,
        state=task.state,
        reason=task.outcome.reason if task.outcome else task.waits_for,
        node=task.outcome.node if task.outcome else task.node,
        attempt=task.outcome.attempt if task.outcome else task.attempt_number,
        epoch=epoch,
        durable_on=1 + max(sum(task.copies.values()), task.is_witnessed),
        kind=task.submit.kind,
        value=task.submit.value,
        budget_s=task.budget_s(now),
    )


def result_of(task: Task) -> TaskResult:
    """A function of the outcome alone: two coordinators that publish it say the same, byte for byte."""
    outcome = task.outcome
    assert outcome is not None, f"task {task.id} has no result yet"
    return TaskResult(
        task=task.id,
        state=outcome.state,
        text=outcome.text,
        finish_reason=outcome.finish_reason,
        reason=outcome.reason,
        node=outcome.node,
        attempt=outcome.attempt,
        epoch=outcome.epoch,
        n_prompt_tokens=outcome.n_prompt_tokens,
        n_tokens=outcome.n_tokens,
        queue_s=outcome.queue_s,
        ttft_s=outcome.ttft_s,
        service_s=outcome.service_s,
        output=outcome.output,
    )
