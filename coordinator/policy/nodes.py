"""The table of nodes: rates, corrections, who has what, and what runs there now."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.company import Company
from coordinator.policy.cost import CostModel, amounts_of, step_share
from coordinator.policy.decisions import Job, NodeView
from coordinator.policy.density import Floats
from coordinator.policy.keys import Keys
from coordinator.policy.rates import PARTS
from coordinator.policy.work import KINDS, PATIENCE, Needs
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId
from mesh.messages.task import TaskKind

__all__ = ["NodeTable", "Running", "Share"]

Share = tuple[float, float]
"""Of what a task reuses: there, and to be fetched from others (0 to 1 each, and together)."""

_WARM_MAX = 16
"""Adapters or sets of features a node is believed to have from earlier work: the latest."""
_DECODE = PARTS.index("decode")
_BY_NODE = ("has_room", "has_tune_room", "free_at", "n_yielding", "batch_share", "is_ready", "is_shared")
_LEAST_S = 1e-6
_FETCH = PARTS.index("fetch")  # the last part
_LEFT_LEAST = 0.05
"""An attempt that overran its prediction is nearly done, as far as anybody knows."""


@dataclass(slots=True)
class Running:
    """One attempt on a node."""

    job: Job
    node: NodeId
    started_at: float
    expected_s: float
    """From start to end, as predicted when it started."""
    reuse: float
    row_seconds_before: float
    """The node's integral of attempts over time when this one started."""
    far: float = 0.0
    """Share of what it reuses that it was expected to fetch."""
    is_pausing: bool = False
    """Told to give way; its slot is counted as free."""
    is_paused: bool = False
    """Generation that stands still on its node."""
    paused_at: float = 0.0
    stood_s: float = 0.0
    delayed_s: float = 0.0
    """What those who joined it later take from it."""
    alone_s: float = 0.0
    """Node seconds of its work that shares nothing, as predicted when it started."""
    answer_s: float = 0.0
    """Seconds of its answer if nobody shared its steps, as predicted when it started."""

    @property
    def writes(self) -> bool:
        """Its answer shares steps with others."""
        return self.job.work.kind == "generate"

    @property
    def tunes(self) -> bool:
        return self.job.work.kind == "tune"

    def left_share(self, now: float) -> float:
        """How much of its service is left, as far as predicted; never nothing."""
        until = self.paused_at if self.is_paused else now
        done_s = until - self.started_at - self.stood_s
        return min(1.0, max(1 - done_s / (self.expected_s + self.delayed_s), _LEFT_LEAST))

    def left_s(self, now: float) -> float:
        return (self.expected_s + self.delayed_s) * self.left_share(now)

    def stands_back(self, now: float) -> bool:
        """Tuning that has the time to let all others on its node go first."""
        return self.tunes and self.job.deadline_at - now > PATIENCE * self.left_s(now)

    def alone_left_s(self, now: float) -> float:
        """Node seconds that are left of its work that shares nothing: an answer's prompt comes first."""
        left = self.left_share(now)
        if not self.writes:
            return self.alone_s * left
        return max(0.0, self.alone_s - (1 - left) * (self.alone_s + self.answer_s))

    def answer_left_s(self, now: float) -> float:
        """The same of its answer."""
        return (
            min(self.answer_s, (self.alone_s + self.answer_s) * self.left_share(now)) if self.writes else 0.0
        )

    @property
    def is_active(self) -> bool:
        """It takes a slot and its share of the node's time."""
        return not (self.is_pausing or self.is_paused)

    @property
    def ends_at(self) -> float:
        """As far as predicted."""
        return self.started_at + self.stood_s + self.expected_s + self.delayed_s


@dataclass(slots=True)
class _Slots:
    view: NodeView
    running: dict[TaskId, Running] = field(default_factory=dict)
    warm: OrderedDict[str, None] = field(default_factory=OrderedDict)
    row_seconds: float = 0.0
    counted_at: float = 0.0
    n_writing: int = 0
    """Attempts that share steps now."""
    company: tuple[float, Company | None] = (-FOREVER, None)
    """As it was when last looked at, and when."""


