"""The bounded queue, and the bus in memory: the same promises as the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mesh.facts import BrokerRef, LinkDown, LinkUp
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId
from mesh.messages import Drain, LeaseRecord, NodeStanding, NodeState, Submit, TaskForgotten, TaskStatus
from mesh.packets import CLIENT, Packet, client_filters, node_filters
from mesh.topics import STATUS
from mesh.transport.bus import BoundedQueue, Heard
from mesh.transport.memory_bus import MemoryBus, MemoryNetwork

HOME = MeshName("home")
A, B = NodeId("a"), NodeId("b")
BROKER = BrokerRef(epoch=1, host=A, addresses=("here",), port=1)
NEXT = BrokerRef(epoch=2, host=B, addresses=("there",), port=1)


def state(node: NodeId, standing: NodeStanding = "online") -> NodeState:
    return NodeState(node=node, state=standing, incarnation=1, boot=Boot("b1"))


# ── the queue ───────────────────────────────────────────────────────────────────────────────────────


async def test_the_queue_gives_back_in_order() -> None:
    queue: BoundedQueue[int] = BoundedQueue(10, 100)
    assert all(queue.put(n, 1) for n in range(5))
    assert [await queue.get() for _ in range(5)] == [0, 1, 2, 3, 4]


async def test_a_reader_waits_for_the_next_item() -> None:
    queue: BoundedQueue[int] = BoundedQueue(10, 100)
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert not reader.done()
    queue.put(7)
    async with asyncio.timeout(5):
        assert await reader == 7


@pytest.mark.parametrize(("items_max", "bytes_max"), [(10, 1_000_000), (1_000_000, 1000)])
async def test_what_may_be_lost_cannot_push_out_what_may_not(items_max: int, bytes_max: int) -> None:
    queue: BoundedQueue[str] = BoundedQueue(items_max, bytes_max)
    reports = sum(queue.put("report", 100, may_be_lost=True) for _ in range(100))
    leases = sum(queue.put("lease", 100) for _ in range(100))
    assert (reports, leases, len(queue)) == (5, 5, 10)
    assert queue.put("link down", always=True), "there are few of these, and they must arrive"
    for _ in range(6):
        await queue.get()
    assert queue.put("lease", 100), "what is taken out makes room"


async def test_clearing_the_queue_frees_its_bytes() -> None:
    queue: BoundedQueue[str] = BoundedQueue(10, 100)
    queue.put("x", 100)
    assert queue.clear() == 1
    assert queue.put("y", 100)


# ── the bus in memory ───────────────────────────────────────────────────────────────────────────────


class Mesh:
    """Two nodes on one broker."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.broker = self.network.start_broker(BROKER)
        self.a, self.b = self.bus(A), self.bus(B)

    def bus(self, me: NodeId, will: Callable[[], NodeState] | None = None, **more: list[str]) -> MemoryBus:
        filters = more.get("filters", node_filters(HOME, me))
        bus = MemoryBus(self.network, mesh=HOME, me=me, filters=filters, will=will)
        bus.use(BROKER)
        return bus


async def events(bus: MemoryBus, n_events: int) -> list[Heard | LinkUp | LinkDown]:
    async with asyncio.timeout(5):
        return [await bus.next() for _ in range(n_events)]


UP = LinkUp(broker_epoch=1, host=A)


async def test_messages_reach_their_inbox_in_order_and_under_the_senders_name() -> None:
    mesh = Mesh()
    for on in (True, False, True):
        mesh.a.publish(Drain(on=on), to=B)
    assert await events(mesh.b, 4) == [UP, *(Heard(Drain(on=on), A) for on in (True, False, True))]
    assert mesh.a.traffic.sent == 3


async def test_a_broadcast_reaches_the_sender_too() -> None:
    mesh = Mesh()
    lease = LeaseRecord(kind="claim", epoch=Epoch(1, A), ttl_s=3.0, beat=0)
    mesh.a.publish(lease)
    assert await events(mesh.a, 2) == [UP, Heard(lease, A)]
    assert await events(mesh.b, 2) == [UP, Heard(lease, A)]


async def test_retained_messages_await_the_newcomer_until_they_are_cleared() -> None:
    mesh = Mesh()
    mesh.a.publish(state(A))
    open_task = TaskStatus(
        task=TaskId("t"), state="queued", reason=None, node=None, attempt=0, epoch=Epoch(1, A), durable_on=1
    )
    mesh.a.publish(open_task)
    late = mesh.bus(NodeId("c"), filters=["edgemesh/home/node/+/state", *client_filters(HOME, (STATUS,))])
    assert await events(late, 3) == [UP, Heard(state(A), A), Heard(open_task, A)]
    mesh.a.publish(TaskForgotten(task=TaskId("t")))
    assert set(mesh.broker.retained) == {"edgemesh/home/node/a/state"}


async def test_a_crash_sends_the_will_and_a_goodbye_does_not() -> None:
    mesh = Mesh()
    crashing, leaving = (mesh.bus(NodeId(name), lambda: state(B, "offline")) for name in ("c", "d"))
    await leaving.close([state(A, "left")])
    crashing.crash()
    heard = await events(mesh.a, 2)
    assert heard == [UP, Heard(state(A, "left"), A)], "the topic decides who sent it"


async def test_a_will_comes_from_the_node_it_is_about() -> None:
    mesh = Mesh()
    crashing = mesh.bus(NodeId("c"), lambda: state(NodeId("c"), "offline"))
    crashing.crash()
    assert await events(mesh.a, 2) == [UP, Heard(state(NodeId("c"), "offline"), NodeId("c"))]


async def test_without_a_link_messages_are_dropped_and_counted() -> None:
    mesh = Mesh()
    mesh.network.kill_broker(BROKER)
    mesh.a.publish(Drain(on=True), to=B)
    assert mesh.a.traffic.dropped_unlinked == 1
    mesh.network.start_broker(BROKER)
    assert await events(mesh.b, 3) == [UP, LinkDown(host_is_dead=True), UP]


async def test_moving_to_another_broker_is_down_then_up() -> None:
    mesh = Mesh()
    mesh.a.use(NEXT)
    assert not mesh.a.is_linked
    mesh.network.start_broker(NEXT)
    assert await events(mesh.a, 3) == [UP, LinkDown(), LinkUp(broker_epoch=2, host=B)]
    mesh.b.publish(Drain(on=True), to=A)
    mesh.b.use(NEXT)
    mesh.b.publish(Drain(on=False), to=A)
    assert await events(mesh.a, 1) == [Heard(Drain(on=False), B)]


async def test_bad_packets_are_counted_and_skipped() -> None:
    mesh = Mesh()
    for payload in (b"\xc1", b"", b"{}"):
        mesh.broker.publish(Packet(topic="edgemesh/home/node/b/to/a", payload=payload, qos=1))
    mesh.broker.publish(Packet(topic="edgemesh/home/task/submit", payload=b'{"prompt":"hi"}', qos=1))
    assert await events(mesh.a, 2) == [UP, Heard(Submit(prompt="hi"), CLIENT)]
    assert mesh.a.traffic.undecodable == 3
