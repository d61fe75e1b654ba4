"""One immutable picture of the mesh, for a screen or a script.

``ViewBuilder`` listens to public messages and facts, ``view(now)`` takes the picture. It is pure: the
same messages at the same times give the same picture, on a node and on a client alike, so ``join``'s
screen, ``edgemesh status``, ``nodes`` and ``tasks`` never disagree.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Literal

from mesh import messages as m
from mesh.core import Fact, Message
from mesh.facts import LinkDown, LinkUp
from mesh.ids import EPOCH_ZERO, Epoch, MeshName, NodeId, TaskId
from mesh.messages.task import TERMINAL_STATES, TaskState

__all__ = ["EventRow", "Link", "NodeRow", "Standing", "TaskRow", "View", "ViewBuilder"]

Standing = Literal["online", "draining", "suspect", "offline", "left"]
Link = Literal["connecting", "up", "down"]

NODES_MAX = 1024  # what one broker and one screen can carry; 1 KiB each
TASKS_MAX = 200  # finished ones leave first; a script that needs more reads the topics itself
EVENTS_MAX = 200
TEXT_TAIL_CHARACTERS = 400  # two lines of a wide terminal

SILENCE_S = 5.0
"""A node reports every second; after this long without a report it is shown as suspect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """One node. What it has not said yet is ``None``."""

    node: NodeId
    state: Standing
    is_coordinator: bool
    is_broker: bool
    is_me: bool
    ready: bool
    activity: str | None
    hostname: str | None
    version: str | None
    system: str | None
    device: str | None
    model: str | None
    precision: str | None
    precision_reason: str | None
    adapters: tuple[str, ...]
    slots: int | None
    n_cpus: int | None
    cpu_percent: float | None
    memory_bytes: int | None
    memory_free_bytes: int | None
    rss_bytes: int | None
    temperature_c: float | None
    running: int | None
    tokens_per_s: float | None
    rates: m.NodeRates | None
    """How fast it works, by its own measure."""
    emulated_slowdown: float
    """Above 1 it plays a device that many times slower."""
    heard_s: float | None
    """Seconds since its last report."""
    addresses: tuple[str, ...]
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One task. ``budget_s``: seconds left to its deadline, negative once it has passed."""

    task: TaskId
    kind: str
    state: TaskState
    reason: str | None
    value: float
    budget_s: float | None
    node: NodeId | None
    attempt: int
    durable_on: int
    text_tail: str
    n_tokens: int
    progress: m.TaskProgress | None
    """How far a tuning task is, or was at its end."""
    age_s: float
    """Since this view first heard of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    age_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    mesh: MeshName
    fingerprint: str | None
    version: str
    me: NodeId | None
    """The node that looks; ``None`` for a client."""
    link: Link
    broker: str | None
    """Where the broker is, in words."""
    epoch: str
    coordinator: NodeId | None
    """``None`` while nobody holds the lease."""
    nodes: tuple[NodeRow, ...]
    tasks: tuple[TaskRow, ...]
    events: tuple[EventRow, ...]
    """Oldest first."""
    prediction_errors: tuple[m.KindError, ...] = ()
    """How far off the coordinator's predictions of times were lately, by kind of task."""


@dataclass(slots=True)
class _Node:
    state: m.NodeState | None = None
    info: m.NodeInfo | None = None
    report: m.NodeReport | None = None
    heard_at: float = 0.0
    """When it last reported, or when its state came first."""


@dataclass(slots=True)
class _Task:
    first_at: float
    status: m.TaskStatus | None = None
    state: TaskState = "queued"
    reason: str | None = None
    deadline_at: float | None = None
    node: NodeId | None = None
    attempt: int = 0
    seq: int = -1
    tail: str = ""
    n_tokens: int = 0
    progress: m.TaskProgress | None = None

    def see_attempt(self, attempt: int) -> None:
        """A newer attempt starts the text over."""
        if attempt > self.attempt:
            self.attempt, self.seq, self.tail, self.n_tokens = attempt, -1, "", 0


@dataclass(slots=True)
class _Lease:
    epoch: Epoch = EPOCH_ZERO
    ends_at: float = 0.0
    is_held: bool = False
    told: NodeId | None = None
    """Whom the event log named last."""


