"""The bus without a network: brokers, retained topics and wills inside one process, for tests.

Topics, payloads and their checks are the real ones (``mesh.packets``); only paho and the sockets are gone.
Everything happens in the order of the calls, without waiting, so a test can say when a broker dies.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence

from mesh.core import Message
from mesh.errors import DecodeError
from mesh.facts import BrokerRef, LinkDown, LinkUp
from mesh.ids import MeshName, NodeId
from mesh.messages import NodeState
from mesh.packets import Packet, outgoing, read
from mesh.transport.bus import BoundedQueue, Heard, Traffic

__all__ = ["MemoryBroker", "MemoryBus", "MemoryNetwork"]

_INBOX_MAX = 65_536  # a test that leaves more unread is stuck
_INBOX_BYTES_MAX = 256 * 1024 * 1024


class MemoryNetwork:
    """All brokers a test has started. A bus that uses one that is not there waits for it."""

    def __init__(self) -> None:
        self._brokers: dict[tuple[int, NodeId | None], MemoryBroker] = {}
        self._waiting: list[MemoryBus] = []

    def start_broker(self, ref: BrokerRef) -> MemoryBroker:
        """A fresh broker that holds nothing; buses that wait for it link up before this returns."""
        broker = self._brokers[ref.epoch, ref.host] = MemoryBroker(ref)
        waiting, self._waiting = self._waiting, []
        for bus in waiting:
            bus._link()
        return broker

    def kill_broker(self, ref: BrokerRef) -> None:
        """As kill -9 of its process: all links go, no will is sent, what was retained is forgotten."""
        broker = self._brokers.pop((ref.epoch, ref.host))
        for bus in broker.buses:
            bus._unlink(LinkDown(host_is_dead=ref.host is not None))
            self._waiting.append(bus)

    def _find(self, ref: BrokerRef) -> MemoryBroker | None:
        return self._brokers.get((ref.epoch, ref.host))


class MemoryBroker:
    """Routes packets to the buses linked to it, in the order they come."""

    def __init__(self, ref: BrokerRef) -> None:
        self.ref = ref
        self.retained: dict[str, Packet] = {}
        self._links: dict[MemoryBus, tuple[list[re.Pattern[str]], Packet | None]] = {}

    @property
    def buses(self) -> list[MemoryBus]:
        return list(self._links)

    def publish(self, packet: Packet) -> None:
        """Deliver to every subscriber; also what tests use as ``mosquitto_pub``."""
        if packet.retain and packet.payload:
            self.retained[packet.topic] = packet
        elif packet.retain:
            self.retained.pop(packet.topic, None)
        for bus, (filters, _) in list(self._links.items()):
            if any(one.fullmatch(packet.topic) for one in filters):
                bus._take(packet)

    def _connect(self, bus: MemoryBus, filters: Sequence[str], will: Packet | None) -> list[Packet]:
        patterns = [_pattern(one) for one in filters]
        self._links[bus] = (patterns, will)
        return [
            packet for topic, packet in self.retained.items() if any(one.fullmatch(topic) for one in patterns)
        ]

    def _disconnect(self, bus: MemoryBus, *, with_will: bool) -> None:
        _, will = self._links.pop(bus, ([], None))
        if will is not None and with_will:
            self.publish(will)


class MemoryBus:
    """A ``Bus`` on a ``MemoryNetwork``; made with the same arguments as ``mesh.transport.mqtt.MqttBus``."""

    def __init__(
        self,
        network: MemoryNetwork,
        *,
        mesh: MeshName,
        me: NodeId,
        filters: Sequence[str],
        will: Callable[[], NodeState] | None = None,
    ) -> None:
        self._network = network
        self._mesh = mesh
        self._me = me
        self._filters = tuple(filters)
        self._will = will
        self._ref: BrokerRef | None = None
        self._broker: MemoryBroker | None = None
        self._inbox: BoundedQueue[Packet | LinkUp | LinkDown] = BoundedQueue(_INBOX_MAX, _INBOX_BYTES_MAX)
        self._closed = asyncio.Event()
        self.traffic = Traffic()

    @property
    def is_linked(self) -> bool:
        return self._broker is not None

    def publish(self, message: Message, to: NodeId | None = None) -> None:
        packets = outgoing(message, mesh=self._mesh, me=self._me, to=to)
        for packet in packets:
            if self._broker is None:
                self.traffic.dropped_unlinked += 1
            else:
                self.traffic.sent += 1
                self._broker.publish(packet)

    def use(self, broker: BrokerRef | None) -> None:
        if broker == self._ref:
            return
        self._ref = broker
        if self._broker is not None:
            self._broker._disconnect(self, with_will=False)
            self._unlink(LinkDown())
        if broker is not None:
            self._link()

    async def next(self) -> Heard | LinkUp | LinkDown:
        while True:
            event = await self._inbox.get()
            if not isinstance(event, Packet):
                return event
            try:
                heard = read(event, mesh=self._mesh)
            except DecodeError:
                self.traffic.undecodable += 1
                continue
            if heard is not None:
                self.traffic.heard += 1
                return heard

    async def run(self) -> None:
        await self._closed.wait()

    async def close(self, farewell: Sequence[Message] = (), timeout_s: float = 2.0) -> None:
        for message in farewell:
            self.publish(message)
        self.use(None)
        self._closed.set()

    def crash(self) -> None:
        """The node dies or is cut off: the broker sends its will, and this bus hears nothing any more."""
        if self._broker is not None:
            self._broker._disconnect(self, with_will=True)
            self._unlink(LinkDown())
        self._ref = None

    def _link(self) -> None:
        if self._ref is None:
            return
        broker = self._network._find(self._ref)
        if broker is None:
            self._network._waiting.append(self)
            return
        will = outgoing(self._will(), mesh=self._mesh, me=self._me)[0] if self._will else None
        self._broker = broker
        self.traffic.links += 1
        self._inbox.put(LinkUp(broker_epoch=broker.ref.epoch, host=broker.ref.host), always=True)
        for packet in broker._connect(self, self._filters, will):
            self._take(packet)

    def _unlink(self, fact: LinkDown) -> None:
        self._broker = None
        self._inbox.put(fact, always=True)

    def _take(self, packet: Packet) -> None:
        if not self._inbox.put(packet, packet.n_bytes, may_be_lost=packet.qos == 0):
            self.traffic.dropped_in += 1


def _pattern(mqtt_filter: str) -> re.Pattern[str]:
    """``a/+/b`` and ``a/#`` as a regular expression."""
    text = re.escape(mqtt_filter).replace(r"\+", "[^/]*").replace(r"/\#", "(/.*)?").replace(r"\#", ".*")
    return re.compile(text)
