"""The queue and the decisions: who starts where now, who gives way, who is refused.

    add ─▶ waiting ──decide: Start──▶ running ──ended──▶ (forgotten)
              │  ▲                     │   ▲
              │  └──── requeue ────────┤   └── decide: Resume
              ▼                        ▼
       decide: Drop             decide: Pause

``decide`` changes the dispatcher's own books at once: what it returns has happened as far as it is
concerned, and ``requeue`` takes a start back. Everything is deterministic: in which order calls at one
``now`` were made changes nothing; ties are broken by deadline, ``Job.tie`` and id.

Its parts: ``books`` (who waits, what runs), ``starting``, ``giving_way``; here, what others call and what
holds for all: who may start at all, who is hopeless, when to look again.

Bounds: a row per waiting task and a record per running one (the caller's admission bounds both), two
entries per waiting task on the list of what may become hopeless.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from math import nextafter

from coordinator.policy.books import Books, DispatchConfig
from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, NodeView, Why
from coordinator.policy.explaining import candidates_of, hopeless_words
from coordinator.policy.giving_way import end_chunks, preempt, resume
from coordinator.policy.looking import overview
from coordinator.policy.nodes import Share
from coordinator.policy.policies import Policy, margin_after, vdf_plain
from coordinator.policy.pricing import all_fastest_s, fastest_s
from coordinator.policy.starting import fill
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

__all__ = ["DispatchConfig", "Dispatcher"]


_READ_LEAST_S = 0.02
"""A prompt that takes longer than thought is not asked after more often."""


class Dispatcher:
    """One policy at work on one queue."""

    def __init__(self, policy: Policy, cost: CostModel, config: DispatchConfig | None = None) -> None:
        self.policy = policy
        self._margin_max = policy.margin
        self.cost = cost
        self._config = config or DispatchConfig()
        self._books = Books(cost, self._config, chunks=policy.chunk)
        self._filling = replace(policy, score=vdf_plain, keeps=None, gambles=True)
        """How nodes are used that ``policy`` would leave idle."""
        self._hopeless: list[tuple[float, TaskId]] = []
        self._select_at = -FOREVER
        """When the policy is asked again what may start."""
        self._is_stale = False
        """Nodes came, left or changed since the last decision."""
        self._is_news = False
        """A task or a node came, left or changed since the last decision."""
        self._again_at = FOREVER
        """When time alone may let a waiting task start."""
        self._newcomers: list[TaskId] = []
        """Added since the last decision."""

    # ── what others may read ────────────────────────────────────────────────────────────────────────

    def __contains__(self, task: TaskId) -> bool:
        return task in self._books.jobs or task in self._books.runs_on

    @property
    def n_waiting(self) -> int:
        return len(self._books.jobs)

    @property
    def n_running(self) -> int:
        return len(self._books.runs_on)

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset(self._books.nodes.ids)

    def waiting(self, task: TaskId) -> Job | None:
        """The task as it was added, if it waits."""
        return self._books.jobs.get(task)

    def node_of(self, task: TaskId) -> NodeId | None:
        """Where the task runs; ``None`` if it does not."""
        return self._books.runs_on.get(task)

    def certain_s(self, job: Job, shares: Mapping[NodeId, Share] | None = None) -> float:
        """What the best node needs for a job that is not here, as far as it is certain.

        ``shares``: as in ``set_shares``, of what it reuses.
        """
        row = self._books.enter(job)
        if shares is not None and job.work.reuses is not None:
            self.set_shares(job.work.reuses, shares)
        _, certain_s = fastest_s(self._books.jobs, self._books.nodes, row)
        self._books.leave(job.task)
        return certain_s

    def outlook(self, task: TaskId, now: float) -> Why | None:
        """What the next decision about a waiting task would be made from: where it could go and why it does
        not. ``None`` if it does not wait."""
        if task not in self._books.jobs:
            return None
        row = self._books.jobs.row(task)
        job, best_s = self._books.jobs.jobs[row], float(self._books.jobs.column("best_s")[row])
        is_virtual = job.deadline_at == FOREVER
        return Why(
            at=now,
            policy=self.policy.name,
            words=f"waits with {len(self._books.jobs) - 1} others; its best node needs {best_s:.1f} s",
            score=-FOREVER,
            density=job.value / best_s if best_s else FOREVER,
            laxity_s=None if is_virtual else job.deadline_at - now - best_s,
            cost_s=best_s,
            service_s=best_s,
            n_waiting=len(self._books.jobs) - 1,
            candidates=candidates_of(self._books.jobs, self._books.nodes, self.cost, row, None, now),
            n_candidates=len(self._books.nodes),
        )

    @property
    def wake_at(self) -> float:
        """When ``decide`` has something to do though nothing happens: a task is hopeless, a chunk ends."""
        if self._is_stale and len(self._books.jobs):
            return -FOREVER
        hopeless_at = self._hopeless[0][0] if self._hopeless else FOREVER
        if not len(self._books.jobs):
            return hopeless_at
        contest_at = min(self._books.yielding.values(), default=FOREVER)
        return min(hopeless_at, contest_at, self._again_at if self._books.nodes.n_open else FOREVER)

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def put_node(self, view: NodeView) -> None:
        """A node is here, or something about it changed."""
        self._is_stale |= self._books.nodes.put(view)
        self._is_news = True

    def drop_node(self, node: NodeId) -> list[TaskId]:
        """A node is gone. What ran there is forgotten: ``add`` again what shall run elsewhere."""
        if node not in self._books.nodes:
            return []
        lost = [running.job.task for running in self._books.nodes.drop(node)]
        for task in lost:
            self._stops(task)
        self._is_stale = self._is_news = True
        return sorted(lost)

    def set_shares(self, name: str, shares: Mapping[NodeId, Share]) -> None:
        """Which share of what waiting tasks reuse by this name each node has, and which it would fetch."""
        self._is_stale |= self._books.nodes.set_shares(name, shares)

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, job: Job, now: float) -> None:
        """The job waits from now on. Its place in the order does not depend on when it was added."""
        assert job.task not in self, f"task {job.task} is here already"
        row = self._books.enter(job)
        best_s, certain_s = fastest_s(self._books.jobs, self._books.nodes, row)
        self._books.jobs.rate(row, best_s, self._config.patience_s + best_s)
        if job.deadline_at < FOREVER and self.policy.drop:
            heapq.heappush(self._hopeless, (job.deadline_at - certain_s, job.task))
            self._tidy()
        self._select_at = -FOREVER
        self._newcomers.append(job.task)
        self._is_news = True
        for task, at in self._books.yielding.items():
            row = self._books.nodes.row(self._books.runs_on[task])
            self._books.yielding[task] = min(
                at, self._books.chunk_end(self._books.nodes.running(row)[task], now)
            )
        self._books.recent.add(job, best_s)

    def withdraw(self, task: TaskId, now: float) -> None:
        """Forget the task, whatever it does."""
        if task in self._books.jobs:
            self._books.leave(task)
        elif task in self._books.runs_on:
            self._books.nodes.end(self._books.nodes.row(self._stops(task)), task, now)

    def running(self, job: Job, node: NodeId, now: float) -> None:
        """The task runs on ``node`` whoever started it, such as an earlier coordinator."""
        if self._books.runs_on.get(job.task) == node:
            return
        self.withdraw(job.task, now)
        if node in self._books.nodes:
            self._books.run(job, self._books.nodes.row(node), now)

    def ended(self, task: TaskId, now: float, observed: Observed | None = None) -> None:
        """The task is over; ``observed`` teaches the cost model."""
        if task not in self._books.runs_on:
            self.withdraw(task, now)
            return
        node = self._stops(task)
        row = self._books.nodes.row(node)
        running, rows = self._books.nodes.end(row, task, now)
        if observed is not None and not running.stood_s:  # else much of its time was another's
            crowding = self._books.nodes.crowding(row, running, rows)
            self.cost.learn(
                running.job.work,
                node,
                self._books.nodes.view(row).rates,
                replace(observed, rows=rows, crowding=crowding),
                reuse=running.reuse,
                far=running.far,
                predicted_s=running.expected_s + running.delayed_s,  # as last revised
            )
            self._books.nodes.learned(node, running.job.work.kind)

    def requeue(
        self, task: TaskId, now: float, *, left: float = 1.0, avoid: Mapping[NodeId, float] | None = None
    ) -> None:
        """The attempt is over and the task is not (refused, lost, given way): it waits again.

        Args:
            left: Share of the work that is still to be done, 0 to 1.
            avoid: Nodes that refused or failed it -> until when not to ask them.
        """
        running, _ = self._books.nodes.end(self._books.nodes.row(self._stops(task)), task, now)
        job = replace(running.job, work=running.job.work.left(left), avoid=avoid or running.job.avoid)
        self.add(job, now)

    # ── decisions ───────────────────────────────────────────────────────────────────────────────────

    def decide(self, now: float) -> list[Decision]:
        """Everything that is to be done now, in order. A second call at the same time returns nothing.

        Cost: with m nodes that have room and n waiting tasks about 20 passes over n * m numbers, and
        next to nothing while no node has room.
        """
        decisions: list[Decision] = []
        if self._is_stale:
            self._look_again()
        if self._hopeless and self._hopeless[0][0] <= now:
            decisions += self._drop_hopeless(now)
        if self._books.paused:
            decisions += resume(self._books, self.policy, now)
        if len(self._books.jobs):
            due = [task for task, at in self._books.yielding.items() if at <= now]
            is_news = self._is_news or now >= self._again_at
            if due or (is_news and self._books.nodes.n_open):
                if self._select(now) or self._may_start_more():
                    decisions += fill(self._books, self.policy, now)
                if self.policy.fill and self._holds_back(now):
                    decisions += fill(self._books, self._filling, now)
                decisions += end_chunks(self._books, self.policy, sorted(due), now)
            if self._newcomers and self.policy.preempt:
                decisions += preempt(self._books, self.policy, self._newcomers, now)
            self._is_news, self._again_at = False, self._next_look_at(now)
        self._newcomers.clear()
        return decisions

    def _next_look_at(self, now: float) -> float:
        """When time alone may let a waiting task start on a node that has room."""
        again_at = FOREVER
        for task in self._books.jobs.avoiding:
            avoid = self._books.jobs.jobs[self._books.jobs.row(task)].avoid
            again_at = min(again_at, min((until for until in avoid.values() if until > now), default=FOREVER))
        if self.policy.keeps is not None or self.policy.margin != 1.0:
            again_at = min(again_at, now + self._config.chunk_s)
        if self.policy.drop and self._books.nodes.n_shared:
            # Once somebody there has read its prompt, who waited for that may join.
            again_at = min(again_at, now + max(self._books.nodes.read_in_s(now), _READ_LEAST_S))
        return again_at

    def _drop_hopeless(self, now: float) -> list[Decision]:
        dropped: list[Decision] = []
        while self._hopeless and self._hopeless[0][0] <= now:
            _, task = heapq.heappop(self._hopeless)
            job = self._books.jobs.get(task)
            if job is None:
                continue
            _, certain_s = fastest_s(self._books.jobs, self._books.nodes, self._books.jobs.row(task))
            if now + certain_s <= job.deadline_at and now < job.deadline_at:
                # Rounding must not bring it up at this same moment for ever.
                again_at = max(job.deadline_at - certain_s, nextafter(now, FOREVER))
                heapq.heappush(self._hopeless, (again_at, task))
                continue
            self._books.leave(task)
            dropped.append(Drop(task=task, reason=hopeless_words(certain_s, job.deadline_at - now)))
        return sorted(dropped, key=lambda drop: drop.task)

    def _select(self, now: float) -> bool:
        """Ask the policy which of the waiting tasks may start at all, if there is news since it was asked."""
        keeps = self.policy.keeps
        is_asked = keeps is not None and self._select_at <= now
        if keeps is not None and is_asked:
            self._select_at = now + self._config.select_every_s
            margin = margin_after(self._margin_max, self.cost.errors().values())
            if margin != self.policy.margin:
                self.policy = replace(self.policy, margin=margin)
                self._filling = replace(self._filling, margin=margin)
            scene = overview(self._books.jobs, self._books.nodes, now, self._books.recent)
            self._books.jobs.kept[:] = keeps(scene)
        return is_asked

    def _may_start_more(self) -> bool:
        """Whether the policy may start what it did not a moment ago. As time alone goes by, ever less ends in
        time on an idle node; in a batch those who run free it bit by bit, and refusals are forgotten."""
        nodes = self._books.nodes
        if self._is_news or self._books.jobs.avoiding:
            return True
        return nodes.n_shared > 0 and bool(nodes.is_shared[nodes.has_room].any())

    def _holds_back(self, now: float) -> bool:
        """Whether a task may wait that the policy would not start, and a node that has room would.

        On an idle node, a task that is kept and can keep the margin somewhere is refused by both.
        """
        jobs, nodes = self._books.jobs, self._books.nodes
        if not len(jobs) or not nodes.n_open:
            return False
        if (nodes.n_shared and nodes.is_shared[nodes.has_room].any()) or not jobs.kept.all():
            return True
        likely_s = self.policy.margin * jobs.column("best_s")
        return bool((likely_s > jobs.column("deadline_at") - now).any())

    def _stops(self, task: TaskId) -> NodeId:
        """The task runs no longer; where it did."""
        self._is_news = True
        return self._books.stops(task)

    def _look_again(self) -> None:
        """What tasks take on their best nodes changed: what was hopeless may not be, and the reverse."""
        self._is_stale = False
        best_s, certain_s = all_fastest_s(self._books.jobs, self._books.nodes)
        self._books.jobs.rate_all(best_s)
        if self.policy.drop:
            hopeless_at = (self._books.jobs.column("deadline_at") - certain_s).tolist()
            self._hopeless = [
                (at, job.task)
                for at, job in zip(hopeless_at, self._books.jobs.jobs, strict=True)
                if job.deadline_at < FOREVER
            ]
            heapq.heapify(self._hopeless)

    def _tidy(self) -> None:
        """Entries of tasks that are gone are left on the list; here it is kept from growing by them."""
        if len(self._hopeless) > 2 * len(self._books.jobs) + 64:
            self._hopeless = [entry for entry in self._hopeless if entry[1] in self._books.jobs]
            heapq.heapify(self._hopeless)
