"""The last tasks that came: what a policy may expect to come next."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

import numpy as np

from coordinator.policy.decisions import Job
from coordinator.policy.foresight import RecentTask
from coordinator.policy.policies import Recent
from mesh.core import FOREVER
from mesh.ids import TaskId

__all__ = ["RecentTasks"]

RECENT_MAX: Final = 256
"""Minutes of a busy mesh; the error of a rate counted from so many is 6 %."""


class RecentTasks:
    """A ring of numbers. Tasks without a deadline are left out; one that comes again counts once."""

    def __init__(self) -> None:
        self._columns = np.zeros((4, 2 * RECENT_MAX))
        """Every entry twice, ``RECENT_MAX`` apart: any ``RECENT_MAX`` in a row are the latest in order."""
        self._tasks: list[TaskId] = []
        self._known: set[TaskId] = set()
        self._next = 0
        self._in_order: list[RecentTask] = []
        self._seen: Recent | None = None
        """``arrays`` since the last ``add``."""

    def add(self, job: Job, best_s: float) -> None:
        if job.deadline_at == FOREVER or job.task in self._known:
            return
        if len(self._tasks) < RECENT_MAX:
            self._tasks.append(job.task)
        else:
            self._known.discard(self._tasks[self._next])
            self._tasks[self._next] = job.task
            gone = _task_of(*self._columns[:, self._next].tolist())
            del self._in_order[bisect_left(self._in_order, gone)]
        self._known.add(job.task)
        entry = job.arrived_at, job.deadline_at, job.value, best_s
        insort(self._in_order, _task_of(*entry))
        self._columns[:, self._next] = self._columns[:, self._next + RECENT_MAX] = entry
        self._next = (self._next + 1) % RECENT_MAX
        self._seen = None

    def arrays(self) -> Recent:
        """Oldest first; until the next ``add`` they are the same."""
        if self._seen is not None:
            return self._seen
        n = len(self._tasks)
        first = 0 if n < RECENT_MAX else self._next
        arrived_at, deadline_at, value, best_s = self._columns[:, first : first + n]
        self._seen = Recent(
            arrived_at=arrived_at,
            deadline_at=deadline_at,
            value=value,
            best_s=best_s,
            in_order=self._in_order,
        )
        return self._seen


def _task_of(arrived_at: float, deadline_at: float, value: float, best_s: float) -> RecentTask:
    return RecentTask(deadline_at - 2 * arrived_at, arrived_at, deadline_at, value, best_s)
