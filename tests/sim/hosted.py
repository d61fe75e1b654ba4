"""Meshes that host their own broker: peers find and ask one another, a broker lives and dies with a node."""

from __future__ import annotations

from random import Random

from mesh.agreement.hosting import Hosting
from mesh.core import Fact
from mesh.facts import (
    AskPeers,
    BrokerFailed,
    BrokerHosted,
    BrokerRef,
    HostBroker,
    PeerHeard,
    PeerSilent,
    StopBroker,
    UseBroker,
)
from mesh.ids import NodeId
from mesh.messages import PeerHello
from tests.sim.engine import EngineShell
from tests.sim.network import Broker
from tests.sim.world import Life

__all__ = ["HostingShell"]

SIGHTED_S = (0.02, 0.3)
SIGHT_AGAIN_S = (3.0, 6.0)
"""mDNS says everything again, so a packet lost to it is not lost for ever."""
PROBE_TIMEOUT_S = 0.5
START_S = (0.02, 0.6)
START_FAILURE_P = 0.1
PORT = 1883


class HostingShell(EngineShell):
    """An engine, and what ``node.agent`` does for the hosting core."""

    def __init__(
        self, seed: int | str, *, service_s: float = 1.0, failure_p: float = 0.0, fails_to_start: bool = False
    ) -> None:
        super().__init__(seed, service_s=service_s, failure_p=failure_p)
        self._random = Random(f"hosting/{seed}")
        self._fails_to_start = fails_to_start
        self._hosted: dict[str, Broker] = {}  # by boot of the life that hosts it
        self._names: dict[tuple[int, NodeId | None], str] = {}

    def on_start(self, life: Life) -> None:
        super().on_start(life)
        self._sight_later(life, SIGHTED_S)

    def on_end(self, life: Life) -> None:
        super().on_end(life)
        self._stop(life)

    def on_fact(self, life: Life, fact: Fact) -> None:
        super().on_fact(life, fact)
        match fact:
            case AskPeers(nodes=nodes):
                for node in nodes:
                    self._probe(life, node)
            case HostBroker(epoch=epoch):
                life.world.queue.after(self._random.uniform(*START_S), self._host, life, epoch)
            case StopBroker():
                self._stop(life)
            case UseBroker(broker=used):
                life.world.use_broker(life, self._names.get((used.epoch, used.host)))
                life.world.queue.after(self._random.uniform(*SIGHTED_S), self._sighted, life)
            case _:
                pass

    def stall(self, life: Life, length_s: float) -> None:
        """The process is stopped, and its broker with it."""
        if (broker := self._hosted.get(life.boot)) is not None:
            life.world.network.stall_broker(broker, length_s)

    def crash(self, broker: Broker, life: Life | None) -> None:
        if life is not None and self._hosted.get(life.boot) is broker:
            self._stop(life)
            life.learn(BrokerFailed("it ended"))

    # ── brokers ─────────────────────────────────────────────────────────────────────────────────────

    def _host(self, life: Life, epoch: int) -> None:
        if not life.is_alive:
            return
        if self._fails_to_start and self._random.random() < START_FAILURE_P:
            life.learn(BrokerFailed("the port is taken"))
            return
        self._stop(life)  # as ``node.broker_host`` does: one broker a process
        name = f"{epoch}@{life.name}/{life.boot}"
        broker = life.world.network.add_broker(name, place=life.place, epoch=epoch, host=life.host.node)
        self._hosted[life.boot] = broker
        self._names[epoch, life.host.node] = name
        life.learn(
            BrokerHosted(BrokerRef(epoch=epoch, host=life.host.node, addresses=(life.place,), port=PORT))
        )

    def _stop(self, life: Life) -> None:
        if (broker := self._hosted.pop(life.boot, None)) is not None:
            life.world.network.stop_broker(broker, is_power_cut=life.is_unplugged)

    # ── peers ───────────────────────────────────────────────────────────────────────────────────────

    def _sight_later(self, life: Life, within_s: tuple[float, float]) -> None:
        life.world.queue.after(self._random.uniform(*within_s), self._sight, life)

    def _sight(self, life: Life) -> None:
        """This node hears all others' adverts, and they hear its."""
        if not life.is_alive:
            return
        for node in life.world.remaining:
            if node != life.name:
                self._probe(life, node, is_sighting=True)
        self._sighted(life)
        self._sight_later(life, SIGHT_AGAIN_S)

    def _sighted(self, life: Life) -> None:
        for other in life.world.hosts.values():
            if other.life is not None and other.life is not life and life.is_alive:
                self._probe(other.life, life.host.node, is_sighting=True)

    def _probe(self, life: Life, node: NodeId, *, is_sighting: bool = False) -> None:
        """Ask one node. Nobody asks a node that it does not see on the network."""
        world = life.world
        target = world.hosts[node].life
        delay_s = 3 * self._random.expovariate(1.0) * world.faults.delay_s_mean + 0.003
        if (
            target is not None
            and not target.is_stopped()
            and world.network.is_reachable(life.place, target.place)
        ):
            world.queue.after(delay_s, self._answer, life, target)
        elif not is_sighting:
            wait_s = delay_s if target is None and self._is_refused(life, node) else PROBE_TIMEOUT_S
            world.queue.after(wait_s, life.learn, PeerSilent(node))

    def _is_refused(self, life: Life, node: NodeId) -> bool:
        """The machine runs and can be reached, and says that nobody listens there."""
        host = life.world.hosts[node]
        return not host.is_unplugged and life.world.network.is_reachable(life.place, host.place)

    def _answer(self, life: Life, target: Life) -> None:
        if target.is_alive:
            life.learn(PeerHeard(_hello(target), target.place))
        else:
            life.learn(PeerSilent(target.host.node))


def _hello(life: Life) -> PeerHello:
    hosting = next(core for core in life.core._cores if isinstance(core, Hosting))  # type: ignore[attr-defined]
    broker = hosting.broker
    return PeerHello(
        node=life.host.node,
        boot=life.boot,
        incarnation=1,
        mesh="sim",
        port=1,
        addresses=[life.place],
        broker_epoch=broker.epoch if broker else 0,
        broker_host=broker.host if broker else None,
        broker_addresses=list(broker.addresses) if broker else [],
        broker_port=broker.port if broker else 0,
        broker_connected=broker is not None and hosting.is_linked,
        peers={},
    )
