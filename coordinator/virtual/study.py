"""Policies against one another: every policy on every mesh at every load with every seed, on equal terms.

One seed is one set of tasks. Policies, meshes and loads get the same tasks of a seed, so what differs is
theirs; seeds differ in everything drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from coordinator.policy.policies import Policy
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.loop import run
from coordinator.virtual.metrics import Interval, RunMetrics, interval
from coordinator.virtual.traces import Request
from coordinator.virtual.workload import Mix, VirtualTask, at_load, tasks_of

__all__ = ["Case", "Cell", "Progress", "Source", "Study"]

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


@dataclass(frozen=True, slots=True)
class Case:
    """One run. ``policy`` is its place in ``Study.policies``."""

    mesh: str
    load: float | None
    policy: int
    seed: int


_DRAWN_MAX = 8
"""Sets of tasks kept: 8 MB each for a trace of 20,000 requests."""


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
    _drawn: dict[tuple[int, float | None], list[VirtualTask]] = field(default_factory=dict, init=False)

    @property
    def cases(self) -> list[Case]:
        """Every run there is, in the order of the cells."""
        return [
            Case(mesh, load, policy, seed)
            for mesh in self.meshes
            for load in self.loads
            for policy in range(len(self.policies))
            for seed in self.seeds
        ]

    def run(self, case: Case, progress: Progress | None = None) -> RunMetrics:
        """One case; it depends on no other, so they may run anywhere and in any order.

        Raises:
            ValueError: The tasks of a seed all arrive at one instant, so that there is no load to speak of.
        """
        return run(
            self._tasks_of(case),
            self.meshes[case.mesh],
            self.policies[case.policy],
            failover_every_s=self.failover_every_s,
            progress=progress,
        )

    def cells(self, runs: Iterable[RunMetrics]) -> Iterator[Cell]:
        """What came out, cell by cell. ``runs``: of all ``cases``, in their order."""
        made = iter(runs)
        for mesh in self.meshes:
            for load in self.loads:
                for policy in self.policies:
                    mine = tuple(islice(made, len(self.seeds)))
                    yield Cell(mesh=mesh, load=load, policy=policy.name, runs=mine)

    def _tasks_of(self, case: Case) -> list[VirtualTask]:
        """Policies and meshes get the same tasks: the last few sets are kept."""
        key = (case.seed, case.load)
        if key not in self._drawn:
            if len(self._drawn) >= _DRAWN_MAX:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[key] = self._tasks(case.seed, case.load, next(iter(self.meshes.values())))
        return self._drawn[key]

    def _tasks(self, seed: int, load: float | None, reference: Sequence[NodeSpec]) -> list[VirtualTask]:
        tasks = tasks_of(self.source(seed), self.mix, seed, reference)
        return tasks if load is None else at_load(tasks, reference, load)
