"""Keeps the dispatcher in step with the ledger and the cluster, and asks it what to do.

The ledger says what is; the dispatcher (``coordinator.policy``) only decides. So nothing is told to it as it
happens: before each decision every task and node that changed is compared with the dispatcher's books, and
what differs is put right there. An attempt adopted after a failover, a refusal, a cancellation and a death
need no code of their own here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from coordinator.cluster import Cluster, Node
from coordinator.explanations import Explanations
from coordinator.ledger import Ledger
from coordinator.locality import REFRESH_S, Locality
from coordinator.placement import has_what_it_needs, held_layers
from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, NodeView, Why
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.explaining import hopeless_words
from coordinator.policy.nodes import Share
from coordinator.policy.policies import Policy
from coordinator.policy.rates import Rates, rates_of
from coordinator.policy.work import Needs, Work, needs_of, size_of, work_of
from coordinator.task import Task
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId
from mesh.messages import NodeInfo, Outcome, Submit

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
        locality: Locality | None = None,
    ) -> None:
        self._ledger = ledger
        self._cluster = cluster
        self._dispatcher = Dispatcher(policy, cost, config)
        self._cost = cost
        self._explanations = explanations
        self._changed_nodes = cluster.watch()
        self._with_recovered = True
        self._locality = locality or Locality()
        self._reading: dict[TaskId, Work] = {}
        """Waiting tasks of which it is known what features they read."""
        self._shared_at = -FOREVER

    @property
    def wake_at(self) -> float:
        """When ``decide`` has something to do though nothing happens."""
        return self._dispatcher.wake_at

    def decide(self, now: float, *, with_recovered: bool) -> list[Decision]:
        """What to start and what to reject now; recovered tasks are touched only if told so."""
        self._take_in_nodes(now)
        for task_id in self._moved(with_recovered):
            self._take_in(task_id, now)
        if self._reading and now - self._shared_at >= REFRESH_S:
            self._share(list(self._reading), now)
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
        if not self._dispatcher.policy.drop or _is_done_in_parts(submit):
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
        shares = self._shares(job.work, now) if job.work.n_feature_bytes else None
        certain_s = self._dispatcher.certain_s(job, shares)
        return hopeless_words(certain_s, deadline_at - now) if now + certain_s > deadline_at else None

    def outlook(self, task: TaskId, now: float) -> Why | None:
        """What the next decision about a waiting task would be made from."""
        return self._dispatcher.outlook(task, now)

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def _take_in_nodes(self, now: float) -> None:
        while self._changed_nodes:
            node = self._cluster.get(self._changed_nodes.popitem()[0])
            view = _view_of(node, self._locality)
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
            self._reading.pop(task_id, None)
            dispatcher.withdraw(task_id, now)
            self._explanations.forget(task_id)
        elif not task.is_open:
            self._take_end(task, now)
        elif task.node is not None:
            self._reading.pop(task_id, None)
            if dispatcher.node_of(task_id) != task.node:
                dispatcher.running(self._job(task), task.node, now)
        elif self._may_start(task, now):
            waiting = dispatcher.waiting(task_id)
            # What was learned since it came is no news about it: it would count as a newcomer again.
            if waiting is None or not _is_same(waiting, task):
                self._wait(task, now)
        else:
            self._reading.pop(task_id, None)
            dispatcher.withdraw(task_id, now)

    def _wait(self, task: Task, now: float) -> None:
        job = self._job(task)
        self._dispatcher.withdraw(task.id, now)
        self._dispatcher.add(job, now)
        if job.work.n_feature_bytes:
            self._reading[task.id] = job.work
            self._share([task.id], now)

    def _take_end(self, task: Task, now: float) -> None:
        """The task is over: what its last attempt took is a lesson."""
        self._reading.pop(task.id, None)
        node, outcome = self._dispatcher.node_of(task.id), task.outcome
        assert outcome is not None, f"task {task.id} is over and has an outcome"
        ran = node is not None and outcome.node == node and outcome.service_s > 0
        is_lesson = ran and outcome.state in ("done", "expired")
        self._dispatcher.ended(task.id, now, _observed(outcome) if is_lesson else None)
        is_done = ran and outcome.state == "done"
        if is_done and task.submit.kind == "generate":
            self._cost.learn_answer(max_tokens=task.submit.max_tokens, n_tokens=outcome.n_tokens)
        if is_done and outcome.n_prompt_tokens:
            n_bytes, n_texts = size_of(task.submit)
            self._cost.counts.learn(
                task.submit.kind, n_bytes=n_bytes, n_texts=n_texts, n_tokens=outcome.n_prompt_tokens
            )
        self._learn_features(task, outcome, now)

    # ── where features are ──────────────────────────────────────────────────────────────────────────

    def _learn_features(self, ended: Task, outcome: Outcome, now: float) -> None:
        held = outcome.output.features if outcome.output is not None else None
        if held is None or ended.submit.tune is None or outcome.state != "done":
            return
        node = outcome.node
        info = self._cluster.get(node).info if node is not None else None
        model = info.model if info is not None else None
        if not self._locality.learn(ended.submit, held, node, model, ended.settled_at):
            return
        if node is not None and node in self._dispatcher.nodes:
            self._changed_nodes[node] = None  # its link is known better
        for task in list(self._ledger.waiting()):
            is_tuning = task.submit.tune is not None and self._dispatcher.waiting(task.id) is not None
            if is_tuning and task.id not in self._reading:
                work = self._work(task.submit)
                if work.n_feature_bytes:
                    self._wait(task, now)

    def _share(self, tasks: Iterable[TaskId], now: float) -> None:
        """Tell the dispatcher who has how much of what these tasks read."""
        self._shared_at = now
        for work in {work.reuses: work for task in tasks if (work := self._reading.get(task))}.values():
            shares = self._shares(work, now)
            if shares is not None and work.reuses is not None:
                self._dispatcher.set_shares(work.reuses, shares)

    def _shares(self, work: Work, now: float) -> Mapping[NodeId, Share] | None:
        nodes = sorted((node for node in self._cluster if node.is_present), key=lambda node: node.id)
        rated = [(node, _rates_of(node.info, node.id, self._locality)) for node in nodes if node.info]
        return self._locality.shares(work, rated, now)

    def _may_start(self, task: Task, now: float) -> bool:
        return (
            task.is_acknowledged
            and not task.is_cancelling
            and not _is_done_in_parts(task.submit)
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
        work = work_of(submit, answer_share=self._cost.answer_share, counts=self._cost.counts)
        return self._locality.work(submit, work)


def _is_same(job: Job, task: Task) -> bool:
    """Whether nothing about the task has changed; a merge may find it older than thought."""
    return (job.arrived_at, job.deadline_at, job.avoid) == (task.accepted_at, task.deadline_at, task.avoid)


def _is_done_in_parts(submit: Submit) -> bool:
    """It never runs itself: see ``coordinator.rounds``."""
    return submit.tune is not None and submit.tune.nodes > 1 and submit.tune.part is None


_UNBORN = TaskId("a-task-not-accepted-yet")


@dataclass(frozen=True, slots=True)
class _Has:
    """``placement.has_what_it_needs`` of one node, comparable: an unchanged node is recognised."""

    node: NodeId
    model: str | None
    also_called: tuple[str, ...]
    adapters: frozenset[str]
    n_layers: int
    profile: str | None

    def __call__(self, needs: Needs) -> bool:
        if needs.profile and self.profile not in (None, needs.profile):
            return False
        return has_what_it_needs(self.node, self.model, self.also_called, self.adapters, needs, self.n_layers)


def _rates_of(info: NodeInfo, node: NodeId, locality: Locality) -> Rates:
    return replace(rates_of(info), fetch_bytes_per_s=locality.fetch_bytes_per_s(node))


def _view_of(node: Node, locality: Locality) -> NodeView | None:
    """The node as the dispatcher sees it; ``None`` if it is not here or computes nothing."""
    info = node.info
    if info is None or not node.is_present or node.slots < 1:
        return None
    return NodeView(
        id=node.id,
        rates=_rates_of(info, node.id, locality),
        slots=node.slots,
        has=_Has(
            node.id,
            info.model,
            tuple(info.also_called),
            frozenset(info.adapters),
            held_layers(info),
            info.features_profile,
        ),
        is_ready=node.may_start,
        can_pause=info.can_pause,
        tunes_beside=True,
    )


def _observed(outcome: Outcome) -> Observed:
    is_whole = outcome.state == "done"
    return Observed(
        service_s=outcome.service_s,
        n_prompt_tokens=outcome.n_prompt_tokens or None,
        # Who settles an attempt that it stopped has not heard how far it came.
        n_tokens=outcome.n_tokens if is_whole or outcome.n_tokens else None,
        is_whole=is_whole,
    )
