"""Virtual nodes: they do what the coordinator decided, in the time that the work truly takes.

Prompts and texts are read first, in turns. Else a node shares its time equally among tuning jobs and all
answers together, which share every step: with n of them a step takes ``1 + (n - 1) * row_cost`` of one alone.
Tuning that has time stands back for all others (``coordinator.policy.work.PATIENCE``). A node with one slot
serves one attempt at a time, and all of this is a plain queue.

Tuning stops for others only at the end of a chunk of ``CHUNK_S``, generation between any two tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from coordinator.policy.cost import step_share
from coordinator.policy.work import PATIENCE
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.workload import VirtualTask
from mesh.core import FOREVER
from mesh.ids import TaskId

__all__ = ["CHUNK_S", "Attempt", "VirtualNode"]

CHUNK_S = 1.0
_KEPT = 16
"""Adapters (and feature maps of records) that a node keeps at hand, the last used ones."""
_NOTHING_S = 1e-9
_JUST_BEGUN = 1 - 1e-9


@dataclass(slots=True, eq=False)
class Attempt:
    """One try of a task on one node. Amounts of work are true seconds of this node alone."""

    task: VirtualTask
    started_at: float
    alone_s: float
    """Of work that shares nothing and is left: adapter, prompt, features, training."""
    answer_s: float
    """Of the answer that is left."""
    whole_s: float
    """Of all the work of this attempt."""
    used_s: float = 0.0
    """Node time it took from others until now."""
    ran_s: float = 0.0
    training_s: float = 0.0
    """Of ``whole_s``, what comes after the features of a tuning job."""
    gives_way_at: float = FOREVER
    """A pause takes effect then."""

    @property
    def impatient_at(self) -> float:
        """Tuning takes its share beside others from then on."""
        is_tune = self.task.work.kind == "tune"
        return self.task.deadline_at - PATIENCE * self.alone_s if is_tune else -FOREVER

    @property
    def is_reading(self) -> bool:
        return self.alone_s > _NOTHING_S and self.task.work.kind != "tune"

    @property
    def is_done(self) -> bool:
        return self.alone_s <= _NOTHING_S and self.answer_s <= _NOTHING_S

    @property
    def left(self) -> float:
        """Share of the work that is left, from 0 to 1."""
        return min(1.0, max(0.0, (self.alone_s + self.answer_s) / self.whole_s))

    @property
    def left_of_training(self) -> float:
        """What a tuning job tells of its progress: the share of its training that is left.

        Features that are left count as training: there is no word for them alone, and they are few.
        """
        if self.training_s <= 0 or self.left >= 1:
            return 1.0
        return min(self.alone_s / self.training_s, _JUST_BEGUN)


@dataclass(slots=True)
class VirtualNode:
    """The true state of one node. ``next_at`` says when something happens here; ``advance`` goes there."""

    spec: NodeSpec
    now: float = 0.0
    running: dict[TaskId, Attempt] = field(default_factory=dict)
    paused: dict[TaskId, Attempt] = field(default_factory=dict)
    coming: list[Attempt] = field(default_factory=list)
    """Ordered to start when somebody has given way."""
    busy_s: float = 0.0
    """Slots in use, integrated over time."""
    version: int = 0
    """Grows whenever ``next_at`` may have changed."""
    _kept: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def n_here(self) -> int:
        return len(self.running) + len(self.paused) + len(self.coming)

    def attempts(self) -> Iterator[Attempt]:
        """All that are here, in the order of their start within each state."""
        yield from self.running.values()
        yield from self.paused.values()
        yield from self.coming

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────

    def start(self, task: VirtualTask, left: float, now: float) -> None:
        """Begin now, or as soon as a slot is free."""
        self.advance(now)
        alone_s, answer_s = self._true_s(task, left)
        attempt = Attempt(task, now, alone_s, answer_s, max(alone_s + answer_s, _NOTHING_S))
        if task.work.kind == "tune":
            *_, tune_s, _ = self.spec.rates.unit_s
            attempt.training_s = min(alone_s, task.work.n_tune_tokens * tune_s * task.true_factor)
        self.coming.append(attempt)
        self._fill()

    def may_pause(self, task: TaskId) -> bool:
        """At most one stands aside at a time, as in ``node.worker``; tuning, which leaves, always may."""
        attempt = self.running.get(task)
        if attempt is not None and attempt.task.work.kind == "tune":
            return True
        return attempt is not None and not self.paused and not self.coming

    def is_giving_way(self, task: TaskId) -> bool:
        """Tuning in its last chunk here."""
        attempt = self.running.get(task)
        return attempt is not None and attempt.gives_way_at < FOREVER

    def pause(self, task: TaskId, now: float) -> None:
        """Have it give way: a tuning job at the end of its chunk, anything else at once."""
        self.advance(now)
        attempt = self.running.get(task)
        if attempt is None:
            return
        if attempt.task.work.kind == "tune":
            n_chunks = int((now - attempt.started_at + _NOTHING_S) / CHUNK_S)
            in_chunk_s = now - attempt.started_at - n_chunks * CHUNK_S
            attempt.gives_way_at = now if in_chunk_s <= _NOTHING_S else now + CHUNK_S - in_chunk_s
        else:
            attempt.gives_way_at = now
        self.version += 1

    def resume(self, task: TaskId, now: float) -> None:
        """Let a paused one go on, now or as soon as a slot is free."""
        self.advance(now)
        if (attempt := self.paused.pop(task, None)) is not None:
            self.coming.append(attempt)
            self._fill()

    def resume_all(self, now: float) -> list[TaskId]:
        """Nobody remembers why they were paused: they go on as slots become free. Who they were."""
        resumed = [*self.paused]
        for task in resumed:
            self.resume(task, now)
        for attempt in self.running.values():
            if attempt.task.work.kind != "tune":
                attempt.gives_way_at = FOREVER
        self.version += 1
        return resumed

    def stop(self, task: TaskId, now: float) -> Attempt | None:
        """Take it out unfinished; ``None`` if it is not here (any more)."""
        self.advance(now)
        attempt = self.running.pop(task, None) or self.paused.pop(task, None)
        if attempt is None:
            attempt = next((one for one in self.coming if one.task.id == task), None)
            if attempt is None:
                return None
            self.coming.remove(attempt)
        self._fill()
        return attempt

    def clear(self, now: float) -> list[Attempt]:
        """The node is gone: what was here is lost."""
        self.advance(now)
        lost = list(self.attempts())
        self.running, self.paused, self.coming = {}, {}, []
        self._kept.clear()
        self.version += 1
        return lost

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    def next_at(self) -> float:
        """When an attempt ends, changes what it does, or gives way; infinite if nothing runs."""
        if not self.running:
            return FOREVER
        sharing = self._sharing()
        alone_share, answer_share, _ = self._shares(sharing)
        at = FOREVER
        for attempt in self.running.values():
            at = min(at, attempt.gives_way_at)
            if attempt not in sharing:
                if attempt.impatient_at > self.now:
                    at = min(at, attempt.impatient_at)
                continue
            is_alone = attempt.alone_s > _NOTHING_S
            left_s = attempt.alone_s / alone_share if is_alone else attempt.answer_s / answer_share
            at = min(at, self.now + left_s)
        return max(at, self.now)

    def advance(self, now: float) -> None:
        """Let time pass; not beyond ``next_at``, where rates change."""
        length_s = now - self.now
        if length_s <= 0:
            return
        sharing = self._sharing()
        self.now = now
        if not self.running:
            return
        alone_share, answer_share, n_answers = self._shares(sharing)
        self.busy_s += len(self.running) * length_s
        for attempt in self.running.values():
            attempt.ran_s += length_s
        for attempt in sharing:
            if attempt.alone_s > _NOTHING_S:
                attempt.alone_s = max(0.0, attempt.alone_s - length_s * alone_share)
                attempt.used_s += length_s * alone_share
            else:
                attempt.answer_s = max(0.0, attempt.answer_s - length_s * answer_share)
                attempt.used_s += length_s * alone_share / n_answers

    def ended(self) -> list[Attempt]:
        """Take out what is done now."""
        done = [attempt for attempt in self.running.values() if attempt.is_done]
        for attempt in done:
            del self.running[attempt.task.id]
            self._keep(attempt.task.work.reuses)
        self._fill()
        self.version += 1
        return done

    def gave_way(self) -> list[Attempt]:
        """Take out tuning that has come to the end of its last chunk; paused answers stay here."""
        gone: list[Attempt] = []
        for attempt in [one for one in self.running.values() if one.gives_way_at <= self.now + _NOTHING_S]:
            del self.running[attempt.task.id]
            attempt.gives_way_at = FOREVER
            if attempt.task.work.kind == "tune":
                gone.append(attempt)
            else:
                self.paused[attempt.task.id] = attempt
        self._fill()
        self.version += 1
        return gone

    # ── ─────────────────────────────────────────────────────────────────────────────────────────────

    def _fill(self) -> None:
        while self.coming and len(self.running) < self.spec.slots:
            attempt = self.coming.pop(0)
            if attempt.ran_s == 0.0:
                attempt.started_at = self.now
            self.running[attempt.task.id] = attempt
        self.version += 1

    def _sharing(self) -> list[Attempt]:
        """Who has a share of the node's time now: those who read, or all, less tuning that stands back."""
        attempts = [*self.running.values()]
        if len(attempts) == 1:
            return attempts
        if reading := [one for one in attempts if one.is_reading]:
            return reading
        at = self.now + _NOTHING_S
        return [one for one in attempts if one.impatient_at <= at] or attempts

    def _shares(self, sharing: Sequence[Attempt]) -> tuple[float, float, int]:
        """Seconds of work done each second by one that shares nothing, by one answer; how many answers."""
        n_answers = sum(attempt.alone_s <= _NOTHING_S for attempt in sharing)
        n_parties = len(sharing) - n_answers + (n_answers > 0)
        return 1 / n_parties, 1 / (n_parties * step_share(n_answers, self.spec.rates.row_cost)), n_answers

    def _true_s(self, task: VirtualTask, left: float) -> tuple[float, float]:
        """Seconds of this node that the task truly takes: without its answer, and its answer."""
        work, (load_s, feature_s, prompt_s, token_s, tune_s, _) = task.work, self.spec.rates.unit_s
        has = work.reuses is not None and work.reuses in self._kept
        fresh_s = 0.0 if has else work.n_adapter_loads * load_s
        if work.kind == "tune":
            # Features are made first; what a job has done of them is done.
            both_s = work.n_feature_tokens * feature_s + work.n_tune_tokens * tune_s
            return (fresh_s + both_s * left) * task.true_factor, 0.0
        alone_s, answer_s = fresh_s + work.n_prompt_tokens * prompt_s, work.n_tokens * token_s
        if self.spec.slots == 1:  # nobody to share a step with: one stretch of work, half the events
            alone_s, answer_s = alone_s + answer_s, 0.0
        return alone_s * task.true_factor, answer_s * task.true_factor

    def _keep(self, name: str | None) -> None:
        if name is not None:
            self._kept[name] = None
            self._kept.move_to_end(name)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
