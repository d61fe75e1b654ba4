"""Attempts of open tasks: place, assign, ask again, give up, and take what workers answer.

An attempt is the coordinator's to number and the worker's to run. What the worker says it runs counts:
if it already runs an older attempt of the task (another coordinator's, or one thought lost), that attempt
is adopted instead of starting the work twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.explanations import Explanations
from coordinator.placing import Placing
from coordinator.policy.decisions import Drop, Start
from coordinator.publish import announce, event
from coordinator.task import CANCELLED_BY_CLIENT, Task
from coordinator.term import Term
from mesh.core import FOREVER, Effect, Send
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import Assign, AttemptEnded, AttemptId, CancelAttempt, Outcome, TaskState

__all__ = ["Attempts", "AttemptsConfig", "Settle", "own_outcome"]

Settle = Callable[[Task, Outcome, float], list[Effect]]

_ATTEMPT_MAX = 1000  # what ``AttemptId`` can carry


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptsConfig:
    assign_every_s: float = 1.5
    asked_max: int = 4
    """Unanswered ``Assign``s to a node that is alive before another node is tried."""
    silence_s: float = 4.0
    """Workers speak once a second: four reports lost is no accident."""
    failures_max: int = 8
    """Attempts lost or failed by their nodes before the task is taken for the cause."""
    refused_wait_s: float = 0.25
    """Not asked again for this long, doubled with every refusal, at most ``refused_wait_max_s``."""
    refused_wait_max_s: float = 5.0
    cancel_s: float = 5.0
    """How long a client waits for the worker to stop before the task counts as cancelled anyway."""
    cancel_every_s: float = 1.0


class Attempts:
    """One coordinator's view of who runs what. ``settle`` ends a task; ``placing`` says what starts."""

    def __init__(
        self,
        *,
        term: Term,
        placing: Placing,
        explanations: Explanations,
        settle: Settle,
        config: AttemptsConfig,
    ) -> None:
        self._epoch = term.epoch
        self._ledger = term.ledger
        self._cluster = term.cluster
        self._placing = placing
        self._explanations = explanations
        self._settle = settle
        self._config = config
        self.stragglers_until = -FOREVER
        """Until then a node that has not answered the recall may know of an end of a recovered task."""

    # ── to workers ──────────────────────────────────────────────────────────────────────────────────

    def place(self, now: float, *, with_recovered: bool = True) -> list[Effect]:
        """Assign what waits to whoever is free and reject what cannot be done in time.

        Recovered tasks only if told so: another node may know more of them.
        """
        effects: list[Effect] = []
        for decision in self._placing.decide(now, with_recovered=with_recovered):
            task = self._ledger.get(decision.task)
            assert task is not None, f"decided about task {decision.task}, which is not in the ledger"
            self._explanations.note(task.id, decision, now)
            match decision:
                case Start(node=node, after=after):
                    effects += self._assign(task, node, now, pauses=after)
                case Drop(reason=reason):
                    effects += self._end(task, "rejected", reason, now)
                case _:
                    pass  # the worker pauses one for the other (``Assign.pauses``), and resumes it by itself
        return effects

    def attend(self, task: Task, now: float) -> list[Effect]:
        """Do what time makes due for an open task, its deadline apart."""
        if task.node is None:
            is_due = task.cancel_at <= now
            return self._end(task, "cancelled", CANCELLED_BY_CLIENT, now) if is_due else []
        if task.cancel_at <= now:
            return self._end(task, "cancelled", f"{CANCELLED_BY_CLIENT}; its worker did not answer", now)
        if task.is_cancelling:
            if task.cancel_again_at > now:
                return []
            task.cancel_again_at = now + self._config.cancel_every_s
            return [self._stop(task, task.node, CANCELLED_BY_CLIENT)]
        if task.assign_again_at <= now:
            if task.asked >= self._config.asked_max:
                return self.lost(task, f"{task.node} did not answer", now)
            return [self._order(task, task.node, now)]
        if task.heard_at + self._config.silence_s <= now:
            return self.again(task, f"{task.node} went silent", now)
        return []

    def due_at(self, task: Task, now: float) -> float:
        """When ``attend`` or ``place`` has something to do for an open task."""
        if task.node is None:
            again_at = min((until for until in task.avoid.values() if until > now), default=FOREVER)
            return min(again_at, task.cancel_at)
        if task.is_cancelling:
            return min(task.cancel_at, task.cancel_again_at)
        return min(task.assign_again_at, task.heard_at + self._config.silence_s)

    def cancel(self, task: Task, now: float) -> list[Effect]:
        """A client wants the open task ended."""
        if task.node is None and task.is_recovered and now < self.stragglers_until:
            # A node that owes its answer may know how it ended.
            self._ledger.touch(task)
            task.cancel_at = min(task.cancel_at, self.stragglers_until)
            return []
        if task.node is None:
            return self._end(task, "cancelled", CANCELLED_BY_CLIENT, now)
        if task.is_cancelling:
            return []
        self._ledger.touch(task)
        task.cancel_at = now + self._config.cancel_s
        task.cancel_again_at = now + self._config.cancel_every_s
        return [self._stop(task, task.node, CANCELLED_BY_CLIENT)]

    def again(self, task: Task, reason: str, now: float) -> list[Effect]:
        """The attempt may be lost with its worker's memory: the same node is asked for the next one.

        If it still runs the old one, it says so and that one is adopted.
        """
        assert task.node is not None
        if task.deadline_at <= now or task.is_cancelling:
            return []  # its end is due; nothing starts it again
        if not task.is_acknowledged:
            # Said again during a failover and adopted while it ran: it waits for its second disk.
            with self._ledger.changing(task):
                task.requeue()
            return []
        if not self._may_try(task):
            return self._end(task, "failed", f"given up after {task.failures + 1} attempts: {reason}", now)
        task.failures += 1
        return self._assign(task, task.node, now)

    def lost(self, task: Task, reason: str, now: float) -> list[Effect]:
        """The attempt is over and settled nothing: the next one runs elsewhere if anywhere it can."""
        if task.is_cancelling:
            return self._end(task, "cancelled", CANCELLED_BY_CLIENT, now)
        if not self._may_try(task):
            return self._end(task, "failed", f"given up after {task.failures + 1} attempts: {reason}", now)
        assert task.node is not None
        node = task.node
        task.failures += 1
        task.avoid = {**task.avoid, node: now + self._config.refused_wait_max_s}
        with self._ledger.changing(task):
            task.requeue()
        return [event(f"attempt {task.attempt} on {node} is lost ({reason}); trying again", task.id)]

    # ── from workers ────────────────────────────────────────────────────────────────────────────────

    def running(self, sender: NodeId, attempt: AttemptId, now: float) -> list[Effect]:
        """``sender`` runs ``attempt``: adopt it, or have it stopped if the task needs it no longer."""
        task = self._ledger.get(attempt.task)
        if task is None:
            return []
        if not task.is_open:
            return [self._stop(task, sender, "the task is over")]
        is_news = (task.state, task.node, task.attempt_number) != ("running", sender, attempt.attempt)
        if task.node is not None and task.node != sender:
            return [self._stop(task, sender, f"the task runs on {task.node}")]
        if (attempt.attempt, attempt.epoch) in task.over:
            return []  # an old report overtaken by the attempt's end
        if task.failures and attempt.attempt < task.attempt:
            task.failures -= 1  # it was not lost after all
        with self._ledger.changing(task):
            task.run(sender, attempt.attempt, attempt.epoch, now)
            task.waits_for = None
        return announce(task, self._epoch, now) if is_news else []

    def refused(self, sender: NodeId, attempt: AttemptId, now: float) -> list[Effect]:
        task = self._ledger.get(attempt.task)
        if task is None or not task.is_open or task.node != sender or task.state != "assigned":
            return []
        if task.attempt_number != attempt.attempt:
            return []
        if task.is_cancelling:
            return self._end(task, "cancelled", CANCELLED_BY_CLIENT, now)
        wait_s = min(
            self._config.refused_wait_s * 2 ** min(task.refusals, 10), self._config.refused_wait_max_s
        )
        task.refusals += 1
        task.avoid = {**task.avoid, sender: now + wait_s}
        with self._ledger.changing(task):
            task.requeue()
        return announce(task, self._epoch, now)

    def ended(self, sender: NodeId, ended: AttemptEnded, task: Task, now: float) -> Outcome | list[Effect]:
        """An outcome that settles the open task, or what to do because this one does not."""
        outcome = ended.outcome
        # The coordinator that was asked to cancel may be gone: then the worker's word is all there is.
        is_wanted = task.is_cancelling or outcome.reason == CANCELLED_BY_CLIENT
        is_final = not outcome.retry and (outcome.state != "cancelled" or is_wanted)
        if is_final:
            return outcome
        if task.node != sender or task.attempt_number > ended.attempt:
            return []  # an attempt given up before
        return self.lost(task, outcome.reason or f"{sender} ended it", now)

    # ── ─────────────────────────────────────────────────────────────────────────────────────────────

    def _may_try(self, task: Task) -> bool:
        return task.failures < self._config.failures_max and task.attempt < _ATTEMPT_MAX

    def _assign(self, task: Task, node: NodeId, now: float, *, pauses: TaskId | None = None) -> list[Effect]:
        assert task.is_acknowledged, f"task {task.id} is not durable yet"
        assert task.deadline_at > now, f"task {task.id} is expired and must not start"
        if task.attempt >= _ATTEMPT_MAX:
            return self._end(task, "failed", f"given up after {task.attempt} attempts", now)
        task.avoid = {other: until for other, until in task.avoid.items() if until > now}
        with self._ledger.changing(task):
            task.assign(node, task.attempt + 1, self._epoch, now)
            task.waits_for, task.pauses = None, pauses
        return [self._order(task, node, now), *announce(task, self._epoch, now)]

    def _order(self, task: Task, node: NodeId, now: float) -> Effect:
        task.asked += 1
        task.assign_again_at = now + self._config.assign_every_s
        order = Assign(
            epoch=self._epoch,
            task=task.id,
            attempt=task.attempt,
            submit=task.submit,
            budget_s=task.budget_s(now),
            queue_s=task.queue_s(now),
            pauses=task.pauses,
        )
        return Send(node, order)

    def _stop(self, task: Task, node: NodeId, reason: str) -> Effect:
        return Send(node, CancelAttempt(epoch=self._epoch, task=task.id, reason=reason))

    def _end(self, task: Task, state: TaskState, reason: str, now: float) -> list[Effect]:
        return self._settle(task, own_outcome(task, state, reason, self._epoch, now), now)


def own_outcome(task: Task, state: TaskState, reason: str, epoch: Epoch, now: float) -> Outcome:
    """How the coordinator ends a task without a worker's outcome."""
    ran_s = 0.0 if task.assigned_at == FOREVER else max(0.0, now - task.assigned_at)
    return Outcome(
        state=state,
        text="",
        finish_reason=None,
        reason=reason,
        node=task.node,
        attempt=task.attempt,
        epoch=epoch,
        queue_s=task.queue_s(now),
        service_s=ran_s,
    )
