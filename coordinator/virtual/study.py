"""Policies against one another: every policy on every mesh at every load with every seed, on equal terms.

One seed is one set of tasks. Policies, meshes and loads get the same tasks of a seed, so what differs is
theirs; seeds differ in everything drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.policy.policies import Policy
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.loop import run
from coordinator.virtual.metrics import Interval, RunMetrics, interval
from coordinator.virtual.traces import Request
from coordinator.virtual.workload import Mix, VirtualTask, at_load, tasks_of

__all__ = ["Cell", "Progress", "Source", "Study"]

Source = Callable[[int], Sequence[Request]]
"""Requests of one seed; a trace gives the same for all."""

Progress = Callable[[int], None]
"""Called now and then with how many more tasks have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One policy on one mesh at one load, over the seeds."""

    mesh: str
    load: float | None
    """``None``: tasks come when the trace says."""
    policy: str
    runs: tuple[RunMetrics, ...]

    def over_seeds(self, metric: str) -> Interval:
        """Mean and 95 % interval of one of the numbers of ``RunMetrics``."""
        return interval(getattr(run, metric) for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to compare. Cells come in the order mesh, load, policy."""

    source: Source
    mix: Mix
    meshes: Mapping[str, Sequence[NodeSpec]]
    """By name. Loads and deadlines are those of the first; the others get the very same tasks."""
    policies: Sequence[Policy]
    loads: Sequence[float | None]
    """``None`` keeps the times of the source."""
    seeds: Sequence[int]
    failover_every_s: float | None = None

    def cells(self, progress: Progress | None = None) -> Iterator[Cell]:
        """Run everything, cell by cell.

        Raises:
            ValueError: The tasks of a seed all arrive at one instant, so that there is no load to speak of.
        """
        reference = next(iter(self.meshes.values()))
        for mesh, nodes in self.meshes.items():
            for load in self.loads:
                by_seed = {seed: self._tasks(seed, load, reference) for seed in self.seeds}
                for policy in self.policies:
                    runs = tuple(
                        run(
                            by_seed[seed],
                            nodes,
                            policy,
                            failover_every_s=self.failover_every_s,
                            progress=progress,
                        )
                        for seed in self.seeds
                    )
                    yield Cell(mesh=mesh, load=load, policy=policy.name, runs=runs)

    def _tasks(self, seed: int, load: float | None, reference: Sequence[NodeSpec]) -> list[VirtualTask]:
        tasks = tasks_of(self.source(seed), self.mix, seed, reference)
        return tasks if load is None else at_load(tasks, reference, load)
