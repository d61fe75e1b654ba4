"""The commands' client against a real broker: it finds it, follows it, and says why when it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import SystemRandom
from typing import Any

import pytest

from mesh.broker import start_broker
from mesh.brokers.contract import BrokerSettings, RunningBroker
from mesh.errors import UnreachableError, WrongKeyError
from mesh.facts import BrokerRef, LinkUp
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId, new_boot
from mesh.messages import (
    CancelTask,
    Drain,
    LeaseRecord,
    NodeReport,
    NodeState,
    Submit,
    TaskResult,
    TaskStatus,
    TaskTokens,
)
from mesh.packets import node_filters
from mesh.topics import access_list
from mesh.transport.bus import Heard
from mesh.transport.identity import MeshKey, issue
from mesh.transport.mqtt import MqttBus
from node import client as client_module
from node.client import TASK_ROWS, cancel_task, connected, drain_nodes, find_broker, snapshot, submit
from node.settings import Settings
from node.state import KnownBroker, StateDir

HOME = MeshName("home")
KEY = MeshKey.create("home", bytes(range(32)))
PI = NodeId("pi-1")
EPOCH = Epoch(1, PI)
REQUEST = Submit(prompt="hi", id=TaskId("t-1"))
ONE_SETTINGS: dict[str, Any] = {"mesh": HOME, "interfaces": ("lo",)}


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir(tmp_path / "state")
    made.save_key(KEY)
    return made


def settings(state: StateDir) -> Settings:
    return Settings(state_dir=state.path, **ONE_SETTINGS)


async def start(state: StateDir, tmp_path: Path, epoch: int, key: MeshKey = KEY) -> RunningBroker:
    """A broker as node ``pi-1`` hosts it, written down as a node does."""
    broker = await start_broker(
        BrokerSettings(
            mesh=HOME,
            identity=issue(key, PI, tmp_path / f"pi-{epoch}"),
            access_list=access_list(HOME),
            directory=tmp_path / f"broker-{epoch}",
            addresses=("127.0.0.1",),
        )
    )
    state.write_broker(HOME, KnownBroker(ref(broker, epoch)))
    return broker


def ref(broker: RunningBroker, epoch: int) -> BrokerRef:
    return BrokerRef(epoch=epoch, host=PI, addresses=("127.0.0.1",), port=broker.port)


@asynccontextmanager
async def coordinator(
    tmp_path: Path, answer: Callable[[MqttBus, Any], None], first: BrokerRef
) -> AsyncIterator[MqttBus]:
    """A member of the mesh that answers what it hears by a script."""
    identity = issue(KEY, PI, tmp_path / "script")
    bus = MqttBus(
        mesh=HOME,
        me=PI,
        boot=new_boot(SystemRandom()),
        filters=node_filters(HOME, PI),
        tls=identity.client_context(),
    )
    linked = asyncio.Event()

    async def listen() -> None:
        while True:
            match await bus.next():
                case LinkUp():
                    linked.set()
                case Heard(message=message):
                    answer(bus, message)
                case _:
                    pass

    bus.use(first)
    tasks = [asyncio.create_task(bus.run()), asyncio.create_task(listen())]
    try:
        async with asyncio.timeout(10):
            await linked.wait()
        yield bus
    finally:
        await bus.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def status(state: str, **changes: Any) -> TaskStatus:
    fields: dict[str, Any] = {
        "reason": None,
        "node": PI,
        "attempt": 1,
        "epoch": EPOCH,
        "durable_on": 1,
    } | changes
    return TaskStatus(task=TaskId("t-1"), state=state, **fields)  # type: ignore[arg-type]


RESULT = TaskResult(
    task=TaskId("t-1"), state="done", text="hello", finish_reason="stop", reason=None, node=PI, attempt=1,
    epoch=EPOCH, n_prompt_tokens=1, n_tokens=1, queue_s=0.0, ttft_s=0.1, service_s=0.1,
)  # fmt: skip


async def test_a_submission_is_repeated_until_acknowledged_and_followed_to_its_end(
    state: StateDir, tmp_path: Path
) -> None:
    heard: list[Submit] = []

    def answer(bus: MqttBus, message: Any) -> None:
        if isinstance(message, Submit):
            heard.append(message)
            if len(heard) == 2:  # the first one fell into a failover
                for said in (
                    status("queued"),
                    status("queued"),
                    status("running"),
                    TaskTokens(task=TaskId("t-1"), attempt=1, seq=0, text="hello", n_tokens=1),
                    status("done"),
                    RESULT,
                ):
                    bus.publish(said)

    broker = await start(state, tmp_path, 1)
    try:
        async with (
            coordinator(tmp_path, answer, ref(broker, 1)),
            asyncio.timeout(20),
            connected(settings(state), state, TASK_ROWS, task=REQUEST.id) as client,
        ):
            said = [progress async for progress in submit(client, REQUEST)]
    finally:
        await broker.stop()
    assert [getattr(one, "state", "tokens") for one in said if one is not said[-1]].count("queued") == 1
    assert said[-1] == RESULT
    assert any(isinstance(one, TaskTokens) for one in said)
    assert {submission.id for submission in heard} == {REQUEST.id}


async def test_a_rejection_is_told_at_once_and_an_older_one_of_the_same_id_is_no_answer(
    state: StateDir, tmp_path: Path
) -> None:
    def answer(bus: MqttBus, message: Any) -> None:
        match message:
            case Submit(prompt="nonsense"):
                bus.publish(status("rejected", node=None, reason="no"))  # retained
            case Submit():
                bus.publish(status("queued"))
                bus.publish(RESULT)
            case _:
                pass

    async def said_to(request: Submit) -> list[Any]:
        async with connected(settings(state), state, TASK_ROWS, task=REQUEST.id) as client:
            return [progress async for progress in submit(client, request)]

    broker = await start(state, tmp_path, 1)
    try:
        async with coordinator(tmp_path, answer, ref(broker, 1)):
            async with asyncio.timeout(client_module.RESULT_AFTER_STATUS_S):
                assert (await said_to(replace(REQUEST, prompt="nonsense")))[-1].state == "rejected"
            async with asyncio.timeout(20):
                assert (await said_to(REQUEST))[-1] == RESULT
    finally:
        await broker.stop()


async def test_a_client_follows_the_mesh_to_another_broker_and_hears_the_end_there(
    state: StateDir, tmp_path: Path
) -> None:
    moved = asyncio.Event()

    def answer(bus: MqttBus, message: Any) -> None:
        if isinstance(message, Submit):
            bus.publish(RESULT if moved.is_set() else status("queued"))

    first = await start(state, tmp_path, 1)
    second: RunningBroker | None = None
    try:
        async with (
            coordinator(tmp_path, answer, ref(first, 1)) as bus,
            asyncio.timeout(30),
            connected(settings(state), state, TASK_ROWS, task=REQUEST.id) as client,
        ):
            progress = submit(client, REQUEST)
            acknowledged = await anext(progress)
            assert isinstance(acknowledged, TaskStatus) and acknowledged.state == "queued"
            second = await start(state, tmp_path, 2)
            bus.use(ref(second, 2))
            moved.set()
            await first.stop()
            assert [one async for one in progress][-1] == RESULT
    finally:
        await first.stop()
        if second is not None:
            await second.stop()


async def test_without_a_coordinator_the_reason_is_told(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "ACK_TIMEOUT_S", 0.5)
    broker = await start(state, tmp_path, 1)
    try:
        async with (
            asyncio.timeout(10),
            connected(settings(state), state, TASK_ROWS, task=REQUEST.id) as client,
        ):
            with pytest.raises(UnreachableError, match="no node coordinates"):
                [progress async for progress in submit(client, REQUEST)]
    finally:
        await broker.stop()


async def test_a_broker_of_another_mesh_is_refused_as_such(state: StateDir, tmp_path: Path) -> None:
    broker = await start(state, tmp_path, 1, MeshKey.create("home", bytes(32)))
    try:
        with pytest.raises(WrongKeyError, match="another mesh"):
            await find_broker(settings(state), state)
    finally:
        await broker.stop()


async def test_where_nobody_is_the_next_step_is_told(state: StateDir, tmp_path: Path) -> None:
    broker = await start(state, tmp_path, 1)
    await broker.stop()  # what is written down is out of date
    with pytest.raises(UnreachableError, match=r"edgemesh join.*--seed"):
        await find_broker(settings(state), state)


async def test_a_snapshot_ends_when_every_node_has_reported(state: StateDir, tmp_path: Path) -> None:
    broker = await start(state, tmp_path, 1)
    try:
        async with (
            coordinator(tmp_path, lambda bus, message: None, ref(broker, 1)) as bus,
            asyncio.timeout(10),
        ):
            bus.publish(NodeState(node=PI, state="online", incarnation=1, boot=Boot("b")))
            bus.publish(LeaseRecord(kind="lease", epoch=EPOCH, ttl_s=3.0, beat=1))
            taking = asyncio.create_task(snapshot(settings(state), state, seconds=8.0))
            report = NodeReport(
                node=PI, incarnation=1, ready=True, activity="idle", running=0, cpu_percent=1.0,
                memory_free_bytes=1, rss_bytes=1, tokens_per_s=0.0,
            )  # fmt: skip
            while not taking.done():  # as a node does, until the client is there to hear it
                bus.publish(report)
                await asyncio.wait([taking], timeout=0.1)
            view = taking.result()
    finally:
        await broker.stop()
    assert (view.coordinator, [row.activity for row in view.nodes]) == (PI, ["idle"])
    assert (view.link, view.fingerprint) == ("up", KEY.fingerprint)


async def test_cancel_and_drain_reach_whom_they_mean(state: StateDir, tmp_path: Path) -> None:
    def answer(bus: MqttBus, message: Any) -> None:
        match message:
            case CancelTask(task=task):
                assert task == "t-1"
                bus.publish(status("cancelled"))
            case Drain(on=on, leave=leave):
                assert not leave
                standing = "draining" if on else "online"
                bus.publish(NodeState(node=PI, state=standing, incarnation=1, boot=Boot("b")))  # type: ignore[arg-type]

    broker = await start(state, tmp_path, 1)
    try:
        async with coordinator(tmp_path, answer, ref(broker, 1)), asyncio.timeout(20):
            async with connected(settings(state), state, TASK_ROWS, task=REQUEST.id) as client:
                final = await cancel_task(client, TaskId("t-1"))
                assert final is not None and final.state == "cancelled"
            told = await drain_nodes(settings(state), state, [PI], on=True, leave=False)
            assert told == [(PI, "draining")]
            assert await drain_nodes(settings(state), state, [PI], on=False, leave=False) == [(PI, "online")]
            with pytest.raises(UnreachableError, match="no answer from nobody-1"):
                await drain_nodes(
                    settings(state), state, [NodeId("nobody-1")], on=True, leave=False, timeout_s=0.5
                )
    finally:
        await broker.stop()
