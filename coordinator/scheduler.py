"""The coordinator's core: takes submissions, keeps the promise made by acknowledging one, ends each once.

    following ──Elected──▶ recovering ──all inventories, or 1 s──▶ active
        ▲                      │                                     │
        └──────────────────────┴──────────── Deposed ◀───────────────┘

*following*: hears what clients say and keeps it for seconds. *recovering*: rebuilds the ledger from every
node's store. *active*: the rules below. Whatever is known here was read from disks or can be had again,
so stopping at any moment loses nothing that was acknowledged.

The safety argument, per task:

1. It is acknowledged after ``Held`` (a second disk) and ``Save`` (this disk), in this order, so an
   unacknowledged submission is on no deposed coordinator's disk and cannot come back doubled.
2. It is assigned only when acknowledged, and settled only by ``Settlement.settle``, once (``Task.move``).
3. The result is published when two disks have the outcome: this one and the worker's or a holder's.
4. The worker keeps the outcome until a second disk has the settled record (``OutcomeTaken``).
5. Workers and holders refuse an older epoch (``mesh.agreement.fence``), so whoever acts for one that is
   over gets no ``Held`` and acknowledges nothing.

The parts: ``intake`` (clients), ``attempts`` (workers), ``copies`` and ``settlement`` (disks), ``recovery``
(elections), ``groundwork`` (feature maps of one node for another), ``rounds`` (jobs of several nodes), all on
one ``Term``. This file routes, and decides when.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from coordinator.admission import AdmissionConfig
from coordinator.ahead import AheadConfig
from coordinator.attempts import Attempts, AttemptsConfig
from coordinator.cluster import Cluster, Node
from coordinator.copies import Copies, CopiesConfig
from coordinator.explanations import Explanations
from coordinator.groundwork import Groundwork
from coordinator.intake import Intake
from coordinator.locality import Claims, Locality, nobody_claims
from coordinator.placing import Placing
from coordinator.policy.cost import CostModel, PredictionError
from coordinator.policy.decisions import Why
from coordinator.policy.dispatch import DispatchConfig
from coordinator.policy.policies import DEFAULT_POLICY, POLICIES, Policy
from coordinator.publish import announce, conclude, event
from coordinator.recovery import Recalls
from coordinator.rounds import Rounds
from coordinator.settlement import Settlement, SettlementConfig
from coordinator.store import RecordStore
from coordinator.submissions import SubmissionBuffer, unknown_to
from coordinator.task import Task, status_of
from coordinator.term import Term
from mesh.agreement.fence import Fence
from mesh.core import FOREVER, Effect, Fact, Message, Send
from mesh.facts import Deposed, Elected, LinkUp, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId, TaskId
from mesh.messages import (
    AttemptEnded,
    AttemptsRunning,
    CancelTask,
    FeaturesWanted,
    Held,
    Inventory,
    NodeForgotten,
    NodeInfo,
    NodeReport,
    NodeState,
    OutcomeTaken,
    Refused,
    Submit,
    TaskKind,
    TaskState,
    TaskStatus,
    Unacceptable,
)

__all__ = ["Mode", "Scheduler", "SchedulerConfig"]

# Workers repeat what they say once a second; a recovery lasts one. Inventories are not counted: each node
# sends what its own store can hold.
_HEARD_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    recall_timeout_s: float = 1.0
    """How long a new coordinator waits for silent nodes before it acts on what it knows."""
    straggler_s: float = 3.0
    """How long recovered tasks are neither started nor expired while a node that is alive has not told what
    it knows of them: it may be the one that has their end on disk. New tasks do not wait."""
    republish_max: int = 2000
    """Tasks whose retained topics are sent again at once when the link comes back."""
    reply_again_s: float = 15.0
    """A reply sent so shortly before the link came back may have been lost with the old one."""
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    attempts: AttemptsConfig = field(default_factory=AttemptsConfig)
    copies: CopiesConfig = field(default_factory=CopiesConfig)
    settlement: SettlementConfig = field(default_factory=SettlementConfig)
    ahead: AheadConfig = field(default_factory=AheadConfig)


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
        policy: Policy = POLICIES[DEFAULT_POLICY],
        claims: Claims = nobody_claims,
    ) -> None:
        """``claims``: which node says that it has a block of feature maps."""
        self._me = me
        self._fence = fence
        self._store = store
        self._rng = rng
        self._config = config or SchedulerConfig()
        self._policy = policy
        self._cost = CostModel()
        self._locality = Locality(claims)
        self.explanations = Explanations()
        """Why tasks were placed as they were; empty while following."""
        self._cluster = Cluster(me)
        self._copies = Copies(self._cluster, self._config.copies)
        self._buffer = SubmissionBuffer()
        self._mode = Mode.FOLLOWING
        self._recover_until = FOREVER
        self._stragglers_until = FOREVER
        self._start_over(EPOCH_ZERO)

    # ── what others may read ────────────────────────────────────────────────────────────────────────

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def epoch(self) -> Epoch:
        """Of this node's own coordination; zero while it follows."""
        return self._term.epoch

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
        return [status_of(task, self.epoch, now) for task in tasks]

    def waiting(self) -> Iterator[Task]:
        """Tasks that no node runs yet, in order of arrival: to be read only."""
        return self._ledger.waiting()

    def task(self, task: TaskId) -> Task | None:
        """As the ledger has it: to be read only."""
        return self._ledger.get(task)

    def outlook(self, task: TaskId, now: float) -> Why | None:
        """What the next decision about a waiting task would be made from."""
        return self._placing.outlook(task, now)

    def cost_errors(self) -> dict[TaskKind, PredictionError]:
        """How far estimates were off, by kind; empty while following."""
        return {} if self._mode is Mode.FOLLOWING else self._cost.errors()

    @property
    def wake_at(self) -> float:
        match self._mode:
            case Mode.FOLLOWING:
                return FOREVER
            case Mode.RECOVERING:
                return min(self._recover_until, self._recalls.wake_at)
            case Mode.ACTIVE:
                times = (self._ledger.wake_at, self._recalls.wake_at, self._intake.wake_at)
                return min(*times, self._stragglers_until, self._placing.wake_at, self._rounds.wake_at)

    # ── the three entrances ─────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        if isinstance(message, NodeInfo | NodeReport | NodeState | NodeForgotten):
            self._cluster.see(message)
        self._stop_if_fenced()
        match self._mode:
            case Mode.FOLLOWING:
                self._keep(message, now)
                return []
            case Mode.RECOVERING:
                self._keep(message, now)
                return self._while_recovering(message, sender, now)
            case Mode.ACTIVE:
                return self._rest(self._while_active(message, sender, now), now)

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
                return self._rest(self._member_changed(before, fact, now), now)
            case LinkUp() if self._mode is Mode.ACTIVE:
                return self._republish(now)
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        self._stop_if_fenced()
        effects = self._recalls.tick(now)
        if self._mode is Mode.RECOVERING and now >= self._recover_until:
            effects += self._activate(now)
        if self._mode is Mode.ACTIVE:
            if self._stragglers_until <= now:
                self._stragglers_until = FOREVER
            for task in self._ledger.due(now):
                effects += self._attend(task, now)
            effects += self._intake.tick(now)
        return self._rest(effects, now)

    # ── who coordinates ─────────────────────────────────────────────────────────────────────────────

    def _start_over(self, epoch: Epoch) -> None:
        """An empty ledger for ``epoch``: what was in the last one is on disks."""
        config = self._config
        self.explanations.clear()
        self._term = Term(
            me=self._me, epoch=epoch, cluster=self._cluster, store=self._store, copies=self._copies
        )
        self._ledger = self._term.ledger
        self._recalls = Recalls(epoch)
        self._recover_until = FOREVER
        self._stragglers_until = FOREVER
        self._heard: list[tuple[NodeId, Inventory | AttemptEnded | AttemptsRunning]] = []
        self._settlement = Settlement(self._term, config.settlement)
        self._placing = Placing(
            ledger=self._ledger,
            cluster=self._cluster,
            policy=self._policy,
            cost=self._cost,
            explanations=self.explanations,
            config=config.dispatch,
            locality=self._locality,
        )
        self._attempts = Attempts(
            term=self._term,
            placing=self._placing,
            explanations=self.explanations,
            settle=self._settlement.settle,
            config=config.attempts,
        )
        self._intake = Intake(
            term=self._term,
            rng=self._rng,
            attempts=self._attempts,
            placing=self._placing,
            settlement=self._settlement,
            admission=config.admission,
            status_keep_s=config.settlement.status_keep_s,
        )
        self._groundwork = Groundwork(
            term=self._term,
            intake=self._intake,
            attempts=self._attempts,
            admission=config.admission,
            config=config.ahead,
        )
        self._rounds = Rounds(
            term=self._term,
            intake=self._intake,
            attempts=self._attempts,
            settle=self._settlement.settle,
        )

    def _begin(self, epoch: Epoch, now: float) -> list[Effect]:
        self._end()
        self._start_over(epoch)
        self._mode = Mode.RECOVERING
        self._recover_until = now + self._config.recall_timeout_s
        effects = [*self._fence.raise_to(epoch), *self._recalls.ask(self._cluster.holders, now)]
        return effects + (self._activate(now) if self._recalls.is_complete else [])

    def _end(self) -> None:
        """Stop at once. What was never acknowledged is kept as every other node keeps it."""
        for task in sorted(self._ledger, key=lambda task: task.accepted_at):
            if not task.is_acknowledged and task.is_open:
                self._buffer.keep(task.submit, task.accepted_at)
        self._mode = Mode.FOLLOWING
        self._start_over(EPOCH_ZERO)

    def _stop_if_fenced(self) -> None:
        """This node has obeyed a newer coordinator; its own election will say so in a moment."""
        if self._mode is not Mode.FOLLOWING and not self._fence.admits(self.epoch):
            self._end()

    def _keep(self, message: Message, now: float) -> None:
        if isinstance(message, Submit | CancelTask | Unacceptable):
            self._buffer.keep(message, now)

    def _while_recovering(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case Inventory(epoch=epoch) if epoch == self.epoch:
                self._heard.append((sender, message))
                self._recalls.answered(sender, message)
                return self._activate(now) if self._recalls.is_complete else []
            case AttemptEnded() | AttemptsRunning() if len(self._heard) < _HEARD_MAX:
                self._heard.append((sender, message))
                return []
            case _:
                return []

    def _activate(self, now: float) -> list[Effect]:
        """All that would answer have: build the ledger, records first, then what workers say of them."""
        self._mode = Mode.ACTIVE
        self._recover_until = FOREVER
        if not self._recalls.is_complete:
            self._stragglers_until = self._attempts.stragglers_until = now + self._config.straggler_s
        heard, self._heard = self._heard, []
        own = Inventory(
            epoch=self.epoch,
            records=self._store.records(now),
            running=list(self._store.running.values()),
            ended=list(self._store.ended.values()),
            is_last=True,
        )
        heard.insert(0, (self._me, own))
        effects: list[Effect] = []
        for sender, message in heard:
            if isinstance(message, Inventory):
                for record in message.records:
                    effects += self._settlement.merge(record, sender, now)
        for sender, message in heard:
            if not isinstance(message, AttemptsRunning):
                for ended in message.ended if isinstance(message, Inventory) else [message]:
                    effects += self._attempt_ended(ended, sender, now)
        for sender, message in heard:
            if not isinstance(message, AttemptEnded):
                for attempt in message.running if isinstance(message, Inventory) else message.attempts:
                    effects += self._attempts.running(sender, attempt, now)
        for task in self._ledger:
            self._groundwork.found(task)
            if task.state == "queued":
                effects += announce(task, self.epoch, now)
        carried_on = f"{self._ledger.n_open} open tasks carried on"
        effects.append(event(f"{self._me} coordinates under epoch {self.epoch}; {carried_on}"))
        self._copies.came(self._ledger, now)
        for at, said in unknown_to(self._ledger, self._buffer.take(now)):
            effects += self._intake.hear(said, at, now)
        return self._rest(effects, now)

    def _member_changed(self, before: Node, fact: MemberChanged, now: float) -> list[Effect]:
        if fact.standing in ("dead", "left"):
            self._recalls.forget(fact.node)
            if self._mode is Mode.RECOVERING:
                return self._activate(now) if self._recalls.is_complete else []
            return self._member_gone(fact, now)
        is_new_life = fact.incarnation > before.incarnation
        if fact.standing != "alive" or (before.standing == "alive" and not is_new_life):
            return []
        effects = self._recalls.ask([fact.node], now)
        if self._mode is Mode.ACTIVE:
            self._copies.came(self._ledger, now)
            if is_new_life and before.incarnation >= 0:
                for task in self._ledger.on_node(fact.node):
                    effects += self._attempts.again(task, f"{fact.node} started anew", now)
        return effects

    def _member_gone(self, fact: MemberChanged, now: float) -> list[Effect]:
        self._copies.gone(fact.node, self._ledger, now)
        effects: list[Effect] = []
        for task in self._ledger.on_node(fact.node):
            effects += self._attempts.lost(task, f"{fact.node} is {fact.standing}", now)
        if self._copies.is_alone:
            for task in list(self._ledger):
                effects += self._settlement.now_safe(task, now)
        return effects

    def _republish(self, now: float) -> list[Effect]:
        """A new broker knows nothing: everything retained goes out again, open tasks first."""
        tasks = sorted(self._ledger, key=lambda task: (not task.is_open, -task.accepted_at, task.id))
        effects: list[Effect] = []
        for task in tasks[: self._config.republish_max]:
            if task.is_open and task.is_acknowledged:
                effects += announce(task, self.epoch, now)
            elif task.is_published and task.forget_at != FOREVER:
                is_recent = now - task.settled_at <= self._config.reply_again_s
                effects += conclude(task, self.epoch, now)[: None if is_recent else 2]
        return effects

    # ── active ──────────────────────────────────────────────────────────────────────────────────────

    def _while_active(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case Submit() | Unacceptable() | CancelTask():
                return self._intake.hear(message, now, now)
            case Held(epoch=epoch, task=task, settled=settled) if epoch == self.epoch:
                return self._settlement.held(task, settled, sender, now)
            case Inventory(epoch=epoch) if epoch == self.epoch:
                return self._take_inventory(message, sender, now)
            case AttemptsRunning(attempts=attempts):
                return [e for attempt in attempts for e in self._attempts.running(sender, attempt, now)]
            case Refused(attempt=attempt):
                return self._attempts.refused(sender, attempt, now)
            case FeaturesWanted():
                return self._groundwork.wanted(message, sender, now)
            case AttemptEnded():
                return self._attempt_ended(message, sender, now)
            case TaskStatus(task=task, epoch=epoch) if message.is_final and epoch < self.epoch:
                return self._intake.foreign_status(task, now)
            case _:
                return []

    def _take_inventory(self, inventory: Inventory, sender: NodeId, now: float) -> list[Effect]:
        self._recalls.answered(sender, inventory)
        effects: list[Effect] = []
        for record in inventory.records:
            is_news = self._ledger.get(record.task) is None
            effects += self._settlement.merge(record, sender, now)
            task = self._ledger.get(record.task)
            if is_news and task is not None and task.is_open:
                effects += announce(task, self.epoch, now)
        for ended in inventory.ended:
            effects += self._attempt_ended(ended, sender, now)
        for attempt in inventory.running:
            effects += self._attempts.running(sender, attempt, now)
        return effects

    def _attempt_ended(self, ended: AttemptEnded, sender: NodeId, now: float) -> list[Effect]:
        taken = Send(sender, OutcomeTaken(epoch=self.epoch, task=ended.task, attempt=ended.attempt))
        task = self._ledger.get(ended.task)
        if task is None:
            # Settled long ago: nobody needs it. Never heard of: its record may still turn up; keep it.
            return [taken] if self._store.tombstone(ended.task) else []
        if task.is_open:
            verdict = self._attempts.ended(sender, ended, task, now)
            if isinstance(verdict, list):
                return [*verdict, taken]
            return self._settlement.settle(task, verdict, now, ended_by=(sender, ended.attempt))
        task.ended_by[sender] = ended.attempt
        return self._settlement.conclude(task, now)

    def _attend(self, task: Task, now: float) -> list[Effect]:
        """Everything time alone makes due for one task."""
        effects: list[Effect] = []
        if task.is_open and self._expires_at(task) <= now:
            effects += self._settlement.expire(task, now)
        elif task.is_open:
            effects += self._attempts.attend(task, now)
        effects += self._copies.attend(task, self.epoch, now)
        return effects + self._settlement.attend(task, now)

    @property
    def _awaits_stragglers(self) -> bool:
        return self._stragglers_until != FOREVER and not self._recalls.is_complete

    def _expires_at(self, task: Task) -> float:
        if task.is_recovered and self._awaits_stragglers:
            return max(task.deadline_at, self._stragglers_until)
        return task.deadline_at

    def _rest(self, effects: list[Effect], now: float) -> list[Effect]:
        """After every input: start what can start, and put what changed back on the agenda."""
        if self._mode is Mode.ACTIVE:
            effects = [*effects, *self._groundwork.attend(now), *self._rounds.attend(now)]
            effects = [*effects, *self._attempts.place(now, with_recovered=not self._awaits_stragglers)]
        for task in self._ledger.take_touched():
            if task.is_open:
                expires_at = self._expires_at(task)
                self._ledger.arm(task, min(expires_at, task.hold_at, self._attempts.due_at(task, now)))
            else:
                self._ledger.arm(task, min(task.hold_at, self._settlement.due_at(task)))
        return effects
