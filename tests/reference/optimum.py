"""What somebody who knows everything beforehand could keep on one machine: the exact optimum, not a bound.

Work may stop for other work at any time and go on later, as chunks of tuning and tokens of generation do. A
set of jobs can then be done in time if and only if every interval is long enough for the jobs that arrive and
are due within it (feasibility of the earliest deadline, Dertouzos 1974; the demand criterion, Baruah et al.
1990). So the best set is an integer program with one yes or no per job and one row per pair of an arrival and
a deadline, which HiGHS solves by branch and bound.

A schedule without preemption is one with it, so the optimum is never below that of any rule on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from coordinator.policy.policies import Policy
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.loop import run
from coordinator.virtual.workload import VirtualTask, service_s

__all__ = ["Known", "best_value", "is_feasible", "optimum_share"]


@dataclass(frozen=True, slots=True)
class Known:
    """One job as a clairvoyant sees it; times in seconds."""

    arrives_at: float
    deadline_at: float
    service_s: float
    value: float


def best_value(jobs: Sequence[Known]) -> float:
    """The most value that can be done in time on one machine, given all of ``jobs`` beforehand.

    Raises:
        RuntimeError: The solver gave up.
    """
    able = [job for job in jobs if job.arrives_at + job.service_s <= job.deadline_at]
    if not able:
        return 0.0
    rows, lengths = _intervals(able)
    value = np.array([job.value for job in able])
    if not len(rows):
        return float(value.sum())
    found = milp(
        -value,
        constraints=LinearConstraint(rows, ub=lengths),
        integrality=np.ones(len(able)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not found.success:
        raise RuntimeError(f"no optimum of {len(able)} jobs: {found.message}")
    return float(-found.fun)


def _intervals(jobs: Sequence[Known]) -> tuple[np.ndarray, np.ndarray]:
    """(k, n) service times of the jobs within each interval, (k,) its length; intervals that bind nobody and
    those with the same jobs as a shorter one are left out."""
    arrives_at = np.array([job.arrives_at for job in jobs])
    deadline_at = np.array([job.deadline_at for job in jobs])
    work_s = np.array([job.service_s for job in jobs])
    shortest: dict[bytes, tuple[float, np.ndarray]] = {}
    for start in np.unique(arrives_at):
        for end in np.unique(deadline_at[arrives_at >= start]):
            is_inside = (arrives_at >= start) & (deadline_at <= end)
            if (work_s[is_inside].sum() <= end - start) or not is_inside.any():
                continue
            key, length = is_inside.tobytes(), float(end - start)
            if key not in shortest or length < shortest[key][0]:
                shortest[key] = (length, np.where(is_inside, work_s, 0.0))
    return np.array([row for _, row in shortest.values()]), np.array(
        [length for length, _ in shortest.values()]
    )


def is_feasible(jobs: Sequence[Known]) -> bool:
    """Whether all end in time if the earliest deadline runs at any time, step by step."""
    left = {k: job.service_s for k, job in enumerate(jobs)}
    events = sorted({job.arrives_at for job in jobs})
    at = events[0] if events else 0.0
    while left:
        here = [k for k in left if jobs[k].arrives_at <= at]
        upcoming = [event for event in events if event > at]
        if not here:
            at = upcoming[0]
            continue
        first = min(here, key=lambda k: jobs[k].deadline_at)
        runs_s = min(left[first], upcoming[0] - at) if upcoming else left[first]
        at += runs_s
        left[first] -= runs_s
        if left[first] <= 1e-9:
            del left[first]
            if at > jobs[first].deadline_at + 1e-6:
                return False
    return True


def optimum_share(policy: Policy, tasks: Sequence[VirtualTask], node: NodeSpec, window: int = 50) -> float:
    """Value that ``policy`` keeps on one node / value of the exact clairvoyant optimum, over windows of
    ``window`` tasks in a row, each from an idle node.

    The tasks should name no adapters: the optimum knows nothing of what a node keeps from earlier work.
    """
    kept = best = 0.0
    for start in range(0, len(tasks), window):
        some = tasks[start : start + window]
        kept += run(some, [node], policy).value_kept * sum(task.value for task in some)
        best += best_value([_known(task, node) for task in some])
    return kept / best


def _known(task: VirtualTask, node: NodeSpec) -> Known:
    return Known(
        task.arrives_at, task.deadline_at, service_s(task.work, node.rates) * task.true_factor, task.value
    )