class ViewBuilder:
    """Feeds on messages; not thread-safe (one event loop owns it)."""

    def __init__(
        self, *, mesh: MeshName, version: str, fingerprint: str | None = None, me: NodeId | None = None
    ) -> None:
        self._mesh = mesh
        self._version = version
        self._fingerprint = fingerprint
        self._me = me
        self._link: Link = "connecting"
        self._broker: str | None = None
        self._broker_host: NodeId | None = None
        self._nodes: dict[NodeId, _Node] = {}
        self._tasks: OrderedDict[TaskId, _Task] = OrderedDict()
        self._lease = _Lease()
        self._costs: m.CostReport | None = None
        self._events: deque[tuple[float, str]] = deque(maxlen=EVENTS_MAX)

    # ── what happens ────────────────────────────────────────────────────────────────────────────────

    def apply(self, message: Message, sender: str, now: float) -> None:
        """Take one message from a public topic. Unknown, stale and repeated ones change nothing.

        Args:
            message: Decoded.
            sender: The node or client by whose topic it came (unused where the message names its node).
            now: Monotonic seconds.
        """
        match message:
            case m.NodeState():
                self._on_state(message, now)
            case m.NodeInfo():
                if (node := self._node(message.node)) is not None and not _is_older(message, node.info):
                    node.info = message
            case m.NodeReport():
                self._on_report(message, now)
            case m.NodeForgotten():
                self._nodes.pop(message.node, None)
            case m.LeaseRecord():
                self._on_lease(message, now)
            case m.TaskStatus():
                self._on_status(message, now)
            case m.TaskTokens():
                self._on_tokens(message, now)
            case m.TaskProgress():
                self._on_progress(message, now)
            case m.TaskResult():
                self._on_result(message, now)
            case m.TaskForgotten():
                self._tasks.pop(message.task, None)
            case m.CostReport():
                if self._costs is None or message.epoch >= self._costs.epoch:
                    self._costs = message
            case m.TaskEvent():
                self.event(message.text, now)
            case _:
                pass

    def learn(self, fact: Fact, now: float) -> None:
        """Take one fact of this process: whether the link to the broker stands."""
        match fact:
            case LinkUp(host=host):
                self._link, self._broker_host = "up", host
            case LinkDown():
                if self._link == "up":
                    self.event("link to the broker is down", now)
                self._link = "down"
            case _:
                pass

    def use_broker(self, broker: str | None, host: NodeId | None) -> None:
        """Which broker the link goes to: words for the screen, and the node that hosts it."""
        self._broker, self._broker_host = broker, host

    def event(self, text: str, now: float) -> None:
        """One line for people."""
        self._events.append((now, text))

    # ── the picture ─────────────────────────────────────────────────────────────────────────────────

    def view(self, now: float) -> View:
        """What is known at ``now``: nodes by name, tasks oldest first."""
        lease = self._lease
        coordinator = lease.epoch.node if lease.is_held and now < lease.ends_at else None
        return View(
            mesh=self._mesh,
            fingerprint=self._fingerprint,
            version=self._version,
            me=self._me,
            link=self._link,
            broker=self._broker,
            epoch=str(lease.epoch),
            coordinator=coordinator,
            nodes=tuple(self._node_row(node, coordinator, now) for node in sorted(self._nodes)),
            tasks=tuple(_task_row(task, known, now) for task, known in self._tasks.items()),
            events=tuple(EventRow(age_s=now - at, text=text) for at, text in self._events),
            prediction_errors=tuple(self._costs.errors) if self._costs else (),
        )

    def _node_row(self, node: NodeId, coordinator: NodeId | None, now: float) -> NodeRow:
        known = self._nodes[node]
        info, report = known.info, known.report
        state: Standing = known.state.state if known.state else "online"
        if state in ("online", "draining") and self._link == "up" and now - known.heard_at > SILENCE_S:
            state = "suspect"
        return NodeRow(
            node=node,
            state=state,
            is_coordinator=node == coordinator,
            is_broker=node == self._broker_host,
            is_me=node == self._me,
            ready=report is not None and report.ready,
            activity=report.activity if report else None,
            hostname=info.hostname if info else None,
            version=info.version if info else None,
            system=info.system if info else None,
            device=info.device if info else None,
            model=info.model if info else None,
            precision=_precision_of(info) if info else None,
            precision_reason=info.precision_reason if info else None,
            adapters=tuple(info.adapters) if info else (),
            slots=info.slots if info else None,
            n_cpus=info.n_cpus if info else None,
            cpu_percent=report.cpu_percent if report else None,
            memory_bytes=info.memory_bytes if info else None,
            memory_free_bytes=report.memory_free_bytes if report else None,
            rss_bytes=report.rss_bytes if report else None,
            temperature_c=report.temperature_c if report else None,
            running=report.running if report else None,
            tokens_per_s=report.tokens_per_s if report else None,
            rates=info.rates if info else None,
            emulated_slowdown=info.rates.emulated_slowdown if info and info.rates else 1.0,
            heard_s=now - known.heard_at if report else None,
            addresses=tuple(info.addresses) if info else (),
            incarnation=known.state.incarnation if known.state else report.incarnation if report else 0,
        )

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def _node(self, node: NodeId) -> _Node | None:
        """The node's entry, made if there is room."""
        if node not in self._nodes and len(self._nodes) >= NODES_MAX:
            return None
        return self._nodes.setdefault(node, _Node())

    def _on_state(self, message: m.NodeState, now: float) -> None:
        node = self._node(message.node)
        if node is None or _is_older(message, node.state):
            return
        before = node.state.state if node.state else None
        if node.state is None or message.incarnation > node.state.incarnation:
            node.heard_at = now
        node.state = message
        if message.state == "left":
            node.report = None
        if before != message.state and message.node != self._me:
            self.event(f"{message.node} {_STATE_WORDS[message.state]}", now)

    def _on_report(self, message: m.NodeReport, now: float) -> None:
        node = self._node(message.node)
        if node is not None and not _is_older(message, node.report):
            node.report, node.heard_at = message, now

    def _on_lease(self, message: m.LeaseRecord, now: float) -> None:
        lease = self._lease
        if message.epoch < lease.epoch:
            return
        if message.kind == "claim":  # asks; the lease that follows is the answer
            if message.epoch > lease.epoch:
                lease.epoch, lease.is_held = message.epoch, False
            return
        lease.epoch, lease.ends_at = message.epoch, now + message.ttl_s
        lease.is_held = message.kind == "lease"
        holder = message.node if lease.is_held else None
        if holder != lease.told:
            lease.told = holder
            self.event(
                f"{holder} coordinates (epoch {message.epoch.term})"
                if holder
                else f"{message.node} resigned",
                now,
            )

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────

    def _task(self, task: TaskId, now: float) -> _Task:
        """The task's entry, made at the cost of the oldest finished one (else the oldest)."""
        if task not in self._tasks and len(self._tasks) >= TASKS_MAX:
            finished = (name for name, known in self._tasks.items() if known.state in TERMINAL_STATES)
            del self._tasks[next(finished, next(iter(self._tasks)))]
        return self._tasks.setdefault(task, _Task(first_at=now))

    def _on_status(self, message: m.TaskStatus, now: float) -> None:
        task = self._task(message.task, now)
        if task.state in TERMINAL_STATES:  # the first end stands, whatever arrives late
            return
        if task.status is not None and message.epoch < task.status.epoch:
            return
        task.status, task.state, task.reason = message, message.state, message.reason
        task.node = message.node
        task.deadline_at = now + message.budget_s if message.budget_s is not None else None
        task.see_attempt(message.attempt)

    def _on_tokens(self, message: m.TaskTokens, now: float) -> None:
        task = self._task(message.task, now)
        if task.state in TERMINAL_STATES or message.attempt < task.attempt:
            return
        task.see_attempt(message.attempt)
        if message.seq <= task.seq:
            return
        task.seq = message.seq
        task.state = "running"
        task.n_tokens += message.n_tokens
        task.tail = (task.tail + message.text)[-TEXT_TAIL_CHARACTERS:]

    def _on_progress(self, message: m.TaskProgress, now: float) -> None:
        task = self._task(message.task, now)
        if task.state in TERMINAL_STATES or message.attempt < task.attempt:
            return
        task.see_attempt(message.attempt)
        if message.seq > task.seq:
            task.seq = message.seq
            task.state = "running"
            task.progress = message

    def _on_result(self, message: m.TaskResult, now: float) -> None:
        task = self._task(message.task, now)
        task.state, task.reason, task.node = message.state, message.reason, message.node
        task.attempt, task.n_tokens = message.attempt, message.n_tokens
        task.tail = message.text[-TEXT_TAIL_CHARACTERS:]


_STATE_WORDS: dict[str, str] = {
    "online": "is online",
    "draining": "is draining: it takes no new work",
    "offline": "is offline",
    "left": "left",
}

_OfNode = m.NodeState | m.NodeInfo | m.NodeReport


def _precision_of(info: m.NodeInfo) -> str | None:
    """Of the weights; of a node that holds the upper layers only, how many: it computes as others began."""
    return f"top {info.top_layers} layers" if info.holds == "top" else info.precision


def _is_older(message: _OfNode, known: _OfNode | None) -> bool:
    return known is not None and message.incarnation < known.incarnation


def _task_row(task: TaskId, known: _Task, now: float) -> TaskRow:
    is_final = known.state in TERMINAL_STATES
    return TaskRow(
        task=task,
        kind=known.status.kind if known.status else "tune" if known.progress else "generate",
        state=known.state,
        reason=known.reason,
        value=known.status.value if known.status else 1.0,
        budget_s=known.deadline_at - now if known.deadline_at is not None and not is_final else None,
        node=known.node,
        attempt=known.attempt,
        durable_on=known.status.durable_on if known.status else 0,
        text_tail=known.tail,
        n_tokens=known.n_tokens,
        progress=known.progress,
        age_s=now - known.first_at,
    )
