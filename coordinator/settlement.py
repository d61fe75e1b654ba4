"""How a task becomes durable, how it ends, and how two histories of one task become one.

Everything the coordinator does with a record: acknowledge, settle, publish, forget, and merge what
another node has on its disk. ``settle`` is the only way a task gets its outcome.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.attempts import own_outcome
from coordinator.placement import why_waiting
from coordinator.publish import acknowledge, conclude, event
from coordinator.store import Tombstone
from coordinator.task import Task, outcome_rank, record_of, task_from
from coordinator.term import Term
from mesh.core import FOREVER, Broadcast, Effect, Send
from mesh.ids import NodeId, TaskId
from mesh.messages import CancelAttempt, Hold, Outcome, OutcomeTaken, TaskForgotten, TaskRecord

__all__ = ["Settlement", "SettlementConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SettlementConfig:
    status_keep_s: float = 120.0
    """How long a task's retained topics outlive it."""
    settled_keep_s: float = 600.0
    settled_max: int = 4096
    """As in ``StoreConfig``: the ledger remembers what the store does."""
    published_within_s: float = 30.0
    """A settled record older than this when it is recovered was published by an earlier coordinator."""


class Settlement:
    def __init__(self, term: Term, config: SettlementConfig) -> None:
        self._term = term
        self._ledger = term.ledger
        self._store = term.store
        self._copies = term.copies
        self._config = config

    # ── a second disk has it ────────────────────────────────────────────────────────────────────────

    def held(self, task_id: TaskId, settled: bool, sender: NodeId, now: float) -> list[Effect]:
        """``sender`` has the open or the settled version on disk."""
        task = self._ledger.get(task_id)
        if task is None or settled != (not task.is_open):
            return []  # the other version: its inventory, or the next Hold, brings both to one
        self._ledger.touch(task)
        self._copies.held(task, sender)
        return self.now_safe(task, now)

    def now_safe(self, task: Task, now: float) -> list[Effect]:
        """What waited for the second disk may go out."""
        self._ledger.touch(task)
        if not task.is_open:
            return self.conclude(task, now)
        return [] if task.is_acknowledged else self.acknowledge(task, now)

    def acknowledge(self, task: Task, now: float) -> list[Effect]:
        with self._ledger.changing(task):
            task.is_acknowledged = True
            if task.node is None:
                task.waits_for = why_waiting(task.submit, self._term.cluster)
        saved = self._store.put(record_of(task, self._term.epoch, now), now)
        return [*saved, *acknowledge(task, self._term.epoch, now)]

    # ── one record, two histories ───────────────────────────────────────────────────────────────────

    def merge(self, record: TaskRecord, sender: NodeId, now: float) -> list[Effect]:
        """Take in what a node has on disk about a task. Order and repetition of merges change nothing."""
        task = self._ledger.get(record.task)
        tombstone = self._store.tombstone(record.task) if task is None else None
        if tombstone is not None:
            is_told = record.outcome is not None or sender == self._term.me
            return [] if is_told else [self._tell_ended(record, tombstone, sender)]
        if task is None:
            return self._adopt(record, sender, now)
        self._ledger.touch(task)
        if record.outcome is None:
            if task.is_open:
                self._copies_on(task, sender, True)
                with self._ledger.changing(task):
                    task.see_age(record, now)
                return self.now_safe(task, now)
            self._copies_on(task, sender, task.copies.get(sender, False))
            task.hold_at = now
            return []
        if task.outcome is None:
            return self.settle(task, record.outcome, now, copy_on=sender)
        theirs, ours = outcome_rank(record.outcome), outcome_rank(task.outcome)
        if theirs < ours:
            with self._ledger.changing(task):
                task.resettle(record.outcome)
            told = event(f"settled twice while the mesh was split; {record.outcome.state} counts", task.id)
            effects: list[Effect] = [told]
            task.is_published = False
        else:
            effects = []
        self._copies_on(task, sender, theirs <= ours)
        task.hold_at = now
        return [*effects, *self.conclude(task, now)]

    def _copies_on(self, task: Task, node: NodeId, is_fresh: bool) -> None:
        if node != self._term.me:
            task.copies[node] = is_fresh

    def _adopt(self, record: TaskRecord, sender: NodeId, now: float) -> list[Effect]:
        """A task this coordinator did not know: carry it on from where the record stands."""
        task = task_from(record, now)
        self._copies_on(task, sender, True)
        self._ledger.add(task)
        if task.is_open:
            return [] if sender == self._term.me else self._store.put(record, now)
        if record.settled_s > self._config.published_within_s:
            task.is_published = True
            task.forget_at = now + max(0.0, self._config.status_keep_s - record.settled_s)
            return []
        task.is_witnessed = sender != self._term.me
        saved = [] if sender == self._term.me else self._store.put(record, now)
        return [*saved, *self.conclude(task, now)]

    def _tell_ended(self, record: TaskRecord, tombstone: Tombstone, sender: NodeId) -> Effect:
        """A node was away while the task ended: all that is left to tell it is that it did."""
        outcome = Outcome(
            state=tombstone.state,
            text="",
            finish_reason=None,
            reason="ended while this node was away; the answer is no longer kept",
            node=None,
            attempt=tombstone.attempt,
            epoch=tombstone.epoch,
        )
        ended = replace(record, outcome=outcome, epoch=self._term.epoch)
        return Send(sender, Hold(epoch=self._term.epoch, record=ended))

    # ── the end of a task ───────────────────────────────────────────────────────────────────────────

    def settle(
        self,
        task: Task,
        outcome: Outcome,
        now: float,
        *,
        copy_on: NodeId | None = None,
        ended_by: tuple[NodeId, int] | None = None,
    ) -> list[Effect]:
        """The only way a task gets its outcome.

        Args:
            copy_on: A node that has this outcome on disk as the task's.
            ended_by: The worker that has it on disk as its attempt's, and the attempt.
        """
        runner = task.node
        with self._ledger.changing(task):
            task.settle(replace(outcome, retry=False), now)
        task.hold_at = now
        if copy_on is not None:
            self._copies_on(task, copy_on, True)
        if ended_by is not None:
            worker, attempt = ended_by
            task.ended_by[worker] = attempt
            task.is_witnessed = worker != self._term.me
        effects: list[Effect] = []
        if runner is not None and runner not in task.ended_by:
            stop = CancelAttempt(epoch=self._term.epoch, task=task.id, reason=f"the task is {task.state}")
            effects.append(Send(runner, stop))
        effects += self.conclude(task, now)
        effects += self._copies.attend(task, self._term.epoch, now)
        while (oldest := self._ledger.oldest_settled) is not None and oldest.is_published:
            # The store also counts bytes: what it has buried, the ledger need not remember either.
            is_buried = self._store.get(oldest.id, now) is None
            if not is_buried and self._ledger.n_settled <= self._config.settled_max:
                break
            effects += self._drop(oldest)
        return effects

    def conclude(self, task: Task, now: float) -> list[Effect]:
        """Save, publish, and let workers forget, as soon as another disk has the outcome.

        The other disk comes first: an outcome that was on this disk alone when the node died could come
        back after the next coordinator has settled the task in its own way.
        """
        effects: list[Effect] = []
        is_safe = self._copies.is_safe(task)
        if not task.is_published and (is_safe or task.is_witnessed):
            effects += self._store.put(record_of(task, self._term.epoch, now), now)
            task.is_published = task.is_acknowledged = True
            task.forget_at = now + self._config.status_keep_s
            effects += conclude(task, self._term.epoch, now)
        if is_safe:
            for node, attempt in sorted(task.ended_by.items()):
                taken = OutcomeTaken(epoch=self._term.epoch, task=task.id, attempt=attempt)
                effects.append(Send(node, taken))
            task.ended_by.clear()
        return effects

    def expire(self, task: Task, now: float) -> list[Effect]:
        where = f"while it ran on {task.node}" if task.node else "before it could start"
        reason = f"its deadline of {task.submit.deadline_s:g} s passed {where}"
        return self.settle(task, own_outcome(task, "expired", reason, self._term.epoch, now), now)

    def _drop(self, task: Task) -> list[Effect]:
        """Out of the ledger; the store keeps the record or its tombstone."""
        effects: list[Effect] = [] if task.forget_at == FOREVER else [Broadcast(TaskForgotten(task=task.id))]
        self._ledger.drop(task)
        return [*effects, *self._store.bury(task.id)]

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    def attend(self, task: Task, now: float) -> list[Effect]:
        """Clear what was retained, and let go of what nobody asks for any more."""
        effects: list[Effect] = []
        if task.forget_at <= now:
            task.forget_at = FOREVER
            effects.append(Broadcast(TaskForgotten(task=task.id)))
        if not task.is_open and task.is_published and self._drop_at(task) <= now:
            effects += self._drop(task)
        return effects

    def due_at(self, task: Task) -> float:
        """When ``attend`` has something to do for a settled task."""
        return min(task.forget_at, self._drop_at(task) if task.is_published else FOREVER)

    def _drop_at(self, task: Task) -> float:
        return max(task.settled_at, task.accepted_at) + self._config.settled_keep_s
