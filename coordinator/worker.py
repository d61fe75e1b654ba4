"""Runs attempts on this node for whoever coordinates; the shell does the computing.

    Assign ──▶ StartAttempt ─▷ shell ─▷ AttemptText, AttemptProgress…
       └─▶ Refused                   ─▷ AttemptFinished ──▶ Save, AttemptEnded… until OutcomeTaken
                                     ─▷ FeaturesNeeded ──▶ FeaturesWanted… until FeaturesReady

A task runs here at most once at a time: whoever assigns it again, under whatever attempt or epoch, is
told which attempt runs already. With all slots taken, an ``Assign`` may name a generation that stands still
for it (``pauses``): one at a time, and it goes on before anything else starts. An outcome is on disk before
anybody hears of it, and is repeated to the present coordinator until that has it in safety; a change of
coordinator disturbs nothing here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from coordinator.cluster import serves
from coordinator.facts import (
    AdaptersChanged,
    AttemptFinished,
    AttemptProgress,
    AttemptText,
    DrainChanged,
    EngineLost,
    EngineReady,
    FeaturesArrived,
    FeaturesNeeded,
    PauseAttempt,
    ResumeAttempt,
    StartAttempt,
    StopAttempt,
)
from coordinator.store import RecordStore
from coordinator.task import CANCELLED_BY_CLIENT
from mesh.agreement.fence import Fence
from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Notify, Send
from mesh.facts import Elected, Followed
from mesh.ids import NodeId, TaskId
from mesh.messages import (
    Assign,
    AttemptEnded,
    AttemptId,
    AttemptsRunning,
    CancelAttempt,
    Drain,
    FeaturesReady,
    FeaturesWanted,
    Outcome,
    OutcomeTaken,
    Refused,
    StaleCommand,
    TaskProgress,
    TaskTokens,
)

__all__ = ["Worker", "WorkerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    report_every_s: float = 1.0
    end_every_s: float = 1.0
    """First repetition of an outcome; doubled while nobody takes it, at most ``end_every_max_s``."""
    end_every_max_s: float = 8.0
    ask_every_s: float = 2.0
    """Repetition of what an attempt waits for; the answer itself comes at once when it is there."""
    over_max: int = 1024
    """Attempts remembered after their end, so that a late ``Assign`` does not run one twice: at two a
    second, eight minutes, much longer than any broker keeps a message."""


@dataclass(slots=True)
class _Running:
    assign: Assign
    started_at: float
    n_pieces: int = 0
    wants: FeaturesWanted | None = None
    """Feature maps that it waits for."""
    stopped_for: str | None = None
    """Why it was told to stop: ``deadline``, or a coordinator's reason."""

    @property
    def deadline_at(self) -> float:
        return FOREVER if self.assign.budget_s is None else self.started_at + self.assign.budget_s


@dataclass(slots=True)
class _Ended:
    at: float
    every_s: float


