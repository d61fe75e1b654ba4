"""What clients say: submissions, cancellations, and what could not be read. Each gets an answer."""

from __future__ import annotations

from random import Random

from coordinator.admission import AdmissionConfig, Reject, admit
from coordinator.attempts import Attempts
from coordinator.placing import Placing
from coordinator.publish import refuse, repeat
from coordinator.settlement import Settlement
from coordinator.submissions import Said
from coordinator.task import Task, digest_of
from coordinator.term import Term
from mesh.core import FOREVER, Broadcast, Effect
from mesh.ids import TaskId, new_task_id
from mesh.messages import CancelTask, Submit, TaskForgotten, Unacceptable

__all__ = ["Intake"]

_REPLIES_MAX = 4  # a client that reconnects under a new reply topic more often than this within one task

# Retained refusals not yet cleared, about 300 bytes each in the broker; the oldest are cleared early.
_REFUSED_MAX = 1024


class Intake:
    def __init__(
        self,
        *,
        term: Term,
        rng: Random,
        attempts: Attempts,
        placing: Placing,
        settlement: Settlement,
        admission: AdmissionConfig,
        status_keep_s: float,
    ) -> None:
        self._term = term
        self._ledger = term.ledger
        self._rng = rng
        self._attempts = attempts
        self._placing = placing
        self._settlement = settlement
        self._admission = admission
        self._status_keep_s = status_keep_s
        self._refused: dict[TaskId, float] = {}

    @property
    def wake_at(self) -> float:
        return next(iter(self._refused.values()), FOREVER)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self.wake_at <= now:
            effects.append(self._clear_refusal(next(iter(self._refused))))
        return effects

    def hear(self, said: Said, at: float, now: float) -> list[Effect]:
        """What a client said ``at`` that time, now or while nobody coordinated."""
        match said:
            case Submit():
                return self._submit(said, at, now)
            case Unacceptable():
                is_taken = said.id is not None and self._is_known(said.id)
                task_id = said.id or new_task_id(self._rng)
                return self._refuse(said, task_id, said.reason, now, on_topic=not is_taken)
            case CancelTask():
                task = self._ledger.get(said.task)
                if task is None or not task.is_open:
                    return []
                self._ledger.touch(task)
                return self._attempts.cancel(task, now)

    def _submit(self, submit: Submit, at: float, now: float) -> list[Effect]:
        digest = digest_of(submit)
        task_id = submit.id or new_task_id(self._rng)
        known = self._ledger.get(task_id)
        if known is not None:
            if known.digest != digest:
                return self._refuse_other_body(submit, task_id, now)
            return self._submitted_again(known, submit, now)
        tombstone = self._term.store.tombstone(task_id)
        if tombstone is not None:
            if tombstone.digest != digest:
                return self._refuse_other_body(submit, task_id, now)
            reason = f"id {task_id} ended before ({tombstone.state}); its answer is gone. Use another id"
            return refuse(submit, task_id, reason, self._term.epoch, on_topic=False)
        verdict = admit(submit, self._term.cluster, self._ledger.n_open, self._admission)
        if isinstance(verdict, Reject):
            return self._refuse(submit, task_id, verdict.reason, now, on_topic=True)
        if not self._term.store.has_room:
            reason = "the coordinator's task store is full; try again later"
            return self._refuse(submit, task_id, reason, now, on_topic=True)
        deadline_at = FOREVER if submit.deadline_s is None else at + submit.deadline_s
        if deadline_at < FOREVER and now >= self._attempts.stragglers_until:
            # While a node has not told what it holds, it may hold this very task, acknowledged.
            hopeless = self._placing.hopeless(submit, deadline_at, now)
            if hopeless is not None:
                return self._refuse(submit, task_id, hopeless, now, on_topic=True)
        task = Task(
            id=task_id,
            submit=submit,
            digest=digest,
            accepted_at=at,
            deadline_at=deadline_at,
            hold_at=now,
            is_recovered=at < now,
        )
        if submit.reply_to is not None:
            task.replies.append((submit.reply_to, submit.correlation))
        self._refused.pop(task_id, None)
        self._ledger.add(task)
        if self._term.copies.is_alone:
            return self._settlement.acknowledge(task, now)
        return self._term.copies.attend(task, self._term.epoch, now)

    def _is_known(self, task: TaskId) -> bool:
        return self._ledger.get(task) is not None or self._term.store.tombstone(task) is not None

    def _submitted_again(self, task: Task, submit: Submit, now: float) -> list[Effect]:
        """The same body under the same id is the same task, however often it arrives."""
        wanted = (submit.reply_to, submit.correlation)
        if submit.reply_to is not None and wanted not in task.replies and len(task.replies) < _REPLIES_MAX:
            task.replies.append((submit.reply_to, submit.correlation))
        if not (task.is_published or (task.is_open and task.is_acknowledged)):
            return []  # the first answer is on its way
        if task.is_published:
            task.forget_at = now + self._status_keep_s
            self._ledger.touch(task)
        return repeat(task, submit, self._term.epoch, now)

    def _refuse_other_body(self, submit: Submit, task: TaskId, now: float) -> list[Effect]:
        reason = f"id {task} is taken by a task with another body; use another id"
        return self._refuse(submit, task, reason, now, on_topic=False)

    def _refuse(
        self, said: Submit | Unacceptable, task: TaskId, reason: str, now: float, *, on_topic: bool
    ) -> list[Effect]:
        effects = refuse(said, task, reason, self._term.epoch, on_topic=on_topic)
        if on_topic:
            effects += self._note_refusal(task, now)
        return effects

    def foreign_status(self, task: TaskId, now: float) -> list[Effect]:
        """A final status retained by an earlier coordinator, and perhaps nobody is left to clear it."""
        return [] if self._is_known(task) else self._note_refusal(task, now)

    def _note_refusal(self, task: TaskId, now: float) -> list[Effect]:
        self._refused.pop(task, None)
        self._refused[task] = now + self._status_keep_s
        if len(self._refused) > _REFUSED_MAX:
            return [self._clear_refusal(next(iter(self._refused)))]
        return []

    def _clear_refusal(self, task: TaskId) -> Effect:
        del self._refused[task]
        return Broadcast(TaskForgotten(task=task))
