"""How long the mesh takes to form, to notice a death, and to pass a task through: real processes on loopback.

``failover_s`` and ``broker_failover_s`` are what a user waits: from ``kill -9`` until a task submitted right
after it is acknowledged by the new coordinator (durable on two nodes). When an election ends is in the
detail. Four tasks are in flight at every kill; ``lost`` and ``doubled`` count over all of them.

``overhead_ms`` is a task that computes nothing, from publish to result, minus the same prompt given to
the engine by a function call. The floor named in the detail is two fsyncs of this disk, one after the
other: a task is acknowledged and settled on two disks, and the rest is message hops.

    python -m tests.benchmarks.mesh [--quick] [--json]
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psutil

from mesh.ids import MeshName, TaskId
from mesh.messages import Submit
from node.compute.echo import EchoEngine
from node.compute.messages import Run
from node.local_mesh import LocalMesh, NodeProcess
from tests.benchmarks.report import Metric, Options, main, percentile, spread
from tests.integration.meshes import coordinator_of, elected, words
from tests.traffic import Traffic, traffic

N_NODES = 3
IN_FLIGHT = 4


def measure(options: Options) -> Iterator[Metric]:
    """Yields each metric as soon as it is known; one mesh at a time, nothing else running."""
    quick = options.quick
    yield asyncio.run(_join(n_meshes=2 if quick else 7))
    yield from asyncio.run(_collect(_overhead(n_tasks=40 if quick else 300)))
    yield from asyncio.run(
        _collect(
            _kills(random.Random(options.seed), n_kills=3 if quick else 20, n_broker_kills=2 if quick else 10)
        )
    )
    yield from asyncio.run(_collect(_idle(seconds=5.0 if quick else 30.0)))


async def _collect(metrics: AsyncIterator[Metric]) -> list[Metric]:
    return [metric async for metric in metrics]


def _mesh(directory: str, *flags: str) -> LocalMesh:
    return LocalMesh(Path(directory), MeshName(f"bench-{secrets.token_hex(3)}"), flags=flags)


async def _join(n_meshes: int) -> Metric:
    """From the start of the process, interpreter and imports included, to ``joined``."""
    lengths_s: list[float] = []
    for _ in range(n_meshes):
        with tempfile.TemporaryDirectory() as directory:
            async with _mesh(directory, "--no-compute") as mesh:
                nodes = await mesh.start_many(N_NODES)
                for node in nodes:
                    lengths_s.append((await node.wait_for("joined"))["monotonic_s"] - node.started_at)
    detail = {"p99": round(percentile(lengths_s, 99), 3), **spread(lengths_s), "nodes": N_NODES}
    return Metric("join_s", percentile(lengths_s, 50), "s", "<= 3", n_meshes, detail)


# ── one task's way ──────────────────────────────────────────────────────────────────────────────────


async def _overhead(n_tasks: int) -> AsyncIterator[Metric]:
    direct_s = _direct(n_tasks)
    with tempfile.TemporaryDirectory() as directory:
        async with _mesh(directory, "--model", "echo") as mesh:
            await mesh.start_many(N_NODES)
            await asyncio.gather(*(node.wait_for("engine_ready", 60) for node in mesh.nodes))
            async with traffic(mesh) as client:
                for _ in range(10):
                    await _ask(client)  # connections, code paths and caches are warm from here on
                through_s = [await _ask(client) for _ in range(n_tasks)]
        floor_ms = 2 * statistics.median(_fsync_s(Path(directory)) for _ in range(20)) * 1000
    added_ms = sorted((one - direct_s) * 1000 for one in through_s)
    detail = {
        **spread(added_ms),
        "direct_ms": round(direct_s * 1000, 3),
        "two_fsyncs_ms": round(floor_ms, 2),
        "tasks": n_tasks,
    }
    yield Metric("overhead_ms", percentile(added_ms, 50), "ms", "<= 15", 1, detail)
    yield Metric("overhead_ms_p99", percentile(added_ms, 99), "ms", "<= 60", 1, {"tasks": n_tasks})


def _direct(n_tasks: int) -> float:
    engine = EchoEngine("echo")
    lengths_s: list[float] = []
    for k in range(n_tasks):
        started_at = time.perf_counter()
        generate = Run(task=TaskId(f"t-{k}"), attempt=1, submit=Submit(prompt="ping", max_tokens=1))
        engine.start(generate)
        while engine.due_s is not None:
            engine.step()
        lengths_s.append(time.perf_counter() - started_at)
    return statistics.median(lengths_s)


async def _ask(client: Traffic) -> float:
    started_at = time.perf_counter()
    task = client.submit(Submit(prompt="ping", max_tokens=1, id=TaskId(f"t-{secrets.token_hex(6)}")))
    await client.wait(lambda: bool(client.results[task]), 20.0, "an answer")
    return time.perf_counter() - started_at


def _fsync_s(directory: Path) -> float:
    path = directory / "fsync"
    with path.open("ab") as file:
        file.write(b"x" * 512)
        file.flush()
        started_at = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - started_at


# ── deaths ──────────────────────────────────────────────────────────────────────────────────────────


async def _kills(rng: random.Random, n_kills: int, n_broker_kills: int) -> AsyncIterator[Metric]:
    """Kill, wait until the mesh serves again, start a fresh process in the dead one's place; repeat."""
    waits_s: list[float] = []
    elections_s: list[float] = []
    broker_waits_s: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        async with _mesh(directory, "--model", "echo:40") as mesh:
            await mesh.start_many(N_NODES)
            await asyncio.gather(*(node.wait_for("engine_ready", 60) for node in mesh.nodes))
            async with traffic(mesh) as client:
                for _ in range(n_kills):
                    served_s, elected_s = await _kill(mesh, client, rng, coordinator_of)
                    waits_s.append(served_s)
                    elections_s.append(elected_s)
                for _ in range(n_broker_kills):
                    served_s, _ = await _kill(mesh, client, rng, _host_of, wait_for_election=False)
                    broker_waits_s.append(served_s)
                await client.all_ended(60.0)
                n_tasks, lost, doubled = len(client.submitted), client.lost, client.doubled
    yield Metric(
        "failover_s", percentile(waits_s, 99), "s", "<= 5", n_kills,
        {**spread(waits_s), "elected": spread(elections_s), "kills": n_kills},
    )  # fmt: skip
    yield Metric(
        "broker_failover_s", percentile(broker_waits_s, 99), "s", "<= 10", n_broker_kills,
        {**spread(broker_waits_s), "kills": n_broker_kills},
    )  # fmt: skip
    yield Metric("lost", len(lost), "tasks", "<= 0", n_kills + n_broker_kills, {"of": n_tasks})
    yield Metric("doubled", len(doubled), "tasks", "<= 0", n_kills + n_broker_kills, {"of": n_tasks})


