"""Which broker the mesh uses, and who hosts it when the one it had is gone.

There is no broker to install first: whoever is there hosts one. Brokers carry an epoch that grows with
every broker the mesh starts. ``BrokerRef.outranks`` orders any two, so brokers born at the same moment,
or on two sides of a split network, become one: everybody moves to the one that outranks.

    SEARCHING ──a peer knows a broker──────────────▶ USING ──link down, and nobody vouches for it──┐
        ▲  └──nobody does, and it is my turn──▶ STARTING ──hosted──▶ USING                         │
        └──────────────────────────────────────────────────────────────────────────────────────────┘

*My turn*: the node whose id sorts first among the peers that answer hosts at once; the second waits one
``turn_s`` longer, and so on, so two hosts at once are rare, and harmless when they happen.

mDNS only finds addresses. What counts here is what a peer says of itself when asked (``PeerHello``):
a peer that is still connected to the broker we lost vetoes a new one for ``veto_s``, because then our
own link is the likelier fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random

from mesh.core import FOREVER, Effect, Fact, Message, Notify
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
from mesh.ids import NodeId
from mesh.messages import PeerHello

__all__ = ["Hosting", "HostingConfig", "Phase"]

# A broker needs the first few peers, not all: every answer names the broker. 4,096 is the member bound.
PEERS_MAX = 4096
TURNS_MAX = 4  # if the first four in turn cannot host, several at once may as well try: rank decides
ASK_AT_ONCE_MAX = 8  # probes are TLS handshakes, about 3 ms of a small CPU each


class Phase(Enum):
    SEARCHING = "searching"
    STARTING = "starting"
    USING = "using"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostingConfig:
    settle_s: float = 0.8
    """How long a newcomer listens before it hosts: mDNS answers come within 0.13 s (p100 of 24)."""
    turn_s: float = 1.0
    """Start of a broker and the news of it take about half of this on a small device."""
    grace_s: float = 2.0
    """A broker that is silent but not refusing may be busy; the bus goes on trying meanwhile."""
    dead_grace_s: float = 0.25
    """After a refused connection: long enough for the peers' answers, which veto or name a better one."""
    veto_s: float = 8.0
    ask_every_s: float = 0.25
    check_every_s: float = 5.0
    """How often a node with a good link compares brokers with a few peers."""
    down_keep_s: float = 5.0
    forget_s: float = 600.0
    """A peer on the other side of a split must be found again when it heals."""
    linger_s: float = 2.0
    """How long an outranked broker stays up so that its clients hear the news through it."""
    answer_fresh_s: float = 1.5
    host_again_s: float = 30.0
    """After a failed start, others host; this node tries again only then, or alone."""

    def __post_init__(self) -> None:
        if not 0 < self.ask_every_s < min(self.settle_s, self.answer_fresh_s):
            raise ValueError("peers must be asked at least once while we listen: ask_every_s < settle_s")


@dataclass(slots=True)
class _Peer:
    hello: PeerHello | None
    address: str
    heard_at: float
    silent_since: float = FOREVER


