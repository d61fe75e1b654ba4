"""A few nodes' task cores and a bag of messages between them: the smallest world that can go wrong.

No election and no membership: the test says who coordinates and who is there. An ``Engine`` answers
``StartAttempt`` after a service time. The bag may lose, repeat and reorder by a seeded generator.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from coordinator.copies import rendezvous
from coordinator.facts import (
    AttemptFinished,
    AttemptProgress,
    AttemptText,
    EngineReady,
    FeaturesArrived,
    StartAttempt,
    StopAttempt,
)
from coordinator.holder import Holder
from coordinator.locality import Claims, nobody_claims
from coordinator.policy.policies import DEFAULT_POLICY, POLICIES, Policy
from coordinator.scheduler import Scheduler, SchedulerConfig
from coordinator.store import RecordStore, StoreConfig
from coordinator.worker import Worker
from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.core import Broadcast, Effect, Message, Notify, Save, Send, Stack
from mesh.facts import Elected, Followed, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId, TaskId
from mesh.messages import (
    Assign,
    EpochSeen,
    NodeInfo,
    NodeReport,
    Outcome,
    Submit,
    TaskProgress,
    TaskReply,
    TaskResult,
    TaskStatus,
)

MODEL = "test/Tiny-1M"


def info(node: str, *, slots: int = 2, model: str | None = MODEL, adapters: tuple[str, ...] = ()) -> NodeInfo:
    return NodeInfo(
        node=NodeId(node),
        incarnation=1,
        hostname=node,
        version="0.1.0",
        protocol_min=1,
        protocol_max=1,
        addresses=["127.0.0.1"],
        port=1,
        system="Linux",
        device="cpu",
        n_cpus=1,
        memory_bytes=1,
        model=model,
        adapters=list(adapters),
        slots=slots,
        context_tokens=2048,
        can_pause=True,
    )


def report(node: str, *, ready: bool = True) -> NodeReport:
    return NodeReport(
        node=NodeId(node),
        incarnation=1,
        ready=ready,
        activity="idle",
        running=0,
        cpu_percent=0.0,
        memory_free_bytes=1,
        rss_bytes=1,
        tokens_per_s=0.0,
    )


def answer_of(assign: Assign, **changes: object) -> Outcome:
    outcome = Outcome(
        state="done",
        text=f"answer to {assign.submit.prompt}",
        finish_reason="stop",
        reason=None,
        node=None,
        attempt=assign.attempt,
        epoch=assign.epoch,
        n_tokens=3,
        ttft_s=0.1,
        service_s=0.5,
    )
    return replace(outcome, **changes)  # type: ignore[arg-type]


@dataclass(slots=True)
class Host:
    node: NodeId
    journal: dict[str, Message] = field(default_factory=dict)
    is_up: bool = False
    incarnation: int = 0
    stack: Stack = field(init=False)
    scheduler: Scheduler = field(init=False)
    worker: Worker = field(init=False)
    store: RecordStore = field(init=False)
    fence: Fence = field(init=False)
    running: dict[tuple[TaskId, int], Assign] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class World:
    seed: int = 0
    loss: float = 0.0
    repeat: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.001)
    service_s: float = 0.5
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    disk: StoreConfig = field(default_factory=StoreConfig)
    slots: int = 2
    policy: Policy = POLICIES[DEFAULT_POLICY]
    answer: Callable[[Assign], Outcome] = answer_of
    claims: Claims = nobody_claims

    now: float = 0.0
    hosts: dict[NodeId, Host] = field(default_factory=dict)
    said: list[tuple[float, NodeId, Message]] = field(default_factory=list)
    """Everything broadcast, with its time and publisher: what clients could hear."""
    started: list[tuple[float, NodeId, Assign]] = field(default_factory=list)
    arrived: list[tuple[NodeId, FeaturesArrived]] = field(default_factory=list)
    """What workers handed to their engines."""
    cut: set[frozenset[NodeId]] = field(default_factory=set)
    """Pairs of nodes that cannot talk."""
    term: int = 0
    coordinator: NodeId | None = None
    rng: Random = field(init=False)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _n: int = 0

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)

    # ── what a test does ────────────────────────────────────────────────────────────────────────────

    def start(self, *nodes: str) -> World:
        """Start (or start again, with their disks) nodes; all who are up see one another."""
        for name in nodes:
            host = self.hosts.setdefault(NodeId(name), Host(NodeId(name)))
            host.is_up, host.incarnation, host.running = True, host.incarnation + 1, {}
            seen = host.journal.get(FENCE_KEY)
            host.fence = Fence(seen.epoch if isinstance(seen, EpochSeen) else EPOCH_ZERO)
            host.store = RecordStore(now=self.now, journal=host.journal, config=self.disk)
            rng = Random(f"{self.seed}/{name}/{host.incarnation}")
            host.scheduler = Scheduler(
                me=host.node,
                fence=host.fence,
                store=host.store,
                rng=rng,
                config=self.config,
                policy=self.policy,
                claims=self.claims,
            )
            host.worker = Worker(me=host.node, fence=host.fence, store=host.store, now=self.now)
            host.stack = Stack(
                [host.scheduler, Holder(me=host.node, fence=host.fence, store=host.store), host.worker]
            )
        for name in nodes:
            self.learn(name, EngineReady(MODEL, 2048, self.slots, can_pause=True))
            for other in self.up:
                self._introduce(self.hosts[NodeId(name)], other)
                self._introduce(other, self.hosts[NodeId(name)])
            if self.coordinator is not None and self.coordinator != name:
                self.learn(name, Followed(Epoch(self.term, self.coordinator)))
        return self

    def kill(self, node: str) -> None:
        """As ``kill -9``: memory gone, disk kept; nobody is told."""
        self.hosts[NodeId(node)].is_up = False
        if self.coordinator == node:
            self.coordinator = None

    def bury(self, node: str, standing: str = "dead") -> None:
        """Membership declares the node dead on all others."""
        for host in self.up:
            if host.node != node:
                self.learn(
                    host.node, MemberChanged(NodeId(node), standing, self.hosts[NodeId(node)].incarnation)
                )

    def elect(self, node: str, *, told: bool = True) -> Epoch:
        self.term += 1
        self.coordinator = NodeId(node)
        epoch = Epoch(self.term, NodeId(node))
        self.learn(node, Elected(epoch))
        for host in self.up:
            if told and host.node != node:
                self.learn(host.node, Followed(epoch))
        return epoch

    def say(self, message: Message) -> None:
        """A client says it; every node hears it at once."""
        for host in self.up:
            self._feed(host, lambda h: h.stack.receive(message, NodeId("client"), self.now))

    def learn(self, node: str, fact: object) -> None:
        self._feed(self.hosts[NodeId(node)], lambda h: h.stack.learn(fact, self.now))

    def run(self, seconds: float) -> World:
        """Let the time pass, everything due in order."""
        until = self.now + seconds
        while True:
            wake_at = min((host.stack.wake_at for host in self.up), default=until)
            event_at = self._events[0][0] if self._events else until
            if min(wake_at, event_at) > until:
                break
            if event_at <= wake_at and self._events and event_at <= until:
                self.now = max(self.now, event_at)
                heapq.heappop(self._events)[2]()
            elif wake_at <= until:
                self.now = max(self.now, wake_at)
                for host in self.up:
                    if host.stack.wake_at <= self.now:
                        self._feed(host, lambda h: h.stack.tick(self.now))
            else:
                break
        self.now = until
        return self

    # ── what a test reads ───────────────────────────────────────────────────────────────────────────

    @property
    def up(self) -> list[Host]:
        return [host for _, host in sorted(self.hosts.items()) if host.is_up]

    @property
    def scheduler(self) -> Scheduler:
        assert self.coordinator is not None
        return self.hosts[self.coordinator].scheduler

    def heard(self, kind: type, task: str | None = None) -> list[Message]:
        of_kind = [message for _, _, message in self.said if isinstance(message, kind)]
        return [m for m in of_kind if task is None or getattr(m, "task", None) == task]

    def states(self, task: str) -> list[str]:
        return [status.state for status in self.heard(TaskStatus, task)]

    def results(self, task: str) -> list[TaskResult]:
        return self.heard(TaskResult, task)

    def replies(self, topic: str) -> list[TaskStatus | TaskResult]:
        return [reply.body for reply in self.heard(TaskReply) if reply.reply_to == topic]

    # ── how it works ────────────────────────────────────────────────────────────────────────────────

    def _introduce(self, newcomer: Host, seer: Host) -> None:
        for message in (info(newcomer.node, slots=self.slots), report(newcomer.node)):
            self._feed(seer, lambda h, m=message: h.stack.receive(m, newcomer.node, self.now))
        if seer is not newcomer:
            self.learn(seer.node, MemberChanged(newcomer.node, "alive", newcomer.incarnation))

    def _at(self, at: float, event: Callable[[], None]) -> None:
        self._n += 1
        heapq.heappush(self._events, (at, self._n, event))

    def _feed(self, host: Host, step: Callable[[Host], list[Effect]]) -> None:
        if not host.is_up:
            return
        if host.stack.wake_at <= self.now:
            self._carry_out(host, host.stack.tick(self.now))
        self._carry_out(host, step(host))

    def _carry_out(self, host: Host, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to=to, message=message):
                    self._post(host.node, to, message)
                case Broadcast(message=message):
                    self.said.append((self.now, host.node, message))
                case Save(key=key, record=None):
                    host.journal.pop(key, None)
                case Save(key=key, record=record):
                    host.journal[key] = record
                case Notify(fact=StartAttempt(assign=assign)):
                    self._start_attempt(host, assign)
                case Notify(fact=FeaturesArrived() as fact):
                    self.arrived.append((host.node, fact))
                case Notify(fact=StopAttempt(task=task, attempt=attempt)):
                    self._finish(host, task, attempt, is_stopped=True)
                case _:
                    pass

    def _post(self, sender: NodeId, to: NodeId, message: Message) -> None:
        if to not in self.hosts or frozenset((sender, to)) in self.cut:
            return
        n_copies = 0 if self.rng.random() < self.loss else 2 if self.rng.random() < self.repeat else 1
        incarnation = self.hosts[to].incarnation
        for _ in range(n_copies):

            def deliver() -> None:
                host = self.hosts[to]
                if host.incarnation == incarnation:
                    self._feed(host, lambda h: h.stack.receive(message, sender, self.now))

            self._at(self.now + self.rng.uniform(*self.delay_s), deliver)

    def _start_attempt(self, host: Host, assign: Assign) -> None:
        self.started.append((self.now, host.node, assign))
        host.running[assign.task, assign.attempt] = assign
        incarnation = host.incarnation

        def speak() -> None:
            if host.incarnation != incarnation or (assign.task, assign.attempt) not in host.running:
                return
            if assign.submit.kind == "tune":
                at = TaskProgress(
                    task=assign.task, attempt=assign.attempt, seq=0, phase="training", fraction=0.5
                )
                self.learn(host.node, AttemptProgress(at))
            else:
                self.learn(host.node, AttemptText(assign.task, assign.attempt, "answer ", 1))

        def finish() -> None:
            if host.incarnation == incarnation:
                self._finish(host, assign.task, assign.attempt)

        self._at(self.now + self.service_s / 2, speak)
        self._at(self.now + self.service_s, finish)

    def _finish(self, host: Host, task: TaskId, attempt: int, *, is_stopped: bool = False) -> None:
        assign = host.running.pop((task, attempt), None)
        if assign is None or not host.is_up:
            return
        outcome = (
            answer_of(assign, state="cancelled", finish_reason=None) if is_stopped else self.answer(assign)
        )
        self._at(self.now, lambda: self.learn(host.node, AttemptFinished(task, attempt, outcome)))


def ask(prompt: str = "hello", **fields: object) -> Submit:
    return Submit(prompt=prompt, **fields)  # type: ignore[arg-type]


def mesh(n: int = 3, **settings: object) -> World:
    """``n`` nodes, the first of which coordinates."""
    names = [f"n{i}" for i in range(n)]
    world = World(**settings).start(*names)  # type: ignore[arg-type]
    world.elect("n0")
    return world.run(0.1)


def held_by(holder: str, candidates: list[str], prefix: str) -> TaskId:
    """A task id whose first holder among ``candidates`` is ``holder``."""
    names = (TaskId(f"{prefix}{i}") for i in range(1000))
    return next(name for name in names if rendezvous(name, [NodeId(n) for n in candidates])[0] == holder)
