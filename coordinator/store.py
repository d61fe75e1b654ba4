"""What this node has on disk about tasks, whoever coordinates.

One store per node, shared by its scheduler, holder and worker cores. Journal keys:

    task/<id>             TaskRecord     mine as coordinator, or held for one
    attempt/<task>/<n>    AttemptEnded   an outcome of my own that no coordinator has taken yet

``put`` is a join: a settled record is never replaced by an open one, and of two outcomes the one of
lower rank stays (see ``coordinator.task``). So repeated and reordered copies do no harm, and all nodes
come to the same record. Settled records are kept for a bounded time, then only their *tombstone*: enough
to answer a late repetition and to settle the copy of a node that was away.

Tombstones are in memory: after a restart, a task settled more than ``settled_keep_s`` ago is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.task import aged, outcome_rank
from mesh.core import FOREVER, Effect, Message, Save
from mesh.ids import Epoch, TaskId
from mesh.messages import AttemptEnded, AttemptId, TaskRecord, TaskState
from mesh.units import MIB

__all__ = ["RecordStore", "StoreConfig", "Tombstone", "attempt_key", "task_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    settled_keep_s: float = 600.0
    """How long an answer can be asked for again, and a returning node be told of it."""
    settled_max: int = 4096
    """At 8 KiB an answer, 32 MiB; the oldest go first."""
    open_max: int = 20_000
    """Twice what one coordinator admits: its own and those held for one before it."""
    settled_bytes_max: int = 64 * MIB
    open_bytes_max: int = 128 * MIB
    """Bounds on text as well: prompts of 256 KiB would fill the journal (512 MiB, together with the outcomes
    below) long before there are too many of them, and a node whose journal is full is silent."""
    ended_max: int = 1024
    """Outcomes no coordinator has taken: what one worker makes in ten minutes at two a second."""
    ended_bytes_max: int = 192 * MIB
    """1024 of the longest answers; vectors and scores may be twice as long."""
    tombstones_max: int = 100_000
    """About 200 bytes each: 20 MB."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """All that is left of a task settled long ago."""

    digest: str
    state: TaskState
    epoch: Epoch
    attempt: int


@dataclass(frozen=True, slots=True)
class _Stored:
    record: TaskRecord
    at: float
    """When it was written, on this process's clock."""

    @property
    def n_bytes(self) -> int:
        """Of what is computed on and what came of it; the rest of a record is small."""
        outcome = self.record.outcome
        return self.record.submit.n_text_bytes + (outcome.n_bytes if outcome is not None else 0)


class _Shelf(dict[TaskId, _Stored]):
    """Records in the order they came, and how much text they hold."""

    n_bytes = 0

    def __setitem__(self, task: TaskId, stored: _Stored) -> None:
        known = self.get(task)
        self.n_bytes += stored.n_bytes - (known.n_bytes if known is not None else 0)
        super().__setitem__(task, stored)

    def remove(self, task: TaskId) -> _Stored | None:
        stored = super().pop(task, None)
        self.n_bytes -= stored.n_bytes if stored is not None else 0
        return stored


def task_key(task: TaskId) -> str:
    return f"task/{task}"


def attempt_key(task: TaskId, attempt: int) -> str:
    return f"attempt/{task}/{attempt}"


