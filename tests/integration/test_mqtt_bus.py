"""The real bus on real brokers: Mosquitto and amqtt as the mesh hosts them, and a site's own Mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from mesh.broker import start_broker
from mesh.brokers.contract import BrokerSettings
from mesh.facts import BrokerRef, LinkDown, LinkUp
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId
from mesh.messages import (
    Drain,
    LeaseRecord,
    NodeStanding,
    NodeState,
    OutcomeTaken,
    Submit,
    TaskEvent,
    TaskForgotten,
    TaskReply,
    TaskResult,
    TaskStatus,
    TaskTokens,
    Unacceptable,
)
from mesh.packets import CLIENT, client_filters, node_filters
from mesh.topics import EVENT, RESULT, STATUS, STREAM, access_list
from mesh.transport.bus import Heard
from mesh.transport.identity import MeshKey, issue
from mesh.transport.mqtt import MqttBus
from tests.integration.site_broker import SiteBroker, free_port

HOME = MeshName("home")
A, B = NodeId("a"), NodeId("b")
WAIT_S = 15.0  # how long a test waits for what must come; a healthy machine needs milliseconds
_T = TypeVar("_T")

Join = Callable[..., Awaitable[MqttBus]]


def state(node: NodeId, standing: NodeStanding = "online", incarnation: int = 1) -> NodeState:
    return NodeState(node=node, state=standing, incarnation=incarnation, boot=Boot("b1"))


def status(task: str = "t-1") -> TaskStatus:
    return TaskStatus(
        task=TaskId(task), state="queued", reason=None, node=None, attempt=0, epoch=Epoch(1, A), durable_on=1
    )


async def until(bus: MqttBus, kind: type[_T], **fields: Any) -> _T:
    """The next event of this kind: a message (with these fields), or a fact about the link."""
    async with asyncio.timeout(WAIT_S):
        while True:
            event = await bus.next()
            what = event.message if isinstance(event, Heard) else event
            if isinstance(what, kind) and all(getattr(what, name) == value for name, value in fields.items()):
                return what


async def heard(bus: MqttBus) -> Heard:
    async with asyncio.timeout(WAIT_S):
        while True:
            event = await bus.next()
            if isinstance(event, Heard):
                return event


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    """Start buses on a broker; all are closed at the end, and none may have broken."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(broker: BrokerRef | None, me: NodeId = A, **arguments: Any) -> MqttBus:
            arguments.setdefault("filters", node_filters(HOME, me))
            bus = MqttBus(mesh=HOME, me=me, boot=Boot("b1"), rng=Random(1), **arguments)
            running = asyncio.create_task(bus.run())

            async def stop() -> None:
                await bus.close()
                async with asyncio.timeout(WAIT_S):
                    await running

            stack.push_async_callback(stop)
            bus.use(broker)
            if broker is not None:
                await until(bus, LinkUp)
            return bus

        yield start


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[SiteBroker]:
    async with SiteBroker(tmp_path) as broker:
        yield broker


class Hosted:
    """A broker as a node hosts it, and what its members need to connect."""

    def __init__(self, ref: BrokerRef, plain: BrokerRef, tls_of: Callable[[str], Any]) -> None:
        self.ref = ref
        self.plain = plain
        self.tls_of = tls_of


@pytest.fixture(params=["mosquitto", "amqtt"])
async def hosted(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Hosted]:
    key = MeshKey.create(HOME, bytes(32))
    broker = await start_broker(
        BrokerSettings(
            mesh=HOME,
            identity=issue(key, "host", tmp_path),
            access_list=access_list(HOME),
            directory=tmp_path / "broker",
            addresses=("127.0.0.1",),
            plain_port=0,
            kind=request.param,
        )
    )
    assert broker.plain_port is not None
    local = ("127.0.0.1",)
    host = NodeId("host")
    yield Hosted(
        BrokerRef(epoch=1, host=host, addresses=local, port=broker.port),
        BrokerRef(epoch=1, host=host, addresses=local, port=broker.plain_port, tls=False),
        lambda name: issue(key, name, tmp_path).client_context(),
    )
    await broker.stop()


