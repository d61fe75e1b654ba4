"""Answers clients who ask why, and tells all how well the coordinator foresees what work takes.

A core of its own beside the scheduler: it only reads, so nothing is decided here.
"""

from __future__ import annotations

from coordinator.explanations import told, told_why
from coordinator.scheduler import Mode, Scheduler
from coordinator.task import status_of
from mesh.core import FOREVER, Broadcast, Effect, Fact, Message
from mesh.facts import LinkUp
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import CostReport, ExplainTask, KindError, TaskDecision, TaskExplanation
from mesh.messages.explain import KINDS_MAX

__all__ = ["Explainer"]

_REPORT_EVERY_S = 5.0  # a retained message of 200 bytes, and only if it has changed
_PLACES = 3  # a change below a thousandth is none


class Explainer:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._report_at = 0.0
        self._reported: tuple[Epoch, tuple[KindError, ...]] | None = None

    @property
    def wake_at(self) -> float:
        return self._report_at if self._scheduler.mode is Mode.ACTIVE else FOREVER

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        if isinstance(message, ExplainTask) and self._scheduler.mode is Mode.ACTIVE:
            return [Broadcast(self.explanation(message.task, now))]
        return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        if isinstance(fact, LinkUp):
            self._reported = None  # a new broker retains nothing yet
        return []

    def tick(self, now: float) -> list[Effect]:
        if self._scheduler.mode is not Mode.ACTIVE or now < self._report_at:
            return []
        self._report_at = now + _REPORT_EVERY_S
        epoch, errors = self._scheduler.epoch, self._errors()
        if not errors or self._reported == (epoch, errors):
            return []  # nothing learned: what an earlier coordinator retained says more
        self._reported = epoch, errors
        return [Broadcast(CostReport(epoch=epoch, errors=list(errors)))]

    def explanation(self, task_id: TaskId, now: float) -> TaskExplanation:
        scheduler = self._scheduler
        explanations = scheduler.explanations
        decisions = [told(noted, now) for noted in explanations.of(task_id)]
        task = scheduler.task(task_id)
        if task is None:
            return TaskExplanation(
                task=task_id,
                epoch=scheduler.epoch,
                state=None,
                decisions=decisions,
                n_decisions=explanations.n_of(task_id),
            )
        if task.is_open and task.node is None and (waits := self._waits(task_id, now)) is not None:
            decisions.append(waits)
        status = status_of(task, scheduler.epoch, now)
        return TaskExplanation(
            task=task_id,
            epoch=scheduler.epoch,
            state=status.state,
            reason=status.reason,
            kind=status.kind,
            value=status.value,
            budget_s=status.budget_s,
            node=status.node,
            attempt=status.attempt,
            decisions=decisions,
            n_decisions=explanations.n_of(task_id),
        )

    def _waits(self, task: TaskId, now: float) -> TaskDecision | None:
        why = self._scheduler.outlook(task, now)
        return None if why is None else told_why(why, "wait", None, 0.0)

    def _errors(self) -> tuple[KindError, ...]:
        found = sorted(self._scheduler.cost_errors().items())[:KINDS_MAX]
        return tuple(KindError(kind=kind, p50=round(error.p50, _PLACES), n=error.n) for kind, error in found)