class RecordStore:
    """The node's durable knowledge of tasks, and which attempts it runs now."""

    def __init__(
        self, *, now: float, journal: Mapping[str, Message] | None = None, config: StoreConfig | None = None
    ) -> None:
        self._config = config or StoreConfig()
        self._open = _Shelf()
        self._settled = _Shelf()  # in order of settling
        self._tombstones: dict[TaskId, Tombstone] = {}
        self.ended: dict[tuple[TaskId, int], AttemptEnded] = {}
        """Own outcomes not yet taken by a coordinator."""
        self._ended_bytes = 0
        self.running: dict[TaskId, AttemptId] = {}
        """Own attempts in progress, kept by the worker core; lost with the process."""
        for _, message in sorted((journal or {}).items()):
            match message:
                case TaskRecord():
                    kept = self._open if message.outcome is None else self._settled
                    kept[message.task] = _Stored(message, now)
                case AttemptEnded():
                    self.ended[message.task, message.attempt] = message
                    self._ended_bytes += message.outcome.n_bytes
                case _:
                    pass

    @property
    def n_records(self) -> int:
        return len(self._open) + len(self._settled)

    def get(self, task: TaskId, now: float) -> TaskRecord | None:
        """The record as of ``now``: its remaining time has gone on running here."""
        stored = self._open.get(task) or self._settled.get(task)
        return aged(stored.record, max(0.0, now - stored.at)) if stored else None

    def records(self, now: float) -> list[TaskRecord]:
        """All records as of ``now``: the open ones first, then the settled, latest first."""
        kept = [*self._open.values(), *reversed(self._settled.values())]
        return [aged(stored.record, max(0.0, now - stored.at)) for stored in kept]

    @property
    def has_room(self) -> bool:
        """Whether one more open record may be kept."""
        config = self._config
        return len(self._open) < config.open_max and self._open.n_bytes < config.open_bytes_max

    def tombstone(self, task: TaskId) -> Tombstone | None:
        return self._tombstones.get(task)

    def put(self, record: TaskRecord, now: float) -> list[Effect]:
        """Keep the record unless a better one is here; ``[]`` means nothing changed, or no room."""
        settled = self._settled.get(record.task)
        if record.outcome is None:
            if settled is not None or not (record.task in self._open or self.has_room):
                return []
            self._tombstones.pop(record.task, None)  # its coordinator knows better than an old memory
            self._open[record.task] = _Stored(record, now)
            return [Save(task_key(record.task), record)]
        known = settled.record.outcome if settled is not None else None
        if known is not None and outcome_rank(known) <= outcome_rank(record.outcome):
            return []
        self._settled.remove(record.task)
        self._tombstones.pop(record.task, None)
        self._open.remove(record.task)
        self._settled[record.task] = _Stored(record, now)
        effects: list[Effect] = [Save(task_key(record.task), record)]
        while len(self._settled) > self._config.settled_max or (
            self._settled.n_bytes > self._config.settled_bytes_max and len(self._settled) > 1
        ):
            effects += self.bury(next(iter(self._settled)))
        return effects

    def bury(self, task: TaskId) -> list[Effect]:
        """Erase a settled record; its tombstone stays."""
        stored = self._settled.remove(task)
        if stored is None or stored.record.outcome is None:
            return []
        outcome = stored.record.outcome
        self._tombstones[task] = Tombstone(
            stored.record.digest, outcome.state, outcome.epoch, outcome.attempt
        )
        while len(self._tombstones) > self._config.tombstones_max:
            del self._tombstones[next(iter(self._tombstones))]
        return [Save(task_key(task), None)]

    @property
    def bury_at(self) -> float:
        """When the oldest settled record is due; ``FOREVER`` without one."""
        oldest = next(iter(self._settled.values()), None)
        return oldest.at + self._config.settled_keep_s if oldest else FOREVER

    def bury_due(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self.bury_at <= now:
            effects += self.bury(next(iter(self._settled)))
        return effects

    def end(self, ended: AttemptEnded) -> list[Effect]:
        """An attempt of this node is over: durable before anybody hears of it."""
        self.running.pop(ended.task, None)
        self.ended[ended.task, ended.attempt] = ended
        self._ended_bytes += ended.outcome.n_bytes
        effects: list[Effect] = [Save(attempt_key(ended.task, ended.attempt), ended)]
        while len(self.ended) > self._config.ended_max or (
            self._ended_bytes > self._config.ended_bytes_max and len(self.ended) > 1
        ):
            task, attempt = next(iter(self.ended))
            effects += self.take(task, attempt)
        return effects

    def take(self, task: TaskId, attempt: int) -> list[Effect]:
        """A coordinator has the outcome in safety: forget the attempt's own record."""
        taken = self.ended.pop((task, attempt), None)
        if taken is None:
            return []
        self._ended_bytes -= taken.outcome.n_bytes
        return [Save(attempt_key(task, attempt), None)]