# ── on every broker the mesh hosts ──────────────────────────────────────────────────────────────────


async def test_members_hear_one_another_under_their_own_names(hosted: Hosted, join: Join) -> None:
    a = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    b = await join(hosted.ref, B, tls=hosted.tls_of("b"))
    a.publish(Drain(on=True), to=B)
    assert await heard(b) == Heard(Drain(on=True), A)
    a.publish(Drain(on=False), to=A)
    assert await heard(a) == Heard(Drain(on=False), A), "a core may send to its own node"
    lease = LeaseRecord(kind="lease", epoch=Epoch(3, B), ttl_s=3.0, beat=1)
    b.publish(lease)
    assert await heard(a) == Heard(lease, B)
    assert await heard(b) == Heard(lease, B), "the echo by which a coordinator knows that it still is one"


async def test_a_newcomer_learns_at_once_what_is_retained(hosted: Hosted, join: Join) -> None:
    a = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    a.publish(state(A))
    assert await heard(a) == Heard(state(A), A)
    b = await join(hosted.ref, B, tls=hosted.tls_of("b"))  # waits for LinkUp, which nothing may precede
    assert await heard(b) == Heard(state(A), A)


async def test_pipelined_messages_keep_their_order(hosted: Hosted, join: Join) -> None:
    a = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    b = await join(hosted.ref, B, tls=hosted.tls_of("b"))
    for n in range(1, 501):
        a.publish(OutcomeTaken(epoch=Epoch(1, A), task=TaskId("t"), attempt=n), to=B)
    assert [(await until(b, OutcomeTaken)).attempt for _ in range(500)] == list(range(1, 501))
    assert (a.traffic.dropped_out, b.traffic.dropped_in) == (0, 0)


async def test_a_client_submits_and_follows_on_the_plain_loopback_listener(
    hosted: Hosted, join: Join
) -> None:
    """EM-MQTT-14, EM-MQTT-20."""
    coordinator = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    mine = TaskId("t-mine")
    client = await join(
        hosted.plain,
        NodeId("someone"),
        filters=[*client_filters(HOME, (STATUS, STREAM, RESULT), task=mine), "edgemesh/home/client/#"],
    )
    client.publish(Submit(id=mine, prompt="hello", reply_to="edgemesh/home/client/me", correlation="7"))
    asked = await heard(coordinator)
    assert asked.sender == CLIENT
    assert isinstance(asked.message, Submit) and asked.message.prompt == "hello"
    coordinator.publish(status("t-another"))
    coordinator.publish(status(mine))
    coordinator.publish(TaskReply(reply_to="edgemesh/home/client/me", correlation="7", body=status(mine)))
    coordinator.publish(TaskTokens(task=mine, attempt=1, seq=0, text="hi", n_tokens=1))
    assert await heard(client) == Heard(status(mine), A)
    assert await until(client, TaskReply) == TaskReply(
        reply_to="edgemesh/home/client/me", correlation="7", body=status(mine)
    )
    assert (await until(client, TaskTokens)).text == "hi"


async def test_a_stranger_can_neither_speak_for_a_node_nor_read_an_inbox(hosted: Hosted, join: Join) -> None:
    a = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    stranger = await join(hosted.plain, B, filters=["#"])
    stranger.publish(state(A, "left", 99))
    stranger.publish(LeaseRecord(kind="claim", epoch=Epoch(99, B), ttl_s=3.0, beat=1))
    stranger.publish(Drain(on=True, leave=True), to=A)
    stranger.publish(Submit(prompt="hello"))
    assert isinstance((await heard(a)).message, Submit), "the only thing a stranger may say"
    a.publish(Drain(on=True), to=B)
    a.publish(TaskEvent(text="after"))
    assert (await heard(stranger)).message == TaskEvent(text="after")


