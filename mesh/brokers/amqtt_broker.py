"""amqtt inside this process, mended until it keeps the promises of ``mesh.broker``.

From amqtt 0.12.1 come the packet codec, the checks of CONNECT, the session, and the tables of subscriptions
and retained messages. From here comes the life of a connection, because that is where the defects are; each
mend names its own, and ``docs/adr/0003-embedded-broker.md`` lists them for upstream:

 M1  keepalive is enforced: a hung client is dropped and its will fires    (handle_read_timeout is ``pass``)
 M2  retained messages go to the subscriber, for its new filters, if it may read them
                                      (at each connect: those of *every* filter of *every* client, unchecked)
 M3  a client id lives once: the older connection ends, its will first     (both stay connected)
 M4  a last will obeys the access list                                     (it is published unchecked)
 M5  the name comes from the certificate, and TLS demands one              (CERT_OPTIONAL; the client's word)
 M6  what waits for a client is bounded in messages, bytes and flight      (a task per message, without bound)
 M7  one packet is read whole, up to a size, within a time                 (reads wait for ever, for any size)
 M8  what is malformed ends the connection                                 ("Message discarded": out of step)
 M9  quality of service is the lower of publisher's and subscriber's       (always the subscriber's)
 M10 routing is one synchronous step, so all clients see one order         (a task per message and client)
 M11 the table of filters shrinks again, and a new subscription replaces   (empty lists stay, QoS stays)

Quality of service 2 is granted as 1, and sessions are always clean, which CONNACK says.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio import StreamReader, StreamWriter
from collections import deque
from dataclasses import dataclass
from logging import ERROR, NOTSET, WARNING, getLogger
from typing import Any

from amqtt.adapters import ReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker, RetainedApplicationMessage
from amqtt.contexts import BrokerConfig, ListenerConfig
from amqtt.mqtt import packet_class
from amqtt.mqtt.connack import CONNECTION_ACCEPTED, IDENTIFIER_REJECTED, NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.packet import CONNECT, MQTTFixedHeader, MQTTPacket
from amqtt.mqtt.pingreq import PingReqPacket
from amqtt.mqtt.pingresp import PingRespPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.pubcomp import PubcompPacket
from amqtt.mqtt.publish import PublishPacket
from amqtt.mqtt.pubrec import PubrecPacket
from amqtt.mqtt.pubrel import PubrelPacket
from amqtt.mqtt.suback import SubackPacket
from amqtt.mqtt.subscribe import SubscribePacket
from amqtt.mqtt.unsuback import UnsubackPacket
from amqtt.mqtt.unsubscribe import UnsubscribePacket
from amqtt.plugins import manager as amqtt_plugins
from amqtt.session import Session
from amqtt.utils import gen_client_id

from mesh.brokers.access import AccessList, Right, anonymous_lines, matches
from mesh.brokers.contract import (
    CLIENTS_MAX,
    INFLIGHT_MAX,
    PACKET_BYTES_MAX,
    QUEUED_BYTES_MAX,
    QUEUED_MAX,
    BrokerKind,
    BrokerSettings,
    BrokerStartError,
)
from mesh.transport.identity import CLIENT_COMMON_NAME, peer_common_name

__all__ = ["start_amqtt"]

_log = getLogger(__name__)

_KEEPALIVE_FACTOR = 1.5  # MQTT 3.1.1, 3.1.2.10
_GREETING_S = 10.0  # from connection to CONNECT, TLS included: nobody holds a place for nothing
_GOODBYE_S = 2.0  # for a peer's half of the TLS farewell; a hung one never sends it
_SHAKE_HANDS_S = 10.0
_QOS_MAX = 1
_FILTERS_MAX = 256  # per client; a node has a dozen
_UNRELEASED_MAX = 256  # QoS 2 publications of one client whose second half is missing
_RETAINED_MAX = 20_000  # 1000 nodes with 2 records, 10,000 kept tasks with status and result ...
_RETAINED_BYTES_MAX = 64 * 1024 * 1024  # ... of 3 KB each; a client must not fill the memory with new topics
_CONNECT_UNSUPPORTED = b"\x20\x02\x00\x01"  # MQTT 3.1.1, 3.2.2.3; clients of MQTT 5 know it and fall back
_LEVEL = 4  # the protocol level of MQTT 3.1.1


async def start_amqtt(settings: BrokerSettings) -> AmqttBroker:
    """Start amqtt on the running loop.

    Raises:
        BrokerStartError: An address or a port cannot be had.
    """
    for name, level in (("amqtt", ERROR), ("transitions", WARNING)):
        if getLogger(name).level == NOTSET:  # it logs every connection and oddity; an operator may still ask
            getLogger(name).setLevel(level)
    broker = AmqttBroker(settings)
    try:
        await broker._start()
    except BaseException:
        await broker.stop()
        raise
    return broker


class AmqttBroker:
    """The broker's listeners and connections. Made by ``start_amqtt``."""

    kind: BrokerKind = "amqtt"

    def __init__(self, settings: BrokerSettings) -> None:
        self.port = settings.port
        self.plain_port = settings.plain_port
        self._settings = settings
        self._router = _Router(settings.access_list)
        self._servers: list[asyncio.Server] = []
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def died(self) -> str:
        # In process there is no death but this process's own; a listener that fails stays one that accepts.
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        await self._router.close()
        for server in self._servers:
            # Since Python 3.12 this waits for half-made TLS connections, too; they may take their time.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):
                    await server.wait_closed()
        self._servers.clear()

    async def _start(self) -> None:
        settings = self._settings
        context = settings.identity.server_context()
        for address in settings.addresses:
            self.port = await self._listen(
                address, self.port, ssl=context, ssl_handshake_timeout=_SHAKE_HANDS_S
            )
        if settings.plain_port is not None:
            self.plain_port = await self._listen("127.0.0.1", settings.plain_port)

    async def _listen(self, address: str, port: int, **tls: Any) -> int:
        try:
            server = await asyncio.start_server(
                self._router.stream_connected, address, port, reuse_address=True, backlog=128, **tls
            )
        except OSError as error:
            raise BrokerStartError(
                f"cannot listen on {address} port {port or 'any'}: {error.strerror}"
            ) from error
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])


