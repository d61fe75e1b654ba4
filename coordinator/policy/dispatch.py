"""The queue and the decisions: who starts where now, who gives way, who is refused.

    add ─▶ waiting ──decide: Start──▶ running ──ended──▶ (forgotten)
              │  ▲                     │   ▲
              │  └──── requeue ────────┤   └── decide: Resume
              ▼                        ▼
       decide: Drop             decide: Pause

``decide`` changes the dispatcher's own books at once: what it returns has happened as far as it is concerned,
and ``requeue`` takes a start back. Everything is deterministic: the order in which calls at one ``now`` were made
changes nothing, ties are broken by deadline, ``Job.tie`` and id.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, NodeView, Start, Why
from coordinator.policy.density import Floats, age_factor
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable, Running
from coordinator.policy.policies import Policy, Scene
from coordinator.policy.pricing import Prices, fastest_s, prices
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

__all__ = ["DispatchConfig", "Dispatcher"]

_MATRIX_MAX: Final = 100_000
"""Elements (tasks times nodes) scored at once; above, tasks are ordered by their best node and placed one by one."""
_CANDIDATES_MAX: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    patience_s: float = 30.0
    """A task without a deadline is as urgent as can be after this and its own service time; then it ages."""
    explain: bool = True
    """Fill in ``Why.candidates``. Costs about 30 us a decision; the simulator goes without."""
    explained_max: int = 4096
    """Tasks whose last decision is kept."""


class Dispatcher:
    """One policy at work on one queue."""

    def __init__(self, policy: Policy, cost: CostModel, config: DispatchConfig | None = None) -> None:
        self.policy = policy
        self.cost = cost
        self._config = config or DispatchConfig()
        self._jobs = JobTable()
        self._nodes = NodeTable(cost)
        self._runs_on: dict[TaskId, NodeId] = {}
        self._hopeless: list[tuple[float, TaskId]] = []
        self._why: OrderedDict[TaskId, Why] = OrderedDict()

    # ── what others may read ────────────────────────────────────────────────────────────────────────

    def __contains__(self, task: TaskId) -> bool:
        return task in self._jobs or task in self._runs_on

    @property
    def n_waiting(self) -> int:
        return len(self._jobs)

    @property
    def n_running(self) -> int:
        return len(self._runs_on)

    def node_of(self, task: TaskId) -> NodeId | None:
        return self._runs_on.get(task)

    def why(self, task: TaskId) -> Why | None:
        """The numbers behind the last decision about the task."""
        return self._why.get(task)

    @property
    def wake_at(self) -> float:
        """When ``decide`` has something to do though nothing happens: a task becomes hopeless."""
        return self._hopeless[0][0] if self._hopeless else FOREVER

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def put_node(self, view: NodeView) -> None:
        """A node is here, or something about it changed."""
        if self._nodes.put(view):
            self._look_again()

    def drop_node(self, node: NodeId) -> list[TaskId]:
        """A node is gone. What ran there is forgotten: ``add`` again what shall run elsewhere."""
        if node not in self._nodes:
            return []
        lost = [running.job.task for running in self._nodes.drop(node)]
        for task in lost:
            del self._runs_on[task]
        self._look_again()
        return sorted(lost)

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, job: Job, now: float) -> None:
        """The job waits from now on. Its place in the order does not depend on when it was added."""
        assert job.task not in self, f"task {job.task} is here already"
        needs, reuse = self._nodes.take_keys(job)
        row = self._jobs.add(job, needs=needs, reuse=reuse, best_s=0.0, patience_s=self._config.patience_s)
        best_s, certain_s = fastest_s(self._jobs, self._nodes, row)
        self._jobs.column("best_s")[row] = best_s
        if job.deadline_at == FOREVER:
            patience_s = self._config.patience_s + best_s
            self._jobs.column("patience_s")[row] = patience_s
            self._jobs.column("deadline_at")[row] = job.arrived_at + patience_s
        elif self.policy.drop:
            heapq.heappush(self._hopeless, (job.deadline_at - certain_s, job.task))

    def withdraw(self, task: TaskId, now: float) -> None:
        """Forget the task, whatever it does."""
        if task in self._jobs:
            self._leave(task)
        elif task in self._runs_on:
            self._nodes.end(self._nodes.row(self._runs_on.pop(task)), task, now)

    def running(self, job: Job, node: NodeId, now: float) -> None:
        """The task runs on ``node`` whoever started it, such as an earlier coordinator."""
        if self._runs_on.get(job.task) == node:
            return
        self.withdraw(job.task, now)
        if node in self._nodes:
            self._run(job, self._nodes.row(node), now)

    def ended(self, task: TaskId, now: float, observed: Observed | None = None) -> None:
        """The task is over; ``observed`` teaches the cost model."""
        node = self._runs_on.pop(task, None)
        if node is None:
            self.withdraw(task, now)
            return
        row = self._nodes.row(node)
        running, rows = self._nodes.end(row, task, now)
        if observed is not None:
            self.cost.learn(
                running.job.work,
                node,
                self._nodes.view(row).rates,
                replace(observed, rows=max(observed.rows, rows)),
                reuse=running.reuse,
                predicted_s=running.expected_s,
            )
            self._nodes.learned(node)

    def requeue(
        self, task: TaskId, now: float, *, left: float = 1.0, avoid: Mapping[NodeId, float] | None = None
    ) -> None:
        """The attempt is over and the task is not (refused, lost, given way): it waits again.

        Args:
            left: Share of the work that is still to be done, 0 to 1.
            avoid: Nodes that refused or failed it -> until when not to ask them.
        """
        node = self._runs_on.pop(task)
        running, _ = self._nodes.end(self._nodes.row(node), task, now)
        job = replace(running.job, work=running.job.work.left(left), avoid=avoid or running.job.avoid)
        self.add(job, now)

    # ── decisions ───────────────────────────────────────────────────────────────────────────────────

    def decide(self, now: float) -> list[Decision]:
        """Everything that is to be done now, in order. A second call at the same time returns nothing."""
        decisions: list[Decision] = []
        if self.policy.drop:
            decisions += self._drop_hopeless(now)
        decisions += self._fill(now)
        return decisions

    def _drop_hopeless(self, now: float) -> list[Decision]:
        dropped: list[Decision] = []
        while self._hopeless and self._hopeless[0][0] <= now:
            _, task = heapq.heappop(self._hopeless)
            job = self._jobs.get(task)
            if job is None:
                continue
            best_s, certain_s = fastest_s(self._jobs, self._nodes, self._jobs.row(task))
            if now + certain_s <= job.deadline_at and now < job.deadline_at:
                heapq.heappush(self._hopeless, (job.deadline_at - certain_s, task))
                if job.deadline_at - certain_s <= now:
                    break  # exactly now or never: it may still start in this decision
                continue
            self._leave(task)
            dropped.append(Drop(task=task, reason=_hopeless_words(certain_s, job.deadline_at - now)))
        return sorted(dropped, key=lambda drop: drop.task)

    def _fill(self, now: float) -> list[Decision]:
        """Start what can start on nodes with room."""
        open_nodes = np.flatnonzero(self._nodes.has_room)
        if not len(open_nodes) or not len(self._jobs):
            return []
        scene, priced = self._scene(now, open_nodes)
        scores = self._allowed_scores(scene, priced)
        best = scores.max(axis=1)
        order = self._in_order(best)
        started: list[Decision] = []
        closed = np.zeros(len(open_nodes), np.bool_)
        tasks = [self._jobs.jobs[row].task for row in order]
        rows = dict(zip(tasks, order, strict=True))
        for task in tasks:
            row = rows[task]
            column = self._column_for(scores[row], priced.finish_s[row], closed)
            if column is None:
                continue
            node = int(open_nodes[column])
            started.append(self._start(task, row, column, node, scene, scores, priced, now))
            closed[column] = not self._nodes.has_room[node]
            if closed.all():
                break
        for start in started:
            assert isinstance(start, Start)
            self._leave(start.task)
        return started

    def _scene(self, now: float, open_nodes: NDArray[np.intp]) -> tuple[Scene, Prices]:
        jobs, nodes = self._jobs, self._nodes
        everything = slice(None)
        priced = prices(jobs, nodes, everything, open_nodes)
        deadline_at, patience_s = jobs.column("deadline_at"), jobs.column("patience_s")
        value = jobs.column("value")
        if jobs.n_virtual:
            value = value * age_factor(now, deadline_at, patience_s)
        scene = Scene(
            now=now,
            value=value,
            deadline_at=deadline_at,
            is_virtual=np.isfinite(patience_s),
            arrived_at=jobs.column("arrived_at"),
            cost_s=priced.cost_s,
            finish_s=priced.finish_s,
            mean_s=priced.cost_s.mean(axis=0),
            room_in_s=np.maximum(nodes.free_at - now, 0.0),
            open_nodes=open_nodes,
            all_finish=lambda: prices(jobs, nodes, everything, everything, alone=True).finish_s,
        )
        return scene, priced

    def _allowed_scores(self, scene: Scene, priced: Prices) -> Floats:
        """The policy's scores, ``-inf`` where the task must not start."""
        scores = self.policy.score(scene)
        allowed = np.isfinite(scene.finish_s)
        if self.policy.drop:
            is_late = (scene.now + scene.finish_s > scene.deadline_at[:, None]) & priced.is_known
            is_late |= (scene.deadline_at <= scene.now)[:, None]
            allowed &= ~is_late | scene.is_virtual[:, None]
        if self.policy.keeps is not None:
            allowed &= self.policy.keeps(scene)[:, None]
        is_tune = self._jobs.numbers("kind") == 4
        if is_tune.any():
            allowed &= ~is_tune[:, None] | self._nodes.has_tune_room[scene.open_nodes][None, :]
        for row, job in enumerate(self._jobs.jobs):
            for node, until in job.avoid.items():
                if until > scene.now and node in self._nodes:
                    allowed[row, scene.open_nodes == self._nodes.row(node)] = False
        return np.where(allowed, scores, -np.inf)

    def _in_order(self, best: Floats) -> list[int]:
        """Rows that may start, the highest score first."""
        rows = np.flatnonzero(best > -np.inf)
        return sorted(map(int, rows), key=lambda row: (-best[row], self._jobs.tie_of(row)))

    def _column_for(self, scores: Floats, finish_s: Floats, closed: NDArray[np.bool_]) -> int | None:
        """The open node where the task ends first; ties go to the first by id."""
        usable = np.where((scores > -np.inf) & ~closed, finish_s, np.inf)
        column = int(usable.argmin())
        return None if usable[column] == np.inf else column

    def _start(
        self,
        task: TaskId,
        row: int,
        column: int,
        node: int,
        scene: Scene,
        scores: Floats,
        priced: Prices,
        now: float,
    ) -> Start:
        job = self._jobs.jobs[row]
        why = Why(
            at=now,
            policy=self.policy.name,
            words="",
            score=float(scores[row, column]),
            density=float(scene.value[row] / priced.cost_s[row, column]),
            laxity_s=None if scene.is_virtual[row] else float(scene.laxity_s[row, column]),
            cost_s=float(priced.cost_s[row, column]),
            service_s=float(priced.finish_s[row, column]),
            n_waiting=len(self._jobs),
        )
        self._run(job, node, now, expected_s=why.service_s, density=why.density)
        self._note(task, why)
        return Start(task=task, node=self._nodes.ids[node], why=why)

    # ── books ───────────────────────────────────────────────────────────────────────────────────────

    def _run(
        self, job: Job, row: int, now: float, *, expected_s: float | None = None, density: float = 0.0
    ) -> None:
        node, reuse = self._nodes.ids[row], self._nodes.reuse_of(job, row)
        if expected_s is None:
            rates = self._nodes.view(row).rates
            expected_s = self.cost.estimate(job.work, node, rates, reuse=reuse).service_s
        running = Running(job, node, now, expected_s, reuse, 0.0, density=density)
        self._nodes.start(row, running, now)
        self._runs_on[job.task] = node

    def _leave(self, task: TaskId) -> None:
        _, needs, reuse = self._jobs.remove(task)
        self._nodes.release_keys(needs, reuse)

    def _note(self, task: TaskId, why: Why) -> None:
        self._why[task] = why
        self._why.move_to_end(task)
        while len(self._why) > self._config.explained_max:
            self._why.popitem(last=False)

    def _look_again(self) -> None:
        """Nodes changed: what was hopeless may not be, and the other way round."""
        if self.policy.drop:
            self._hopeless = [(-FOREVER, job.task) for job in self._jobs.jobs if job.deadline_at < FOREVER]
            heapq.heapify(self._hopeless)


def _hopeless_words(best_s: float, left_s: float) -> str:
    if left_s <= 0:
        return "its deadline passed before it could start"
    return f"best node needs {best_s:.1f} s, {left_s:.1f} s left"
