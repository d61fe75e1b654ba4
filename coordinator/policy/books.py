"""Who waits and what runs where: the books that every part of the dispatcher reads and changes."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from coordinator.policy.cost import CostModel
from coordinator.policy.decisions import Job
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable, Running
from coordinator.policy.recent import RecentTasks
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

__all__ = ["Books", "DispatchConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    patience_s: float = 30.0
    """A task without a deadline is as urgent as can be after this and its own service time; then it ages."""
    chunk_s: float = 1.0
    """Longest chunk of tuning: how long a newcomer may wait for it."""
    preempt_ratio: float = 2.0
    """A newcomer's density over the runner's, at least, for generation to be paused."""
    select_every_s: float = 5.0
    """How long what ``Policy.keeps`` said holds while no task and no node comes: 0 to 20 s measured alike."""
    explain: bool = True
    """Fill in ``Why.candidates`` and ``Why.words``; the simulator goes without."""


class Books:
    """Tables of waiting tasks and of nodes, and what is known of both together."""

    def __init__(self, cost: CostModel, config: DispatchConfig, *, chunks: bool) -> None:
        """``chunks``: running tuning gives way at the ends of its chunks."""
        self.cost = cost
        self.config = config
        self.chunks = chunks
        self.jobs = JobTable()
        self.nodes = NodeTable(cost, chunk_s=config.chunk_s if chunks else FOREVER)
        self.recent = RecentTasks()
        self.runs_on: dict[TaskId, NodeId] = {}
        self.yielding: dict[TaskId, float] = {}
        """Tuning that runs in chunks -> when it is next compared with who waits."""
        self.paused: dict[NodeId, TaskId] = {}
        """Generation that stands still; at most one on a node, so that a pause ends soon."""
        self.mean_s = 1.0
        """Mean cost of the waiting tasks when last looked at."""

    def enter(self, job: Job) -> int:
        """The job waits; its row."""
        needs, reuse = self.nodes.take_keys(job)
        return self.jobs.add(job, needs=needs, reuse=reuse, best_s=0.0, patience_s=self.config.patience_s)

    def leave(self, task: TaskId) -> None:
        """The task waits no longer."""
        _, needs, reuse = self.jobs.remove(task)
        self.nodes.release_keys(needs, reuse)

    def run(self, job: Job, row: int, now: float, *, expected_s: float | None = None) -> None:
        """The job runs on the node ``row``; ``expected_s`` as predicted alone there, if not given."""
        node, view = self.nodes.ids[row], self.nodes.view(row)
        reuse, far = self.nodes.share_of(job, row)
        if expected_s is None:
            expected_s = self.cost.estimate(job.work, node, view.rates, reuse=reuse, far=far).service_s
        self.nodes.start(row, Running(job, node, now, expected_s, reuse, 0.0, far), now)
        self.runs_on[job.task] = node
        if job.work.kind == "tune" and self.chunks and not view.tunes_beside:
            self.yielding[job.task] = self.chunk_end(self.nodes.running(row)[job.task], now)

    def stops(self, task: TaskId) -> NodeId:
        """The task runs no longer; where it did. The caller takes it off the node."""
        node = self.runs_on.pop(task)
        self.yielding.pop(task, None)
        if self.paused.get(node) == task:
            del self.paused[node]
        return node

    def chunk_end(self, runner: Running, now: float) -> float:
        """Just before the end of the chunk after the one that ends now."""
        chunk_s, margin_s = self.config.chunk_s, self.config.chunk_s / 1000
        n_ended = floor((now + 1.5 * margin_s - runner.started_at) / chunk_s)
        return runner.started_at + (n_ended + 1) * chunk_s - margin_s
