"""Real processes, real signals: what was acknowledged survives whoever dies."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mesh.ids import TaskId
from mesh.messages import Submit
from tests.integration.meshes import coordinator_of, elected, local_mesh, words
from tests.integration.site_broker import SiteBroker
from tests.tiny import tiny_llama
from tests.traffic import Traffic, traffic
from tests.tuning import spec

needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists(),
    reason="needs Debian's mosquitto package",
)
KINDS = [pytest.param("mosquitto", marks=needs_mosquitto), "amqtt"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_killed_coordinator_is_replaced_within_5_s_and_every_acknowledged_task_ends_once(
    tmp_path: Path, kind: str
) -> None:
    async with local_mesh(tmp_path, 3, "--broker-kind", kind) as mesh, traffic(mesh) as client:
        for _ in range(9):
            client.submit(words(60))
        await client.all_acknowledged()
        victim = coordinator_of(mesh)
        marks = {node: len(node.events) for node in mesh.running if node is not victim}
        killed_at = time.monotonic()
        await victim.kill()
        _, event = await elected(marks, 15.0)
        assert event["monotonic_s"] - killed_at <= 5.0
        await client.all_ended()
        assert client.doubled == [] and client.lost == []
        assert all(heard[-1].state == "done" for heard in client.results.values())


async def test_a_killed_host_of_the_broker_is_replaced_and_nothing_acknowledged_is_lost(
    tmp_path: Path,
) -> None:
    async with local_mesh(tmp_path, 3) as mesh, traffic(mesh) as client:
        host = next(n for n in mesh.running if any(e["event"] == "broker_hosted" for e in n.events))
        for _ in range(6):
            client.submit(words(40))
        await client.all_acknowledged()
        marks = {node: len(node.events) for node in mesh.running if node is not host}
        killed_at = time.monotonic()
        await host.kill()
        up = await asyncio.gather(*(node.wait_for("link_up", 15, after=mark) for node, mark in marks.items()))
        assert max(event["monotonic_s"] for event in up) - killed_at <= 10.0
        for _ in range(3):
            client.submit(words(5))  # the mesh is whole again: it takes new work
        await client.all_ended()
        assert client.doubled == [] and client.lost == []


async def test_a_coordinator_that_stood_still_for_10_s_is_fenced_and_follows(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 3) as mesh, traffic(mesh) as client:
        first = coordinator_of(mesh)
        others = {node: len(node.events) for node in mesh.running if node is not first}
        mark = len(first.events)
        for _ in range(6):
            client.submit(words(30))
        await client.all_acknowledged()
        first.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        second, event = await elected(others, 15.0)
        await asyncio.sleep(max(0.0, 10.0 - (time.monotonic() - stopped_at)))  # the promise is about 10 s
        first.signal(signal.SIGCONT)
        deposed = await first.wait_for("deposed", 10, after=mark)
        followed = await first.wait_for("followed", 10, after=mark)
        assert followed["monotonic_s"] >= deposed["monotonic_s"]
        assert followed["term"] >= event["term"], "it follows the newer epoch"
        client.submit(words(5))
        await client.all_ended()
        assert client.doubled == [] and client.lost == []
        assert coordinator_of(mesh) is not first or second is first


@needs_mosquitto
async def test_the_sites_own_broker_restarted_without_persistence_loses_nothing(tmp_path: Path) -> None:
    async with (
        SiteBroker(tmp_path) as site,
        local_mesh(tmp_path, 3, broker=site.ref) as mesh,
        traffic(mesh) as client,
    ):
        for _ in range(6):
            client.submit(words(60))
        await client.all_acknowledged()
        marks = {node: len(node.events) for node in mesh.running}
        await site.kill()
        await site.start()
        await asyncio.gather(*(node.wait_for("link_up", 15, after=mark) for node, mark in marks.items()))
        await client.all_ended()
        assert client.doubled == [] and client.lost == []
        assert not any(e["event"] == "broker_hosted" for node in mesh.running for e in node.events)
        _, out, _ = await mesh.run("nodes", "--json")
        assert out.count('"online"') == 3, "retained state is back, published again by its owners"


async def test_running_work_is_not_disturbed_by_a_new_coordinator(tmp_path: Path) -> None:
    """The worker that is neither coordinator nor broker host goes on with attempt 1."""
    async with local_mesh(tmp_path, 3) as mesh, traffic(mesh) as client:
        for _ in range(9):
            client.submit(words(120))
        await client.wait(
            lambda: sum(any(s.state == "running" for s in heard) for heard in client.statuses.values()) == 9,
            20, "all running",
        )  # fmt: skip
        victim = coordinator_of(mesh)
        await victim.kill()
        await client.all_ended()
        undisturbed = {
            task for task, heard in client.statuses.items()
            if any(s.state == "running" and s.node != victim.id for s in heard if s.attempt == 1)
        }  # fmt: skip
        assert undisturbed, "some tasks ran elsewhere"
        for task in undisturbed:
            assert client.results[task][-1].attempt == 1, "it was not started again"
        assert client.doubled == [] and client.lost == []


async def test_a_stream_of_mixed_tasks_loses_and_doubles_nothing_when_its_coordinator_is_killed(
    tmp_path: Path,
) -> None:
    """Generation, texts and tuning, with deadlines and without, some said while nobody coordinates."""
    model = tiny_llama(tmp_path / "tiny-llama")
    async with (
        local_mesh(tmp_path / "state", 3, "--threads", "1", model=str(model)) as mesh,
        traffic(mesh) as client,
    ):
        first = [client.submit(one) for one in mixed("first")]
        await client.all_acknowledged()
        await client.wait(lambda: any(client.results[task] for task in first), 60, "the first end")
        victim = coordinator_of(mesh)
        marks = {node: len(node.events) for node in mesh.running if node is not victim}
        await victim.kill()
        for one in mixed("meanwhile"):
            client.submit(one)
        await elected(marks, 30.0)
        for one in mixed("after"):
            client.submit(one)
        await client.wait(
            lambda: all(is_over(client, task) for task in client.submitted), 120, "every task has ended"
        )
        lost = [task for task in client.lost if not is_over(client, task)]
        assert client.doubled == [] and lost == []
        ends = {client.results[task][-1].state for task in client.submitted if client.results[task]}
        assert ends <= {"done", "expired", "rejected"}, client.summary()


def mixed(name: str) -> list[Submit]:
    """Seven tasks of four kinds; every third has a deadline that may or may not be met."""
    bodies: list[dict[str, Any]] = [
        {"prompt": "w1 w2 w3", "max_tokens": 120},
        {"kind": "embed", "texts": ["w1 w2 w3 w4"] * 8},
        {"kind": "score", "texts": ["w5 w6 w7 w8"] * 8},
        {"prompt": "w4 w5", "max_tokens": 60},
        {"kind": "tune", "tune": spec(adapter=f"{name}-house")},
        {"prompt": "w6 w7 w8", "max_tokens": 90},
    ]
    return [
        Submit(
            id=TaskId(f"{name}-{k}"),
            deadline_s=3.0 if k % 3 == 0 else None,
            value=1.0 + k % 4,
            **body,
        )
        for k, body in enumerate([*bodies, bodies[0]])
    ]


def is_over(client: Traffic, task: TaskId) -> bool:
    """A task that is refused at once has no result."""
    statuses = client.statuses[task]
    return bool(client.results[task]) or (bool(statuses) and statuses[-1].state == "rejected")
