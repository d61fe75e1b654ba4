"""A small world for ``mesh.agreement.hosting``: nodes, cuttable links, brokers that die with their host."""

from __future__ import annotations

from random import Random

from mesh.agreement.hosting import Hosting
from mesh.core import Notify
from mesh.facts import (
    AskPeers,
    BrokerFailed,
    BrokerHosted,
    BrokerRef,
    HostBroker,
    HostRefused,
    LinkDown,
    LinkUp,
    PeerHeard,
    PeerSilent,
    StopBroker,
    UseBroker,
)
from mesh.ids import Boot, NodeId
from mesh.messages import PeerHello

STEP_S = 0.01


class HostingWorld:
    """Virtual time in steps of 10 ms; every delay is drawn from the seed."""

    def __init__(self, n_nodes: int, seed: int, stagger_s: float = 0.0) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.cores: dict[NodeId, Hosting] = {}
        self.brokers: dict[NodeId, BrokerRef] = {}
        self.sides: dict[NodeId, int] = {}
        self.refuses_to_host: set[NodeId] = set()
        self.n_hosted = 0
        self._due: list[tuple[float, int, NodeId, object]] = []
        self._starts = {
            NodeId(f"node-{k}"): self.rng.uniform(0, stagger_s) if stagger_s else 0.0 for k in range(n_nodes)
        }

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += STEP_S
            for node, start_at in list(self._starts.items()):
                if start_at <= self.now:
                    del self._starts[node]
                    self._boot(node)
            for entry in [e for e in self._due if e[0] <= self.now]:
                self._due.remove(entry)
                self._learn(entry[2], entry[3])
            for node in sorted(self.cores):
                self._check_link(node)
                if self.cores[node].wake_at <= self.now:
                    self._carry_out(node, self.cores[node].tick(self.now))

    def kill(self, node: NodeId) -> None:
        del self.cores[node]
        self.brokers.pop(node, None)

    def restart(self, node: NodeId) -> None:
        self._boot(node)

    def agreed(self) -> BrokerRef | None:
        """The one broker everybody is linked to, or ``None``."""
        used = {
            (core.broker.epoch, core.broker.host)
            for core in self.cores.values()
            if core.broker and core.is_linked
        }
        linked = all(core.is_linked for core in self.cores.values())
        return next(iter(self.cores.values())).broker if linked and len(used) == 1 else None

    def _boot(self, node: NodeId) -> None:
        self.sides.setdefault(node, 0)
        self.cores[node] = Hosting(me=node, rng=Random(self.rng.random()), now=self.now)
        for other in sorted(self.cores):  # mDNS: both learn of each other shortly after
            if other != node:
                self._probe(node, other)
                self._probe(other, node)

    def _reaches(self, a: NodeId, b: NodeId) -> bool:
        return a in self.cores and b in self.cores and self.sides[a] == self.sides[b]

    def _probe(self, asker: NodeId, target: NodeId) -> None:
        delay_s = self.rng.uniform(0.005, 0.1)
        fact: object = (
            PeerHeard(self._hello(target), target) if self._reaches(asker, target) else PeerSilent(target)
        )
        self._due.append((self.now + delay_s, len(self._due), asker, fact))

    def _hello(self, node: NodeId) -> PeerHello:
        core = self.cores[node]
        broker = core.broker
        return PeerHello(
            node=node, boot=Boot("b"), incarnation=1, mesh="m", port=1, addresses=[node],
            broker_epoch=broker.epoch if broker else 0, broker_host=broker.host if broker else None,
            broker_addresses=list(broker.addresses) if broker else [], broker_port=1,
            broker_connected=core.is_linked, peers={},
        )  # fmt: skip

    def _check_link(self, node: NodeId) -> None:
        """What the bus does: connects to the broker it was told, and notices when it is gone."""
        core = self.cores[node]
        if core.broker is None or core.broker.host is None:
            return
        host = core.broker.host
        is_there = self.brokers.get(host) == core.broker and self._reaches(node, host)
        if is_there and not core.is_linked and self.rng.random() < 0.5:
            self._learn(node, LinkUp(core.broker.epoch, host))
        elif not is_there and self.rng.random() < 0.2:
            self._learn(
                node, LinkDown(host_is_dead=host not in self.brokers and self._is_same_side(node, host))
            )

    def _is_same_side(self, a: NodeId, b: NodeId) -> bool:
        return self.sides.get(a) == self.sides.get(b)

    def _learn(self, node: NodeId, fact: object) -> None:
        if node in self.cores:
            self._carry_out(node, self.cores[node].learn(fact, self.now))

    def _carry_out(self, node: NodeId, effects: list[object]) -> None:
        for effect in effects:
            assert isinstance(effect, Notify)
            match effect.fact:
                case AskPeers(nodes=nodes):
                    for other in nodes:
                        self._probe(node, other)
                case HostBroker(epoch=epoch):
                    start_s = self.rng.uniform(0.02, 0.4)
                    if node in self.refuses_to_host:
                        self._due.append((self.now + start_s, 0, node, BrokerFailed("port taken")))
                        continue
                    self.n_hosted += 1
                    ref = BrokerRef(epoch=epoch, host=node, addresses=(node,), port=1)
                    self.brokers[node] = ref
                    self._due.append((self.now + start_s, 0, node, BrokerHosted(ref)))
                case StopBroker():
                    self.brokers.pop(node, None)
                case UseBroker() | HostRefused():
                    pass  # _check_link reads core.broker; nobody keeps members here