@dataclass(frozen=True, slots=True)
class _Outgoing:
    topic: str
    data: bytes
    qos: int
    retain: bool


class _Whole(ReaderAdapter):  # type: ignore[misc]  # amqtt is not typed
    """M7: hands amqtt's parsers one packet that is already here: none of them can wait or read too far."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        self._packet = b""
        self._at = 0

    async def next_packet(self, *, only: int | None = None) -> None:
        """Read one packet, of type ``only`` if given. Raises EOFError at the end, ValueError if refused."""
        head = await self._reader.readexactly(1)
        if only not in (None, head[0] >> 4):
            raise ValueError(f"packet type {head[0] >> 4} where only {only} may come")
        length = shift = 0
        while True:
            digit = (await self._reader.readexactly(1))[0]
            head += bytes((digit,))
            length |= (digit & 127) << shift
            shift += 7
            if not digit & 128:
                break
            if shift > 21:
                raise ValueError("a length of more than four bytes")
        if length > PACKET_BYTES_MAX:
            raise ValueError(f"a packet of {length} bytes; the largest is {PACKET_BYTES_MAX}")
        self._packet = head + await self._reader.readexactly(length)
        self._at = 0

    @property
    def protocol_level(self) -> int | None:
        """Of a CONNECT packet, before anybody parses the rest; ``None`` if it is no CONNECT of MQTT."""
        start = self._packet.find(b"\x00\x04MQTT", 0, 12)
        return self._packet[start + 6] if start >= 2 and len(self._packet) > start + 6 else None

    def is_read(self) -> bool:
        """Whether the parser took all of it. Lets go of the packet: an idle client must not hold 2 MB."""
        is_read = self._at == len(self._packet)
        self._packet, self._at = b"", 0
        return is_read

    async def read(self, n: int = -1) -> bytes:
        end = len(self._packet) if n < 0 else self._at + n
        if end > len(self._packet):
            raise asyncio.IncompleteReadError(self._packet[self._at :], n)
        piece, self._at = self._packet[self._at : end], end
        return piece

    def feed_eof(self) -> None:
        self._reader.feed_eof()


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """One client's connection from CONNACK to its end."""

    def begin(self, session: Session, name: str | None, packets: _Whole, writer: StreamWriter) -> None:
        self.session = session
        self.name = name
        """From the certificate; ``None`` on the plain listener."""
        self.filters: set[str] = set()
        self.ended = asyncio.Event()
        self._packets = packets
        self._stream = writer
        self._task = asyncio.current_task()
        self._outbox: deque[_Outgoing] = deque()
        self._outbox_bytes = 0
        self._outbox_filled = asyncio.Event()
        self._is_dropping = False
        self._in_flight: set[int] = set()
        self._slots = asyncio.Semaphore(INFLIGHT_MAX)
        self._last_id = 0
        self._unreleased: set[int] = set()

    @property
    def client_id(self) -> str:
        return str(self.session.client_id)

    def close(self) -> None:
        """End the connection as if the network had: the will fires. Returns at once; see ``ended``."""
        if self._task is not None:
            self._task.cancel()

    def offer(self, message: _Outgoing) -> None:
        """M6: queue a message, or drop it when too much waits, as Mosquitto does. Never waits."""
        full = len(self._outbox) >= QUEUED_MAX or self._outbox_bytes + len(message.data) > QUEUED_BYTES_MAX
        if full and self._outbox:
            if not self._is_dropping:
                _log.warning("broker_client_slow client=%s queued=%d", self.client_id, len(self._outbox))
            self._is_dropping = True
            return
        self._is_dropping = False
        self._outbox.append(message)
        self._outbox_bytes += len(message.data)
        self._outbox_filled.set()

    async def receive(self, router: _Router) -> bool:
        """Serve packets until the client says goodbye (True); silence, nonsense and a lost link raise."""
        keep_alive_s = self.session.keep_alive * _KEEPALIVE_FACTOR or None
        while True:
            # M1. The answer is inside as well: who does not read what it asked for is as dead as the silent.
            async with asyncio.timeout(keep_alive_s):
                await self._packets.next_packet()
                packet = await self._parse()
                if isinstance(packet, DisconnectPacket):
                    return True
                await self._answer(packet, router)

    async def send_queued(self) -> None:
        """Write what ``offer`` queued, in order, with at most ``INFLIGHT_MAX`` unacknowledged."""
        while True:
            while self._outbox:
                if self._outbox[0].qos:
                    await self._slots.acquire()
                message = self._outbox.popleft()
                self._outbox_bytes -= len(message.data)
                packet_id = self._next_id() if message.qos else None
                await self.send(
                    PublishPacket.build(
                        message.topic, message.data, packet_id, False, message.qos, message.retain
                    )
                )
            self._outbox_filled.clear()
            await self._outbox_filled.wait()

    async def send(self, packet: MQTTPacket) -> None:
        """One whole packet; waits while the client's buffer is full."""
        self._stream.write(packet.to_bytes())
        await self._stream.drain()

    def _next_id(self) -> int:
        while True:
            self._last_id = self._last_id % 65535 + 1
            if self._last_id not in self._in_flight:  # at most INFLIGHT_MAX are taken
                self._in_flight.add(self._last_id)
                return self._last_id

    async def _parse(self) -> MQTTPacket:
        """M8: parse the packet at hand or raise, never skip."""
        header = await MQTTFixedHeader.from_stream(self._packets)
        packet = await packet_class(header).from_stream(self._packets, fixed_header=header)
        if not self._packets.is_read():
            raise ValueError("a packet with bytes left over")
        return packet

    async def _answer(self, packet: MQTTPacket, router: _Router) -> None:
        match packet:
            case PublishPacket():
                await self._on_publish(packet, router)
            case PubackPacket():
                self._on_puback(packet.variable_header.packet_id)
            case PubrelPacket():
                self._unreleased.discard(packet.variable_header.packet_id)
                await self.send(PubcompPacket.build(packet.variable_header.packet_id))
            case PingReqPacket():
                await self.send(PingRespPacket.build())
            case SubscribePacket():
                topics = packet.payload.topics
                if not topics:
                    raise ValueError("a SUBSCRIBE to nothing")
                codes = [await router.add_subscription(wanted, self.session) for wanted in topics]
                await self.send(SubackPacket.build(packet.variable_header.packet_id, codes))
                for (filter_, _), code in zip(topics, codes, strict=True):
                    if code <= _QOS_MAX:
                        router.offer_retained(filter_, code, self)
            case UnsubscribePacket():
                for filter_ in packet.payload.topics:
                    router.unsubscribe(filter_, self)
                await self.send(UnsubackPacket.build(packet.variable_header.packet_id))
            case _:
                raise ValueError(f"a {type(packet).__name__} from a client")

    async def _on_publish(self, packet: PublishPacket, router: _Router) -> None:
        topic, qos, packet_id = packet.topic_name, packet.qos, packet.variable_header.packet_id
        if not topic or "\0" in topic or qos > 2 or (qos and not packet_id):
            raise ValueError("a PUBLISH that MQTT forbids")
        # QoS 2 by method B of MQTT 3.1.1, 4.3.3: deliver at the first sight, remember the id until released.
        if packet_id not in self._unreleased or qos != 2:
            router.publish(self, topic, packet.data or b"", qos, packet.retain_flag)
        if qos == 1:
            await self.send(PubackPacket.build(packet_id))
        elif qos == 2:
            self._unreleased.add(packet_id)
            if len(self._unreleased) > _UNRELEASED_MAX:
                raise ValueError(f"more than {_UNRELEASED_MAX} publications without release")
            await self.send(PubrecPacket.build(packet_id))

    def _on_puback(self, packet_id: int) -> None:
        if packet_id in self._in_flight:
            self._in_flight.remove(packet_id)
            self._slots.release()


