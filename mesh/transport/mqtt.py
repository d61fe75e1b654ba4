"""The bus on a real MQTT broker. Sole owner of aiomqtt and paho.

    use(broker) ─▶ probe by TCP ─▶ connect (MQTT 5, else 3.1.1) ─▶ subscribe ─▶ LinkUp ─▶ … ─▶ LinkDown ─┐
                        ▲                     full jitter, at most 1 s                                    │
                        └─────────────────────────────────────────────────────────────────────────────────┘

What the libraries leave to us, and why it is here:

* aiomqtt connects in a worker thread that a black-holed address holds for seconds, so every address is
  probed first, truly asynchronously; a connection attempt nobody waits for any more is hung up.
* Its incoming queue is unbounded, or drops the newest silently: ``_Intake`` takes its place.
* It waits for each acknowledgement before it returns: ``_send_all`` keeps a window in flight, in order.
* paho leaves Nagle's algorithm on, which makes request and reply take 88 ms instead of 0.5 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from mesh.core import Message
from mesh.errors import DecodeError
from mesh.facts import BrokerRef, LinkDown, LinkUp
from mesh.ids import Boot, MeshName, NodeId
from mesh.messages import NodeState
from mesh.packets import Packet, outgoing, read
from mesh.transport.bus import BoundedQueue, Heard, Traffic
from mesh.transport.knock import knock
from mesh.units import MIB

__all__ = ["KEEPALIVE_S", "MqttBus"]

log = logging.getLogger(__name__)

# paho's own lines are about its inside, and at DEBUG they would hold payloads.
_paho_log = logging.getLogger(f"{__name__}.paho")
_paho_log.setLevel(logging.ERROR)

KEEPALIVE_S = 3
"""A silent broker is given up after at most twice this; a silent node's will is sent after 1.5 times it."""

_CONNECT_S = 2.0  # TCP and TLS handshake in aiomqtt's worker thread, and then CONNACK
_ANSWER_S = 5.0  # SUBACK and PUBACK: about as long as keepalive takes to find a dead link
_RETRY_S_MAX = 1.0  # a broker that comes back is found within a second; 1000 nodes make 2000 attempts/s
_RETRY_S_FIRST = 0.05

# Mosquitto lets a client have 20 unacknowledged messages (its Receive Maximum) and disconnects beyond it.
_WINDOW = 16

# Towards the broker and from it: seconds of the busiest traffic of one node (about 2,000 messages/s), and
# far below the memory of the smallest device. Half of each is closed to QoS 0.
_QUEUE_MAX = 8192
_QUEUE_BYTES_MAX = 32 * MIB

_BROKERS_REMEMBERED_MAX = 16  # which of them speak MQTT 5
_LOG_EVERY_S = 10.0  # a flood of bad messages is one line in this time

_Tls = Callable[[BrokerRef], ssl.SSLContext] | ssl.SSLContext | None
_V5 = aiomqtt.ProtocolVersion.V5
_V311 = aiomqtt.ProtocolVersion.V311


_Key = tuple[int, NodeId | None, int, bool, str | None, str | None]


def _key(broker: BrokerRef) -> _Key:
    """What makes a broker another one; its addresses may change under it."""
    return broker.epoch, broker.host, broker.port, broker.tls, broker.username, broker.password


class _LinkFault(Exception):
    """Why there is no link. ``refused``: the host answered that nobody listens there."""

    def __init__(self, text: str, *, refused: bool = False, retry_at_once: bool = False) -> None:
        super().__init__(text)
        self.refused = refused
        self.retry_at_once = retry_at_once


