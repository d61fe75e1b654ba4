"""The coordinator's core: takes submissions, keeps the promise made by acknowledging one, ends each once.

    following ──Elected──▶ recovering ──all inventories, or 1 s──▶ active
        ▲                      │                                     │
        └──────────────────── Deposed ◀──────────────────────────────┘

*following*: hears what clients say and keeps it for seconds. *recovering*: rebuilds the ledger from every
node's store. *active*: the rules below. Whatever is known here was read from disks or can be had again,
so stopping at any moment loses nothing that was acknowledged.

The safety argument, per task:

1. It is acknowledged after ``Held`` (a second disk) and ``Save`` (this disk), in this order, so an
   unacknowledged submission is on no deposed coordinator's disk and cannot come back doubled.
2. It is assigned only when acknowledged, and settled only by ``_settle``, once (``Task.move``).
3. The result is published when two disks have the outcome: this one and the worker's or a holder's.
4. The worker keeps the outcome until a second disk has the settled record (``OutcomeTaken``).
5. Workers and holders refuse an older epoch (``mesh.fence``), so whoever acts for an epoch that is over
   gets no ``Held`` and acknowledges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random

from coordinator.admission import AdmissionConfig, Reject, admit
from coordinator.attempts import Attempts, AttemptsConfig, own_outcome
from coordinator.cluster import Cluster
from coordinator.copies import Copies, CopiesConfig
from coordinator.ledger import Ledger
from coordinator.placement import Policy, least_loaded
from coordinator.publish import acknowledge, announce, conclude, event, refuse, repeat
from coordinator.recovery import Recalls
from coordinator.store import RecordStore, Tombstone
from coordinator.submissions import Said, SubmissionBuffer, unknown_to
from coordinator.task import Task, digest_of, outcome_rank, record_of, status_of, task_from
from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Send
from mesh.facts import Deposed, Elected, LinkUp, MemberChanged
from mesh.fence import Fence
from mesh.ids import EPOCH_ZERO, Epoch, NodeId, TaskId, new_task_id
from mesh.messages import (
    AttemptEnded,
    AttemptId,
    AttemptsRunning,
    CancelAttempt,
    CancelTask,
    Held,
    Hold,
    Inventory,
    NodeForgotten,
    NodeInfo,
    NodeReport,
    NodeState,
    Outcome,
    OutcomeTaken,
    Refused,
    Submit,
    TaskForgotten,
    TaskRecord,
    TaskState,
    TaskStatus,
    Unacceptable,
)

__all__ = ["Mode", "Scheduler", "SchedulerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    recall_timeout_s: float = 1.0
    """How long a new coordinator waits for silent nodes before it acts on what it knows."""
    status_keep_s: float = 120.0
    """How long a task's retained topics outlive it."""
    settled_keep_s: float = 600.0
    settled_max: int = 4096
    """As in ``StoreConfig``: the ledger remembers what the store does."""
    published_within_s: float = 30.0
    """A settled record older than this when it is recovered was published by an earlier coordinator."""
    refused_max: int = 1024
    """Retained refusals not yet cleared; the oldest are cleared early."""
    republish_max: int = 2000
    """Retained topics sent again at once when the link comes back."""
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    attempts: AttemptsConfig = field(default_factory=AttemptsConfig)
    copies: CopiesConfig = field(default_factory=CopiesConfig)


# Workers repeat what they say once a second; a recovery lasts one. Inventories are not counted: each node
# sends what its own store can hold.
_HEARD_MAX = 4096

_REPLIES_MAX = 4  # a client that reconnects under a new reply topic more often than this within one task


class Mode(Enum):
    FOLLOWING = "following"
    RECOVERING = "recovering"
    ACTIVE = "active"


