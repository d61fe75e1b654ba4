"""Feature maps that one node makes for another: on request, and ahead of need.

    worker ──FeaturesWanted──▶ here ──▶ a ``features`` task like any other, linked to the one it is for
    worker ◀──FeaturesReady─── here, once that has ended

A request is made a task under an id that follows from what is asked, so a repetition, another coordinator
after an election, and a second look all mean the same task. What is linked to a task ends with it.

Nothing here is durable by itself: workers repeat what they wait for, and tasks are on disks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from coordinator.admission import AdmissionConfig, Reject, admit
from coordinator.ahead import AheadConfig, ahead, model_of, order
from coordinator.attempts import Attempts
from coordinator.intake import Intake
from coordinator.placement import HOLDS_ALL, held_layers, listed
from coordinator.task import Task
from coordinator.term import Term
from mesh.core import Effect, Send
from mesh.ids import NodeId, TaskId
from mesh.messages import FeaturesReady, FeaturesWanted, Submit

__all__ = ["Groundwork", "child_id"]

_ORDERS_MAX = 1024
"""Requests that are not answered yet; a worker repeats what was let go of."""
_HELPED_MAX = 4096


@dataclass(frozen=True, slots=True)
class _Order:
    """``node`` waits for ``child``, because of ``wanted``."""

    node: NodeId
    wanted: FeaturesWanted
    child: TaskId


class Groundwork:
    def __init__(
        self,
        *,
        term: Term,
        intake: Intake,
        attempts: Attempts,
        admission: AdmissionConfig,
        config: AheadConfig,
    ) -> None:
        self._term = term
        self._ledger = term.ledger
        self._intake = intake
        self._attempts = attempts
        self._admission = admission
        self._config = config
        self._orders: dict[tuple[TaskId, int, int], _Order] = {}
        self._parent_of: dict[TaskId, TaskId] = {}
        """Of open tasks that were made here, or were found to have been."""
        self._ahead: dict[TaskId, TaskId] = {}
        """Job -> the last task that was made ahead of its need."""
        self._look_at = float("-inf")

    def found(self, task: Task) -> None:
        """A task that an earlier coordinator may have made for another one."""
        spec = task.submit.features
        if spec is not None and spec.parent is not None and task.is_open:
            self._parent_of[task.id] = spec.parent
            if spec.is_ahead:
                self._remember_ahead(spec.parent, task.id)

    # ── on request ──────────────────────────────────────────────────────────────────────────────────

    def wanted(self, wanted: FeaturesWanted, sender: NodeId, now: float) -> list[Effect]:
        parent = self._ledger.get(wanted.task)
        if parent is None or not parent.is_open or parent.node != sender or parent.is_cancelling:
            return []
        if parent.submit.kind in ("generate", "features"):
            return []  # these need all layers, and have them
        child, effects = self._child_for(parent, wanted, now)
        if isinstance(child, str) and self._ledger.get(child) is None:
            return [*effects, self._ready(sender, wanted, None, "the coordinator could not take the task")]
        if isinstance(child, _Refusal):
            return [*effects, self._ready(sender, wanted, None, child.reason)]
        key = (wanted.task, wanted.attempt, wanted.round)
        self._orders.pop(key, None)
        self._orders[key] = _Order(sender, wanted, child)
        while len(self._orders) > _ORDERS_MAX:
            del self._orders[next(iter(self._orders))]
        return [*effects, *self._answer(key)]

    def _child_for(
        self, parent: Task, wanted: FeaturesWanted, now: float
    ) -> tuple[TaskId | _Refusal, list[Effect]]:
        child = child_id(parent.id, wanted)
        if self._ledger.get(child) is not None:
            return child, []
        effects: list[Effect] = []
        if wanted.round == 0 and (made := self._ledger.get(self._ahead.get(parent.id, child))) is not None:
            if made.state in ("assigned", "running", "done"):
                return made.id, []  # on its way, or there: the worker has not found it yet
            if made.is_open:
                effects += self._attempts.cancel(made, now)
        submit = _submit_for(parent, wanted, child, model_of(parent, self._term.cluster), now)
        if (reason := self._why_not(submit)) is not None:
            return _Refusal(reason), effects
        effects += self._intake.hear(submit, now, now)
        self._parent_of[child] = parent.id
        return child, effects

    def _why_not(self, submit: Submit) -> str | None:
        """Why nobody here can make them, now and for all that is known."""
        verdict = admit(submit, self._term.cluster, self._ledger.n_open, self._admission)
        if isinstance(verdict, Reject):
            return verdict.reason
        holders = submit.tune.holders if submit.tune is not None else []
        here = [node for node in self._term.cluster if node.is_present and node.id in holders and node.info]
        if holders and all(node.info and held_layers(node.info) < HOLDS_ALL for node in here):
            return f"its records are on {listed(holders)}, and none of these holds the whole model"
        return None

    def _answer(self, key: tuple[TaskId, int, int]) -> list[Effect]:
        """Tell the worker, if there is something to tell."""
        waiting = self._orders[key]
        child = self._ledger.get(waiting.child)
        if child is not None and child.is_open:
            return []
        del self._orders[key]
        outcome = child.outcome if child is not None else None
        if outcome is None:
            return []  # forgotten: the worker asks again
        made = outcome.output.features if outcome.output is not None and outcome.state == "done" else None
        reason = None if made is not None else f"the task that makes them {outcome.state}: {outcome.reason}"
        return [self._ready(waiting.node, waiting.wanted, made, reason)]

    def _ready(self, node: NodeId, wanted: FeaturesWanted, made: object, reason: str | None) -> Effect:
        ready = FeaturesReady(
            epoch=self._term.epoch,
            task=wanted.task,
            attempt=wanted.attempt,
            round=wanted.round,
            made=made,  # type: ignore[arg-type]
            reason=reason[:1000] if reason is not None else None,
        )
        return Send(node, ready)

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    def attend(self, now: float) -> list[Effect]:
        """After every input: answer, drop what nobody needs any more, and look ahead."""
        effects: list[Effect] = []
        for key in list(self._orders):
            effects += self._answer(key)
        for child_task, parent in list(self._parent_of.items()):
            child, job = self._ledger.get(child_task), self._ledger.get(parent)
            if child is None or not child.is_open:
                del self._parent_of[child_task]
            elif job is not None and not job.is_open and not child.is_cancelling:
                effects += self._attempts.cancel(child, now)
        if now >= self._look_at:
            self._look_at = now + self._config.look_every_s
            effects += self._make_ahead(now)
        return effects

    def _make_ahead(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        n_running = sum(self._ahead.get(parent) == child for child, parent in self._parent_of.items())
        for job, node in ahead(self._ledger, self._term.cluster, self._ahead, n_running, now, self._config):
            child = _named("ahead", job.id)
            helper = self._term.cluster.get(node)
            effects += self._intake.hear(order(job, helper, now, self._config, child), now, now)
            self._parent_of[child] = job.id
            self._remember_ahead(job.id, child)
        return effects

    def _remember_ahead(self, job: TaskId, child: TaskId) -> None:
        self._ahead[job] = child
        while len(self._ahead) > _HELPED_MAX:
            del self._ahead[next(iter(self._ahead))]


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str


def child_id(parent: TaskId, wanted: FeaturesWanted) -> TaskId:
    """The same for every coordinator: who asks for the same once more finds the task."""
    return _named("made", parent, str(wanted.round), repr(wanted.spec))


def _named(why: str, *what: str) -> TaskId:
    digest = hashlib.blake2b("\n".join((why, *what)).encode(), digest_size=8).hexdigest()
    return TaskId(f"features-{why}-{digest}")


def _submit_for(parent: Task, wanted: FeaturesWanted, child: TaskId, model: str | None, now: float) -> Submit:
    """As much worth as the task that waits for it, and to be done before that one's time is over."""
    submit, left_s = parent.submit, parent.deadline_at - now
    tune = submit.tune
    if tune is not None and tune.data_sha256 is None and tune.eval_sha256 is None:
        tune = replace(tune, holders=[])  # the records travel along: any node can read them
    return Submit(
        kind="features",
        tune=replace(tune, top_layers=wanted.spec.top_layers) if tune is not None else None,
        texts=submit.texts,
        prompt=submit.prompt,
        messages=submit.messages,
        features=replace(wanted.spec, parent=parent.id, is_ahead=False),
        id=child,
        model=model,
        value=submit.value,
        deadline_s=left_s if left_s < float("inf") else None,
        stream=False,
    )
