"""Which tasks to do at all, when not all can be done: a plan over who waits and who is likely to come.

A mesh that is behind must choose, and by the time the better task arrives the worse one has the node. So the
plan expects the recent past again: each recent task is taken to come once more, as far ahead of now as it
came before now, with the time to its deadline that it had. On tasks that wait and tasks that are expected:

    in the order of deadlines, add each one's work; whenever the work up to a deadline is more than the mesh
    can do until then, take out the task of least worth per second of work, until it is not

which is the rule of Moore (1968) for the fewest late jobs, with worth per second instead of length as the
key. Tasks left in are *kept*. Whoever is taken out waits, and is asked about again at the next decision: what
was expected and did not come leaves its time to those who are here.

``worth`` is the value of an answer and, for the promise itself, the mean value of recent tasks once: value
alone keeps few tasks of high value at the price of many missed deadlines, the promise alone the reverse
(docs/adr/0015). Capacity is that of all nodes together; the mesh's unequal speeds matter again when a task is
placed, where no start is made that ends too late.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heappushpop
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats

__all__ = [
    "Forecast",
    "RecentTask",
    "capacity_s",
    "expected",
    "expected_soon",
    "kept",
    "kept_of_few",
    "mean_of",
    "worth",
]

Bools = NDArray[np.bool_]
Forecast = tuple[Floats, Floats, Floats]
"""Worth, work and seconds to the deadline of the tasks that are expected, each (h,)."""


def worth(value: Floats, recent_mean: float | None, promise: float) -> Floats:
    """(n,) Value plus ``promise`` times the mean value of recent tasks (of these, if there were none)."""
    mean = mean_of(value) if recent_mean is None else recent_mean
    return value + promise * (mean or 0.0)


def mean_of(values: Floats) -> float | None:
    """``None`` if there are none."""
    return float(values.sum()) / len(values) if len(values) else None


def expected(now: float, arrived_at: Floats, deadline_at: Floats, worths: Floats, work_s: Floats) -> Forecast:
    """Recent tasks (each array (h,)) as they will come again if the past is repeated backwards.

    The latest comes first, after as long as it is here: a burst is expected to go on for as long as it has
    lasted, silence too.
    """
    return worths, work_s, (now - arrived_at) + (deadline_at - arrived_at)


class RecentTask(NamedTuple):
    """Sorted, they are nearly in the order in which ``expected`` has them due."""

    lead_s: float
    """``deadline_at - 2 * arrived_at``: with ``now`` the seconds to its deadline, but for rounding."""
    arrived_at: float
    deadline_at: float
    value: float
    best_s: float


def expected_soon(
    now: float, recent: Sequence[RecentTask], within_s: float, most: int
) -> list[tuple[float, float, float]] | None:
    """(value, work, seconds to the deadline) of the tasks that ``expected`` has due within some time, the
    same numbers; ``None`` if there are more than ``most``.

    Args:
        recent: Sorted.
    """
    soon: list[tuple[float, float, float]] = []
    for lead_s, arrived_at, deadline_at, value, best_s in recent:
        if lead_s + now > within_s + _ROUGHLY_S:
            return soon
        due_in_s = (now - arrived_at) + (deadline_at - arrived_at)
        if due_in_s <= within_s:
            if len(soon) == most:
                return None
            soon.append((value, best_s, due_in_s))
    return soon


def kept(
    worths: Floats, work_s: Floats, due_in_s: Floats, forecast: Forecast, pool: tuple[Floats, Floats]
) -> Bools:
    """Which of the waiting tasks are in the plan.

    Args:
        worths: (n,)
        work_s: (n,) Seconds of work on a node of capacity 1.
        due_in_s: (n,) Seconds to the deadline.
        forecast: Of (h,) tasks.
        pool: (M,) capacities, (M,) seconds until each node has room.

    Cost: sorting n + h + M numbers; if not everything fits n + h heap operations in Python, 2 ms a thousand.
    """
    n = len(worths)
    is_kept = np.ones(n, np.bool_)
    if not n:
        return is_kept
    is_near = forecast[2] <= due_in_s.max()
    work = np.concatenate((work_s, forecast[1][is_near]))
    due = np.concatenate((due_in_s, forecast[2][is_near]))
    order = due.argsort(kind="stable")
    in_order = due[order]
    density: Floats | None = None
    if (in_order[1:] == in_order[:-1]).any():
        density = _densities(worths, forecast, is_near, work)
        order = np.lexsort((np.arange(len(due)) >= n, work, density, due))
    can_s = capacity_s(in_order, *pool) + _ROUNDING_S
    is_behind = work[order].cumsum() > can_s
    if not is_behind.any():
        return is_kept
    if density is None:
        density = _densities(worths, forecast, is_near, work)
    ranked = zip(
        density[order].tolist(), (-in_order).tolist(), work[order].tolist(), range(len(due)), strict=True
    )
    gone = order[_taken_out(list(ranked), can_s.tolist(), int(is_behind.argmax()))]
    gone = gone[gone < n]
    if not len(gone):
        return is_kept
    is_kept[gone] = False
    return _twins_together(is_kept, np.stack([density[:n], due[:n], work[:n]]))


def kept_of_few(
    worths: Sequence[float],
    work_s: Sequence[float],
    due_in_s: Sequence[float],
    soon: Sequence[tuple[float, float, float]],
    pool: tuple[Floats, Floats],
) -> list[bool]:
    """``kept`` in plain numbers, for few tasks; the same to the last bit.

    Args:
        soon: (worth, work, seconds to the deadline) of the expected tasks that are due before the last that
            waits.
    """
    n = len(worths)
    tasks = [*zip(worths, work_s, due_in_s, strict=True), *soon]
    ranked = sorted(
        (due, worth / max(work, _ROUNDING_S), work, at) for at, (worth, work, due) in enumerate(tasks)
    )
    can = _capacity_line(pool)
    can_s = [can(due) + _ROUNDING_S for due, *_ in ranked]
    work_until = accumulate(work for _, _, work, _ in ranked)
    first = next((at for at, until in enumerate(work_until) if until > can_s[at]), None)
    if first is None:
        return [True] * n
    places = [(density, -due, work, at) for at, (due, density, work, _) in enumerate(ranked)]
    out = {task for at in _taken_out(places, can_s, first) if (task := ranked[at][3]) < n}
    if not out:
        return [True] * n
    # As in ``_twins_together``.
    alike = {(density, due, work) for due, density, work, task in ranked if task < n and task not in out}
    back = {task for due, density, work, task in ranked if task in out and (density, due, work) in alike}
    return [task not in out or task in back for task in range(n)]


def _densities(worths: Floats, forecast: Forecast, is_near: Bools, work_s: Floats) -> Floats:
    """Worth per second of those who wait and of those who are expected in time."""
    return np.concatenate((worths, forecast[0][is_near])) / np.maximum(work_s, _ROUNDING_S)


_ROUNDING_S = 1e-9
_ROUGHLY_S = 1e-3
"""More than sums of clock times are rounded by."""
_FAR_S = 1e9
"""As good as never, and still a number to calculate with."""


def _taken_out(ranked: list[tuple[float, float, float, int]], can_s: list[float], first: int) -> list[int]:
    """Places of the tasks that are taken out.

    Args:
        ranked: (density, -seconds to the deadline, work, place) in the order of deadlines. The least goes
            first: among equal densities the latest deadline, whose owner can ask again for longest.
        can_s: What can be done until each deadline.
        first: The first place where the work is more than that.
    """
    inside = ranked[:first]
    planned_s = sum(task[2] for task in inside)
    heapify(inside)
    gone: list[int] = []
    for task in ranked[first:]:
        planned_s += task[2]
        can = can_s[task[3]]
        if planned_s <= can:
            heappush(inside, task)
            continue
        least = heappushpop(inside, task)
        while True:
            planned_s -= least[2]
            gone.append(least[3])
            if planned_s <= can or not inside:
                break
            least = heappop(inside)
    return gone


def _twins_together(is_kept: Bools, features: Floats) -> Bools:
    """Of tasks alike in everything all are kept if one is: which one must not depend on the order of rows."""
    out = np.flatnonzero(~is_kept)
    alike = {tuple(column) for column in features[:, is_kept].T.tolist()}
    is_kept[[row for row in out.tolist() if tuple(features[:, row].tolist()) in alike]] = True
    return is_kept


def capacity_s(until_s: Floats, capacity: Floats, room_in_s: Floats) -> Floats:
    """(n,) Work that the nodes can do until each time: of each its capacity times the time it has room.

    >>> capacity_s(np.array([1.0, 3.0]), np.array([1.0, 0.5]), np.array([0.0, 2.0]))
    array([1. , 3.5])
    """
    rooms, speeds, lost = map(np.array, _by_room(capacity, room_in_s))
    until_s = np.minimum(until_s, _FAR_S)
    n_open = rooms.searchsorted(until_s, side="right")
    work_s: Floats = np.maximum(until_s * speeds[n_open] - lost[n_open], 0.0)
    return work_s


def _capacity_line(pool: tuple[Floats, Floats]) -> Callable[[float], float]:
    """``capacity_s`` of one time after the other, in plain numbers."""
    rooms, speeds, lost = _by_room(*pool)

    def can_s(until_s: float) -> float:
        until_s = min(until_s, _FAR_S)
        n_open = bisect_right(rooms, until_s)
        return max(until_s * speeds[n_open] - lost[n_open], 0.0)

    return can_s


def _by_room(capacity: Floats, room_in_s: Floats) -> tuple[list[float], list[float], list[float]]:
    """Of k nodes that do work, the first with room first: (k,) seconds until each has; (k + 1,) what so many
    do together per second, and what they do less by their waits."""
    nodes = zip(room_in_s.tolist(), capacity.tolist(), strict=True)
    # Who takes no work now does none.
    by_room = sorted((node for node in nodes if node[0] < np.inf), key=lambda node: node[0])
    speeds = [0.0, *accumulate(speed for _, speed in by_room)]
    lost = [0.0, *accumulate(speed * room for room, speed in by_room)]
    return [room for room, _ in by_room], speeds, lost
