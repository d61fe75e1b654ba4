"""The last tasks that came: what a policy may expect to come next."""

from __future__ import annotations

from typing import Final

import numpy as np

from coordinator.policy.decisions import Job
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

    def add(self, job: Job, best_s: float) -> None:
        if job.deadline_at == FOREVER or job.task in self._known:
            return
        if len(self._tasks) < RECENT_MAX:
            self._tasks.append(job.task)
        else:
            self._known.discard(self._tasks[self._next])
            self._tasks[self._next] = job.task
        self._known.add(job.task)
        entry = (job.arrived_at, job.deadline_at, job.value, best_s)
        self._columns[:, self._next] = self._columns[:, self._next + RECENT_MAX] = entry
        self._next = (self._next + 1) % RECENT_MAX

    def arrays(self) -> Recent:
        """Oldest first."""
        n = len(self._tasks)
        first = 0 if n < RECENT_MAX else self._next
        arrived_at, deadline_at, value, best_s = self._columns[:, first : first + n]
        return Recent(arrived_at=arrived_at, deadline_at=deadline_at, value=value, best_s=best_s)
