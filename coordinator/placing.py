"""Keeps the dispatcher in step with the ledger and the cluster, and asks it what to do.

The ledger says what is; the dispatcher (``coordinator.policy``) only decides. So nothing is told to it as it
happens: before each decision every task and node that changed is compared with the dispatcher's books, and
what differs is put right there. An attempt adopted after a failover, a refusal, a cancellation and a death
need no code of their own here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.cluster import Cluster, Node
from coordinator.explanations import Explanations
from coordinator.ledger import Ledger
from coordinator.placement import has_what_it_needs, held_layers
from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, NodeView, Why
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.explaining import hopeless_words
from coordinator.policy.policies import Policy
from coordinator.policy.rates import rates_of
from coordinator.policy.work import Needs, Work, needs_of, work_of
from coordinator.task import Task
from mesh.ids import NodeId, TaskId
from mesh.messages import Outcome, Submit

__all__ = ["Placing"]


class Placing:
    """One coordination's queue: made at an election, dropped when it ends. ``cost`` outlives it."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        cluster: Cluster,
        policy: Policy,
        cost: CostModel,
        explanations: Explanations,
        config: DispatchConfig,
    ) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._dispatcher = Dispatcher(policy, cost, config)
        self._cost = cost
        self._explanations = explanations
        self._changed_nodes = cluster.watch()
        self._with_recovered = True

    @property
    def wake_at(self) -> float:
        """When ``decide`` has something to do though nothing happens."""
        return self._dispatcher.wake_at

    def decide(self, now: float, *, with_recovered: bool) -> list[Decision]:
        """What to start and what to reject now; recovered tasks are touched only if told so."""
        self._take_in_nodes(now)
        for task_id in self._moved(with_recovered):
            self._take_in(task_id, now)
        # A task whose deadline has passed is expired in its own turn, and waits no more.
        decisions = self._dispatcher.decide(now)
        return [
            decision
            for decision in decisions
            if not (isinstance(decision, Drop) and self._is_late(decision, now))
        ]

    def hopeless(self, submit: Submit, deadline_at: float, now: float) -> str | None:
        """Why a task that is not in the ledger cannot be done in time.

        ``None`` if it may be, or if the policy refuses nothing.
        """
        if not self._dispatcher.policy.drop:
            return None
        self._take_in_nodes(now)
        job = Job(
            task=_UNBORN,
            work=self._work(submit),
            value=submit.value,
            arrived_at=now,
            deadline_at=deadline_at,
            needs=needs_of(submit),
        )
        certain_s = self._dispatcher.certain_s(job)
        return hopeless_words(certain_s, deadline_at - now) if now + certain_s > deadline_at else None

    def outlook(self, task: TaskId, now: float) -> Why | None:
        """What the next decision about a waiting task would be made from."""
        return self._dispatcher.outlook(task, now)

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def _take_in_nodes(self, now: float) -> None:
        while self._changed_nodes:
            node = self._cluster.get(self._changed_nodes.popitem()[0])
            view = _view_of(node)
            if view is None:
                self._dispatcher.drop_node(node.id)
            else:
                is_new = node.id not in self._dispatcher.nodes
                self._dispatcher.put_node(view)
                if is_new:
                    for task in self._ledger.on_node(node.id):
                        self._take_in(task.id, now)

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────

    def _moved(self, with_recovered: bool) -> Iterable[TaskId]:
        moved = self._ledger.take_moved()
        if with_recovered == self._with_recovered:
            return moved
        self._with_recovered = with_recovered
        return [*moved, *(task.id for task in self._ledger.waiting() if task.is_recovered)]

    def _take_in(self, task_id: TaskId, now: float) -> None:
        task, dispatcher = self._ledger.get(task_id), self._dispatcher
        if task is None:
            dispatcher.withdraw(task_id, now)
            self._explanations.forget(task_id)
        elif not task.is_open:
            self._take_end(task, now)
        elif task.node is not None:
            if dispatcher.node_of(task_id) != task.node:
                dispatcher.running(self._job(task), task.node, now)
        elif self._may_start(task, now):
            waiting = dispatcher.waiting(task_id)
            # What was learned since it came is no news about it: it would count as a newcomer again.
            if waiting is None or not _is_same(waiting, task):
                dispatcher.withdraw(task_id, now)
                dispatcher.add(self._job(task), now)
        else:
            dispatcher.withdraw(task_id, now)

    def _take_end(self, task: Task, now: float) -> None:
        """The task is over: what its last attempt took is a lesson."""
        node, outcome = self._dispatcher.node_of(task.id), task.outcome
        assert outcome is not None, f"task {task.id} is over and has an outcome"
        is_lesson = outcome.state == "done" and outcome.node == node and outcome.service_s > 0
        self._dispatcher.ended(task.id, now, _observed(outcome) if is_lesson and node is not None else None)
        if is_lesson and task.submit.kind == "generate":
            self._cost.learn_answer(max_tokens=task.submit.max_tokens, n_tokens=outcome.n_tokens)
            if outcome.n_prompt_tokens:
                n_bytes = task.submit.n_text_bytes
                self._cost.learn_bytes(n_bytes=n_bytes, n_tokens=outcome.n_prompt_tokens)

    def _may_start(self, task: Task, now: float) -> bool:
        return (
            task.is_acknowledged
            and not task.is_cancelling
            and task.deadline_at > now
            and (self._with_recovered or not task.is_recovered)
        )

    def _is_late(self, drop: Drop, now: float) -> bool:
        task = self._ledger.get(drop.task)
        return task is None or task.deadline_at <= now

    def _job(self, task: Task) -> Job:
        return Job(
            task=task.id,
            work=self._work(task.submit),
            value=task.submit.value,
            arrived_at=task.accepted_at,
            deadline_at=task.deadline_at,
            needs=needs_of(task.submit),
            tie=task.digest,
            avoid=task.avoid,
        )

    def _work(self, submit: Submit) -> Work:
        return work_of(
            submit, answer_share=self._cost.answer_share, bytes_per_token=self._cost.bytes_per_token
        )


def _is_same(job: Job, task: Task) -> bool:
    """Whether nothing about the task has changed; a merge may find it older than thought."""
    return (job.arrived_at, job.deadline_at, job.avoid) == (task.accepted_at, task.deadline_at, task.avoid)


_UNBORN = TaskId("a-task-not-accepted-yet")


@dataclass(frozen=True, slots=True)
class _Has:
    """``placement.has_what_it_needs`` of one node, comparable: an unchanged node is recognised."""

    node: NodeId
    model: str | None
    also_called: tuple[str, ...]
    adapters: frozenset[str]
    n_layers: int

    def __call__(self, needs: Needs) -> bool:
        return has_what_it_needs(self.node, self.model, self.also_called, self.adapters, needs, self.n_layers)


def _view_of(node: Node) -> NodeView | None:
    """The node as the dispatcher sees it; ``None`` if it is not here or computes nothing."""
    info = node.info
    if info is None or not node.is_present or node.slots < 1:
        return None
    return NodeView(
        id=node.id,
        rates=rates_of(info),
        slots=node.slots,
        has=_Has(node.id, info.model, tuple(info.also_called), frozenset(info.adapters), held_layers(info)),
        is_ready=node.may_start,
        can_pause=info.can_pause,
        tunes_beside=True,
    )


def _observed(outcome: Outcome) -> Observed:
    return Observed(
        service_s=outcome.service_s,
        n_prompt_tokens=outcome.n_prompt_tokens or None,
        n_tokens=outcome.n_tokens,
    )