async def test_a_member_cannot_speak_for_another(hosted: Hosted, join: Join) -> None:
    """EM-MQTT-04."""
    honest = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    liar = await join(hosted.ref, B, tls=hosted.tls_of("liar"), filters=[])
    liar.publish(state(B))
    liar.publish(Drain(on=True), to=A)
    liar.publish(Submit(prompt="now the truth"))
    assert isinstance((await heard(honest)).message, Submit)


async def test_a_farewell_is_sent_before_leaving_and_no_will_follows(hosted: Hosted, join: Join) -> None:
    a = await join(hosted.ref, A, tls=hosted.tls_of("a"))
    b = await join(hosted.ref, B, tls=hosted.tls_of("b"), will=lambda: state(B, "offline"))
    await b.close([state(B, "left", 2)])
    assert await heard(a) == Heard(state(B, "left", 2), B)
    a.publish(Drain(on=True), to=A)
    assert isinstance((await heard(a)).message, Drain), "the will stays with the broker"


CHILD = """
import asyncio, sys
from mesh.facts import BrokerRef, LinkUp
from mesh.messages import NodeState
from mesh.transport.mqtt import MqttBus
from mesh.packets import node_filters

async def main():
    will = lambda: NodeState(node="b", state="offline", incarnation=7, boot="b2")
    bus = MqttBus(mesh="home", me="b", boot="b2", filters=node_filters("home", "b"), will=will)
    bus.use(BrokerRef(epoch=0, host=None, addresses=("127.0.0.1",), port=int(sys.argv[1]), tls=False))
    running = asyncio.create_task(bus.run())
    assert isinstance(await bus.next(), LinkUp)
    print("linked", flush=True)
    await running

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def child_node(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """Node ``b`` in a process of its own, linked."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(port), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert await process.stdout.readline() == b"linked\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_the_broker_sends_the_will_of_a_node_that_dies_or_hangs(
    how: signal.Signals, site: SiteBroker, join: Join
) -> None:
    """EM-MQTT-03."""
    a = await join(site.ref, A)
    async with child_node(site.port) as b:
        b.send_signal(how)
        assert await until(a, NodeState) == NodeState(node=B, state="offline", incarnation=7, boot=Boot("b2"))


# ── links that break, move and never come ───────────────────────────────────────────────────────────


async def test_the_bus_comes_back_and_subscribes_again_when_the_broker_restarts(
    site: SiteBroker, join: Join
) -> None:
    a = await join(site.ref, A)
    b = await join(site.ref, B)
    await site.kill()
    assert await until(a, LinkDown) == LinkDown(host_is_dead=False)
    a.publish(Drain(on=True), to=B)
    assert a.traffic.dropped_unlinked == 1, "nothing is kept for a broker that is not there"
    await site.start()
    for bus in (a, b):
        assert await until(bus, LinkUp) == LinkUp(broker_epoch=0, host=None)
    a.publish(Drain(on=False), to=B)
    assert await heard(b) == Heard(Drain(on=False), A)
    assert a.traffic.links == 2 and a.trouble is None


async def test_a_broker_that_hangs_is_given_up(site: SiteBroker, join: Join) -> None:
    a = await join(site.ref, A)
    site.stop()
    since = time.monotonic()
    await until(a, LinkDown)
    assert time.monotonic() - since < 10


async def test_a_host_that_refuses_connections_is_reported_dead_once(site: SiteBroker, join: Join) -> None:
    ref = BrokerRef(epoch=4, host=B, addresses=("127.0.0.1",), port=site.port, tls=False)
    a = await join(ref, A)
    await site.kill()
    assert await until(a, LinkDown) == LinkDown(host_is_dead=False)
    assert await until(a, LinkDown) == LinkDown(host_is_dead=True)
    await site.start()
    assert await until(a, LinkUp) == LinkUp(broker_epoch=4, host=B), "and no third LinkDown before"


