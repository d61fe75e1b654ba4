"""``mesh.driver``: the promises it makes to the cores it hosts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from mesh.core import FOREVER, Broadcast, Effect, Notify, Save
from mesh.driver import HEARD_MAX, QUEUE_MAX, Driver
from mesh.ids import NodeId
from mesh.journal import JournalError
from mesh.transport.bus import Heard


class World:
    """A bus, a journal and a shell in one: everything that reaches the outside is one ordered list."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[object] = asyncio.Queue()
        self.outside: list[object] = []
        self.n_commits = 0
        self._staged: list[object] = []

    async def next(self) -> object:
        return await self.inbox.get()

    def publish(self, message: object, to: NodeId | None = None) -> None:
        self.outside.append(("sent", message))

    def save(self, key: str, record: object) -> None:
        self._staged.append(("saved", key))

    def commit(self) -> None:
        self.n_commits += 1
        self.outside += self._staged
        self._staged = []

    def on_fact(self, fact: object) -> None:
        self.outside.append(("fact", fact))


class Script:
    """A core that does what the test says."""

    def __init__(self, on_message: Callable[[object], list[Effect]], wake_at: float = FOREVER) -> None:
        self.on_message = on_message
        self.wake_at = wake_at
        self.calls: list[object] = []
        self.was_called = asyncio.Event()

    def receive(self, message: object, sender: NodeId, now: float) -> list[Effect]:
        self.calls.append(message)
        self.was_called.set()
        return self.on_message(message)

    def learn(self, fact: object, now: float) -> list[Effect]:
        return self.receive(fact, NodeId("shell"), now)

    def tick(self, now: float) -> list[Effect]:
        self.calls.append("tick")
        self.wake_at = FOREVER
        return []


@contextlib.asynccontextmanager
async def driving(
    core: Script, world: World, now: Callable[[], float] = time.monotonic
) -> AsyncIterator[Driver]:
    driver = Driver(core=core, bus=world, journal=world, on_fact=world.on_fact, now=now)  # type: ignore[arg-type]
    task = asyncio.create_task(driver.run())
    try:
        yield driver
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def heard(message: object) -> Heard:
    return Heard(message=message, sender=NodeId("peer"))


async def test_a_save_is_durable_before_anything_is_sent() -> None:
    world = World()
    core = Script(lambda m: [Save("ballot", m), Broadcast("claim"), Notify("done")])
    async with driving(core, world) as driver:
        driver.learn("go")
        await driver.settled()
    assert world.outside == [("fact", "go"), ("saved", "ballot"), ("sent", "claim"), ("fact", "done")]


async def test_a_burst_of_messages_shares_one_commit() -> None:
    world = World()
    core = Script(lambda m: [Save(f"task/{m}", m), Broadcast(m)])
    driver = Driver(core=core, bus=world, journal=world, on_fact=world.on_fact)  # type: ignore[arg-type]
    for k in range(40):
        driver.learn(k)
    task = asyncio.create_task(driver.run())
    await driver.settled()
    task.cancel()
    assert world.n_commits == 1
    sent = [entry for entry in world.outside if entry[0] == "sent"]  # type: ignore[index]
    assert sent == [("sent", k) for k in range(40)]


async def test_a_node_whose_disk_is_full_is_silent_until_it_has_room_again() -> None:
    world = World()
    core = Script(lambda m: [Save(f"task/{m}", m), Broadcast(m)] if m == "hold" else [Broadcast(m)])
    durable_commit = world.commit

    def full() -> None:
        raise JournalError("the disk is full")

    async with driving(core, world) as driver:
        world.commit = full  # type: ignore[method-assign]
        driver.learn("hold")
        await driver.settled()
        driver.learn("beat")
        await driver.settled()
        assert [entry for entry in world.outside if entry[0] == "sent"] == []  # type: ignore[index]
        world.commit = durable_commit  # type: ignore[method-assign]
        driver.learn("beat")
        await driver.settled()
    assert world.outside[-2:] == [("saved", "task/hold"), ("sent", "beat")]


async def test_time_that_has_passed_is_told_before_the_message_that_came_late() -> None:
    """A process that was stopped for ten seconds learns first that its lease is over."""
    clock = [0.0]
    world = World()
    core = Script(lambda m: [], wake_at=5.0)
    clock[0] = 15.0
    async with driving(core, world, lambda: clock[0]):
        await world.inbox.put(heard("assign"))
        async with asyncio.timeout(5):
            await core.was_called.wait()
    assert core.calls == ["tick", "assign"]


async def test_a_core_that_raises_ends_the_driver() -> None:
    def broken(message: object) -> list[Effect]:
        raise RuntimeError("impossible")

    world = World()
    driver = Driver(core=Script(broken), bus=world, journal=world, on_fact=world.on_fact)  # type: ignore[arg-type]
    driver.learn("go")
    with pytest.raises(ExceptionGroup, match="unhandled"):
        async with asyncio.timeout(5):
            await driver.run()


async def test_a_flood_from_the_bus_leaves_room_for_the_facts_of_this_process() -> None:
    """While the disk is busy: a full queue would end the process with the next fact it learns."""
    world = World()
    core = Script(lambda m: [Save("x", m)])
    durable_commit, is_stuck, may_go_on = world.commit, threading.Event(), threading.Event()

    def slow() -> None:
        is_stuck.set()
        may_go_on.wait(10)
        durable_commit()

    world.commit = slow  # type: ignore[method-assign]
    async with driving(core, world) as driver:
        for k in range(2 * QUEUE_MAX):
            world.inbox.put_nowait(heard(k))
        await asyncio.to_thread(is_stuck.wait, 10)
        for _ in range(2 * QUEUE_MAX):  # as much as it takes from the bus
            await asyncio.sleep(0)
        for k in range(HEARD_MAX):
            driver.learn(f"fact {k}")
        may_go_on.set()
        async with asyncio.timeout(20):
            await driver.settled()
    assert f"fact {HEARD_MAX - 1}" in core.calls