class NodeTable:
    """Shapes: with M nodes, every column is (M,)."""

    def __init__(self, cost: CostModel, *, chunk_s: float = FOREVER) -> None:
        self._cost = cost
        self._chunk_s = chunk_s
        """After how long running tuning gives way; ``FOREVER``: it does not."""
        self.ids: list[NodeId] = []
        self._row: dict[NodeId, int] = {}
        self._slots: list[_Slots] = []
        self.unit_s: Floats = np.zeros((len(PARTS), 0))
        self.row_cost: Floats = np.zeros(0)
        self.corrections: Floats = np.zeros((len(KINDS), 0))
        self.is_known: NDArray[np.bool_] = np.zeros((len(KINDS), 0), np.bool_)
        self.batch_share: Floats = np.zeros(0)
        """Node seconds of a step in a full batch for each row, against a step alone."""
        self.is_ready: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.n_rows: Floats = np.zeros(0)
        """Answers that share steps on each node, paused ones apart."""
        self.is_shared: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Somebody runs on a node where others may join."""
        self.n_shared = 0
        """Of them there are so many."""
        self.has_room: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.n_open = 0
        """Nodes with room."""
        self.has_tune_room: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.free_at: Floats = np.zeros(0)
        """When the next slot is expected to be free; -inf with room."""
        self.n_yielding: Floats = np.zeros(0)
        """Tuning tasks that give way at the end of a chunk."""
        self.needs: Keys[Needs] = Keys()
        self.reuses: Keys[str] = Keys()
        self.has: NDArray[np.bool_] = np.zeros((0, 0), np.bool_)
        """(needs, M)"""
        self.warm: Floats = np.zeros((0, 0))
        """(reuses, M) Share of what a task reuses that the node has."""
        self.far: Floats = np.zeros((0, 0))
        """(reuses, M) Share of it that the node would fetch from others."""
        self._shares: dict[str, Mapping[NodeId, Share]] = {}
        """Of what is reused and whose holders are known; bound: names that tasks reuse now."""
        self.has_everything = True
        """Every node has what every waiting task needs."""
        self.knows_everything = True
        """No estimate is a guess."""

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._row

    def row(self, node: NodeId) -> int:
        return self._row[node]

    def view(self, row: int) -> NodeView:
        return self._slots[row].view

    def running(self, row: int) -> dict[TaskId, Running]:
        return self._slots[row].running

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def put(self, view: NodeView) -> bool:
        """Add or replace a node; whether what a task takes there may have changed."""
        row = self._row.get(view.id)
        if row is None:
            row = self._row[view.id] = len(self.ids)
            self.ids.append(view.id)
            self._slots.append(_Slots(view))
            for name in ("unit_s", "row_cost", "corrections", "is_known", "n_rows", "has", "warm", "far"):
                setattr(self, name, _wider(getattr(self, name)))
            for name in _BY_NODE:
                setattr(self, name, _wider(getattr(self, name)))
            is_same_work = False
        else:
            before = self._slots[row].view
            if before == view:
                return False
            is_same_work = before.rates == view.rates and before.has == view.has
        self._slots[row].view = view
        self.unit_s[:, row] = view.rates.unit_s
        self.row_cost[row] = view.rates.row_cost
        n = max(1, view.slots)
        self.batch_share[row] = step_share(n, view.rates.row_cost) / n
        self.is_ready[row] = view.is_ready and view.slots > 0
        for needs, number in self.needs.items():
            self.has[number, row] = view.has(needs)
        for reuse, number in self.reuses.items():
            self.warm[number, row], self.far[number, row] = self._share_of(reuse, row)
        for kind in KINDS:
            self.learned(view.id, kind)
        self._count(row)
        self._look_over()
        return not is_same_work

    def drop(self, node: NodeId) -> list[Running]:
        """Take a node out; what ran there comes back."""
        row = self._row.pop(node)
        ran = list(self._slots[row].running.values())
        self.n_open -= bool(self.has_room[row])
        self.n_shared -= bool(self.is_shared[row])
        del self.ids[row], self._slots[row]
        for name in ("unit_s", "corrections", "is_known", "has", "warm", "far"):
            setattr(self, name, np.delete(getattr(self, name), row, axis=1))
        for name in ("row_cost", "n_rows", *_BY_NODE):
            setattr(self, name, np.delete(getattr(self, name), row))
        self._row = {name: at for at, name in enumerate(self.ids)}
        self._look_over()
        return ran

    def learned(self, node: NodeId, kind: TaskKind) -> None:
        """The cost model changed its mind about a kind on the node."""
        row, number = self._row[node], KINDS.index(kind)
        self.corrections[number, row] = self._cost.correction(kind, node)
        is_known = self._cost.is_known(kind, node, self._slots[row].view.rates)
        if self.is_known[number, row] != is_known:
            self.is_known[number, row] = is_known
            self._look_over()

    def _look_over(self) -> None:
        used = [number for _, number in self.needs.items()]
        self.has_everything = bool(self.has[used].all())
        self.knows_everything = bool(self.is_known.all())

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────

    def take_keys(self, job: Job) -> tuple[int, int]:
        """Numbers of what the job needs and reuses; ``release_keys`` gives them back."""
        needs, is_new = self.needs.take(job.needs)
        if is_new:
            self.has = _taller(self.has, len(self.needs))
            self.has[needs] = [slots.view.has(job.needs) for slots in self._slots]
            self.has_everything = self.has_everything and bool(self.has[needs].all())
        name = job.work.reuses or ""
        reuse, is_new = self.reuses.take(name)
        if is_new:
            self.warm = _taller(self.warm, len(self.reuses))
            self.far = _taller(self.far, len(self.reuses))
            self._fill_shares(name, reuse)
        return needs, reuse

    def release_keys(self, needs: int, reuse: int) -> None:
        self.needs.release(needs)
        self.reuses.release(reuse)
        if self._shares:
            self._shares = {name: shares for name, shares in self._shares.items() if name in self.reuses}

    def set_shares(self, name: str, shares: Mapping[NodeId, Share]) -> bool:
        """Who has how much of what some waiting task reuses: instead of what nodes did a moment ago.

        A node that is left out has nothing. Whether what a task takes may have changed.
        """
        number = self.reuses.get(name)
        if number is None or self._shares.get(name) == shares:
            return False
        self._shares[name] = shares
        self._fill_shares(name, number)
        return True

    def share_of(self, job: Job, row: int) -> Share:
        """Of what the job reuses: the share that the node has, and the share that it would fetch."""
        return self._share_of(job.work.reuses or "", row)

    def _share_of(self, name: str, row: int) -> Share:
        shares = self._shares.get(name)
        if shares is None:
            return (1.0 if name in self._slots[row].warm else 0.0), 0.0
        return shares.get(self.ids[row], (0.0, 0.0))

    def _fill_shares(self, name: str, number: int) -> None:
        shares = self._shares.get(name)
        if shares is None:
            self.warm[number] = [name in slots.warm for slots in self._slots]
            self.far[number] = 0.0
        else:
            found = [shares.get(node, (0.0, 0.0)) for node in self.ids]
            self.warm[number], self.far[number] = zip(*found, strict=True) if found else ((), ())

    # ── what runs ───────────────────────────────────────────────────────────────────────────────────

    def start(self, row: int, running: Running, now: float) -> None:
        slots = self._slots[row]
        self._integrate(slots, now)
        running.row_seconds_before = slots.row_seconds
        running.alone_s, running.answer_s = self._predicted_s(running, row)
        slots.running[running.job.task] = running
        name = running.job.work.reuses
        if name:
            slots.warm[name] = None
            slots.warm.move_to_end(name)
            self._set_warm(name, row, 1.0)
            if len(slots.warm) > _WARM_MAX:
                self._set_warm(slots.warm.popitem(last=False)[0], row, 0.0)
        self._count(row)

    def end(self, row: int, task: TaskId, now: float) -> tuple[Running, float]:
        """Take an attempt off; with the mean number of attempts in its steps, itself included."""
        slots = self._slots[row]
        self._integrate(slots, now)
        running = slots.running.pop(task)
        ran_s = now - running.started_at
        rows = (slots.row_seconds - running.row_seconds_before) / ran_s if ran_s > 0 else 1.0
        self._count(row)
        return running, max(1.0, rows)

    def change(self, row: int, now: float) -> None:
        """A running attempt was marked as pausing or paused, or carries on."""
        self._integrate(self._slots[row], now)
        self._count(row)

    def _integrate(self, slots: _Slots, now: float) -> None:
        slots.row_seconds += slots.n_writing * max(0.0, now - slots.counted_at)
        slots.counted_at = max(now, slots.counted_at)

    def _count(self, row: int) -> None:
        slots = self._slots[row]
        view = slots.view
        n = n_tunes = n_writing = 0
        free_at = FOREVER
        for running in slots.running.values():
            if running.is_active:
                n += 1
                n_tunes += running.tunes
                n_writing += running.writes
                free_at = min(free_at, running.ends_at)
        slots.n_writing = n_writing
        slots.company = (-FOREVER, None)
        self.n_rows[row] = n_writing
        is_shared = n > 0 and view.slots > 1
        self.n_shared += is_shared - bool(self.is_shared[row])
        self.is_shared[row] = is_shared
        room = view.is_ready and n < view.slots
        self.n_open += room - bool(self.has_room[row])
        self.has_room[row] = room
        self.has_tune_room[row] = room and n_tunes < view.tunes_max
        self.free_at[row] = -FOREVER if room else free_at
        self.n_yielding[row] = 0 if view.tunes_beside else n_tunes

    def joined(self, row: int, task: TaskId, cost_s: float, service_s: float, now: float) -> None:
        """The task has started there: it reads first; of the rest all feel as much as they stay for."""
        here = self._slots[row].running
        joiner = here[task]
        read_s = 0.0 if joiner.tunes else min(joiner.alone_s, cost_s)
        others = [one for one in here.values() if one.is_active and one is not joiner]
        for other in others:
            if other.tunes or other.writes:
                share = min(1.0, other.left_s(now) / service_s)
                other.delayed_s += read_s + (cost_s - read_s) * share
            else:
                other.delayed_s += min(read_s, other.alone_left_s(now))
        if others:
            self._count(row)

    def company(self, row: int, now: float) -> Company | None:
        """Those who run on a node, as who joins them feels it."""
        slots = self._slots[row]
        if not self.is_shared[row]:
            return None
        if slots.company[0] != now:
            active = [one for one in slots.running.values() if one.is_active]
            answers_s = max((one.left_s(now) for one in active if one.writes), default=0.0)
            felt = [
                (one.alone_left_s(now), one.job.value, one.tunes)
                for one in active
                if not one.stands_back(now)
            ]
            slots.company = (now, Company.of(felt, answers_s))
        return slots.company[1]

    def read_in_s(self, now: float) -> float:
        """Until somebody on a node that others may join has done what shares nothing; infinite if nobody."""
        soonest_s = FOREVER
        for row in (self.is_shared & self.has_room).nonzero()[0].tolist():
            company = self.company(row, now)
            if company is not None and len(company.all.alone_s):
                soonest_s = min(soonest_s, float(company.all.alone_s[0]))
        return soonest_s

    def crowding(self, row: int, running: Running, rows: float) -> float:
        """How many times longer an attempt that ends now was to take for those who shared nothing with it.

        Args:
            rows: Answers in its steps, on average.
        """
        if self._slots[row].view.slots == 1:
            return 1.0
        base_s = running.alone_s + running.answer_s * step_share(rows, float(self.row_cost[row]))
        return max(1.0, (running.expected_s + running.delayed_s) / max(base_s, _LEAST_S))

    def _predicted_s(self, running: Running, row: int) -> tuple[float, float]:
        """Of a start now: work that shares nothing, and an answer's steps alone."""
        view, work = self._slots[row].view, running.job.work
        seconds = [
            amount * unit_s
            for amount, unit_s in zip(
                amounts_of(work, reuse=running.reuse, far=running.far), view.rates.unit_s, strict=True
            )
        ]
        correction = self._cost.correction(work.kind, view.id)
        answer_s = seconds.pop(_DECODE) * correction
        return sum(seconds) * correction, answer_s

    def harm(self, columns: NDArray[np.intp], cost_s: Floats, now: float) -> Floats:
        """(n, m) Value of running tasks that would end too late if a waiting task joined them.

        Args:
            columns: (m,) Nodes.
            cost_s: (n, m) Seconds each waiting task would take from those who run.
        """
        harm = np.zeros(cost_s.shape)
        for column, row in enumerate(columns.tolist()):
            spare = sorted(
                (spare_s, one.job.value)
                for one in self._slots[row].running.values()
                if one.is_active and 0 < (spare_s := one.job.deadline_at - now - one.left_s(now)) < FOREVER
            )
            if spare:  # who is late already cannot be harmed
                lost = np.concatenate([[0.0], np.cumsum([value for _, value in spare])])
                harm[:, column] = lost[np.searchsorted([spare_s for spare_s, _ in spare], cost_s[:, column])]
        return harm

    def room_in_s(self, now: float) -> Floats:
        """(M,) Seconds until each node is expected to have done what runs there.

        Where others may join, its slots full: what is left of answers counts as in a full batch.
        """
        room_in_s: Floats = np.maximum(self.free_at - now, 0.0)
        for row in self.is_shared.nonzero()[0].tolist() if self.n_shared else ():
            here = self._slots[row].running.values()
            active = [one for one in here if one.is_active and not one.stands_back(now)]
            alone_s = sum(one.alone_left_s(now) for one in active)
            room_in_s[row] = alone_s + self.batch_share[row] * sum(one.answer_left_s(now) for one in active)
        return np.where(self.n_yielding > 0, np.minimum(room_in_s, self._chunk_s), room_in_s)

    def capacity(self, amounts: Floats) -> Floats:
        """(M,) Work done per second against the fastest node with one task alone; 0 for a node not ready.

        Args:
            amounts: (parts,) Of the tasks that there are, on average: nodes differ in what they are fast at.
        """
        if not self.ids:
            return np.zeros(0)
        # What could be fetched could be computed: it counts once.
        alone_s = np.maximum(amounts[:_FETCH] @ self.unit_s[:_FETCH] * self.corrections[0], _LEAST_S)
        answers_s = amounts[_DECODE] * self.unit_s[_DECODE] * self.corrections[0]
        capacity: Floats = (
            alone_s.min() / (alone_s - answers_s + answers_s * self.batch_share) * self.is_ready
        )
        return capacity

    def _set_warm(self, name: str, row: int, share: float) -> None:
        number = self.reuses.get(name)
        if number is not None and name not in self._shares:
            self.warm[number, row] = share


T = TypeVar("T", bound=np.generic)


def _wider(array: NDArray[T]) -> NDArray[T]:
    """One more node."""
    shape = (*array.shape[:-1], 1)
    return np.concatenate([array, np.zeros(shape, array.dtype)], axis=-1)


def _taller(array: NDArray[T], n: int) -> NDArray[T]:
    """At least ``n`` rows."""
    if array.shape[0] >= n:
        return array
    more = np.zeros((max(n, 2 * array.shape[0]) - array.shape[0], array.shape[1]), array.dtype)
    return np.concatenate([array, more])
