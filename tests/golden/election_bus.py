"""One broker in a hundred lines: total order on one topic, the retained record, and a trace of all said."""

from __future__ import annotations

from heapq import heappop, heappush
from random import Random

from mesh.agreement.election import Election
from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.core import Broadcast, Effect, Message, Notify, Save, Send
from mesh.facts import Deposed, Elected, Followed, LinkDown, LinkUp
from mesh.ids import EPOCH_ZERO, NodeId
from mesh.messages import EpochSeen, LeaseRecord

DELAY_S = 0.01
BROKER = NodeId("broker")


class ElectionNode:
    """A running node. The disk (``seen``) is all that a restart keeps."""

    def __init__(self, node: NodeId, seen: EpochSeen | None, rng: Random, now: float) -> None:
        self.fence = Fence(seen.epoch if seen else EPOCH_ZERO)
        self.election = Election(me=node, fence=self.fence, rng=rng, now=now)
        self.is_linked = False
        self.is_paused = False
        self.inbox: list[tuple[Message, NodeId]] = []


class ElectionBus:
    """``trace`` has one line for each record the broker took and each fact a node told."""

    def __init__(self, names: str, seed: int = 0) -> None:
        self.now = 0.0
        self.trace: list[str] = []
        self.retained: LeaseRecord | None = None
        self.disks: dict[NodeId, EpochSeen] = {}
        self.nodes: dict[NodeId, ElectionNode] = {}
        self._rng = Random(seed)
        self._on_the_way: list[tuple[float, int, NodeId, Message, NodeId]] = []
        self._n_sent = 0
        for name in names.split():
            self.start(name)

    # ── what a test does to the mesh ────────────────────────────────────────────────────────────────

    def start(self, name: str) -> None:
        node = NodeId(name)
        rng = Random(self._rng.random())
        self.nodes[node] = ElectionNode(node, self.disks.get(node), rng, self.now)
        self.link(name)

    def crash(self, name: str) -> None:
        del self.nodes[NodeId(name)]

    def cut(self, name: str) -> None:
        self.nodes[NodeId(name)].is_linked = False
        self._learn(NodeId(name), LinkDown())

    def link(self, name: str) -> None:
        node = NodeId(name)
        self.nodes[node].is_linked = True
        if self.retained is not None:
            self._post(node, self.retained, BROKER)
        self._learn(node, LinkUp(broker_epoch=1, host=None))

    def pause(self, name: str) -> None:
        self.nodes[NodeId(name)].is_paused = True

    def resume(self, name: str) -> None:
        """The shell's promise: what time made due comes before what was said meanwhile."""
        node = NodeId(name)
        host = self.nodes[node]
        host.is_paused = False
        if host.election.wake_at <= self.now:
            self._carry_out(node, host.election.tick(self.now))
        inbox, host.inbox = host.inbox, []
        for message, sender in inbox:
            self._carry_out(node, host.election.receive(message, sender, self.now))

    def tick(self, name: str) -> None:
        self._carry_out(NodeId(name), self.nodes[NodeId(name)].election.tick(self.now))

    def learn(self, name: str, fact: object) -> None:
        self._learn(NodeId(name), fact)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = [(n.election.wake_at, name) for name, n in self.nodes.items() if not n.is_paused]
            wake_at, waker = min(due, default=(end, BROKER))
            if self._on_the_way and self._on_the_way[0][0] <= min(wake_at, end):
                self.now, _, to, message, sender = heappop(self._on_the_way)
                self._deliver(to, message, sender)
            elif wake_at < end:
                self.now = max(self.now, wake_at)
                self._carry_out(waker, self.nodes[waker].election.tick(self.now))
            else:
                self.now = end
                return

    # ── what a test asks ────────────────────────────────────────────────────────────────────────────

    def coordinators(self) -> list[str]:
        return sorted(n for n, host in self.nodes.items() if host.election.coordinator == n)

    def known(self) -> set[str | None]:
        return {host.election.coordinator for host in self.nodes.values()}

    def facts(self) -> list[str]:
        """The trace without the beats and without times."""
        return [line.split(" ", 1)[1] for line in self.trace if " lease " not in line]

    # ── the broker ──────────────────────────────────────────────────────────────────────────────────

    def _learn(self, node: NodeId, fact: object) -> None:
        self._carry_out(node, self.nodes[node].election.learn(fact, self.now))

    def _post(self, to: NodeId, message: Message, sender: NodeId) -> None:
        self._n_sent += 1
        heappush(self._on_the_way, (self.now + DELAY_S, self._n_sent, to, message, sender))

    def _deliver(self, to: NodeId, message: Message, sender: NodeId) -> None:
        host = self.nodes.get(to)
        if host is None or not host.is_linked:
            return
        if host.is_paused:
            host.inbox.append((message, sender))
        else:
            self._carry_out(to, host.election.receive(message, sender, self.now))

    def _carry_out(self, node: NodeId, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Save(key=key, record=EpochSeen() as record):
                    assert key == FENCE_KEY
                    assert node not in self.disks or record.epoch > self.disks[node].epoch
                    self.disks[node] = record
                case Broadcast(message=LeaseRecord() as record):
                    assert record.epoch.term <= self.disks[node].epoch.term, "said before it was durable"
                    if self.nodes[node].is_linked:
                        self._say(f"{node} says {record.kind} {record.epoch}")
                        self.retained = record
                        for to in sorted(self.nodes):
                            self._post(to, record, node)
                case Send(to=to, message=message):
                    self._say(f"{node} tells {to} {type(message).__name__} {message.seen}")
                    self._post(to, message, node)
                case Notify(fact=Elected() | Deposed() | Followed() as fact):
                    self._say(f"{node} {type(fact).__name__.lower()} {fact.epoch}")
                case _:
                    raise AssertionError(f"an election never asks for {effect}")

    def _say(self, what: str) -> None:
        self.trace.append(f"{self.now:.2f} {what}")