async def test_the_bus_moves_to_the_broker_it_is_told(tmp_path: Path, join: Join) -> None:
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir()
    async with SiteBroker(tmp_path / "1") as old, SiteBroker(tmp_path / "2") as new:
        witness = await join(old.ref, B)
        a = await join(old.ref, A, will=lambda: state(A, "offline"))
        a.use(new.ref)
        assert await until(a, LinkDown) == LinkDown()
        assert await until(a, LinkUp) == LinkUp(broker_epoch=0, host=None)
        a.use(None)
        assert await until(a, LinkDown) == LinkDown()
        assert not a.is_linked
        witness.publish(Drain(on=True), to=B)
        assert isinstance((await heard(witness)).message, Drain), "moving is no death: no will"


async def test_new_addresses_of_the_same_broker_do_not_break_the_link(site: SiteBroker, join: Join) -> None:
    a = await join(site.ref, A)
    a.use(BrokerRef(epoch=0, host=None, addresses=("127.0.0.1", "localhost"), port=site.port, tls=False))
    a.publish(Drain(on=True), to=A)
    assert isinstance(await a.next(), Heard)
    assert a.traffic.links == 1


def _black_hole() -> tuple[socket.socket, list[socket.socket]]:
    """A port whose connections are neither accepted nor refused: its queue of one is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = []
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        fillers.append(filler)
    return listener, fillers


@pytest.mark.parametrize("how", ["silent to TCP", "silent to MQTT"])
async def test_a_black_hole_blocks_neither_the_loop_nor_the_way_to_a_good_broker(
    how: str, site: SiteBroker, join: Join
) -> None:
    if how == "silent to TCP":
        listener, fillers = _black_hole()
    else:
        listener, fillers = socket.create_server(("127.0.0.1", 0)), []
    hole = BrokerRef(epoch=9, host=B, addresses=("127.0.0.1",), port=listener.getsockname()[1], tls=False)
    try:
        buses = [await join(None, NodeId(f"n-{n}")) for n in range(8)]
        for bus in buses:
            bus.use(hole)
        late_s = 0.0
        until_s = time.monotonic() + 2.5  # beyond one probe, and one wait for CONNACK
        while time.monotonic() < until_s:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late_s = max(late_s, time.monotonic() - before - 0.01)
        assert late_s < 1.0, "the event loop stood still"
        since = time.monotonic()
        for bus in buses:
            assert not bus.is_linked and bus.trouble is not None
            bus.use(site.ref)
        for bus in buses:
            assert await until(bus, LinkUp) == LinkUp(broker_epoch=0, host=None), "and no false death before"
        assert time.monotonic() - since < 5
    finally:
        for one in (listener, *fillers):
            one.close()


async def test_trouble_names_what_the_operator_must_look_at(join: Join) -> None:
    bus = await join(None)
    bus.use(BrokerRef(epoch=2, host=B, addresses=("127.0.0.1",), port=free_port(), tls=False))
    await until(bus, LinkDown)
    assert bus.trouble is not None
    assert "refuses connections" in bus.trouble


# ── MQTT 5, clients of every kind, and bad input ────────────────────────────────────────────────────


async def test_mqtt5_response_topic_correlation_and_expiry_are_honoured(site: SiteBroker, join: Join) -> None:
    """EM-MQTT-10, EM-MQTT-12, EM-MQTT-20."""
    coordinator = await join(site.ref, A)
    async with aiomqtt.Client("127.0.0.1", site.port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe("answers/me")
        asking = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        asking.ResponseTopic = "answers/me"
        asking.CorrelationData = b"\xff\x00\x01"
        asking.MessageExpiryInterval = 30
        await client.publish(
            "edgemesh/home/task/submit", b'{"prompt":"hi","deadline_s":500}', 1, False, asking
        )
        submit = await until(coordinator, Submit)
        assert submit.reply_to == "answers/me"
        assert submit.deadline_s is not None and 25 < submit.deadline_s <= 30
        coordinator.publish(
            TaskReply(reply_to=submit.reply_to, correlation=submit.correlation, body=status())
        )
        async with asyncio.timeout(WAIT_S):
            reply = await anext(aiter(client.messages))
        assert reply.properties is not None
        assert reply.properties.CorrelationData == b"\xff\x00\x01", "exactly the bytes that came"
        assert b'"state":"queued"' in bytes(reply.payload)


async def test_retained_task_topics_expire_and_are_cleared(site: SiteBroker, join: Join) -> None:
    """EM-MQTT-16."""
    coordinator = await join(site.ref, A)
    result = TaskResult(
        task=TaskId("t-1"), state="done", text="hi", finish_reason="stop", reason=None, node=B, attempt=1,
        epoch=Epoch(1, A), n_prompt_tokens=1, n_tokens=1, queue_s=0.0, ttft_s=0.1, service_s=0.2,
    )  # fmt: skip
    coordinator.publish(status())
    coordinator.publish(result)
    async with aiomqtt.Client("127.0.0.1", site.port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe("edgemesh/home/task/t-1/#", qos=1)
        async with asyncio.timeout(WAIT_S):
            messages = aiter(client.messages)
            both = [await anext(messages), await anext(messages)]
    assert {message.topic.value for message in both} == {
        "edgemesh/home/task/t-1/status",
        "edgemesh/home/task/t-1/result",
    }
    assert all(message.properties.MessageExpiryInterval > 0 for message in both if message.properties)

    coordinator.publish(TaskForgotten(task=TaskId("t-1")))
    coordinator.publish(state(A))
    await until(coordinator, NodeState)
    late = await join(
        site.ref, B, filters=["edgemesh/home/node/+/state", *client_filters(HOME, (STATUS, RESULT))]
    )
    assert (await heard(late)).message == state(A), "nothing about the task is left"
    assert late.traffic.undecodable == 0


async def test_bad_messages_are_dropped_and_counted_and_a_bad_submission_is_answered(
    site: SiteBroker, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    """EM-MQTT-04, EM-MQTT-07, EM-MQTT-19."""
    a = await join(site.ref, A)
    async with aiomqtt.Client("127.0.0.1", site.port) as client:
        for topic, payload in [
            ("node/b/state", b'{"node":"a","state":"left","incarnation":99,"boot":"x"}'),
            ("node/b/state", b"\xff\xfe"),
            ("node/b/to/a", b"\xc1"),
            ("node/b/to/a", os.urandom(900_000)),
            ("coordinator", b"[" * 100_000),
        ]:
            await client.publish(f"edgemesh/home/{topic}", payload, qos=1)
        await client.publish("edgemesh/home/task/submit", b'{"id":"t-1","promt":"hi"}', qos=1)
    bad = await heard(a)
    assert bad == Heard(
        Unacceptable(
            reason="unknown field 'promt'; did you mean 'prompt'?",
            id=TaskId("t-1"),
            reply_to=None,
            correlation=None,
        ),
        CLIENT,
    )
    assert a.traffic.undecodable == 5
    assert caplog.text.count("dropped a message") == 1, "a flood of them is one line"


async def test_an_empty_payload_cancels_the_task_in_the_topic(site: SiteBroker, join: Join) -> None:
    """EM-MQTT-17."""
    a = await join(site.ref, A)
    async with aiomqtt.Client("127.0.0.1", site.port) as client:
        await client.publish("edgemesh/home/task/t-7/cancel", b"", qos=1)
    cancelled = await heard(a)
    assert (cancelled.message.task, cancelled.sender) == ("t-7", CLIENT)


async def test_a_message_larger_than_a_frame_is_dropped_here_and_harms_nothing(
    site: SiteBroker, join: Join
) -> None:
    a = await join(site.ref, A, filters=client_filters(HOME, (EVENT,)))
    a.publish(TaskEvent(text="x" * 2_000_000))
    assert a.traffic.dropped_out == 1
    a.publish(TaskEvent(text="short"))
    assert (await heard(a)).message == TaskEvent(text="short")
    assert a.traffic.links == 1


async def test_two_processes_under_one_id_do_not_take_each_other_over(site: SiteBroker, join: Join) -> None:
    """EM-MQTT-05."""
    first = await join(site.ref, B)
    async with child_node(site.port):  # also node b, of another boot
        first.publish(Drain(on=True), to=B)
        assert isinstance((await heard(first)).message, Drain)
        assert first.traffic.links == 1