class Scheduler:
    """One per node; acts while this node coordinates."""

    def __init__(
        self,
        *,
        me: NodeId,
        fence: Fence,
        store: RecordStore,
        rng: Random,
        config: SchedulerConfig | None = None,
        policy: Policy = least_loaded,
    ) -> None:
        self._me = me
        self._fence = fence
        self._store = store
        self._rng = rng
        self._config = config or SchedulerConfig()
        self._policy = policy
        self._cluster = Cluster(me)
        self._copies = Copies(self._cluster, self._config.copies)
        self._buffer = SubmissionBuffer()
        self._mode = Mode.FOLLOWING
        self._start_over(EPOCH_ZERO)

    # ── what others may read ────────────────────────────────────────────────────────────────────────

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def epoch(self) -> Epoch:
        """Of this node's own coordination; zero while it follows."""
        return self._epoch

    @property
    def cluster(self) -> Cluster:
        return self._cluster

    @property
    def counts(self) -> dict[TaskState, int]:
        """How many tasks the ledger has in each state; empty while following."""
        return {state: n for state, n in sorted(self._ledger.counts.items()) if n}

    def statuses(self, now: float) -> list[TaskStatus]:
        """Every task of the ledger as clients see it, in order of acceptance."""
        tasks = sorted(self._ledger, key=lambda task: (task.accepted_at, task.id))
        return [status_of(task, self._epoch, now) for task in tasks]

    @property
    def wake_at(self) -> float:
        match self._mode:
            case Mode.FOLLOWING:
                return FOREVER
            case Mode.RECOVERING:
                return min(self._recover_until, self._recalls.wake_at)
            case Mode.ACTIVE:
                refused_at = next(iter(self._refused.values()), FOREVER)
                return min(self._ledger.wake_at, self._recalls.wake_at, refused_at)

    # ── the three entrances ─────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case NodeInfo() | NodeReport() | NodeState() | NodeForgotten():
                self._cluster.see(message)
            case Submit() | Unacceptable() | CancelTask() if self._mode is not Mode.ACTIVE:
                self._buffer.keep(message, now)
                return []
            case Inventory() if self._mode is Mode.RECOVERING:
                return self._collect(message, sender, now)
            case AttemptEnded() | AttemptsRunning() if self._mode is Mode.RECOVERING:
                if len(self._heard) < _HEARD_MAX:
                    self._heard.append((sender, message))
                return []
            case _:
                pass
        if self._mode is not Mode.ACTIVE:
            return []
        return self._rest(self._act_on(message, sender, now), now)

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        match fact:
            case Elected(epoch=epoch):
                return self._begin(epoch, now)
            case Deposed():
                self._end()
                return []
            case MemberChanged():
                before = self._cluster.change(fact)
                if self._mode is Mode.FOLLOWING or fact.node == self._me:
                    return []
                return self._rest(self._member_changed(before.standing, before.incarnation, fact, now), now)
            case LinkUp() if self._mode is Mode.ACTIVE:
                return self._republish(now)
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._mode is Mode.RECOVERING:
            effects += self._recalls.tick(now)
            if now >= self._recover_until:
                effects += self._activate(now)
        elif self._mode is Mode.ACTIVE:
            effects += self._recalls.tick(now)
            for task in self._ledger.due(now):
                self._touched[task.id] = None
                effects += self._attend(task, now)
            while self._refused and next(iter(self._refused.values())) <= now:
                effects.append(self._clear_refusal(next(iter(self._refused))))
        return self._rest(effects, now)

    # ── who coordinates ─────────────────────────────────────────────────────────────────────────────

    def _start_over(self, epoch: Epoch) -> None:
        """An empty ledger for ``epoch``: what was in it is on disks."""
        self._epoch = epoch
        self._ledger = Ledger()
        self._recalls = Recalls(epoch)
        self._recover_until = FOREVER
        self._heard: list[tuple[NodeId, Inventory | AttemptEnded | AttemptsRunning]] = []
        self._touched: dict[TaskId, None] = {}
        self._refused: dict[TaskId, float] = {}
        self._attempts = Attempts(
            epoch=epoch,
            ledger=self._ledger,
            cluster=self._cluster,
            policy=self._policy,
            settle=self._settle,
            config=self._config.attempts,
        )

    def _begin(self, epoch: Epoch, now: float) -> list[Effect]:
        self._end()
        self._start_over(epoch)
        self._mode = Mode.RECOVERING
        self._recover_until = now + self._config.recall_timeout_s
        effects = [*self._fence.raise_to(epoch), *self._recalls.ask(self._cluster.others, now)]
        return effects + (self._activate(now) if self._recalls.is_complete else [])

    def _end(self) -> None:
        """Stop at once. What was never acknowledged is kept like any other node keeps it."""
        for task in sorted(self._ledger, key=lambda task: task.accepted_at):
            if not task.is_acknowledged and task.is_open:
                self._buffer.keep(task.submit, task.accepted_at)
        self._mode = Mode.FOLLOWING
        self._start_over(EPOCH_ZERO)

    def _collect(self, inventory: Inventory, sender: NodeId, now: float) -> list[Effect]:
        self._heard.append((sender, inventory))
        self._recalls.answered(sender, inventory)
        return self._activate(now) if self._recalls.is_complete else []

    def _activate(self, now: float) -> list[Effect]:
        """All that answered have: build the ledger, records first, then what workers say of them."""
        self._mode = Mode.ACTIVE
        self._recover_until = FOREVER
        heard, self._heard = self._heard, []
        effects: list[Effect] = []
        for record in self._store.records(now):
            effects += self._merge(record, self._me, now)
        for sender, message in heard:
            if isinstance(message, Inventory):
                for record in message.records:
                    effects += self._merge(record, sender, now)
        for sender, message in heard:
            match message:
                case Inventory(ended=ended):
                    for one in ended:
                        effects += self._attempt_ended(one, sender, now)
                case AttemptEnded():
                    effects += self._attempt_ended(message, sender, now)
                case _:
                    pass
        for sender, message in heard:
            if isinstance(message, Inventory | AttemptsRunning):
                running = message.running if isinstance(message, Inventory) else message.attempts
                for attempt in running:
                    effects += self._attempt_running(attempt, sender, now)
        for task in list(self._ledger):
            if task.is_open:
                effects += announce(task, self._epoch, now)
        effects.append(
            event(f"{self._me} coordinates under epoch {self._epoch}: {self._ledger.n_open} tasks open")
        )
        self._copies.came(self._ledger, now)
        for at, said in unknown_to(self._ledger, self._buffer.take(now)):
            effects += self._hear(said, at, now)
        return self._rest(effects, now)

    def _member_changed(
        self, standing: str, incarnation: int, fact: MemberChanged, now: float
    ) -> list[Effect]:
        effects: list[Effect] = []
        if fact.standing in ("dead", "left"):
            self._recalls.forget(fact.node)
            if self._mode is Mode.RECOVERING:
                return self._activate(now) if self._recalls.is_complete else []
            self._copies.gone(fact.node, self._ledger, now)
            for task in self._ledger.on_node(fact.node):
                self._touched[task.id] = None
                effects += self._attempts.lost(task, f"{fact.node} is {fact.standing}", now)
            if self._copies.is_alone:
                for task in list(self._ledger):
                    effects += self._now_safe(task, now)
        elif fact.standing == "alive" and (standing != "alive" or fact.incarnation > incarnation):
            effects += self._recalls.ask([fact.node], now)
            if self._mode is Mode.ACTIVE:
                self._copies.came(self._ledger, now)
                if fact.incarnation > incarnation >= 0:
                    for task in self._ledger.on_node(fact.node):
                        self._touched[task.id] = None
                        effects += self._attempts.again(task, f"{fact.node} started anew", now)
        return effects

    def _republish(self, now: float) -> list[Effect]:
        """A new broker knows nothing: everything retained goes out again, open tasks first."""
        tasks = sorted(self._ledger, key=lambda task: (not task.is_open, -task.accepted_at, task.id))
        effects: list[Effect] = []
        for task in tasks[: self._config.republish_max]:
            if task.is_open and task.is_acknowledged:
                effects += announce(task, self._epoch, now)
            elif task.is_published and task.forget_at != FOREVER:
                effects += conclude(task, self._epoch, now)[:2]
        return effects

    # ── active: messages ────────────────────────────────────────────────────────────────────────────

    def _act_on(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case Submit() | Unacceptable() | CancelTask():
                return self._hear(message, now, now)
            case Held(epoch=epoch, task=task_id) if epoch == self._epoch:
                return self._held(task_id, message.settled, sender, now)
            case Inventory(epoch=epoch) if epoch == self._epoch:
                self._recalls.answered(sender, message)
                return self._take_inventory(message, sender, now)
            case AttemptsRunning(attempts=attempts):
                effects: list[Effect] = []
                for attempt in attempts:
                    effects += self._attempt_running(attempt, sender, now)
                return effects
            case Refused(attempt=attempt):
                self._touched[attempt.task] = None
                return self._attempts.refused(sender, attempt, now)
            case AttemptEnded():
                return self._attempt_ended(message, sender, now)
            case TaskStatus(task=task_id) if message.is_final and message.epoch < self._epoch:
                # Retained by a coordinator before this one, and perhaps nobody is left to clear it.
                return [] if self._is_known(task_id) else self._note_refusal(task_id, now)
            case _:
                return []

    def _hear(self, said: Said, at: float, now: float) -> list[Effect]:
        """What a client said ``at`` that time, now or while nobody coordinated."""
        match said:
            case Submit():
                return self._submit(said, at, now)
            case Unacceptable():
                is_taken = said.id is not None and self._is_known(said.id)
                return self._refuse(
                    said, said.id or new_task_id(self._rng), said.reason, now, on_topic=not is_taken
                )
            case CancelTask():
                task = self._ledger.get(said.task)
                if task is None or not task.is_open:
                    return []
                self._touched[task.id] = None
                return self._attempts.cancel(task, now)

    def _submit(self, submit: Submit, at: float, now: float) -> list[Effect]:
        digest = digest_of(submit)
        task_id = submit.id or new_task_id(self._rng)
        known = self._ledger.get(task_id)
        if known is not None:
            if known.digest != digest:
                return self._refuse_other_body(submit, task_id, now)
            return self._submitted_again(known, submit, now)
        tombstone = self._store.tombstone(task_id)
        if tombstone is not None:
            if tombstone.digest != digest:
                return self._refuse_other_body(submit, task_id, now)
            reason = (
                f"this task ended before ({tombstone.state}); its answer is no longer kept. Use another id"
            )
            return refuse(submit, task_id, reason, self._epoch, on_topic=False)
        verdict = admit(submit, self._cluster, self._ledger.n_open, self._config.admission)
        if isinstance(verdict, Reject):
            return self._refuse(submit, task_id, verdict.reason, now, on_topic=True)
        if not self._store.has_room:
            return self._refuse(
                submit, task_id, "this node's task store is full; try again later", now, on_topic=True
            )
        task = Task(
            id=task_id,
            submit=submit,
            digest=digest,
            accepted_at=at,
            deadline_at=FOREVER if submit.deadline_s is None else at + submit.deadline_s,
            hold_at=now,
        )
        if submit.reply_to is not None:
            task.replies.append((submit.reply_to, submit.correlation))
        self._refused.pop(task_id, None)
        self._ledger.add(task)
        self._touched[task_id] = None
        if task.deadline_at <= now:
            return self._expire(task, now)
        return (
            self._acknowledge(task, now)
            if self._copies.is_alone
            else self._copies.attend(task, self._epoch, now)
        )

    def _is_known(self, task: TaskId) -> bool:
        return self._ledger.get(task) is not None or self._store.tombstone(task) is not None

    def _submitted_again(self, task: Task, submit: Submit, now: float) -> list[Effect]:
        """The same body under the same id is the same task, however often it arrives."""
        wanted = (submit.reply_to, submit.correlation)
        if submit.reply_to is not None and wanted not in task.replies and len(task.replies) < _REPLIES_MAX:
            task.replies.append((submit.reply_to, submit.correlation))
        if not (task.is_published or (task.is_open and task.is_acknowledged)):
            return []  # the first answer is on its way
        if task.is_published:
            task.forget_at = now + self._config.status_keep_s
            self._touched[task.id] = None
        return repeat(task, submit, self._epoch, now)

    def _refuse_other_body(self, submit: Submit, task: TaskId, now: float) -> list[Effect]:
        reason = f"id {task} is taken by a task with another body; use another id"
        return self._refuse(submit, task, reason, now, on_topic=False)

    def _refuse(
        self, said: Submit | Unacceptable, task: TaskId, reason: str, now: float, *, on_topic: bool
    ) -> list[Effect]:
        effects = refuse(said, task, reason, self._epoch, on_topic=on_topic)
        if on_topic:
            effects += self._note_refusal(task, now)
        return effects

    def _held(self, task_id: TaskId, settled: bool, sender: NodeId, now: float) -> list[Effect]:
        task = self._ledger.get(task_id)
        if task is None or settled != (not task.is_open):
            return []  # the other version: its inventory, or the next Hold, brings both to one
        self._touched[task_id] = None
        self._copies.held(task, sender)
        return self._now_safe(task, now)

    def _now_safe(self, task: Task, now: float) -> list[Effect]:
        """What waited for the second disk may go out."""
        self._touched[task.id] = None
        if not task.is_open:
            return self._conclude(task, now)
        return [] if task.is_acknowledged else self._acknowledge(task, now)

    def _acknowledge(self, task: Task, now: float) -> list[Effect]:
        with self._ledger.changing(task):
            task.is_acknowledged = True
        saved = self._store.put(record_of(task, self._epoch, now), now)
        return [*saved, *acknowledge(task, self._epoch, now)]

    def _take_inventory(self, inventory: Inventory, sender: NodeId, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for record in inventory.records:
            effects += self._merge(record, sender, now)
        for ended in inventory.ended:
            effects += self._attempt_ended(ended, sender, now)
        for attempt in inventory.running:
            effects += self._attempt_running(attempt, sender, now)
        return effects

    def _attempt_running(self, attempt: AttemptId, sender: NodeId, now: float) -> list[Effect]:
        self._touched[attempt.task] = None
        return self._attempts.running(sender, attempt, now)

    def _attempt_ended(self, ended: AttemptEnded, sender: NodeId, now: float) -> list[Effect]:
        taken = Send(sender, OutcomeTaken(epoch=self._epoch, task=ended.task, attempt=ended.attempt))
        task = self._ledger.get(ended.task)
        if task is None:
            # Settled long ago: nobody needs it. Never heard of: its record may still turn up; keep it.
            return [taken] if self._store.tombstone(ended.task) else []
        self._touched[task.id] = None
        if not task.is_open:
            task.ended_by[sender] = ended.attempt
            return self._conclude(task, now)
        verdict = self._attempts.ended(sender, ended, task, now)
        if isinstance(verdict, list):
            return [*verdict, taken]
        task.ended_by[sender] = ended.attempt
        task.is_witnessed = sender != self._me
        return self._settle(task, verdict, now)

    # ── one record, two histories ───────────────────────────────────────────────────────────────────

    def _merge(self, record: TaskRecord, sender: NodeId, now: float) -> list[Effect]:
        """Take in what a node has on disk about a task. Order and repetition of merges change nothing."""
        task = self._ledger.get(record.task)
        tombstone = self._store.tombstone(record.task) if task is None else None
        if tombstone is not None:
            return [] if record.outcome or sender == self._me else self._tell_ended(record, tombstone, sender)
        if task is None:
            return self._adopt(record, sender, now)
        self._touched[task.id] = None
        if record.outcome is None:
            if sender != self._me:
                task.copies.setdefault(sender, task.is_open)
            if task.is_open:
                return self._now_safe(task, now)
            task.hold_at = now
            return []
        if task.outcome is None:
            task.is_witnessed = True
            return self._settle(task, record.outcome, now, copy_on=sender)
        theirs, ours = outcome_rank(record.outcome), outcome_rank(task.outcome)
        if theirs < ours:
            with self._ledger.changing(task):
                task.resettle(record.outcome)
            told = event(f"settled twice while the mesh was split; {record.outcome.state} counts", task.id)
            effects = [*self._store.put(record_of(task, self._epoch, now), now), told]
            task.is_published = False
        else:
            effects = []
        if sender != self._me:
            task.copies[sender] = theirs <= ours
        task.hold_at = now
        return [*effects, *self._conclude(task, now)]

    def _adopt(self, record: TaskRecord, sender: NodeId, now: float) -> list[Effect]:
        """A task this coordinator did not know: carry it on from where the record stands."""
        task = task_from(record, now)
        if sender != self._me:
            task.copies[sender] = True
        self._ledger.add(task)
        self._touched[task.id] = None
        if task.is_open:
            saved = [] if sender == self._me else self._store.put(record, now)
            return [*saved, *announce(task, self._epoch, now)]
        if record.settled_s > self._config.published_within_s:
            task.is_published = True
            task.forget_at = now + max(0.0, self._config.status_keep_s - record.settled_s)
            return []
        task.is_witnessed = sender != self._me
        saved = [] if sender == self._me else self._store.put(record, now)
        return [*saved, *self._conclude(task, now)]

    def _tell_ended(self, record: TaskRecord, tombstone: Tombstone, sender: NodeId) -> list[Effect]:
        """A node was away while the task ended: all that is left to tell it is that it did."""
        outcome = Outcome(
            state=tombstone.state,
            text="",
            finish_reason=None,
            reason="ended while this node was away; the answer is no longer kept",
            node=None,
            attempt=tombstone.attempt,
            epoch=tombstone.epoch,
        )
        return [
            Send(sender, Hold(epoch=self._epoch, record=replace(record, outcome=outcome, epoch=self._epoch)))
        ]

    # ── the end of a task ───────────────────────────────────────────────────────────────────────────

    def _settle(
        self, task: Task, outcome: Outcome, now: float, copy_on: NodeId | None = None
    ) -> list[Effect]:
        """The only way a task gets its outcome. ``copy_on`` has this very outcome on disk."""
        runner = task.node
        with self._ledger.changing(task):
            task.settle(replace(outcome, retry=False), now)
        self._touched[task.id] = None
        task.hold_at = now
        if copy_on is not None and copy_on != self._me:
            task.copies[copy_on] = True
        effects = self._store.put(record_of(task, self._epoch, now), now)
        if runner is not None and runner not in task.ended_by:
            effects.append(
                Send(runner, CancelAttempt(epoch=self._epoch, task=task.id, reason=f"task {task.state}"))
            )
        effects += self._conclude(task, now)
        while self._ledger.n_settled > self._config.settled_max:
            oldest = self._ledger.oldest_settled
            if oldest is None or not oldest.is_published:
                break  # its second disk is a second away
            effects += self._drop(oldest)
        return effects

    def _conclude(self, task: Task, now: float) -> list[Effect]:
        """Publish, and let workers forget, as soon as enough disks have the outcome."""
        effects: list[Effect] = []
        is_safe = self._copies.is_safe(task)
        if not task.is_published and (is_safe or task.is_witnessed):
            task.is_published = task.is_acknowledged = True
            task.forget_at = now + self._config.status_keep_s
            effects += conclude(task, self._epoch, now)
        if is_safe:
            for node, attempt in sorted(task.ended_by.items()):
                effects.append(Send(node, OutcomeTaken(epoch=self._epoch, task=task.id, attempt=attempt)))
            task.ended_by.clear()
        return effects

    def _expire(self, task: Task, now: float) -> list[Effect]:
        where = f"while it ran on {task.node}" if task.node else "before it could start"
        reason = f"its deadline of {task.submit.deadline_s:g} s passed {where}"
        return self._settle(task, own_outcome(task, "expired", reason, self._epoch, now), now)

    def _drop(self, task: Task) -> list[Effect]:
        """Out of the ledger; the store keeps the record or its tombstone."""
        effects: list[Effect] = [] if task.forget_at == FOREVER else [Broadcast(TaskForgotten(task=task.id))]
        self._ledger.drop(task)
        return [*effects, *self._store.bury(task.id)]

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    def _attend(self, task: Task, now: float) -> list[Effect]:
        """Everything time alone makes due for one task."""
        effects: list[Effect] = []
        if task.is_open and task.deadline_at <= now:
            effects += self._expire(task, now)
        elif task.is_open:
            effects += self._attempts.attend(task, now)
        effects += self._copies.attend(task, self._epoch, now)
        if task.forget_at <= now:
            task.forget_at = FOREVER
            effects.append(Broadcast(TaskForgotten(task=task.id)))
        if not task.is_open and task.settled_at + self._config.settled_keep_s <= now:
            effects += self._drop(task)
        return effects

    def _due_at(self, task: Task, now: float) -> float:
        if task.is_open:
            return min(task.deadline_at, task.hold_at, self._attempts.due_at(task, now))
        return min(task.hold_at, task.forget_at, task.settled_at + self._config.settled_keep_s)

    def _rest(self, effects: list[Effect], now: float) -> list[Effect]:
        """After every input: start what can start, and put what changed back on the agenda."""
        if self._mode is Mode.ACTIVE:
            effects += self._attempts.place(now, self._touched)
        while self._touched:
            task_id, _ = self._touched.popitem()
            task = self._ledger.get(task_id)
            if task is not None:
                self._ledger.arm(task, self._due_at(task, now))
        return effects

    # ── refusals on retained topics ─────────────────────────────────────────────────────────────────

    def _note_refusal(self, task: TaskId, now: float) -> list[Effect]:
        self._refused.pop(task, None)
        self._refused[task] = now + self._config.status_keep_s
        if len(self._refused) > self._config.refused_max:
            return [self._clear_refusal(next(iter(self._refused)))]
        return []

    def _clear_refusal(self, task: TaskId) -> Effect:
        del self._refused[task]
        return Broadcast(TaskForgotten(task=task))
