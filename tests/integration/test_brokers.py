"""Both brokers keep the promises of ``mesh.broker``, with real clients over real sockets.

Parametrised over Mosquitto and amqtt; Mosquitto is skipped where it is not installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import random
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import psutil
import pytest

from mesh.broker import mosquitto_path, start_broker
from mesh.brokers import mosquitto_broker
from mesh.brokers.access import AccessList, anonymous_lines, matches
from mesh.brokers.contract import (
    PACKET_BYTES_MAX,
    QUEUED_MAX,
    BrokerKind,
    BrokerSettings,
    BrokerStartError,
    RunningBroker,
)
from mesh.brokers.probe import accepts_clients
from mesh.errors import ConfigError
from mesh.ids import MeshName
from mesh.topics import access_list
from mesh.transport.identity import Identity, MeshKey, issue, issue_client, wrong_key

KEY = MeshKey(MeshName("home"), bytes(range(32)))
STRANGE_KEY = MeshKey(MeshName("home"), bytes(32))
ROOT = "edgemesh/home"
ACCESS = f"""
topic read {ROOT}/node/+/state
topic read {ROOT}/task/#
topic write {ROOT}/task/submit
pattern write {ROOT}/node/%u/#
pattern read {ROOT}/node/+/to/%u
pattern read {ROOT}/node/+/state
pattern readwrite {ROOT}/coordinator
pattern readwrite {ROOT}/task/#
"""
SOON_S = 5.0  # nothing here takes longer on a loaded machine; what is awaited usually takes milliseconds
QUIET_S = 0.3  # how long a message that must not come is waited for, after one that must come has come

AT_ONCE = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)  # paho leaves it off, which costs 40 ms a message

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
KINDS = [pytest.param("mosquitto", marks=needs_mosquitto), "amqtt"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    kind: BrokerKind = request.param
    return kind


@pytest.fixture
async def broker(kind: BrokerKind, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    running = await start_broker(settings(kind, tmp_path))
    yield running
    await running.stop()


def settings(kind: BrokerKind, tmp_path: Path, **changes: Any) -> BrokerSettings:
    given: dict[str, Any] = {
        "mesh": KEY.name,
        "identity": issue(KEY, "host", tmp_path / "host"),
        "access_list": ACCESS,
        "directory": tmp_path / "broker",
        "addresses": ("127.0.0.1",),
        "plain_port": 0,
        "kind": kind,
    }
    return BrokerSettings(**(given | changes))


@asynccontextmanager
async def node(
    broker: RunningBroker, tmp_path: Path, name: str, *, key: MeshKey = KEY, **more: Any
) -> AsyncIterator[aiomqtt.Client]:
    """A member: its name is in its certificate, whatever it calls itself."""
    identity = issue(key, name, tmp_path / f"client-{key.fingerprint}")
    async with member(broker, identity, identifier=more.pop("identifier", name), **more) as client:
        yield client


@asynccontextmanager
async def member(broker: RunningBroker, identity: Identity, **more: Any) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(
        "127.0.0.1",
        broker.port,
        tls_context=identity.client_context(),
        tls_insecure=True,
        socket_options=AT_ONCE,
        **{"timeout": SOON_S, **more},
    ) as client:
        yield client


@asynccontextmanager
async def anonymous(broker: RunningBroker, **more: Any) -> AsyncIterator[aiomqtt.Client]:
    assert broker.plain_port is not None
    async with aiomqtt.Client("127.0.0.1", broker.plain_port, timeout=SOON_S, **more) as client:
        yield client


async def heard(client: aiomqtt.Client, within_s: float = SOON_S) -> tuple[str, bytes, bool]:
    """Topic, payload and retain flag of the next message."""
    async with asyncio.timeout(within_s):
        async for message in client.messages:
            return str(message.topic), bytes(message.payload), bool(message.retain)
    raise AssertionError("the connection ended")


async def nothing_heard(client: aiomqtt.Client) -> None:
    with contextlib.suppress(TimeoutError):
        pytest.fail(f"heard {await heard(client, QUIET_S)}")


# -- who may connect


async def test_members_talk_and_their_order_is_kept(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a") as a, node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/to/b", qos=1)
        for number in range(200):
            await a.publish(f"{ROOT}/node/a/to/b", str(number), qos=1)
        assert [int((await heard(b))[1]) for _ in range(200)] == list(range(200))


async def test_anonymous_clients_talk_on_the_plain_port(broker: RunningBroker) -> None:
    async with anonymous(broker) as one, anonymous(broker) as two:
        await one.subscribe(f"{ROOT}/task/#")
        await two.publish(f"{ROOT}/task/submit", "please", qos=1)
        await nothing_heard(two)
        assert (await heard(one))[1] == b"please"


async def test_a_member_of_another_mesh_is_refused(broker: RunningBroker, tmp_path: Path) -> None:
    with pytest.raises((aiomqtt.MqttError, ssl.SSLError)) as caught:
        async with node(broker, tmp_path, "a", key=STRANGE_KEY):
            pytest.fail("connected")
    assert wrong_key(caught.value, "the broker") is not None


async def test_a_stranger_who_trusts_anybody_is_refused_too(broker: RunningBroker, tmp_path: Path) -> None:
    """The broker itself must refuse; here the client would accept any broker."""
    identity = issue(STRANGE_KEY, "a", tmp_path / "strange")
    context = identity.client_context()
    context.verify_mode = ssl.CERT_NONE
    assert not await greeted(broker.port, context)
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    assert not await greeted(broker.port, nobody)
    assert await greeted(broker.port, issue(KEY, "a", tmp_path / "member").client_context())


async def test_the_plain_listener_is_on_loopback_only(broker: RunningBroker) -> None:
    listening = [
        c.laddr
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for c in process.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == broker.plain_port
    ]
    assert [address.ip for address in listening] == ["127.0.0.1"]


async def test_a_name_that_is_only_said_is_refused(broker: RunningBroker) -> None:
    """A broker that believed it would grant an anonymous client the rights of the node it names."""
    with pytest.raises(aiomqtt.MqttError, match=r"(?i)not authori[sz]ed"):
        async with anonymous(broker, username="a"):
            pytest.fail("connected")


# -- who may say and hear what


async def test_an_anonymous_client_cannot_speak_for_a_node(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "b") as b, anonymous(broker) as stranger:
        await b.subscribe([(f"{ROOT}/#", 1)])
        await stranger.publish(f"{ROOT}/node/a/state", "dead", qos=1, retain=True)
        await stranger.publish(f"{ROOT}/node/a/to/b", "obey", qos=1)
        await stranger.publish(f"{ROOT}/coordinator", "me", qos=1, retain=True)
        await stranger.publish(f"{ROOT}/task/submit", "marker", qos=1)
        assert await heard(b) == (f"{ROOT}/task/submit", b"marker", False)
        await b.subscribe(f"{ROOT}/+/+/state")
        await nothing_heard(b)


async def test_an_anonymous_client_cannot_read_inboxes(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a") as a, anonymous(broker) as stranger:
        await a.publish(f"{ROOT}/node/a/to/b", "kept secret", qos=1, retain=True)
        for filter_ in ("#", f"{ROOT}/node/+/to/#", f"{ROOT}/node/a/to/b"):
            with contextlib.suppress(aiomqtt.MqttError):  # to refuse the subscription is as good
                await stranger.subscribe(filter_, qos=1)
        await a.publish(f"{ROOT}/node/a/to/b", "secret", qos=1)
        await a.publish(f"{ROOT}/task/1/status", "marker", qos=1)
        assert (await heard(stranger))[1] == b"marker"


async def test_a_node_cannot_write_below_another(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a", identifier="b") as a, node(broker, tmp_path, "c") as c:
        await c.subscribe([(f"{ROOT}/node/+/state", 1), (f"{ROOT}/node/+/to/c", 1)])
        await a.publish(f"{ROOT}/node/b/state", "forged", qos=1)
        await a.publish(f"{ROOT}/node/b/to/c", "forged", qos=1)
        await a.publish(f"{ROOT}/node/a/to/c", "true", qos=1)
        assert await heard(c) == (f"{ROOT}/node/a/to/c", b"true", False)


async def test_a_node_reads_its_own_inbox_only(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a") as a, node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/to/#", qos=1)
        await a.publish(f"{ROOT}/node/a/to/c", "not for b", qos=1)
        await a.publish(f"{ROOT}/node/a/to/b", "for b", qos=1)
        assert (await heard(b))[1] == b"for b"


async def test_a_client_with_a_certificate_may_ask_and_is_no_member(kind: BrokerKind, tmp_path: Path) -> None:
    """What ``edgemesh mqtt`` issues may be copied to a sensor: it must not let the sensor coordinate."""
    shell = issue_client(KEY, "shell", tmp_path / "shell")
    forged = [
        f"{ROOT}/coordinator",
        f"{ROOT}/task/t/status",
        f"{ROOT}/task/t/result",
        f"{ROOT}/task/t/stream",
        f"{ROOT}/client/me",
        f"{ROOT}/event",
        *(f"{ROOT}/node/{name}/{what}" for name in ("a", "shell") for what in ("state", "to/a")),
    ]
    running = await start_broker(settings(kind, tmp_path, access_list=access_list(KEY.name)))
    try:
        async with node(running, tmp_path, "a") as a, member(running, shell, identifier="x") as client:
            await a.subscribe("#", qos=1)
            await client.subscribe("#", qos=1)
            for topic in forged:
                await client.publish(topic, b"forged", qos=1, retain=True)
            await client.publish(f"{ROOT}/task/submit", b"asked", qos=1)
            assert (await heard(a))[:2] == (f"{ROOT}/task/submit", b"asked")
            await a.publish(f"{ROOT}/task/t/result", b"public", qos=1)
            await a.publish(f"{ROOT}/node/a/to/b", b"private", qos=1)
            await a.publish(f"{ROOT}/node/a/state", b"online", qos=1)
            assert (await heard(client))[1] == b"public"
            assert (await heard(client))[1] == b"online"
    finally:
        await running.stop()


async def test_a_client_s_certificate_makes_no_server(tmp_path: Path) -> None:
    """Or whoever was given one could take a dead broker's address and hear all that the nodes say."""
    shell = issue_client(KEY, "shell", tmp_path / "shell")
    with pytest.raises(BrokerStartError):  # it asks itself for a connection first, as a node would
        await start_broker(settings("mosquitto" if mosquitto_path() else "amqtt", tmp_path, identity=shell))