class Worker:
    """One per node, also on nodes that compute nothing (they refuse)."""

    def __init__(
        self, *, me: NodeId, fence: Fence, store: RecordStore, now: float, config: WorkerConfig | None = None
    ) -> None:
        self._me = me
        self._fence = fence
        self._store = store
        self._config = config or WorkerConfig()
        self._coordinator: NodeId | None = None
        self._engine: EngineReady | None = None
        self._adapters: frozenset[str] = frozenset()
        self._no_engine_because = "the model is not loaded yet"
        self._is_draining = False
        self._running: dict[TaskId, _Running] = {}
        self._paused: TaskId | None = None
        """Of those that run, the one that stands still for another and takes no slot."""
        self._over: OrderedDict[AttemptId, Refused | None] = OrderedDict()
        self._repeat: dict[tuple[TaskId, int], _Ended] = {
            key: _Ended(now, self._config.end_every_s) for key in store.ended
        }
        self._report_at = FOREVER
        self._ask_at = FOREVER
        """When what attempts wait for is asked for again."""

    # ── what others may read ────────────────────────────────────────────────────────────────────────

    @property
    def n_running(self) -> int:
        """Attempts that take a slot."""
        return len(self._running) - (self._paused is not None)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_idle(self) -> bool:
        """Nothing runs, and every outcome is in a coordinator's safety: the node may leave."""
        return not self._running and not self._store.ended

    @property
    def may_start(self) -> bool:
        """What ``NodeReport.ready`` says."""
        return self._engine is not None and not self._is_draining

    @property
    def wake_at(self) -> float:
        ends_at = min((ended.at for ended in self._repeat.values()), default=FOREVER)
        late_at = min(
            (run.deadline_at for run in self._running.values() if not run.stopped_for), default=FOREVER
        )
        return min(self._report_at, late_at, min(ends_at, self._ask_at) if self._coordinator else FOREVER)

    # ── the three entrances ─────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case Assign() | CancelAttempt() | OutcomeTaken() | FeaturesReady() if not self._fence.admits(
                message.epoch
            ):
                return [Send(sender, StaleCommand(seen=self._fence.seen))]
            case Assign():
                return [*self._obey(message, now), *self._assign(message, sender, now)]
            case CancelAttempt(task=task, reason=reason):
                return [*self._obey(message, now), *self._cancel(task, reason, sender)]
            case OutcomeTaken(task=task, attempt=attempt):
                self._repeat.pop((task, attempt), None)
                return [*self._obey(message, now), *self._store.take(task, attempt)]
            case FeaturesReady():
                return self._features_ready(message)
            case Drain(on=on, leave=leave):
                self._is_draining = on
                return [Notify(DrainChanged(draining=on, leave=leave))]
            case _:
                return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        match fact:
            case Elected(epoch=epoch) | Followed(epoch=epoch):
                return self._report_to(epoch.node, now)
            case EngineReady():
                self._engine, self._adapters = fact, frozenset(fact.adapters)
                return []
            case AdaptersChanged(names=names):
                self._adapters = frozenset(names)
                return []
            case EngineLost(reason=reason):
                return self._engine_lost(reason, now)
            case AttemptText():
                return self._text(fact)
            case AttemptProgress(progress=progress):
                return self._progress(progress)
            case FeaturesNeeded():
                return self._features_needed(fact, now)
            case AttemptFinished(task=task, attempt=attempt, outcome=outcome):
                run = self._running.get(task)
                if run is None or run.assign.attempt != attempt:
                    return []
                return self._end(run, outcome, now)
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for task, run in self._running.items():
            if run.deadline_at <= now and run.stopped_for is None:
                run.stopped_for = _DEADLINE
                effects.append(Notify(StopAttempt(task, run.assign.attempt, "its deadline passed")))
        if self._coordinator is None:
            return effects
        if self._report_at <= now:
            effects.append(self._report(self._coordinator, now))
        if self._ask_at <= now:
            effects += self._ask(self._coordinator, now)
        for key, due in list(self._repeat.items()):
            if due.at <= now:
                effects += self._tell(key, due, self._coordinator, now)
        return effects

    # ── the coordinator ─────────────────────────────────────────────────────────────────────────────

    def _obey(self, command: Assign | CancelAttempt | OutcomeTaken, now: float) -> list[Effect]:
        """A command of the present epoch, or of a newer one that is hereby the present."""
        raised = self._fence.raise_to(command.epoch)
        return raised + (
            self._report_to(command.epoch.node, now) if command.epoch.node != self._coordinator else []
        )

    def _report_to(self, coordinator: NodeId, now: float) -> list[Effect]:
        """From now on this one hears of attempts, beginning with all it may have missed."""
        self._coordinator = coordinator
        effects: list[Effect] = [self._report(coordinator, now)] if self._running else []
        effects += self._ask(coordinator, now)
        for key, due in list(self._repeat.items()):
            due.every_s = self._config.end_every_s
            effects += self._tell(key, due, coordinator, now)
        return effects

    def _report(self, to: NodeId, now: float) -> Effect:
        self._report_at = now + self._config.report_every_s if self._running else FOREVER
        return Send(to, AttemptsRunning(attempts=list(self._store.running.values())))

    def _tell(self, key: tuple[TaskId, int], due: _Ended, to: NodeId, now: float) -> list[Effect]:
        ended = self._store.ended.get(key)
        if ended is None:
            del self._repeat[key]  # dropped by the store's bound
            return []
        due.at = now + due.every_s
        due.every_s = min(due.every_s * 2, self._config.end_every_max_s)
        return [Send(to, ended)]

    # ── commands ────────────────────────────────────────────────────────────────────────────────────

    def _assign(self, assign: Assign, sender: NodeId, now: float) -> list[Effect]:
        attempt = AttemptId(task=assign.task, attempt=assign.attempt, epoch=assign.epoch)
        if assign.task in self._running:
            return [self._report(sender, now)]
        if attempt in self._over:
            answer = self._over[attempt]
            if answer is not None:
                return [Send(sender, answer)]
            ended = self._store.ended.get((assign.task, assign.attempt))
            return [Send(sender, ended)] if ended else []
        earlier = [
            ended for ended in self._store.ended.values() if ended.task == assign.task and _is_answer(ended)
        ]
        if earlier:
            return [Send(sender, earlier[0])]
        reason = self._refusal(assign)
        if reason is not None:
            refused = Refused(attempt=attempt, reason=reason)
            self._remember(attempt, refused)
            return [Send(sender, refused)]
        effects: list[Effect] = []
        if self._is_full:
            run = self._making_way(assign)
            assert run is not None, "what is full and cannot make way has refused"
            self._paused = run.assign.task
            effects.append(Notify(PauseAttempt(run.assign.task, run.assign.attempt)))
        self._running[assign.task] = _Running(assign, now)
        self._store.running[assign.task] = attempt
        return [*effects, Notify(StartAttempt(assign)), self._report(sender, now)]

    @property
    def _is_full(self) -> bool:
        return self._engine is None or self.n_running >= self._engine.slots

    def _making_way(self, assign: Assign) -> _Running | None:
        """Who stands still for ``assign`` if all slots are taken; ``None``: nobody can."""
        run = self._running.get(assign.pauses) if assign.pauses is not None else None
        is_able = self._engine is not None and self._engine.can_pause and self._paused is None
        if run is None or not is_able or run.stopped_for or run.assign.submit.kind != "generate":
            return None
        return run

    def _carry_on(self) -> list[Effect]:
        """A slot may have become free: it is first of all the paused attempt's."""
        if self._paused is None or self._is_full:
            return []
        run, self._paused = self._running[self._paused], None
        return [Notify(ResumeAttempt(run.assign.task, run.assign.attempt))]

    def _refusal(self, assign: Assign) -> str | None:
        """Why this node does not run it now; ``None`` if it does."""
        if self._engine is None:
            return self._no_engine_because
        if self._is_draining:
            return "draining: it takes no new work"
        if self._is_full and self._making_way(assign) is None:
            return f"all {self._engine.slots} slots are taken"
        if not serves(self._engine.model, assign.submit.model, self._engine.also_called):
            return f"it serves {self._engine.model}, not {assign.submit.model}"
        adapter, tune = assign.submit.adapter, assign.submit.tune
        if adapter is not None and adapter not in self._adapters:
            return f"it has no adapter {adapter!r}"
        if tune is not None and tune.holders and self._me not in tune.holders:
            return f"the data are on {', '.join(tune.holders[:3])}"
        if assign.budget_s is not None and assign.budget_s <= 0:
            return "its deadline has passed"
        return None

    def _cancel(self, task: TaskId, reason: str, sender: NodeId) -> list[Effect]:
        run = self._running.get(task)
        if run is None:
            return [Send(sender, ended) for ended in self._store.ended.values() if ended.task == task]
        if run.stopped_for is not None:
            return []
        run.stopped_for = reason
        return [Notify(StopAttempt(task, run.assign.attempt, reason))]

    # ── the engine ──────────────────────────────────────────────────────────────────────────────────

    def _text(self, piece: AttemptText) -> list[Effect]:
        run = self._running.get(piece.task)
        if run is None or run.assign.attempt != piece.attempt:
            return []
        seq = run.n_pieces
        run.n_pieces += 1
        if not run.assign.submit.stream:
            return []
        tokens = TaskTokens(
            task=piece.task, attempt=piece.attempt, seq=seq, text=piece.text, n_tokens=piece.n_tokens
        )
        return [Broadcast(tokens)]

    def _progress(self, progress: TaskProgress) -> list[Effect]:
        run = self._running.get(progress.task)
        if run is None or run.assign.attempt != progress.attempt:
            return []
        seq = run.n_pieces
        run.n_pieces += 1
        return [Broadcast(replace(progress, seq=seq))] if run.assign.submit.stream else []

    # ── feature maps from others ────────────────────────────────────────────────────────────────────

    def _features_needed(self, need: FeaturesNeeded, now: float) -> list[Effect]:
        run = self._running.get(need.task)
        if run is None or run.assign.attempt != need.attempt:
            return []
        run.wants = FeaturesWanted(task=need.task, attempt=need.attempt, round=need.round, spec=need.spec)
        return self._ask(self._coordinator, now) if self._coordinator is not None else []

    def _ask(self, coordinator: NodeId, now: float) -> list[Effect]:
        """All that attempts wait for: the coordinator makes one task of each, however often it hears."""
        wanted = [run.wants for run in self._running.values() if run.wants is not None]
        self._ask_at = now + self._config.ask_every_s if wanted else FOREVER
        return [Send(coordinator, wants) for wants in wanted]

    def _features_ready(self, ready: FeaturesReady) -> list[Effect]:
        run = self._running.get(ready.task)
        if run is None or run.wants is None:
            return []
        if (run.wants.attempt, run.wants.round) != (ready.attempt, ready.round):
            return []
        run.wants = None
        arrived = FeaturesArrived(ready.task, ready.attempt, ready.round, ready.made, ready.reason)
        return [Notify(arrived)]

    def _engine_lost(self, reason: str, now: float) -> list[Effect]:
        """Everything that ran is lost with the compute process, through no fault of the tasks."""
        self._engine = self._paused = None
        self._no_engine_because = f"its compute process ended: {reason}"
        effects: list[Effect] = []
        for run in list(self._running.values()):
            lost = Outcome(
                state="failed",
                text="",
                finish_reason=None,
                reason=self._no_engine_because,
                node=self._me,
                attempt=run.assign.attempt,
                epoch=run.assign.epoch,
                service_s=max(0.0, now - run.started_at),
                retry=True,
            )
            effects += self._end(run, lost, now)
        return effects

    def _end(self, run: _Running, outcome: Outcome, now: float) -> list[Effect]:
        assign = run.assign
        if outcome.state == "cancelled" and run.stopped_for is not None:
            is_late = run.stopped_for == _DEADLINE
            outcome = replace(
                outcome,
                state="expired" if is_late else "cancelled",
                reason=f"its deadline of {assign.submit.deadline_s} s passed while it ran"
                if is_late
                else run.stopped_for,
            )
        outcome = replace(
            outcome, node=self._me, attempt=assign.attempt, epoch=assign.epoch, queue_s=assign.queue_s
        )
        ended = AttemptEnded(task=assign.task, attempt=assign.attempt, epoch=assign.epoch, outcome=outcome)
        del self._running[assign.task]
        if self._paused == assign.task:
            self._paused = None
        self._remember(AttemptId(task=assign.task, attempt=assign.attempt, epoch=assign.epoch), None)
        effects = self._store.end(ended)
        due = _Ended(now, self._config.end_every_s)
        self._repeat[assign.task, assign.attempt] = due
        if self._coordinator is not None:
            effects += self._tell((assign.task, assign.attempt), due, self._coordinator, now)
        return [*effects, *self._carry_on()]

    def _remember(self, attempt: AttemptId, answer: Refused | None) -> None:
        self._over[attempt] = answer
        while len(self._over) > self._config.over_max:
            self._over.popitem(last=False)


_DEADLINE = "deadline"


def _is_answer(ended: AttemptEnded) -> bool:
    """Whether this outcome settles the task, so that no other attempt is needed."""
    outcome = ended.outcome
    return not outcome.retry and (outcome.state != "cancelled" or outcome.reason == CANCELLED_BY_CLIENT)
