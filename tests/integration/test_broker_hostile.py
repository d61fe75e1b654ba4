"""Hostile and clumsy clients harm nobody but themselves, on both kinds of hosted broker."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import aiomqtt
import psutil
import pytest

from mesh.broker import start_broker
from mesh.brokers import mosquitto_broker
from mesh.brokers.contract import (
    PACKET_BYTES_MAX,
    QUEUED_MAX,
    BrokerKind,
    RunningBroker,
)
from mesh.topics import access_list
from tests.integration.broker_clients import (
    CONNECT,
    KEY,
    QUIET_S,
    ROOT,
    SOON_S,
    a_context,
    anonymous,
    deaf_subscriber,
    handler_of,
    heard,
    needs_mosquitto,
    node,
    nothing_heard,
    settings,
    until,
)

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
