"""The coordinator's books: every task by id, in which state, who waits, who runs where, who is due.

Pure bookkeeping, in memory, rebuilt at every election; what is durable is in ``coordinator.store``.
A task is changed only inside ``changing``, which keeps the counts and indexes true.

Bounds: open tasks by admission (10,000) plus what recovery finds (the store's bound); settled tasks by
``settled_max``; the agenda holds at most a few entries per task, because a task is put on it again only
for an earlier time than the one it is there for.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.task import Task
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId
from mesh.messages import TaskState

__all__ = ["Ledger"]

_Key = tuple[float, str, TaskId]


class Ledger:
    def __init__(self) -> None:
        self._tasks: dict[TaskId, Task] = {}
        self._queue: list[_Key] = []
        self._agenda: list[tuple[float, TaskId]] = []
        self._settled: dict[TaskId, None] = {}  # in the order they were settled
        self._touched: dict[TaskId, None] = {}
        self._moved: dict[TaskId, None] = {}
        self.apart: dict[TaskId, Task] = {}
        """Jobs that are trained on several nodes, and their parts."""
        self.counts: Counter[TaskState] = Counter()
        self.in_flight: Counter[NodeId] = Counter()
        """Attempts assigned to or running on each node."""

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def get(self, task: TaskId) -> Task | None:
        return self._tasks.get(task)

    @property
    def n_open(self) -> int:
        return len(self._tasks) - len(self._settled)

    @property
    def n_settled(self) -> int:
        return len(self._settled)

    @property
    def oldest_settled(self) -> Task | None:
        oldest = next(iter(self._settled), None)
        return None if oldest is None else self._tasks[oldest]

    def waiting(self) -> Iterator[Task]:
        """Acknowledged tasks without an attempt, in order of arrival.

        Tasks that arrived at one instant are ordered by their bodies, so the order in which the network
        delivered them changes nothing.
        """
        for _, _, task in self._queue:
            yield self._tasks[task]

    def on_node(self, node: NodeId) -> list[Task]:
        """Tasks with an attempt on ``node``, by id."""
        if not self.in_flight[node]:
            return []
        return sorted((task for task in self if task.node == node and task.is_open), key=lambda task: task.id)

    def add(self, task: Task) -> None:
        assert task.id not in self._tasks, f"task {task.id} is in the ledger already"
        self._tasks[task.id] = task
        if task.submit.tune is not None and task.submit.tune.nodes > 1:
            self.apart[task.id] = task
        self._index(task)
        self.touch(task)

    @contextmanager
    def changing(self, task: Task) -> Iterator[Task]:
        """Whatever changes a task's state, node or acknowledgement happens inside."""
        self._unindex(task)
        try:
            yield task
        finally:
            self._index(task)
            self.touch(task)

    def drop(self, task: Task) -> None:
        """Nothing is left to do for it and nobody will ask soon."""
        self._unindex(task)
        self._settled.pop(task.id, None)
        self._moved[task.id] = None
        self.apart.pop(task.id, None)
        del self._tasks[task.id]

    def touch(self, task: Task) -> None:
        """Something about it changed: its next time must be found again."""
        self._touched[task.id] = None
        self._moved[task.id] = None

    def take_touched(self) -> list[Task]:
        touched, self._touched = self._touched, {}
        return [self._tasks[task] for task in touched if task in self._tasks]

    def take_moved(self) -> list[TaskId]:
        """Tasks touched or dropped since last asked: whoever keeps books of its own compares them."""
        moved, self._moved = self._moved, {}
        return list(moved)

    def arm(self, task: Task, at: float) -> None:
        """Have ``due`` bring the task up at ``at`` or before."""
        if at < task.due_at:
            task.due_at = at
            heapq.heappush(self._agenda, (at, task.id))

    @property
    def wake_at(self) -> float:
        return self._agenda[0][0] if self._agenda else FOREVER

    def due(self, now: float) -> list[Task]:
        """Tasks to look at now, earliest first. They count as touched."""
        found: list[Task] = []
        while self._agenda and self._agenda[0][0] <= now:
            at, task_id = heapq.heappop(self._agenda)
            task = self._tasks.get(task_id)
            if task is not None and task.due_at == at:
                task.due_at = FOREVER
                self.touch(task)
                found.append(task)
        return found

    def _key(self, task: Task) -> _Key:
        return task.accepted_at, task.digest, task.id

    def _index(self, task: Task) -> None:
        self.counts[task.state] += 1
        if task.state == "queued" and task.is_acknowledged:
            insort(self._queue, self._key(task))
        elif task.is_open and task.node is not None:
            self.in_flight[task.node] += 1
        elif not task.is_open:
            self._settled[task.id] = None

    def _unindex(self, task: Task) -> None:
        self.counts[task.state] -= 1
        if task.state == "queued" and task.is_acknowledged:
            at = bisect_left(self._queue, self._key(task))
            assert self._queue[at][2] == task.id, f"task {task.id} waits but is not in the queue"
            del self._queue[at]
        elif task.is_open and task.node is not None:
            self.in_flight[task.node] -= 1
