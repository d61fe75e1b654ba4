"""Jobs that are trained on several nodes: made into tasks like any other, round by round.

::

    job ──▶ begin ──▶ part 0 … N-1 of round 0 ──▶ part 0 … N-1 of round 1 ──▶ … ──▶ merge ──▶ end of the job

The job itself never runs and takes no slot, so its parts cannot wait for it: with fewer nodes than parts they
queue. Each part is named by what it starts from, so it does not matter who does it, how often, or when: its
state is the same (``node.compute.tune.part_job``). Where states are lost with the nodes that kept them, the
parts that left them are done again.

Nothing here is durable: jobs and parts are, as tasks. Another coordinator finds the furthest round among
them and goes on from there; if none is left, it begins again, and ends with the same adapter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from coordinator.attempts import Attempts, Settle, own_outcome
from coordinator.intake import Intake
from coordinator.publish import announce
from coordinator.task import Task
from coordinator.term import Term
from mesh.core import FOREVER, Broadcast, Effect
from mesh.ids import TaskId
from mesh.messages import Output, TaskProgress, TuneSpec
from mesh.messages.tune import TunePart

__all__ = ["Rounds"]

_AGAIN_S: Final = 1.0
"""After a part could not be taken in (the queue is full): how soon it is tried once more."""
_LOSSES_MAX: Final = 8
"""Times that states of one job may be lost before it is given up."""
_TRIES_MAX: Final = 64
_ROUNDS_KEPT: Final = 4

Stage = Literal["begin", "train", "merge"]


@dataclass(slots=True)
class _Plan:
    """How far one job is."""

    spec: TuneSpec
    """With the number of layers, once it is chosen."""
    threads: int
    profile: str = ""
    round: int = -1
    """-1: ``begin``; as many as there are epochs: ``merge``."""
    starts: dict[int, tuple[str, ...]] = field(default_factory=lambda: {0: ()})
    """By round, the latest."""
    left: dict[int, dict[int, str]] = field(default_factory=dict)
    """By round, the states that parts have left."""
    spent: set[TaskId] = field(default_factory=set)
    """Parts that ended without a state, and were taken into account."""
    n_losses: int = 0
    again_at: float = -FOREVER
    told: str = ""
    seq: int = 0

    @property
    def stage(self) -> Stage:
        if self.round < 0:
            return "begin"
        return "train" if self.round < self.spec.epochs else "merge"

    @property
    def n_parts(self) -> int:
        return self.spec.nodes if self.stage == "train" else 1


class Rounds:
    """One coordination's."""

    def __init__(self, *, term: Term, intake: Intake, attempts: Attempts, settle: Settle) -> None:
        self._term = term
        self._ledger = term.ledger
        self._intake = intake
        self._attempts = attempts
        self._settle = settle
        self._plans: dict[TaskId, _Plan] = {}

    @property
    def wake_at(self) -> float:
        return min((plan.again_at for plan in self._plans.values() if plan.again_at > 0), default=FOREVER)

    def attend(self, now: float) -> list[Effect]:
        """After every input: begin what can begin, and end what is done or no longer wanted."""
        if not self._ledger.apart:
            return []
        effects: list[Effect] = []
        parts: dict[TaskId, list[Task]] = {}
        jobs = []
        for task in list(self._ledger.apart.values()):
            part = _part(task)
            if part is None:
                jobs.append(task)
            else:
                parts.setdefault(part.parent, []).append(task)
        for job in jobs:
            if job.is_open and job.is_acknowledged and not job.is_cancelling and job.deadline_at > now:
                effects += self._advance(job, parts.get(job.id, []), now)
            elif not job.is_open:
                self._plans.pop(job.id, None)
            elif job.id in self._plans:
                self._plans[job.id].again_at = -FOREVER  # its end is due, and nothing else
        for parent, children in parts.items():
            owner = self._ledger.get(parent)
            if owner is None or not owner.is_open:
                for child in children:
                    if child.is_open and not child.is_cancelling:
                        effects += self._attempts.cancel(child, now)
        return effects

    # ── one job ─────────────────────────────────────────────────────────────────────────────────────

    def _advance(self, job: Task, parts: list[Task], now: float) -> list[Effect]:
        plan = self._plans.get(job.id)
        if plan is None:
            plan = self._plans[job.id] = self._plan_of(job, parts)
        if plan.again_at > now:
            return []
        plan.again_at = -FOREVER
        effects: list[Effect] = []
        while job.is_open:
            before = (plan.round, plan.n_losses)
            effects += self._look(job, plan, parts, now)
            if not job.is_open or before == (plan.round, plan.n_losses):
                break
        return effects + (self._tell(job, plan, now) if job.is_open else [])

    def _look(self, job: Task, plan: _Plan, parts: list[Task], now: float) -> list[Effect]:
        """Take in what the parts of this round have left, and make those that there are not yet."""
        effects: list[Effect] = []
        left = plan.left.setdefault(plan.round, {})
        for index in range(plan.n_parts):
            if index in left:
                continue
            part = self._find(plan, parts, index)
            if part is None:
                effects += self._make(job, plan, parts, index, now)
            elif part.outcome is not None:
                output = part.outcome.output or Output()
                if part.outcome.state != "done":
                    return [*effects, *self._fail(job, plan, part, now)]
                if output.lacking:
                    plan.spent.add(part.id)
                    return [*effects, *self._go_back(job, plan, output.lacking, now)]
                if plan.stage == "merge":
                    return [*effects, *self._end(job, part, now)]
                if plan.stage == "begin":
                    if output.features is None:
                        return [*effects, *self._fail(job, plan, part, now)]
                    plan.profile = output.features.profile
                    plan.spec = replace(plan.spec, top_layers=output.features.top_layers)
                    left[index] = ""
                elif output.state is not None:
                    left[index] = output.state
                else:  # a node of another version, which took it for a job of one node
                    return [*effects, *self._fail(job, plan, part, now)]
        if len(left) == plan.n_parts:
            starts = tuple(left[index] for index in range(plan.n_parts)) if plan.stage == "train" else ()
            plan.round += 1
            if plan.starts.get(plan.round) != starts:
                plan.starts[plan.round] = starts
                plan.left.pop(plan.round, None)
            for kept in (plan.starts, plan.left):
                for number in [n for n in kept if n < plan.round - _ROUNDS_KEPT]:
                    del kept[number]
        return effects

    def _plan_of(self, job: Task, parts: list[Task]) -> _Plan:
        """A new job's, or where an earlier coordinator was with it, as far as tasks tell."""
        spec = job.submit.tune
        assert spec is not None, "a job has its spec"
        furthest = max(parts, key=_round_of, default=None)
        if furthest is None or _round_of(furthest) < 0:
            return _Plan(spec, self._threads(job))
        told = furthest.submit.tune
        assert told is not None and told.part is not None
        part = told.part
        spec = replace(spec, top_layers=told.top_layers)
        return _Plan(spec, part.threads, part.profile, part.round, {part.round: tuple(part.starts)})

    def _threads(self, job: Task) -> int:
        """As many as each node that may do parts has processors for; the same number for all of them."""
        infos = [node.info for node in self._term.cluster if node.is_present and node.slots and node.info]
        return max(1, min((info.n_cpus for info in infos), default=1))

    def _find(self, plan: _Plan, parts: list[Task], index: int) -> Task | None:
        """The task that does a part of this round, or did it."""
        wanted = (plan.stage, max(0, plan.round), index, plan.starts.get(plan.round, ()))
        found = [
            task
            for task in parts
            if (part := _part(task)) is not None
            and (part.stage, part.round, part.index, tuple(part.starts)) == wanted
            and part.profile == ("" if plan.stage == "begin" else plan.profile)
            and task.id not in plan.spent
        ]
        found.sort(key=lambda task: (task.state != "done", not task.is_open, task.id))
        return found[0] if found else None

    def _make(self, job: Task, plan: _Plan, parts: list[Task], index: int, now: float) -> list[Effect]:
        part = TunePart(
            parent=job.id,
            stage=plan.stage,
            index=index,
            round=max(0, plan.round),
            profile="" if plan.stage == "begin" else plan.profile,
            threads=plan.threads,
            starts=list(plan.starts.get(plan.round, ())),
        )
        left_s = job.deadline_at - now
        child = self._name(part)
        if child is None:
            return self._give_up(job, "its parts were tried too often", now)
        submit = replace(
            job.submit,
            tune=replace(plan.spec, part=part),
            id=child,
            reply_to=None,
            correlation=None,
            stream=False,
            deadline_s=left_s if left_s < FOREVER else None,
        )
        effects = self._intake.hear(submit, now, now)
        task = self._ledger.get(child)
        if task is None:
            plan.again_at = now + _AGAIN_S
        else:
            parts.append(task)
        return effects

    def _name(self, part: TunePart) -> TaskId | None:
        """The same for every coordinator: the first of its names that no task has or had."""
        for number in range(_TRIES_MAX):
            digest = hashlib.blake2b(f"{part!r} {number}".encode(), digest_size=8).hexdigest()
            name = TaskId(f"tune-{part.stage}-{part.round}-{part.index}-{digest}")
            if self._ledger.get(name) is None and self._term.store.tombstone(name) is None:
                return name
        return None

    def _go_back(self, job: Task, plan: _Plan, lacking: list[int], now: float) -> list[Effect]:
        """Have the parts done again whose states are lost."""
        plan.n_losses += 1
        if plan.n_losses > _LOSSES_MAX:
            return self._give_up(
                job,
                "the states of its parts are lost again and again: the mesh's memory is too small for them, "
                "or nodes give it nothing (--feature-disk)",
                now,
            )
        before = plan.round - 1
        if before in plan.starts:
            left = plan.left.setdefault(before, {})
            known = plan.starts.get(plan.round, ())
            left.update({index: state for index, state in enumerate(known) if index not in lacking})
            for index in lacking:
                left.pop(index, None)
            plan.spent |= {
                task.id
                for task in self._ledger.apart.values()
                if (part := _part(task)) is not None
                and (part.parent, part.stage, part.round) == (job.id, "train", before)
                and part.index in lacking
                and not task.is_open
            }
            plan.round = before
        else:  # what that round started from went with an earlier coordinator
            plan.spent |= {
                task.id
                for task in self._ledger.apart.values()
                if (part := _part(task)) is not None and part.parent == job.id and part.stage != "begin"
            }
            plan.starts, plan.left, plan.round = {0: ()}, {}, 0
        return []

    # ── ends ────────────────────────────────────────────────────────────────────────────────────────

    def _end(self, job: Task, merged: Task, now: float) -> list[Effect]:
        assert merged.outcome is not None
        self._plans.pop(job.id, None)
        outcome = replace(
            merged.outcome,
            epoch=self._term.epoch,
            attempt=max(1, job.attempt),
            queue_s=0.0,
            service_s=max(0.0, now - job.accepted_at),
        )
        return self._settle(job, outcome, now)

    def _fail(self, job: Task, plan: _Plan, part: Task, now: float) -> list[Effect]:
        assert part.outcome is not None
        which = plan.stage if plan.stage != "train" else f"part {_index(part) + 1} of {plan.spec.nodes}"
        state = part.outcome.state if part.outcome.state != "done" else "failed"
        reason = part.outcome.reason or "it left nothing: update the node"
        self._plans.pop(job.id, None)
        outcome = own_outcome(job, state, f"{which} ({part.id}): {reason}"[:1000], self._term.epoch, now)
        return self._settle(job, outcome, now)

    def _give_up(self, job: Task, reason: str, now: float) -> list[Effect]:
        self._plans.pop(job.id, None)
        return self._settle(job, own_outcome(job, "failed", reason, self._term.epoch, now), now)

    def _tell(self, job: Task, plan: _Plan, now: float) -> list[Effect]:
        """How far the job is, to its client; a word to everybody when a round begins."""
        done, epochs = len(plan.left.get(plan.round, {})), plan.spec.epochs
        words = {
            "begin": "settles how it is trained",
            "train": f"epoch {plan.round + 1} of {epochs} on {plan.spec.nodes} nodes: {done} parts are done",
            "merge": "puts the parts together",
        }[plan.stage]
        if words == plan.told:
            return []
        plan.told = words
        plan.seq += 1
        fraction = (max(0, plan.round) + done / plan.n_parts) / (epochs + 1)
        progress = TaskProgress(
            task=job.id,
            attempt=max(1, job.attempt),
            seq=plan.seq,
            phase={"begin": "choosing", "train": "training", "merge": "saving"}[plan.stage],  # type: ignore[arg-type]
            fraction=min(1.0, fraction),
            epoch=max(0, min(plan.round, epochs)),
            epochs=epochs,
            text=words,
        )
        effects: list[Effect] = [Broadcast(progress)]
        if not done:
            job.waits_for = words
            effects += announce(job, self._term.epoch, now)
        return effects


def _part(task: Task) -> TunePart | None:
    return task.submit.tune.part if task.submit.tune is not None else None


def _round_of(task: Task) -> int:
    """In the order of stages."""
    part = _part(task)
    return -1 if part is None or part.stage == "begin" else part.round


def _index(task: Task) -> int:
    part = _part(task)
    return part.index if part is not None else 0