async def _kill(
    mesh: LocalMesh,
    client: Traffic,
    rng: random.Random,
    choose: Callable[[LocalMesh], NodeProcess],
    *,
    wait_for_election: bool = True,
) -> tuple[float, float]:
    """Seconds from the kill until a new task was acknowledged, and until somebody was elected."""
    for _ in range(IN_FLIGHT):
        client.submit(words(rng.randint(20, 120)))
    await client.all_acknowledged()
    victim = choose(mesh)
    marks = {node: len(node.events) for node in mesh.running if node is not victim}
    killed_at = time.monotonic()
    await victim.kill()
    election: Awaitable[object] | None = elected(marks, 30.0) if wait_for_election else None
    probe = client.submit(words(1))
    if election is not None:
        _, event = await election  # type: ignore[misc]
        elected_s = event["monotonic_s"] - killed_at
    else:
        elected_s = 0.0
    await client.wait(lambda: probe in client.acknowledged_at, 30.0, "the mesh serves again")
    served_s = client.acknowledged_at[probe] - killed_at
    (fresh,) = await mesh.start_many(1)
    await fresh.wait_for("engine_ready", 60)
    return served_s, elected_s


def _host_of(mesh: LocalMesh) -> NodeProcess:
    """The running node that began to host the broker last."""
    hosted = [
        (event["broker_epoch"], node) for node in mesh.running for event in node.events
        if event["event"] == "broker_hosted"
    ]  # fmt: skip
    return max(hosted, key=lambda one: one[0])[1]


# ── doing nothing ───────────────────────────────────────────────────────────────────────────────────


async def _idle(seconds: float) -> AsyncIterator[Metric]:
    """The busiest and the largest of three nodes without compute; a hosted Mosquitto is named apart."""
    with tempfile.TemporaryDirectory() as directory:
        async with _mesh(directory, "--no-compute") as mesh:
            nodes = await mesh.start_many(N_NODES)
            for node in nodes:  # the last thing that joining brings
                await node.wait_for("cache_ring", 30, where=lambda event: len(event["members"]) == N_NODES)
            processes = [psutil.Process(node.pid) for node in mesh.nodes]
            before = [_cpu_s(process) for process in processes]
            started_at = time.monotonic()
            await asyncio.sleep(seconds)
            length_s = time.monotonic() - started_at
            percents = [
                100 * (_cpu_s(process) - cpu_s) / length_s
                for process, cpu_s in zip(processes, before, strict=True)
            ]
            sizes_mb = [process.memory_info().rss / 1e6 for process in processes]
            children_mb = [
                round(child.memory_info().rss / 1e6, 1)
                for process in processes
                for child in process.children(recursive=True)
            ]
    detail = {"seconds": round(length_s, 1), "nodes": [round(percent, 2) for percent in percents]}
    yield Metric("idle_cpu_percent", max(percents), "%", "<= 1", 1, detail)
    sizes = {"nodes": [round(size, 1) for size in sizes_mb], "broker processes": children_mb}
    yield Metric("idle_rss_mb", max(sizes_mb), "MB", "<= 90", 1, sizes)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0] if __doc__ else "", measure))