class _Router(Broker):  # type: ignore[misc]
    """amqtt's tables with connections of our own."""

    def __init__(self, access_list: str) -> None:
        # No plugin: amqtt's default ones log, admit everybody and publish $SYS.
        config = BrokerConfig(listeners={"default": ListenerConfig(bind=None)}, plugins={})
        super().__init__(config, plugin_namespace=_NAMESPACE)
        self._members = AccessList(access_list)
        self._strangers = AccessList(anonymous_lines(access_list))
        self._retained_bytes = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._closing = False

    async def close(self) -> None:
        """End every connection at once, so that no client hears another's will: only the broker goes."""
        self._closing = True
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        self._retained_messages.clear()
        amqtt_plugins.plugins_manager.pop(_NAMESPACE, None)  # amqtt would keep the last broker for ever

    # -- one connection

    async def stream_connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Serve one client from its first byte to its last, whatever it sends."""
        task = asyncio.current_task()
        assert task is not None, "asyncio.start_server runs this in a task"
        self._connections.add(task)
        try:
            if len(self._connections) <= CLIENTS_MAX and not self._closing:
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # taken over, or the broker stops; nobody waits for this task's result
        except (
            Exception
        ) as error:  # the boundary: amqtt's parsers raise anything at garbage, and it ends here
            _log.debug("broker_client_dropped peer=%s reason=%r", writer.get_extra_info("peername"), error)
        finally:
            self._connections.discard(task)
            await _hang_up(writer)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        # For clients without an MQTT keepalive. (TCP_NODELAY is set by asyncio on every connection.)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tls = writer.get_extra_info("ssl_object")
        name = peer_common_name(tls)
        if tls is not None and name is None:
            raise ValueError("a certificate with neither a node's name nor a client's")
        packets = _Whole(reader)
        async with asyncio.timeout(_GREETING_S):
            await packets.next_packet(only=CONNECT)
            if packets.protocol_level != _LEVEL:
                writer.write(_CONNECT_UNSUPPORTED)
                return
            handler, session = await _Handler.init_from_connect(
                packets, StreamWriterAdapter(writer), self.plugins_manager
            )
            if not packets.is_read():
                raise ValueError("a CONNECT with bytes left over")
        handler.begin(session, name, packets, writer)
        refusal = await self._admit(handler)
        if refusal is not None:
            writer.write(ConnackPacket.build(0, refusal).to_bytes())
            return
        # From here to the try no await: whoever is in the table is taken out again.
        self._sessions[handler.client_id] = (session, handler)
        said_goodbye = False
        try:
            session.transitions.connect()
            await handler.send(ConnackPacket.build(0, CONNECTION_ACCEPTED))
            said_goodbye = await self._converse(handler)
        finally:
            if not said_goodbye and session.will_flag:
                self._publish_will(handler)
            for filter_ in list(handler.filters):
                self.unsubscribe(filter_, handler)
            del self._sessions[handler.client_id]
            handler.ended.set()

    async def _admit(self, handler: _Handler) -> int | None:
        """``None``, or the CONNACK code of a refusal. M5: a name is proven by a certificate, not said."""
        session = handler.session
        if handler.name is None and session.username is not None:
            return int(NOT_AUTHORIZED)  # the plain listener is for clients without a name
        session.username, session.password = handler.name, None
        session.clean_session = True
        session.client_id = session.client_id or gen_client_id()
        while (older := self._sessions.get(handler.client_id)) is not None:  # M3
            incumbent = older[1]
            if incumbent.name != handler.name:
                return int(IDENTIFIER_REJECTED)  # an id is not taken from somebody else
            incumbent.close()
            await incumbent.ended.wait()
        return None

    async def _converse(self, handler: _Handler) -> bool:
        sender = asyncio.create_task(handler.send_queued(), name=f"amqtt.send {handler.client_id}")
        # A write that fails says the connection is gone; so does the read, and the read decides.
        try:
            return await handler.receive(self)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def _publish_will(self, handler: _Handler) -> None:
        will = handler.session
        topic, data = str(will.will_topic or ""), bytes(will.will_message or b"")
        self.publish(handler, topic, data, will.will_qos or 0, bool(will.will_retain))  # M4

    # -- routing

    def publish(self, sender: _Handler, topic: str, data: bytes, qos: int, retain: bool) -> None:
        """M10: to everybody who subscribed and may read, before the next message is looked at."""
        if not topic or topic.startswith("$") or "+" in topic or "#" in topic:
            raise ValueError("a topic nobody may publish to")
        if not self._allows(sender, "write", topic):
            _log.debug("broker_denied client=%s topic=%s", sender.client_id, topic)
            return
        # What is no member's is not kept: with topics of its choice it would push out the members' records.
        if retain and sender.name not in (None, CLIENT_COMMON_NAME):
            self._retain(topic, data, qos)
        wanted: dict[str, int] = {}
        for filter_, subscriptions in self._subscriptions.items():
            if matches(filter_, topic):
                for session, granted in subscriptions:
                    wanted[session.client_id] = max(granted, wanted.get(session.client_id, 0))
        for client_id, granted in wanted.items():
            reader: _Handler = self._sessions[client_id][1]
            if self._allows(reader, "read", topic):
                reader.offer(_Outgoing(topic, data, min(qos, granted), False))  # M9

    def _allows(self, client: _Handler, right: Right, topic: str) -> bool:
        access = self._strangers if client.name is None else self._members
        return access.allows(client.name, client.client_id, right, topic)

    def _retain(self, topic: str, data: bytes, qos: int) -> None:
        old = self._retained_messages.pop(topic, None)
        self._retained_bytes -= len(old.data) if old is not None else 0
        if not data:
            return
        too_many = len(self._retained_messages) >= _RETAINED_MAX
        if too_many or self._retained_bytes + len(data) > _RETAINED_BYTES_MAX:
            _log.warning("broker_retained_full topics=%d topic=%s", len(self._retained_messages), topic)
            return
        self._retained_messages[topic] = RetainedApplicationMessage(None, topic, data, qos)
        self._retained_bytes += len(data)

    def offer_retained(self, filter_: str, granted: int, reader: _Handler) -> None:
        """M2: what is retained under this filter, for this client, if it may read it."""
        for topic, kept in self._retained_messages.items():
            if matches(filter_, topic) and self._allows(reader, "read", topic):
                reader.offer(_Outgoing(topic, bytes(kept.data), min(kept.qos or 0, granted), True))

    async def add_subscription(self, subscription: tuple[str, int], session: Session) -> int:
        """amqtt's check of the filter, then M11; the granted quality of service or 0x80."""
        filter_, qos = subscription
        handler: _Handler = self._sessions[session.client_id][1]
        is_new = filter_ not in handler.filters
        if not filter_ or qos > 2 or (is_new and len(handler.filters) >= _FILTERS_MAX):
            return 0x80
        self.unsubscribe(filter_, handler)
        granted = int(await super().add_subscription((filter_, min(qos, _QOS_MAX)), session))
        if granted <= _QOS_MAX:
            handler.filters.add(filter_)
        return granted

    def unsubscribe(self, filter_: str, handler: _Handler) -> None:
        if filter_ not in handler.filters:
            return
        handler.filters.remove(filter_)
        self._del_subscription(filter_, handler.session)
        if not self._subscriptions[filter_]:
            del self._subscriptions[filter_]

    async def _topic_filtering(self, session: Session, topic: str, action: object) -> bool:
        """Subscribing is always allowed: what counts is checked per message (see ``mesh.brokers.access``)."""
        return True


_NAMESPACE = "mesh.amqtt"


async def _hang_up(writer: StreamWriter) -> None:
    """Let the last bytes out, but for no longer than ``_GOODBYE_S``; then cut."""
    try:
        async with asyncio.timeout(_GOODBYE_S):
            writer.close()
            with contextlib.suppress(OSError):  # the peer was faster
                await writer.wait_closed()
    except (TimeoutError, asyncio.CancelledError):
        pass
    finally:
        writer.transport.abort()
