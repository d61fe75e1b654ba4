"""What both kinds of hosted broker promise their clients: who connects, who says and hears what."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import time
from pathlib import Path

import aiomqtt
import psutil
import pytest

from mesh.broker import mosquitto_path, start_broker
from mesh.brokers.contract import (
    BrokerKind,
    BrokerStartError,
    RunningBroker,
)
from mesh.topics import access_list
from mesh.transport.identity import issue, issue_client, wrong_key
from tests.integration.broker_clients import (
    KEY,
    ROOT,
    SOON_S,
    STRANGE_KEY,
    anonymous,
    cut,
    greeted,
    heard,
    member,
    node,
    nothing_heard,
    settings,
    spawn_client,
)

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
