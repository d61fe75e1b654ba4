"""What one run comes to, and what several runs that differ by their seed come to together.

A task is *in time* if it ended with its work done at or before its deadline. Everything else, rejected and
never-run tasks too, is a timeout: whoever turns work away does not look better for it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["End", "How", "Interval", "RunMetrics", "interval", "measured", "percentile"]

How = Literal["done", "rejected", "expired", "lost"]
"""``done``: the work was finished, in time or late. ``rejected`` and ``expired``: given up before. ``lost``
must not happen: still open when nothing was left to do."""


@dataclass(frozen=True, slots=True)
class End:
    """How one task ended. Times in virtual seconds."""

    task: str
    kind: str
    value: float
    arrived_at: float
    deadline_at: float
    ended_at: float
    how: How
    reason: str = ""

    @property
    def is_in_time(self) -> bool:
        return self.how == "done" and self.ended_at <= self.deadline_at


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """One policy at one load with one seed."""

    n_tasks: int
    timeouts: float
    """Share of all tasks that were not done in time."""
    value_kept: float
    """Value of the tasks done in time / value of all."""
    latency_p50_s: float
    """Of done tasks, late ones too, from arrival to the end; 0 where none was done."""
    latency_p95_s: float
    latency_p99_s: float
    utilization: float
    """Busy share of all nodes' slots from the first arrival to the last end."""
    wasted: float
    """Share of the busy time that went into work that was not done in time."""
    late: float
    """Share of all tasks that were done, after their deadline."""
    rejected: float
    expired: float
    pauses: int
    failovers: int
    busy: Mapping[str, float]
    """Of each node, as ``utilization``."""
    timeouts_by_kind: Mapping[str, float]


def measured(
    ends: Sequence[End],
    *,
    busy_s: Mapping[str, float],
    present_s: Mapping[str, float],
    wasted_s: float,
    pauses: int,
    failovers: int,
) -> RunMetrics:
    """The metrics of a run that has ended.

    Args:
        ends: One for every task that arrived.
        busy_s: Of each node, seconds times slots in use.
        present_s: Of each node, seconds it was there times its slots.
        wasted_s: Part of the busy time, in work that was not done in time.
    """
    if not ends:
        raise ValueError("a run without a task has no metrics")
    n_tasks = len(ends)
    n_in_time = sum(end.is_in_time for end in ends)
    all_value = math.fsum(end.value for end in ends)
    kept_value = math.fsum(end.value for end in ends if end.is_in_time)
    latencies_s = sorted(end.ended_at - end.arrived_at for end in ends if end.how == "done")
    by_kind, missed_by_kind = Counter[str](), Counter[str]()
    hows = Counter[str](end.how for end in ends)
    for end in ends:
        by_kind[end.kind] += 1
        missed_by_kind[end.kind] += not end.is_in_time
    all_busy_s = math.fsum(busy_s.values())
    return RunMetrics(
        n_tasks=n_tasks,
        timeouts=1 - n_in_time / n_tasks,
        value_kept=kept_value / all_value,
        latency_p50_s=percentile(latencies_s, 50),
        latency_p95_s=percentile(latencies_s, 95),
        latency_p99_s=percentile(latencies_s, 99),
        utilization=_share(all_busy_s, math.fsum(present_s.values())),
        wasted=_share(wasted_s, all_busy_s),
        late=(hows["done"] - n_in_time) / n_tasks,
        rejected=hows["rejected"] / n_tasks,
        expired=hows["expired"] / n_tasks,
        pauses=pauses,
        failovers=failovers,
        busy={node: _share(busy_s.get(node, 0.0), seconds) for node, seconds in sorted(present_s.items())},
        timeouts_by_kind={kind: missed_by_kind[kind] / by_kind[kind] for kind in sorted(by_kind)},
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank of values that are in order; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


# ── several seeds ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its 95 % interval (0 where one value is all there is)."""

    mean: float
    half: float = field(default=0.0)


def interval(values: Iterable[float]) -> Interval:
    """Of independent runs, by Student's t.

    >>> interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half=2.4841377118437194)
    """
    known = list(values)
    mean = statistics.fmean(known)
    if len(known) < 2:
        return Interval(mean)
    return Interval(mean, _t95(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known)))


_T95 = (12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
        2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)  # fmt: skip


def _t95(degrees: int) -> float:
    """Two-sided 95 % quantile; beyond the table by its expansion's first term, off by less than 0.2 %."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees)