class MqttBus:
    """A ``mesh.transport.bus.Bus``; also the command line's, which gives the filters it wants and no will.

    Args:
        filters: What to subscribe to on every connect (``mesh.packets.node_filters``).
        will: Makes the message that the broker publishes when the connection breaks; asked on every connect.
        tls: The context, or a function from the broker to it, for brokers with ``tls``. Without one the
            system's certificate authorities are trusted, as for a web site.
    """

    def __init__(
        self,
        *,
        mesh: MeshName,
        me: NodeId,
        boot: Boot,
        filters: Sequence[str],
        will: Callable[[], NodeState] | None = None,
        tls: _Tls = None,
        now: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._mesh = mesh
        self._me = me
        # A clone of this node on another SD card has another boot, so the two never take each other's
        # session over in turn; membership shows them both that they are two.
        self._client_id = f"{me}-{boot}"
        self._filters = tuple(filters)
        self._will = will
        self._tls = tls
        self._now = now
        self._rng = rng or random.Random()

        self._broker: BrokerRef | None = None
        self._changed = asyncio.Event()
        self._stopped = asyncio.Event()
        self._closed = False
        self._is_linked = False
        self._inbox: BoundedQueue[Packet | LinkUp | LinkDown] = BoundedQueue(_QUEUE_MAX, _QUEUE_BYTES_MAX)
        self._outbox: BoundedQueue[Packet] = BoundedQueue(_QUEUE_MAX, _QUEUE_BYTES_MAX)
        self._unsent = 0
        self._quiet = asyncio.Event()
        self._partings: set[asyncio.Task[None]] = set()
        self._protocols: OrderedDict[_Key, aiomqtt.ProtocolVersion] = OrderedDict()
        self._good_address: tuple[_Key, str] | None = None
        self._quiet_until: dict[str, float] = {}

        self.traffic = Traffic()
        self.trouble: str | None = None
        """Why there is no link now, as a sentence for the operator; ``None`` while there is one."""

    # ── the interface ───────────────────────────────────────────────────────────────────────────

    @property
    def is_linked(self) -> bool:
        return self._is_linked

    @property
    def broker(self) -> BrokerRef | None:
        """The broker in use, linked or not."""
        return self._broker

    def publish(self, message: Message, to: NodeId | None = None) -> None:
        try:
            packets = outgoing(message, mesh=self._mesh, me=self._me, to=to)
        except ValueError as error:
            self.traffic.dropped_out += 1
            self._log_rarely(logging.ERROR, "cannot send", f"{type(message).__name__}: {error}")
            return
        for packet in packets:
            if not self._is_linked:
                self.traffic.dropped_unlinked += 1
            elif self._outbox.put(packet, packet.n_bytes, may_be_lost=packet.qos == 0):
                self._unsent += 1
            else:
                self.traffic.dropped_out += 1
                self._log_rarely(logging.WARNING, "outgoing queue is full", packet.topic)

    def use(self, broker: BrokerRef | None) -> None:
        if self._closed:
            return
        if broker is None or self._broker is None or _key(broker) != _key(self._broker):
            self._changed.set()
        self._broker = broker  # the same broker at other addresses: the next connect goes there

    async def next(self) -> Heard | LinkUp | LinkDown:
        while True:
            event = await self._inbox.get()
            if not isinstance(event, Packet):
                return event
            # On the mesh's own broker nodes may write nowhere but below edgemesh/<mesh>/.
            replies_anywhere = self._broker is None or self._broker.host is None
            try:
                heard = read(event, mesh=self._mesh, replies_anywhere=replies_anywhere)
            except DecodeError as error:
                self.traffic.undecodable += 1
                self._log_rarely(logging.WARNING, "dropped a message", f"topic={event.topic} reason={error}")
                continue
            if heard is not None:
                self.traffic.heard += 1
                return heard

    async def run(self) -> None:
        try:
            while not self._closed:
                self._changed.clear()
                broker = self._broker
                waiting = asyncio.create_task(self._changed.wait(), name="mqtt.changed")
                linking = broker and asyncio.create_task(self._keep_linked(broker), name="mqtt.link")
                try:
                    both = [waiting, linking] if linking else [waiting]
                    await asyncio.wait(both, return_when="FIRST_COMPLETED")
                finally:
                    waiting.cancel()
                    if linking:
                        linking.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await linking  # raises what broke it, if anything did
        finally:
            self._stopped.set()

    async def close(self, farewell: Sequence[Message] = (), timeout_s: float = 2.0) -> None:
        for message in farewell:
            self.publish(message)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._unsent:
                    self._quiet.clear()
                    await self._quiet.wait()
        self._broker = None
        self._closed = True
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._stopped.wait()
                if self._partings:
                    await asyncio.wait(self._partings)

    # ── the link ────────────────────────────────────────────────────────────────────────────────

    async def _keep_linked(self, broker: BrokerRef) -> None:
        """Link, and link again, until cancelled (when another broker is to be used)."""
        failures = 0
        host_reported_dead = False
        while True:
            links_before = self.traffic.links
            try:
                broker = self._broker or broker  # its addresses may have changed
                await self._link(broker)
            except _LinkFault as fault:
                if self.traffic.links > links_before:
                    failures, host_reported_dead = 0, False
                if fault.retry_at_once:
                    log.info("mqtt: %s; falling back to MQTT 3.1.1", fault)
                    continue
                self._say_trouble(str(fault))
                if fault.refused and broker.host is not None and not host_reported_dead:
                    host_reported_dead = True
                    self._inbox.put(LinkDown(host_is_dead=True), always=True)
            failures += 1
            # Full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015): all nodes lose it at once.
            delay_s_max = min(_RETRY_S_MAX, _RETRY_S_FIRST * 2 ** min(failures, 10))
            await asyncio.sleep(self._rng.uniform(0, delay_s_max))

    async def _link(self, broker: BrokerRef) -> None:
        """One connection, from probe to loss.

        Raises:
            _LinkFault: Always, with the reason why there is none (any more).
        """
        address = await self._probe(broker)
        intake = _LinkIntake(self._inbox, self.traffic)
        client = self._client(broker, address, intake)
        await self._connect(client, broker, address)
        client.timeout = _ANSWER_S
        try:
            await self._subscribe(client)
            self._good_address = (_key(broker), address)
            self.trouble = None
            self.traffic.links += 1
            self._is_linked = True
            self._inbox.put(LinkUp(broker_epoch=broker.epoch, host=broker.host), always=True)
            intake.open()
            log.info(
                "mqtt: linked to %s:%s host=%s protocol=%s",
                address,
                broker.port,
                broker.host or "site",
                "5" if self._protocol(broker) is _V5 else "3.1.1",
            )
            try:
                await self._serve(client)
            except aiomqtt.MqttError as error:
                raise _LinkFault(f"the connection to the broker at {address} broke: {error}") from None
        finally:
            intake.end()
            if self._is_linked:
                self._is_linked = False
                self.traffic.dropped_out += self._unsent
                self._outbox.clear()
                self._unsent = 0
                self._quiet.set()
                self._inbox.put(LinkDown(), always=True)
            self._in_background(_part(client))

    async def _serve(self, client: aiomqtt.Client) -> None:
        """Send until the connection breaks (MqttError); what arrives goes through the intake meanwhile."""
        sending = asyncio.create_task(self._send_all(client), name="mqtt.send")
        watching = asyncio.create_task(_until_broken(client), name="mqtt.watch")
        try:
            done, _ = await asyncio.wait([sending, watching], return_when="FIRST_COMPLETED")
            for task in done:
                task.result()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)

    async def _send_all(self, client: aiomqtt.Client) -> None:
        """Keep up to ``_WINDOW`` packets in flight.

        Tasks start in the order made, and aiomqtt hands a packet to paho before it first waits, so the
        order on the wire is the order of ``publish``.
        """
        window = asyncio.Semaphore(_WINDOW)
        async with asyncio.TaskGroup() as group:
            while True:
                packet = await self._outbox.get()
                await window.acquire()
                group.create_task(self._send(client, packet, window), name="mqtt.packet")

    async def _send(self, client: aiomqtt.Client, packet: Packet, window: asyncio.Semaphore) -> None:
        properties = _publish_properties(packet) if _speaks_v5(client) else None
        try:
            await client.publish(packet.topic, packet.payload, packet.qos, packet.retain, properties)
            self.traffic.sent += 1
        except aiomqtt.MqttError:
            self.traffic.dropped_out += 1  # the link is breaking, which _until_broken tells
        except ValueError as error:  # paho's opinion of a client's reply topic
            self.traffic.dropped_out += 1
            self._log_rarely(logging.WARNING, "cannot send", f"topic={packet.topic!r} reason={error}")
        finally:
            window.release()
            if self._unsent:
                self._unsent -= 1
            if not self._unsent:
                self._quiet.set()

    async def _probe(self, broker: BrokerRef) -> str:
        """The first address that takes a TCP connection.

        Raises:
            _LinkFault: None does. ``refused`` when the one that worked last, or else every one, refused.
        """
        knocked = await knock(broker.addresses, broker.port)
        if knocked.address is not None:
            return knocked.address
        if self._good_address is not None and self._good_address[0] == _key(broker):
            refused = knocked.refused(self._good_address[1])
        else:
            refused = bool(broker.addresses) and all(map(knocked.refused, broker.addresses))
        raise _LinkFault(
            f"no broker answers at port {broker.port}: {str(knocked) or 'it has no address'}", refused=refused
        )

    async def _connect(self, client: aiomqtt.Client, broker: BrokerRef, address: str) -> None:
        entering = asyncio.ensure_future(client.__aenter__())
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            # The worker thread cannot be stopped. Without this its connection would live on, unseen.
            self._in_background(_hang_up_after(entering, client))
            raise
        except (aiomqtt.MqttError, ValueError) as error:
            _hang_up(client)
            self._reconsider_protocol(broker, error)
            raise _LinkFault(
                f"the broker at {address}:{broker.port} did not take the connection: {_connect_text(error)}",
                retry_at_once=_is_protocol_refusal(error) and self._protocol(broker) is _V311,
            ) from None

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        if not self._filters:
            return
        try:
            codes: Sequence[Any] = await client.subscribe([(one, 1) for one in self._filters])
        except aiomqtt.MqttError as error:
            raise _LinkFault(f"the broker did not answer the subscription: {error}") from None
        for one, code in zip(self._filters, codes, strict=False):
            if getattr(code, "value", code) >= 0x80:
                raise _LinkFault(f"the broker refuses the subscription to {one}: check its access list")

    def _client(self, broker: BrokerRef, address: str, intake: _LinkIntake) -> aiomqtt.Client:
        will: aiomqtt.Will | None = None
        if self._will is not None:
            packet = outgoing(self._will(), mesh=self._mesh, me=self._me)[0]
            will = aiomqtt.Will(packet.topic, packet.payload, packet.qos, packet.retain)
        tls: ssl.SSLContext | None = None
        if broker.tls:
            made = self._tls(broker) if callable(self._tls) else self._tls
            tls = made or ssl.create_default_context()
        protocol = self._protocol(broker)
        client = aiomqtt.Client(
            address,
            broker.port,
            username=broker.username,
            password=broker.password,
            identifier=self._client_id,
            protocol=protocol,
            clean_session=None if protocol is _V5 else True,  # nothing exists only in the broker
            keepalive=KEEPALIVE_S,
            timeout=_CONNECT_S,
            will=will,
            tls_context=tls,
            logger=_paho_log,
            queue_type=cast(Any, partial(_Intake, intake.take)),
            max_inflight_messages=_WINDOW,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        client.pending_calls_threshold = _WINDOW
        client._client.connect_timeout = _CONNECT_S  # aiomqtt does not pass it on
        return client

    def _protocol(self, broker: BrokerRef) -> aiomqtt.ProtocolVersion:
        return self._protocols.get(_key(broker), _V5)

    def _reconsider_protocol(self, broker: BrokerRef, error: Exception) -> None:
        """MQTT 5 first; 3.1.1 where the broker asks for it, and in turns with 5 where it just hangs up, as
        old brokers do on a version they do not know."""
        understood = isinstance(error, aiomqtt.MqttCodeError) and not _is_protocol_refusal(error)
        if understood:
            return
        key, other = _key(broker), _V311 if self._protocol(broker) is _V5 else _V5
        self._protocols.pop(key, None)
        self._protocols[key] = other
        while len(self._protocols) > _BROKERS_REMEMBERED_MAX:
            self._protocols.popitem(last=False)

    # ── the rest ────────────────────────────────────────────────────────────────────────────────

    def _in_background(self, parting: Any) -> None:
        """Saying goodbye must not hold up the next connection; ``close`` waits for it."""
        task = asyncio.create_task(parting, name="mqtt.part")
        self._partings.add(task)
        task.add_done_callback(self._partings.discard)

    def _say_trouble(self, text: str) -> None:
        if text != self.trouble:
            self.trouble = text
            log.warning("mqtt: %s; trying again", text)

    def _log_rarely(self, level: int, event: str, details: str) -> None:
        now = self._now()
        if now >= self._quiet_until.get(event, -math.inf):
            self._quiet_until[event] = now + _LOG_EVERY_S  # a handful of events: bounded by this file
            log.log(
                level,
                "mqtt: %s: %s (more of these within %.0f s are not shown)",
                event,
                details,
                _LOG_EVERY_S,
            )


class _Intake(asyncio.Queue[aiomqtt.Message]):
    """Stands in for aiomqtt's incoming queue and keeps nothing: each message goes to ``take`` at once."""

    def __init__(self, take: Callable[[aiomqtt.Message], None], maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self._on_message = take

    def put_nowait(self, item: aiomqtt.Message) -> None:
        self._on_message(item)


class _LinkIntake:
    """What one connection brings, in order: nothing before its ``LinkUp``, nothing after its ``LinkDown``."""

    def __init__(self, inbox: BoundedQueue[Packet | LinkUp | LinkDown], traffic: Traffic) -> None:
        self._inbox = inbox
        self._traffic = traffic
        self._early: list[Packet] | None = []  # what the broker retains, sent before its SUBACK
        self._ended = False

    def take(self, message: aiomqtt.Message) -> None:
        if self._ended:
            return
        packet = _packet(message)
        if self._early is None:
            if not self._inbox.put(packet, packet.n_bytes, may_be_lost=packet.qos == 0):
                self._traffic.dropped_in += 1
        elif len(self._early) < _QUEUE_MAX:
            self._early.append(packet)
        else:
            self._traffic.dropped_in += 1

    def open(self) -> None:
        early, self._early = self._early or [], None
        for packet in early:
            if not self._inbox.put(packet, packet.n_bytes):
                self._traffic.dropped_in += 1

    def end(self) -> None:
        self._ended = True


async def _until_broken(client: aiomqtt.Client) -> None:
    async for _ in client.messages:  # never yields: the intake takes everything
        pass


async def _part(client: aiomqtt.Client) -> None:
    """Disconnect in order (the broker then keeps the will to itself), or at least hang up."""
    with contextlib.suppress(aiomqtt.MqttError):
        await client.__aexit__(None, None, None)
    _hang_up(client)


async def _hang_up_after(entering: asyncio.Future[Any], client: aiomqtt.Client) -> None:
    try:
        await entering
    except (aiomqtt.MqttError, ValueError):
        _hang_up(client)
    else:
        await _part(client)


def _hang_up(client: aiomqtt.Client) -> None:
    """Close the socket, if there is one: paho and aiomqtt then clean up after themselves."""
    sock = client._client.socket()
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _speaks_v5(client: aiomqtt.Client) -> bool:
    return client._client.protocol == _V5.value


def _publish_properties(packet: Packet) -> Properties | None:
    if packet.correlation is None and packet.expiry_s is None and packet.response_topic is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if packet.response_topic is not None:
        properties.ResponseTopic = packet.response_topic
    if packet.correlation is not None:
        properties.CorrelationData = packet.correlation
    if packet.expiry_s is not None:
        properties.MessageExpiryInterval = min(math.ceil(packet.expiry_s), 2**32 - 1)
    return properties


def _packet(message: aiomqtt.Message) -> Packet:
    properties = message.properties
    return Packet(
        topic=message.topic.value,
        payload=bytes(message.payload),
        qos=message.qos,
        retain=message.retain,
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
    )


def _is_protocol_refusal(error: Exception) -> bool:
    return isinstance(error, aiomqtt.MqttCodeError) and "protocol version" in str(error).lower()


def _connect_text(error: Exception) -> str:
    text = str(error)
    if "user name" in text.lower() or "authorized" in text.lower():
        return f"{text}: check the user name and password in --broker, and the broker's access list"
    if "CERTIFICATE" in text or "certificate" in text:
        return f"{text}: its certificate is not of this mesh; check the join code, or the broker's URL"
    return text
