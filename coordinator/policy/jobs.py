"""The table of waiting tasks: one row each, in arrays that are kept and not rebuilt.

Rows are in no order: a row that leaves is filled with the last one. Nothing may depend on the order of
rows; ties are broken by deadline, ``tie`` and id.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.cost import amounts_of
from coordinator.policy.decisions import Job
from coordinator.policy.density import Floats
from coordinator.policy.rates import PARTS
from coordinator.policy.work import KINDS
from mesh.core import FOREVER
from mesh.ids import TaskId

__all__ = ["JobTable"]

_COLUMNS = ("value", "deadline_at", "arrived_at", "patience_s", "best_s")
_NUMBERS = ("kind", "needs", "reuse")
_AT = {name: at for at, name in enumerate(_COLUMNS)}
_NUMBER_AT = {name: at for at, name in enumerate(_NUMBERS)}
_ANSWERS = [PARTS.index("decode"), PARTS.index("tune")]
_FEATURES = PARTS.index("features")
_FETCH = PARTS.index("fetch")
_KIND_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


class JobTable:
    """Shapes: with n rows, every column is (n,) and ``amounts`` is (parts, n)."""

    def __init__(self) -> None:
        self._capacity = 64
        self._columns = np.zeros((len(_COLUMNS), self._capacity))
        self._numbers = np.zeros((len(_NUMBERS), self._capacity), np.intp)
        self._amounts = np.zeros((len(PARTS), self._capacity))
        self._kept = np.ones(self._capacity, np.bool_)
        self.jobs: list[Job] = []
        """By row."""
        self._row: dict[TaskId, int] = {}
        self.n_virtual = 0
        """Rows without a deadline of their own."""
        self.n_tunes = 0
        self.n_spared = 0
        """Rows with parts that a node may be spared by what it has from earlier work."""
        self.n_fetching = 0
        """Rows with parts that a node may fetch instead."""
        self.avoiding: set[TaskId] = set()
        """Tasks that must not go to some nodes for a while."""

    def __len__(self) -> int:
        return len(self.jobs)

    def __contains__(self, task: TaskId) -> bool:
        return task in self._row

    def row(self, task: TaskId) -> int:
        return self._row[task]

    def get(self, task: TaskId) -> Job | None:
        row = self._row.get(task)
        return None if row is None else self.jobs[row]

    def column(self, name: str) -> Floats:
        return self._columns[_AT[name], : len(self.jobs)]

    def columns(self, rows: NDArray[np.intp] | slice) -> Floats:
        """(5, n) Value, deadline, arrival, patience and best service of some rows."""
        return self._columns[:, : len(self.jobs)][:, rows]

    def numbers(self, name: str) -> NDArray[np.intp]:
        return self._numbers[_NUMBER_AT[name], : len(self.jobs)]

    def all_numbers(self, rows: NDArray[np.intp] | slice) -> NDArray[np.intp]:
        """(3, n) Numbers of kind, needs and reuse of some rows."""
        return self._numbers[:, : len(self.jobs)][:, rows]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(n,) What the policy last let start, see ``Policy.keeps``; new rows are let."""
        return self._kept[: len(self.jobs)]

    @property
    def amounts(self) -> Floats:
        """(parts, n)"""
        return self._amounts[:, : len(self.jobs)]

    def add(self, job: Job, *, needs: int, reuse: int, best_s: float, patience_s: float) -> int:
        """Append a row. ``patience_s`` is after how long a task without a deadline becomes urgent."""
        assert job.task not in self._row, f"task {job.task} waits already"
        row = len(self.jobs)
        if row == self._capacity:
            self._grow()
        self.jobs.append(job)
        self._row[job.task] = row
        is_virtual = job.deadline_at == FOREVER
        self._tally(job, 1)
        if job.avoid:
            self.avoiding.add(job.task)
        self._columns[:, row] = (
            job.value,
            job.arrived_at + patience_s if is_virtual else job.deadline_at,
            job.arrived_at,
            patience_s if is_virtual else FOREVER,
            best_s,
        )
        self._numbers[:, row] = (_KIND_NUMBER[job.work.kind], needs, reuse)
        self._amounts[:, row] = amounts_of(job.work)
        self._amounts[_FETCH, row] = job.work.n_feature_bytes  # all of it: what share is the node's matter
        self._kept[row] = True
        return row

    def rate(self, row: int, best_s: float, patience_s: float) -> None:
        """Note what the task takes at best, and the patience of a task without a deadline that follows."""
        self._columns[_AT["best_s"], row] = best_s
        job = self.jobs[row]
        if job.deadline_at == FOREVER:
            self._columns[_AT["patience_s"], row] = patience_s
            self._columns[_AT["deadline_at"], row] = job.arrived_at + patience_s

    def rate_all(self, best_s: Floats) -> None:
        """The nodes changed: what every task takes at best. Patience stays what it was."""
        self._columns[_AT["best_s"], : len(self.jobs)] = best_s

    def keep_left(self, row: int, share: float) -> None:
        """Only this share of the row's answer and training is left, see ``Work.left``."""
        self._amounts[_ANSWERS, row] *= share
        if share < 1:
            self._amounts[_FEATURES, row] = self._amounts[_FETCH, row] = 0.0

    def remove(self, task: TaskId) -> tuple[Job, int, int]:
        """Take a row out; the job, its needs' and its reuse's numbers come back."""
        row = self._row.pop(task)
        job, last = self.jobs[row], len(self.jobs) - 1
        needs, reuse = int(self._numbers[1, row]), int(self._numbers[2, row])
        self._tally(job, -1)
        self.avoiding.discard(task)
        if row != last:
            self.jobs[row] = self.jobs[last]
            self._row[self.jobs[row].task] = row
            for table in (self._columns, self._numbers, self._amounts):
                table[:, row] = table[:, last]
            self._kept[row] = self._kept[last]
        self.jobs.pop()
        return job, needs, reuse

    def tie_of(self, row: int) -> tuple[float, str, TaskId]:
        """Deadline, then ``tie``, then id: two rows never have the same."""
        job = self.jobs[row]
        return float(self._columns[_AT["deadline_at"], row]), job.tie, job.task

    def _tally(self, job: Job, by: int) -> None:
        work = job.work
        self.n_virtual += by * (job.deadline_at == FOREVER)
        self.n_tunes += by * (work.kind == "tune")
        self.n_spared += by * (work.n_adapter_loads > 0 or work.n_feature_tokens > 0)
        self.n_fetching += by * (work.n_feature_bytes > 0)

    def _grow(self) -> None:
        self._capacity *= 2
        self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)], axis=1)
        self._amounts = np.concatenate([self._amounts, np.zeros_like(self._amounts)], axis=1)
        self._kept = np.concatenate([self._kept, np.ones_like(self._kept)])
