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

from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats

__all__ = ["Forecast", "capacity_s", "expected", "kept", "worth"]

Bools = NDArray[np.bool_]
Forecast = tuple[Floats, Floats, Floats]
"""Worth, work and seconds to the deadline of the tasks that are expected, each (h,)."""


def worth(value: Floats, recent_value: Floats, promise: float) -> Floats:
    """(n,) Value plus ``promise`` times the mean value of recent tasks (of these, if there were none)."""
    known = recent_value if len(recent_value) else value
    mean = float(known.sum()) / len(known) if len(known) else 0.0
    return value + promise * mean


def expected(now: float, arrived_at: Floats, deadline_at: Floats, worths: Floats, work_s: Floats) -> Forecast:
    """Recent tasks (each array (h,)) as they will come again if the past is repeated backwards.

    The latest comes first, after as long as it is here: a burst is expected to go on for as long as it has
    lasted, silence too.
    """
    return worths, work_s, (now - arrived_at) + (deadline_at - arrived_at)


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
    work = np.concatenate([work_s, forecast[1][is_near]])
    due = np.concatenate([due_in_s, forecast[2][is_near]])
    density = np.concatenate([worths, forecast[0][is_near]]) / np.maximum(work, _ROUNDING_S)
    order = np.lexsort((np.arange(len(due)) >= n, work, density, due))
    can_s = capacity_s(due[order], *pool) + _ROUNDING_S
    is_behind = np.cumsum(work[order]) > can_s
    if not is_behind.any():
        return is_kept
    densities, dues, works = (column[order].tolist() for column in (density, due, work))
    gone = order[_taken_out(densities, dues, works, can_s.tolist(), int(is_behind.argmax()))]
    is_kept[gone[gone < n]] = False
    return _twins_together(is_kept, np.stack([density[:n], due[:n], work[:n]]))


_ROUNDING_S = 1e-9
_FAR_S = 1e9
"""As good as never, and still a number to calculate with."""


def _taken_out(
    density: list[float], due_in_s: list[float], work_s: list[float], can_s: list[float], first: int
) -> list[int]:
    """Places of the tasks that are taken out; all lists are in the order of deadlines.

    ``first`` is the first place where the work is more than can be done. Among equal densities the latest
    deadline goes first: its owner can ask again for longest.
    """
    inside = [(density[at], -due_in_s[at], work_s[at], at) for at in range(first)]
    heapify(inside)
    planned_s = sum(work_s[:first])
    gone: list[int] = []
    for at in range(first, len(density)):
        heappush(inside, (density[at], -due_in_s[at], work_s[at], at))
        planned_s += work_s[at]
        while planned_s > can_s[at] and inside:
            *_, out_s, out = heappop(inside)
            planned_s -= out_s
            gone.append(out)
    return gone


def _twins_together(is_kept: Bools, features: Floats) -> Bools:
    """Of tasks alike in everything all are kept if one is: which one must not depend on the order of rows."""
    out = np.flatnonzero(~is_kept)
    alike = {tuple(column) for column in features[:, is_kept].T.tolist()} if len(out) else set()
    is_kept[[row for row in out.tolist() if tuple(features[:, row].tolist()) in alike]] = True
    return is_kept


def capacity_s(until_s: Floats, capacity: Floats, room_in_s: Floats) -> Floats:
    """(n,) Work that the nodes can do until each time: of each its capacity times the time it has room.

    >>> capacity_s(np.array([1.0, 3.0]), np.array([1.0, 0.5]), np.array([0.0, 2.0]))
    array([1. , 3.5])
    """
    is_here = room_in_s < np.inf  # who takes no work now does none
    order = np.argsort(room_in_s[is_here], kind="stable")
    room, speed = room_in_s[is_here][order], capacity[is_here][order]
    until_s = np.minimum(until_s, _FAR_S)
    n_open = np.searchsorted(room, until_s, side="right")
    speeds = np.concatenate([[0.0], np.cumsum(speed)])
    lost = np.concatenate([[0.0], np.cumsum(speed * room)])
    work_s: Floats = np.maximum(until_s * speeds[n_open] - lost[n_open], 0.0)
    return work_s
