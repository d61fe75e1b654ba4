"""A client that submits many tasks and remembers everything it ever hears about each of them.

For tests and benchmarks that break the mesh meanwhile: it follows the mesh to another broker, repeats a
submission until it is acknowledged, and repeats it after every reconnect, as any careful client would.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mesh.facts import LinkDown, LinkUp
from mesh.ids import TaskId
from mesh.messages import CancelTask, Submit, TaskResult, TaskStatus
from mesh.topics import RESULT, STATUS
from mesh.transport.bus import Heard
from node.client import MeshClient, connected
from node.local_mesh import LocalMesh
from node.settings import Settings
from node.state import StateDir

__all__ = ["Traffic", "settings_of", "traffic"]

REPEAT_S = 1.0


def settings_of(mesh: LocalMesh) -> Settings:
    return Settings(state_dir=mesh.state_dir, mesh=mesh.mesh, interfaces=("lo",), broker=mesh.broker)


@asynccontextmanager
async def traffic(mesh: LocalMesh) -> AsyncIterator[Traffic]:
    settings = settings_of(mesh)
    async with connected(settings, StateDir(settings.state_dir), (STATUS, RESULT)) as client:
        one = Traffic(client)
        running = asyncio.create_task(one.run(), name="traffic")
        try:
            async with asyncio.timeout(20):
                await one.linked.wait()
            yield one
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


class Traffic:
    def __init__(self, client: MeshClient) -> None:
        self._client = client
        self._asked_at: dict[TaskId, float] = {}
        self._unacknowledged: set[TaskId] = set()
        self._news = asyncio.Condition()
        self.linked = asyncio.Event()
        self.submitted: dict[TaskId, Submit] = {}
        self.said_at: dict[TaskId, float] = {}
        self.acknowledged_at: dict[TaskId, float] = {}
        self.ended_at: dict[TaskId, float] = {}
        self.statuses: dict[TaskId, list[TaskStatus]] = defaultdict(list)
        self.results: dict[TaskId, list[TaskResult]] = defaultdict(list)

    def submit(self, request: Submit) -> TaskId:
        assert request.id is not None
        self.submitted[request.id] = request
        self.said_at[request.id] = time.monotonic()
        self._asked_at[request.id] = time.monotonic()
        self._unacknowledged.add(request.id)
        self._client.publish(request)
        return request.id

    def cancel(self, task: TaskId) -> None:
        self._client.publish(CancelTask(task=task))

    async def wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Until ``condition`` holds; it is looked at after everything heard."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(condition)
        except TimeoutError:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; {self.summary()}") from None

    async def all_acknowledged(self, timeout_s: float = 20.0) -> None:
        await self.wait(
            lambda: all(task in self.acknowledged_at for task in self.submitted),
            timeout_s,
            "all acknowledged",
        )

    async def all_ended(self, timeout_s: float = 60.0) -> None:
        await self.wait(lambda: all(self.results[task] for task in self.submitted), timeout_s, "all ended")

    @property
    def lost(self) -> list[TaskId]:
        """Acknowledged and without an end."""
        return [task for task in self.acknowledged_at if not self.results[task]]

    @property
    def doubled(self) -> list[TaskId]:
        """With two ends that differ: the same result said again is a repetition, not a second end."""
        return [task for task, heard in self.results.items() if len({_end(result) for result in heard}) > 1]

    def summary(self) -> str:
        n_ended = sum(bool(heard) for heard in self.results.values())
        waiting = {
            task: self.statuses[task][-1].state if self.statuses[task] else "unheard"
            for task in self.submitted
            if not self.results[task]
        }
        return (
            f"{len(self.submitted)} submitted, {len(self.acknowledged_at)} acknowledged, {n_ended} ended, "
            f"waiting for {waiting}"
        )

    async def run(self) -> None:
        while True:
            news = await self._client.next(REPEAT_S / 4)
            now = time.monotonic()
            match news:
                case LinkUp():
                    self.linked.set()
                    self._repeat(now, everything=True)
                case LinkDown():
                    self.linked.clear()
                case Heard(message=TaskStatus() as status):
                    self.statuses[status.task].append(status)
                    self.acknowledged_at.setdefault(status.task, now)
                case Heard(message=TaskResult() as result):
                    self.results[result.task].append(result)
                    self.acknowledged_at.setdefault(result.task, now)
                    self.ended_at.setdefault(result.task, now)
                case _:
                    pass
            self._repeat(now)
            async with self._news:
                self._news.notify_all()

    def _repeat(self, now: float, *, everything: bool = False) -> None:
        self._unacknowledged -= self.acknowledged_at.keys()
        if everything:
            tasks = {task for task in self.submitted if not self.results[task]}
        else:
            tasks = {task for task in self._unacknowledged if now - self._asked_at[task] >= REPEAT_S}
        if self.linked.is_set():
            for task in sorted(tasks):
                self._asked_at[task] = now
                self._client.publish(self.submitted[task])


def _end(result: TaskResult) -> tuple[str, str, str | None]:
    return result.state, result.text, result.reason