async def test_a_last_will_obeys_the_access_list(broker: RunningBroker, tmp_path: Path) -> None:
    """Else anybody could bury any node: connect, name its state topic as the will, vanish."""
    async with node(broker, tmp_path, "b") as b:
        await b.subscribe([(f"{ROOT}/#", 1)])
        forged = aiomqtt.Will(f"{ROOT}/node/a/state", "dead", qos=1, retain=True)
        allowed = aiomqtt.Will(f"{ROOT}/task/submit", "last words", qos=1)
        assert broker.plain_port is not None
        for will in (forged, allowed):
            with contextlib.suppress(aiomqtt.MqttError):
                async with anonymous(broker, will=will) as stranger:
                    cut(stranger)
                    await b.publish(f"{ROOT}/node/b/metrics", "still here")
        assert (await heard(b))[1] == b"last words"


# -- last wills, take-over


async def test_a_killed_client_leaves_its_will(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/state", qos=1)
        client = await spawn_client(broker, tmp_path, "a", keepalive_s=30)
        client.kill()
        await client.wait()
        assert await heard(b) == (f"{ROOT}/node/a/state", b"gone", False)
    async with node(broker, tmp_path, "c") as late:
        await late.subscribe(f"{ROOT}/node/+/state", qos=1)
        assert await heard(late) == (f"{ROOT}/node/a/state", b"gone", True)


async def test_a_hung_client_leaves_its_will_within_its_keepalive(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/state", qos=1)
        client = await spawn_client(broker, tmp_path, "a", keepalive_s=2)
        client.send_signal(signal.SIGSTOP)
        try:
            # Mosquitto 2.0 looks at keepalives every five seconds only; nothing can be set about that.
            slack_s = 6 if broker.kind == "mosquitto" else 1
            assert await heard(b, within_s=2 * 1.5 + slack_s) == (f"{ROOT}/node/a/state", b"gone", False)
        finally:
            client.kill()
            await client.wait()


async def test_a_client_that_pings_is_not_dropped(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a", keepalive=1) as a:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            await nothing_heard(a)  # nothing is said for three keepalives, and paho pings meanwhile
        await a.subscribe(f"{ROOT}/task/#")


async def test_a_goodbye_leaves_no_will(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/state", qos=1)
        async with node(broker, tmp_path, "a", will=aiomqtt.Will(f"{ROOT}/node/a/state", "gone")):
            pass
        await nothing_heard(b)


async def test_a_second_life_ends_the_first_whose_will_comes_before_it(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/state", qos=1)
        will = aiomqtt.Will(f"{ROOT}/node/a/state", "gone", qos=1, retain=True)
        with pytest.raises(aiomqtt.MqttError):
            async with (
                node(broker, tmp_path, "a", will=will) as old,
                node(broker, tmp_path, "a", will=will) as new,
            ):
                await new.publish(f"{ROOT}/node/a/state", "born", qos=1, retain=True)
                assert (await heard(b))[1] == b"gone"
                assert (await heard(b))[1] == b"born"
                await heard(old)  # ends with the connection


# -- retained messages


async def test_retained_messages_are_kept_replaced_and_cleared(broker: RunningBroker, tmp_path: Path) -> None:
    topic = f"{ROOT}/node/a/state"
    async with node(broker, tmp_path, "a") as a:
        for payload in ("one", "two"):
            await a.publish(topic, payload, qos=1, retain=True)
        async with node(broker, tmp_path, "b") as b:
            await b.subscribe(f"{ROOT}/node/+/state", qos=1)
            assert await heard(b) == (topic, b"two", True)
            await a.publish(topic, "three", qos=1, retain=True)
            assert await heard(b) == (topic, b"three", False)  # live, so not flagged as retained
            await a.publish(topic, b"", qos=1, retain=True)
            assert await heard(b) == (topic, b"", False)
        async with node(broker, tmp_path, "c") as c:
            await c.subscribe(f"{ROOT}/node/+/state", qos=1)
            await nothing_heard(c)


async def test_who_subscribed_to_nothing_hears_nothing(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a") as a, node(broker, tmp_path, "b") as b:
        await a.publish(f"{ROOT}/node/a/state", "alive", qos=1, retain=True)
        await b.subscribe(f"{ROOT}/node/+/state", qos=1)
        await heard(b)
        async with node(broker, tmp_path, "c") as c:
            await nothing_heard(c)
            await c.subscribe(f"{ROOT}/node/c/none", qos=1)
            await nothing_heard(c)


async def test_the_quality_of_service_is_the_lower_of_both(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a") as a, node(broker, tmp_path, "b") as b:
        await b.subscribe([(f"{ROOT}/node/+/to/b", 1), (f"{ROOT}/node/+/state", 0)])
        await a.publish(f"{ROOT}/node/a/to/b", "0 to 1", qos=0)
        await a.publish(f"{ROOT}/node/a/to/b", "1 to 1", qos=1)
        await a.publish(f"{ROOT}/node/a/state", "1 to 0", qos=1)
        await a.publish(f"{ROOT}/node/a/to/b", "2 to 1", qos=2)
        qualities: dict[bytes, int] = {}
        async with asyncio.timeout(SOON_S):
            async for message in b.messages:
                qualities[bytes(message.payload)] = message.qos
                if len(qualities) == 4:
                    break
        assert qualities == {b"0 to 1": 0, b"1 to 1": 1, b"1 to 0": 0, b"2 to 1": 1}


async def test_subscribing_again_replaces_the_quality_of_service(
    broker: RunningBroker, tmp_path: Path
) -> None:
    async with node(broker, tmp_path, "a") as a:
        for qos in (0, 1, 0, 1):
            await a.subscribe(f"{ROOT}/task/#", qos=qos)
            await a.publish(f"{ROOT}/task/1/status", "x", qos=1)
            async with asyncio.timeout(SOON_S):
                assert (await anext(aiter(a.messages))).qos == qos


async def test_after_unsubscribing_nothing_comes(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "a") as a:
        await a.subscribe([(f"{ROOT}/task/#", 1), (f"{ROOT}/coordinator", 1)])
        await a.unsubscribe(f"{ROOT}/task/#")
        await a.publish(f"{ROOT}/task/1/status", "unheard", qos=1)
        await a.publish(f"{ROOT}/coordinator", "heard", qos=1)
        assert (await heard(a))[1] == b"heard"


# -- hostile and clumsy clients


async def test_a_megabyte_passes(broker: RunningBroker, tmp_path: Path) -> None:
    payload = random.Random(1).randbytes(1_000_000)
    async with node(broker, tmp_path, "a") as a, node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/to/b", qos=1)
        await a.publish(f"{ROOT}/node/a/to/b", payload, qos=1)
        assert (await heard(b))[1] == payload


GARBAGE: dict[str, Callable[[], bytes]] = {
    "noise": lambda: random.Random(2).randbytes(4096),
    "zeros": lambda: bytes(4096),
    "http": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "length of five bytes": lambda: b"\x10\xff\xff\xff\xff\xff",
    "connect cut short": lambda: b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\xff",
    "connect with a lying length": lambda: b"\x10\x08\x00\x04MQTT\x04\x02\x00\x0a\x00\x00",
    "connect with rest": lambda: b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x0a\x00\x00zz",
    "second connect": lambda: CONNECT * 2,
    "reserved type": lambda: CONNECT + b"\xf0\x00",
    "broker's own packet": lambda: CONNECT + b"\x20\x02\x00\x00",
    "subscribe to nothing": lambda: CONNECT + b"\x82\x02\x00\x01",
    "subscribe with a lying length": lambda: CONNECT + b"\x82\x07\x00\x01\x00\xffabc",
    "subscribe torn in its second filter": lambda: CONNECT + b"\x82\x0b\x00\x01\x00\x01a\x01\x00\x09abc",
    "publish to a wildcard": lambda: CONNECT + b"\x30\x05\x00\x03a/#",
    "publish to no topic": lambda: CONNECT + b"\x30\x02\x00\x00",
    "publish with quality 3": lambda: CONNECT + b"\x36\x05\x00\x01a\x00\x01",
    "publish with id 0": lambda: CONNECT + b"\x32\x05\x00\x01a\x00\x00",
    "publish that is too large": lambda: CONNECT + b"\x30\x80\x80\x80\x7f" + bytes(1000),
}
CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_ends_its_own_connection_and_harms_nobody(
    kind: BrokerKind, tmp_path: Path, garbage: str
) -> None:
    running = await start_broker(settings(kind, tmp_path))
    try:
        async with node(running, tmp_path, "a") as a:
            await a.subscribe(f"{ROOT}/task/#", qos=1)
            assert running.plain_port is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", running.plain_port)
            writer.write(GARBAGE[garbage]())
            if garbage == "connect cut short" or garbage == "zeros":
                # An honest packet so far: only the end shows that it is none, unless it is seen at once.
                with contextlib.suppress(OSError):
                    writer.write_eof()
            async with asyncio.timeout(SOON_S):
                with contextlib.suppress(ConnectionError):
                    while await reader.read(4096):
                        pass  # an answer such as CONNACK, then the end
            writer.transport.abort()
            for port, context in ((running.port, None), (running.port, a_context(tmp_path))):
                _, raw = await asyncio.open_connection("127.0.0.1", port, ssl=context)
                raw.write(GARBAGE[garbage]())
                raw.transport.abort()
            await a.publish(f"{ROOT}/task/1/status", "still served", qos=1)
            assert (await heard(a))[1] == b"still served"
    finally:
        await running.stop()


async def test_a_packet_over_the_limit_ends_its_sender(broker: RunningBroker, tmp_path: Path) -> None:
    async with node(broker, tmp_path, "b") as b:
        await b.subscribe(f"{ROOT}/node/+/state", qos=1)
        will = aiomqtt.Will(f"{ROOT}/node/a/state", "gone", qos=1)
        with pytest.raises(aiomqtt.MqttError):
            async with node(broker, tmp_path, "a", will=will, timeout=1) as a:
                await a.publish(f"{ROOT}/node/a/to/b", bytes(PACKET_BYTES_MAX + 1))
                await heard(a)
        assert (await heard(b))[1] == b"gone"


async def test_a_client_of_mqtt_5_is_served_or_told_to_fall_back(
    broker: RunningBroker, tmp_path: Path
) -> None:
    try:
        async with node(broker, tmp_path, "a", protocol=aiomqtt.ProtocolVersion.V5):
            assert broker.kind == "mosquitto"
    except aiomqtt.MqttError as error:
        assert broker.kind == "amqtt"
        assert "protocol version" in str(error).lower()


# -- start and stop


async def test_stopping_frees_the_ports_and_ends_the_clients(kind: BrokerKind, tmp_path: Path) -> None:
    first = await start_broker(settings(kind, tmp_path))
    _reader, writer = await asyncio.open_connection("127.0.0.1", first.port, ssl=a_context(tmp_path))
    before = asyncio.all_tasks()
    await first.stop()
    await first.stop()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", first.port)
    writer.transport.abort()
    again = await start_broker(settings(kind, tmp_path, port=first.port, plain_port=first.plain_port))
    assert (again.port, again.plain_port) == (first.port, first.plain_port)
    await again.stop()
    leaked = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not leaked


async def test_a_stop_fires_no_wills(kind: BrokerKind, tmp_path: Path) -> None:
    """Who still hears something must not hear that the others died: they will be at the next broker."""
    running = await start_broker(settings(kind, tmp_path))
    with contextlib.suppress(aiomqtt.MqttError):
        async with node(running, tmp_path, "b") as b:
            await b.subscribe(f"{ROOT}/node/+/state", qos=1)
            client = await spawn_client(running, tmp_path, "a", keepalive_s=30)
            await running.stop()
            try:
                await nothing_heard(b)
            finally:
                client.kill()
                await client.wait()


async def test_a_taken_port_is_said_at_once(kind: BrokerKind, broker: RunningBroker, tmp_path: Path) -> None:
    with pytest.raises(BrokerStartError, match=r"cannot listen on 127\.0\.0\.1 port"):
        await start_broker(settings(kind, tmp_path / "second", port=broker.port))


async def test_several_addresses_share_one_port(kind: BrokerKind, tmp_path: Path) -> None:
    running = await start_broker(settings(kind, tmp_path, addresses=("127.0.0.1", "127.0.0.2")))
    try:
        for address in ("127.0.0.1", "127.0.0.2"):
            _reader, writer = await asyncio.open_connection(address, running.port, ssl=a_context(tmp_path))
            writer.transport.abort()
    finally:
        await running.stop()


async def test_without_a_plain_port_there_is_none(kind: BrokerKind, tmp_path: Path) -> None:
    running = await start_broker(settings(kind, tmp_path, plain_port=None))
    assert running.plain_port is None
    await running.stop()


async def test_a_bad_access_list_is_refused_with_its_line(kind: BrokerKind, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: 'topics read x'"):
        await start_broker(settings(kind, tmp_path, access_list="topic read a\ntopics read x\n"))


async def test_a_node_that_hosts_nothing_loads_no_broker() -> None:
    loaded = "import sys, mesh.broker; sys.exit('amqtt' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", loaded)
    async with asyncio.timeout(3 * SOON_S):
        assert await process.wait() == 0


@needs_mosquitto
async def test_auto_takes_mosquitto_where_it_is_and_amqtt_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_broker(settings("auto", tmp_path))  # type: ignore[arg-type]
    assert running.kind == "mosquitto"
    await running.stop()
    monkeypatch.setattr("mesh.broker.mosquitto_path", lambda: None)
    running = await start_broker(settings("auto", tmp_path))  # type: ignore[arg-type]
    assert running.kind == "amqtt"
    await running.stop()
    with pytest.raises(BrokerStartError, match="not installed"):
        await start_broker(settings("mosquitto", tmp_path))


async def test_auto_falls_back_if_mosquitto_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "mosquitto"
    broken.write_text("#!/bin/sh\necho Error: this is no broker >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr("mesh.broker.mosquitto_path", lambda: str(broken))
    with pytest.raises(BrokerStartError, match="exit code 3; Error: this is no broker"):
        await start_broker(settings("mosquitto", tmp_path))
    running = await start_broker(settings("auto", tmp_path))  # type: ignore[arg-type]
    assert running.kind == "amqtt"
    await running.stop()


@needs_mosquitto
async def test_a_free_port_that_is_snatched_away_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        taken = thief.getsockname()[1]
        answers = iter([taken, taken + 1])
        looked = mosquitto_broker._free_port
        monkeypatch.setattr(
            mosquitto_broker,
            "_free_port",
            lambda addresses, wanted: next(answers, 0) or looked(addresses, wanted),
        )
        running = await start_broker(settings("mosquitto", tmp_path))
        assert running.port not in (0, taken)
        await running.stop()


@needs_mosquitto
async def test_the_death_of_mosquitto_is_told_with_its_reason(tmp_path: Path) -> None:
    running = await start_broker(settings("mosquitto", tmp_path))
    family = processes_of(running.pid)  # type: ignore[attr-defined]
    os.kill(running.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    async with asyncio.timeout(SOON_S):
        assert "SIGKILL" in await running.died()
    await running.stop()
    await until_gone(family)


@needs_mosquitto
async def test_mosquitto_dies_with_its_parent_even_by_kill_9(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(3 * SOON_S):
        family = processes_of(int(await parent.stdout.readline()))
    assert len(family) >= 2, "Mosquitto and its watcher"
    parent.kill()
    await parent.wait()
    await until_gone(family)


HOST = """
import asyncio, sys
from pathlib import Path
from tests.integration.test_brokers import settings, start_broker
async def main():
    broker = await start_broker(settings("mosquitto", Path(sys.argv[1])))
    print(broker.pid, flush=True)
    await broker.died()
asyncio.run(main())
"""


# -- amqtt's bounds, which a client cannot see from outside


@needs_mosquitto
async def test_what_strangers_have_retained_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosquitto has no bound on retained topics, and a stranger may cancel as many names as it likes."""
    monkeypatch.setattr("mesh.brokers.mosquitto_broker._MEMORY_BYTES_MAX", 20_000_000)
    running = await start_broker(settings("mosquitto", tmp_path, access_list=access_list(KEY.name)))
    assert isinstance(running, mosquitto_broker.MosquittoBroker)
    try:
        async with node(running, tmp_path, "a") as a:
            with contextlib.suppress(aiomqtt.MqttError):  # at the bound it is cut
                async with anonymous(running) as stranger:
                    for number in range(60):
                        await stranger.publish(f"{ROOT}/task/t-{number}/cancel", b"x" * 1_000_000, 1, True)
            assert psutil.Process(running.pid).memory_info().rss < 50_000_000
            await a.subscribe(f"{ROOT}/node/a/state", qos=1)
            await a.publish(f"{ROOT}/node/a/state", b"still here", qos=1)
            assert (await heard(a))[1] == b"still here"
    finally:
        await running.stop()


async def test_strangers_have_nothing_retained_by_amqtt(tmp_path: Path) -> None:
    """They would push the members' own records out of its bound."""
    running = await start_broker(settings("amqtt", tmp_path, access_list=access_list(KEY.name)))
    try:
        async with anonymous(running) as stranger, node(running, tmp_path, "a") as a:
            await stranger.publish(f"{ROOT}/task/t/cancel", b"x", qos=1, retain=True)
            await a.publish(f"{ROOT}/task/t/status", b"kept", qos=1, retain=True)
            await a.subscribe(f"{ROOT}/task/#", qos=1)
            assert await heard(a) == (f"{ROOT}/task/t/status", b"kept", True)
            await nothing_heard(a)
    finally:
        await running.stop()


async def test_a_client_that_never_says_hello_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.brokers.amqtt_broker._GREETING_S", 0.2)
    running = await start_broker(settings("amqtt", tmp_path))
    for context, port in ((None, running.plain_port), (a_context(tmp_path), running.port)):
        for beginning in (b"", b"\x10", b"\x10\x0c\x00\x04MQ"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(beginning)
            async with asyncio.timeout(SOON_S):
                assert await reader.read(1) == b""
            writer.transport.abort()
    await running.stop()


async def test_what_waits_for_a_slow_client_is_bounded(tmp_path: Path) -> None:
    running = await start_broker(settings("amqtt", tmp_path))
    async with node(running, tmp_path, "a") as a:
        _reader, deaf = await deaf_subscriber(running, f"{ROOT}/task/#")
        for number in range(QUEUED_MAX + 200):
            await a.publish(f"{ROOT}/task/1/stream", bytes(20_000), qos=number % 2)
        handler = handler_of(running, "deaf")
        assert len(handler._outbox) <= QUEUED_MAX
        assert handler._outbox_bytes <= 16 * 1024 * 1024
        assert handler._is_dropping
        deaf.transport.abort()
    await running.stop()


async def test_a_client_that_acknowledges_nothing_has_few_in_flight(tmp_path: Path) -> None:
    running = await start_broker(settings("amqtt", tmp_path))
    async with node(running, tmp_path, "a") as a:
        reader, deaf = await deaf_subscriber(running, f"{ROOT}/task/#")
        for _ in range(50):
            await a.publish(f"{ROOT}/task/1/status", "x", qos=1)
        got = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIET_S):
                while piece := await reader.read(65536):
                    got += piece
        assert got.count(f"{ROOT}/task/1/status".encode()) == 20
        deaf.transport.abort()
    await running.stop()


async def test_subscriptions_leave_nothing_behind(tmp_path: Path) -> None:
    running = await start_broker(settings("amqtt", tmp_path))
    async with node(running, tmp_path, "a") as a:
        for number in range(50):
            await a.subscribe(f"{ROOT}/task/{number}/status")
            await a.unsubscribe(f"{ROOT}/task/{number}/status")
        assert running._router._subscriptions == {}  # type: ignore[attr-defined]
        await a.subscribe(f"{ROOT}/task/#")
    await until(lambda: not running._router._subscriptions)  # type: ignore[attr-defined]
    assert running._router._sessions == {}  # type: ignore[attr-defined]
    await running.stop()


async def test_a_client_gets_a_bounded_number_of_filters(tmp_path: Path) -> None:
    running = await start_broker(settings("amqtt", tmp_path))
    async with anonymous(running) as greedy:
        codes = await greedy.subscribe([(f"{ROOT}/task/{number}", 0) for number in range(300)])
    assert [int(getattr(code, "value", code)) for code in codes].count(128) == 300 - 256
    await running.stop()


async def test_retained_topics_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.brokers.amqtt_broker._RETAINED_MAX", 3)
    running = await start_broker(settings("amqtt", tmp_path))
    async with node(running, tmp_path, "a") as a:
        for number in range(5):
            await a.publish(f"{ROOT}/task/{number}/status", "x", qos=1, retain=True)
        await a.publish(f"{ROOT}/task/0/status", "replaced", qos=1, retain=True)
        await a.subscribe(f"{ROOT}/task/#", qos=1)
        assert {await heard(a) for _ in range(3)} == {
            (f"{ROOT}/task/{number}/status", payload, True)
            for number, payload in ((0, b"replaced"), (1, b"x"), (2, b"x"))
        }
        await nothing_heard(a)
    await running.stop()


async def test_an_id_is_not_taken_from_somebody_else(tmp_path: Path) -> None:
    running = await start_broker(settings("amqtt", tmp_path))
    async with node(running, tmp_path, "a") as a:
        with pytest.raises(aiomqtt.MqttError, match=r"(?i)identifier"):
            async with anonymous(running, identifier="a"):
                pytest.fail("connected")
        await a.subscribe(f"{ROOT}/task/#")
    await running.stop()


# -- the access list by itself


@pytest.mark.parametrize(
    ("filter_", "topic", "selects"),
    [
        ("a", "a", True),
        ("a", "a/b", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a//c", True),
        ("a/+", "a/b/c", False),
        ("+", "a/b", False),
        ("+/+", "/a", True),
    ],
)
def test_filters_select_as_the_standard_says(filter_: str, topic: str, selects: bool) -> None:
    assert matches(filter_, topic) is selects


def test_the_access_list_reads_as_mosquitto_reads_it() -> None:
    access = AccessList(
        "# a comment\n\ntopic read news/#\ntopic deny news/secret\ntopic open\n"
        "user a\ntopic write mine\npattern readwrite u/%u/#\npattern read c/%c\npattern write all\n"
    )
    assert access.allows(None, "x", "read", "news/today")
    assert not access.allows(None, "x", "write", "news/today")
    assert not access.allows(None, "x", "read", "news/secret")
    assert access.allows(None, "x", "write", "open") and access.allows(None, "x", "read", "open")
    assert not access.allows("a", "x", "read", "news/today")
    assert access.allows("a", "x", "write", "mine") and not access.allows("b", "x", "write", "mine")
    assert access.allows("b", "x", "write", "u/b/y") and not access.allows("b", "x", "write", "u/a/y")
    assert not access.allows(None, "x", "write", "u//y")
    assert access.allows("b", "x", "read", "c/x") and not access.allows("b", "y", "read", "c/x")
    assert access.allows(None, "x", "write", "all")
    assert not access.allows("+", "x", "write", "u/a/y") and not access.allows("b", "#", "read", "c/x")


def test_strangers_get_the_topic_lines_before_the_first_user() -> None:
    text = "topic read a\npattern write all\n user b\ntopic write b\n"
    assert anonymous_lines(text) == "topic read a\n"


# -- the example for a site's own broker


DEPLOY = Path(__file__).parents[2] / "deploy" / "mosquitto"


def test_the_access_lists_for_a_site_are_those_of_the_topic_table() -> None:
    """If this fails, a row of ``mesh.topics`` changed: put the lines it prints into deploy/mosquitto."""

    def rules(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    current = access_list(MeshName("home"))
    assert rules((DEPLOY / "members.acl").read_text()) == rules(current)
    assert rules((DEPLOY / "strangers.acl").read_text()) == rules(anonymous_lines(current))
    AccessList(current)


@needs_mosquitto
async def test_mosquitto_serves_a_mesh_with_the_example_for_a_site(tmp_path: Path) -> None:
    there = tmp_path / "there"
    issue(KEY, "broker", there)
    for name in ("members.acl", "strangers.acl"):
        (there / name).write_text((DEPLOY / name).read_text())
    (there / "nobody.passwd").write_text("")
    ports = free_ports(2)
    text = (DEPLOY / "edgemesh.conf").read_text().replace("/etc/mosquitto/edgemesh", str(there))
    text = re.sub(r"(?m)^# (?=listener|allow_|password_file|acl_file)", "", text)
    text = text.replace("listener 8883", f"listener {ports[0]} 127.0.0.1").replace("1883", str(ports[1]))
    config = tmp_path / "site.conf"
    config.write_text(f"user {pwd.getpwuid(os.geteuid()).pw_name}\n{text}")
    process = await asyncio.create_subprocess_exec(
        *(str(mosquitto_path()), "-c", str(config)), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        for port, context in ((ports[0], a_context(tmp_path)), (ports[1], None)):
            async with asyncio.timeout(SOON_S):
                while not await accepts_clients("127.0.0.1", port, context, SOON_S):
                    assert process.returncode is None, "the example does not start"
                    await asyncio.sleep(0.01)
        with pytest.raises(aiomqtt.MqttError):
            async with aiomqtt.Client("127.0.0.1", ports[1], username="a", timeout=SOON_S):
                pytest.fail("a name that is only said was believed")
    finally:
        process.kill()
        await process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


# -- helpers that stand for the rest of the world


CLIENT = """
import sys, threading
import paho.mqtt.client as mqtt
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from mesh.transport.identity import Identity
pair = Path(sys.argv[2])
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="a")
client.tls_set_context(Identity("a", pair.parent / "ca.pem", pair, pair).client_context())
client.will_set("edgemesh/home/node/a/state", "gone", qos=1, retain=True)
client.on_connect = lambda *_: print("ready", flush=True)
client.connect("127.0.0.1", int(sys.argv[1]), keepalive=int(sys.argv[3]))
client.loop_forever()
"""


async def spawn_client(
    broker: RunningBroker, tmp_path: Path, name: str, keepalive_s: int
) -> asyncio.subprocess.Process:
    """A client in a process of its own, which may be killed or stopped."""
    pair = issue(KEY, name, tmp_path / "spawned").cert_path
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, str(broker.port), str(pair), str(keepalive_s), os.getcwd()),
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    async with asyncio.timeout(3 * SOON_S):
        assert await client.stdout.readline() == b"ready\n"
    return client


def cut(client: aiomqtt.Client) -> None:
    """End the connection as a pulled cable would, without goodbye."""
    sock = client._client.socket()
    assert sock is not None
    sock.shutdown(2)


async def greeted(port: int, context: ssl.SSLContext) -> bool:
    """Whether the broker answers a CONNECT; with TLS 1.3 a refused client learns it only then."""
    try:
        async with asyncio.timeout(SOON_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(CONNECT)
            answer = await reader.read(4)
            writer.transport.abort()
            return answer == b"\x20\x02\x00\x00"
    except OSError:
        return False


async def deaf_subscriber(
    broker: RunningBroker, filter_: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Subscribes at quality of service 1 as client "deaf", then neither reads nor acknowledges."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.plain_port, limit=1024)
    body = b"\x00\x01" + len(filter_).to_bytes(2, "big") + filter_.encode() + b"\x01"
    writer.write(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04deaf\x82" + bytes((len(body),)) + body)
    async with asyncio.timeout(SOON_S):
        assert await reader.readexactly(9) == b"\x20\x02\x00\x00\x90\x03\x00\x01\x01"
    return reader, writer


def handler_of(broker: RunningBroker, client_id: str) -> Any:
    return broker._router._sessions[client_id][1]  # type: ignore[attr-defined]


def a_context(tmp_path: Path) -> ssl.SSLContext:
    return issue(KEY, "somebody", tmp_path / "somebody").client_context()


def processes_of(pid: int) -> list[psutil.Process]:
    group = os.getpgid(pid)
    return [process for process in everybody() if in_group(process, group)]


def everybody() -> Iterator[psutil.Process]:
    yield from psutil.process_iter()


def in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False


async def until_gone(family: list[psutil.Process]) -> None:
    await until(lambda: not any(alive(process) for process in family))


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event: the end of somebody else's process."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