class Hosting:
    """The core. ``broker`` is what this node uses or tries to use; ``hosted`` what it runs itself."""

    def __init__(
        self,
        *,
        me: NodeId,
        rng: Random,
        now: float,
        external: BrokerRef | None = None,
        may_host: bool = True,
        config: HostingConfig | None = None,
    ) -> None:
        self._me = me
        self._rng = rng
        self._config = config or HostingConfig()
        self._may_host = may_host
        self._external = external
        self._peers: dict[NodeId, _Peer] = {}
        self._down: dict[tuple[int, NodeId | None], float] = {}  # bounded: one entry per failover, aged out
        self._epoch_seen = 0
        self._host_again_at = 0.0
        self._stop_at = FOREVER
        self.phase = Phase.SEARCHING
        self.broker: BrokerRef | None = None
        self.hosted: BrokerRef | None = None
        self.is_linked = False
        self._has_waited = False
        self._host_at = now + self._config.settle_s + rng.uniform(0, 0.1)
        self._ask_at = now
        self._lost_at = now

    @property
    def wake_at(self) -> float:
        host_at = self._host_at if self.phase is Phase.SEARCHING or self._is_searching_while_down else FOREVER
        return min(self._ask_at, host_at, self._stop_at)

    @property
    def _is_searching_while_down(self) -> bool:
        return self.phase is Phase.USING and not self.is_linked and self._external is None

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        match fact:
            case PeerHeard(hello=hello, address=address):
                return self._on_peer_heard(hello, address, now)
            case PeerSilent(node=node):
                self._on_peer_silent(node, now)
            case LinkUp(broker_epoch=epoch):
                if self.broker is not None and epoch == self.broker.epoch:
                    self.is_linked = True
                    self._ask_at = FOREVER if self._external else now + self._config.check_every_s
            case LinkDown(host_is_dead=host_is_dead):
                return self._on_link_down(host_is_dead, now)
            case BrokerHosted(broker=broker):
                return self._on_hosted(broker, now)
            case BrokerFailed():
                return self._on_failed(now)
        return []

    def tick(self, now: float) -> list[Effect]:
        if self._external is not None:
            effects = self._use(self._external, now) if self.broker is None else []
            self._ask_at = FOREVER  # nothing to look for: the operator has said where it is
            return effects
        effects = []
        if now >= self._stop_at:
            self._stop_at = FOREVER
            self.hosted = None
            effects.append(Notify(StopBroker()))
        if (self.phase is Phase.SEARCHING or self._is_searching_while_down) and now >= self._host_at:
            effects += self._on_turn(now)
        if now >= self._ask_at:
            effects += self._ask(now)
        return effects

    # ── what peers say ──────────────────────────────────────────────────────────────────────────────

    def _on_peer_heard(self, hello: PeerHello, address: str, now: float) -> list[Effect]:
        if hello.node == self._me:
            return []
        if hello.node not in self._peers and len(self._peers) >= PEERS_MAX:
            unheard = next((node for node, peer in self._peers.items() if peer.hello is None), None)
            if unheard is None:
                return []
            del self._peers[unheard]  # a rumour makes room for somebody who proved to be there
        self._peers[hello.node] = _Peer(hello, address, now)
        self._epoch_seen = max(self._epoch_seen, hello.broker_epoch)
        offered = _offered(hello, address)
        if offered is None or self._external is not None:
            return []
        if offered.host == self._me and self.hosted is None:
            return []  # it remembers a broker of an earlier life of ours
        if hello.node == offered.host:
            self._down.pop(_key(offered), None)  # its host speaks for it: it is up again
        elif self._is_down(offered, now) or not hello.broker_connected:
            return []
        if self.phase is Phase.USING and self.broker is not None:
            if _key(offered) == _key(self.broker):
                return self._veto(hello, now)
            if not offered.outranks(self.broker) and not self._is_down(self.broker, now):
                return []
        elif self.phase is Phase.STARTING:
            return []  # ours will be up in a moment; rank decides then
        return self._use(offered, now)

    def _on_peer_silent(self, node: NodeId, now: float) -> None:
        if node not in self._peers and len(self._peers) >= PEERS_MAX:
            return
        peer = self._peers.setdefault(node, _Peer(None, "", -FOREVER))  # known of, never heard: ask again
        peer.heard_at = -FOREVER
        peer.silent_since = min(peer.silent_since, now)
        if now - peer.silent_since > self._config.forget_s:
            del self._peers[node]  # a new sighting brings it back

    def _veto(self, hello: PeerHello, now: float) -> list[Effect]:
        """A peer still uses the broker we lost: wait, at most ``veto_s`` in all."""
        if not self.is_linked and hello.broker_connected and hello.node != self._me:
            patience_until = self._lost_at + self._config.veto_s
            self._host_at = max(self._host_at, min(now + self._config.grace_s, patience_until))
        return []

    # ── the link ────────────────────────────────────────────────────────────────────────────────────

    def _on_link_down(self, host_is_dead: bool, now: float) -> list[Effect]:
        if self.phase is not Phase.USING or self._external is not None:
            return []
        effects: list[Effect] = []
        if self.is_linked:
            self._lost_at = now
            self._host_at = now + self._config.grace_s
        self.is_linked = False
        if host_is_dead:
            if self.broker is not None and self.broker.host is not None:
                self._on_peer_silent(self.broker.host, now)
                effects.append(Notify(HostRefused(self.broker.host)))
            self._host_at = min(self._host_at, now + self._config.dead_grace_s)
        self._ask_at = min(self._ask_at, now)
        return effects

    def _on_turn(self, now: float) -> list[Effect]:
        """Nobody offered a broker in time: host one, or give the peers before us their turn."""
        if self.broker is not None:
            self._down[_key(self.broker)] = now + self._config.down_keep_s
        better = self._best_offer(now)
        if better is not None:
            return self._use(better, now)
        self.phase = Phase.SEARCHING
        n_before_me = sum(node < self._me for node in self._fresh(now))
        if n_before_me and not self._has_waited:
            self._has_waited = True
            self._host_at = now + self._config.turn_s * min(n_before_me, TURNS_MAX)
            return []
        return self._start(now)

    def _start(self, now: float) -> list[Effect]:
        if not self._may_host or now < self._host_again_at:
            self._host_at = max(now + self._config.turn_s, self._host_again_at if self._may_host else 0.0)
            return []
        self.phase = Phase.STARTING
        self._epoch_seen += 1
        return [Notify(HostBroker(self._epoch_seen))]

    def _on_hosted(self, broker: BrokerRef, now: float) -> list[Effect]:
        self.hosted = broker
        self._stop_at = FOREVER
        rival = self._best_offer(now)
        if rival is not None and rival.outranks(broker):
            self._stop_at = now + self._config.linger_s
            return self._use(rival, now)
        return self._use(broker, now)

    def _on_failed(self, now: float) -> list[Effect]:
        was_running = self.hosted is not None
        self.hosted = None
        self._stop_at = FOREVER
        if not was_running:
            # A node alone tries again soon: nobody else will host for it.
            wait_s = self._config.host_again_s if self._fresh(now) else self._config.grace_s
            self._host_again_at = now + wait_s
        if self.phase is Phase.STARTING:
            self.phase = Phase.SEARCHING
            self._host_at = self._host_again_at
        return []

    # ── small steps ─────────────────────────────────────────────────────────────────────────────────

    def _use(self, broker: BrokerRef, now: float) -> list[Effect]:
        self.phase = Phase.USING
        self.broker = broker
        self.is_linked = False
        self._has_waited = False
        self._lost_at = now
        self._epoch_seen = max(self._epoch_seen, broker.epoch)
        self._host_at = now + self._config.grace_s  # if it cannot be reached after all
        self._ask_at = now + self._config.ask_every_s
        if self.hosted is not None and _key(self.hosted) != _key(broker) and self._stop_at == FOREVER:
            self._stop_at = now + self._config.linger_s
        return [Notify(UseBroker(broker))]

    def _ask(self, now: float) -> list[Effect]:
        """Often while we look for a broker; a few peers now and then while all is well."""
        every_s = self._config.check_every_s if self.is_linked else self._config.ask_every_s
        self._ask_at = now + every_s
        nodes = sorted(self._peers, key=lambda node: (self._peers[node].silent_since < FOREVER, node))
        if len(nodes) > ASK_AT_ONCE_MAX:
            # The lowest ids are the likely hosts; the rest is a sample, so every split is found in time.
            likely, others = nodes[: ASK_AT_ONCE_MAX // 2], nodes[ASK_AT_ONCE_MAX // 2 :]
            nodes = likely + self._rng.sample(others, ASK_AT_ONCE_MAX - len(likely))
        return [Notify(AskPeers(tuple(nodes)))] if nodes else []

    def _fresh(self, now: float) -> list[NodeId]:
        return [n for n, peer in self._peers.items() if now - peer.heard_at <= self._config.answer_fresh_s]

    def _best_offer(self, now: float) -> BrokerRef | None:
        best: BrokerRef | None = None
        for node in self._fresh(now):
            peer = self._peers[node]
            if peer.hello is None:
                continue
            offered = _offered(peer.hello, peer.address)
            if offered is None or offered.host == self._me or self._is_down(offered, now):
                continue
            if (peer.hello.broker_connected or node == offered.host) and (
                best is None or offered.outranks(best)
            ):
                best = offered
        return best

    def _is_down(self, broker: BrokerRef, now: float) -> bool:
        self._down = {key: until for key, until in self._down.items() if until > now}
        return _key(broker) in self._down


def _key(broker: BrokerRef) -> tuple[int, NodeId | None]:
    return broker.epoch, broker.host


def _offered(hello: PeerHello, address: str) -> BrokerRef | None:
    """The broker a peer names. The host's own answer proves the address it came from: that goes first."""
    if hello.broker_epoch < 1 or hello.broker_host is None:
        return None
    addresses = list(hello.broker_addresses)
    if hello.node == hello.broker_host:
        addresses = [address, *(a for a in addresses if a != address)]
    if not addresses:
        return None
    return BrokerRef(
        epoch=hello.broker_epoch, host=hello.broker_host, addresses=tuple(addresses), port=hello.broker_port
    )
