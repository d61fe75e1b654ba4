"""Nodes that are not equally fast: how they say so, how one is played, and why a task went where it did."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.facts import (
    AttemptFinished,
    AttemptText,
    EngineReady,
    RatesMeasured,
    StartAttempt,
    StopAttempt,
)
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import Assign, NodeRates, Outcome, Submit
from node.client import watch
from node.compute.messages import Load
from node.compute.models import read_manifest, resolve
from node.compute.rates import RatedAs, slowed, write_rates
from node.local_mesh import LocalMesh
from node.settings import Settings
from node.state import StateDir
from node.worker import ComputeWorker
from tests.integration.meshes import local_mesh
from tests.tiny import WORDS, tiny_llama

pytestmark = pytest.mark.timeout(300)

LONG_S = 110.0  # a bound on waiting, not a wait


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", layers=6)


# ── one compute process ─────────────────────────────────────────────────────────────────────────────


class Process:
    """A real compute process and what it says."""

    def __init__(self, worker: ComputeWorker, facts: asyncio.Queue[Any]) -> None:
        self.worker = worker
        self._facts = facts
        self._n_tasks = 0

    async def next(self, kind: type[Any]) -> Any:
        async with asyncio.timeout(LONG_S):
            while not isinstance(fact := await self._facts.get(), kind):
                pass
        return fact

    def start(self, **submit: Any) -> TaskId:
        self._n_tasks += 1
        task = TaskId(f"t-{self._n_tasks}")
        assign = Assign(
            epoch=Epoch(1, NodeId("n")), task=task, attempt=1, submit=Submit(**submit), budget_s=None
        )
        self.worker.carry_out(StartAttempt(assign))
        return task

    async def timed(self, **submit: Any) -> tuple[Outcome, float]:
        """An attempt's outcome, and the seconds it took by our clock."""
        started_at = time.monotonic()
        self.start(**submit)
        outcome: Outcome = (await self.next(AttemptFinished)).outcome
        return outcome, time.monotonic() - started_at


@asynccontextmanager
async def process(model: Path | str, directory: Path, slowdown: float) -> AsyncIterator[Process]:
    facts: asyncio.Queue[Any] = asyncio.Queue()
    load = Load(
        model=str(model), models_dir=str(directory / "models"), adapters_dir=str(directory / "adapters"),
        datasets_dir=str(directory / "datasets"), features_dir=str(directory / "features"), threads=1,
        slowdown=slowdown,
    )  # fmt: skip
    worker = ComputeWorker(load, learn=facts.put_nowait)
    running = asyncio.create_task(worker.run())
    try:
        yield Process(worker, facts)
    finally:
        await worker.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_same_work_takes_a_played_device_so_many_times_as_long(tiny: Path, tmp_path: Path) -> None:
    """Both at once, in turns, so that whoever else uses this machine slows both."""
    request = {"prompt": " ".join(WORDS[:40]), "max_tokens": 60}
    async with process(tiny, tmp_path, 1) as plain, process(tiny, tmp_path, 8) as played:
        for one in (plain, played):
            await one.next(EngineReady)
            await one.timed(**request)  # the first one wakes threads and compiles
        ratios = []
        for _ in range(5):
            (one, one_s), (other, other_s) = await plain.timed(**request), await played.timed(**request)
            assert other.text == one.text, "it only takes longer"
            assert other.service_s == pytest.approx(other_s, rel=0.25, abs=0.1), "it says what it took"
            assert other.ttft_s is not None and other.ttft_s < other.service_s
            ratios.append(other_s / one_s)
        assert 4 < sorted(ratios)[2] < 16, ratios


async def test_what_is_done_in_one_step_takes_so_many_times_as_long_too(tiny: Path, tmp_path: Path) -> None:
    request = {"kind": "embed", "texts": [" ".join(WORDS[:50])] * 40}
    async with process(tiny, tmp_path, 1) as plain, process(tiny, tmp_path, 8) as played:
        for one in (plain, played):
            await one.next(EngineReady)
            await one.timed(**request)
        ratios = []
        for _ in range(5):
            (_, one_s), (other, other_s) = await plain.timed(**request), await played.timed(**request)
            assert other.service_s == pytest.approx(other_s, rel=0.25, abs=0.1)
            ratios.append(other_s / one_s)
        assert 3 < sorted(ratios)[2] < 16, ratios


async def test_a_played_device_is_cancelled_as_quickly_as_any(tiny: Path, tmp_path: Path) -> None:
    """Steps of some milliseconds rest for seconds; the cancellation does not."""
    async with process(tiny, tmp_path, 1000) as played:
        await played.next(EngineReady)
        task = played.start(prompt="w1 w2", max_tokens=200)
        await played.next(AttemptText)
        asked_at = time.monotonic()
        played.worker.carry_out(StopAttempt(task, 1, "cancelled by the client"))
        outcome = (await played.next(AttemptFinished)).outcome
        assert outcome.state == "cancelled"
        assert time.monotonic() - asked_at < 1.0


async def test_a_node_serves_with_a_guess_and_says_what_it_measured_when_it_had_time(
    tiny: Path, tmp_path: Path
) -> None:
    async with process(tiny, tmp_path, 4) as node:
        ready = await node.next(EngineReady)
        assert (ready.rates.origin, ready.rates.emulated_slowdown) == ("guessed", 4.0)
        outcome, _ = await node.timed(prompt="w1 w2 w3", max_tokens=5)
        assert outcome.state == "done"
        rates = (await node.next(RatesMeasured)).rates
        assert rates.origin in ("measured", "busy"), "by who else computes on this machine"
        assert rates.emulated_slowdown == 4.0 and rates.tune_tokens_per_s and rates.features_tokens_per_s


async def test_what_was_measured_once_is_there_at_the_next_start(tiny: Path, tmp_path: Path) -> None:
    """As measured on a calm machine, which this one may not be: written as a measurement writes it."""
    async with process(tiny, tmp_path, 1) as node:
        precision = (await node.next(EngineReady)).precision
    home = tmp_path / "models" / resolve(str(tiny)).slug
    manifest = read_manifest(home)
    assert manifest is not None
    kept = NodeRates(
        prefill_tokens_per_s=321.0, decode_tokens_per_s=32.0, row_cost=0.5, features_tokens_per_s=400.0,
        tune_tokens_per_s=500.0, adapter_load_s=0.25,
    )  # fmt: skip
    write_rates(
        home, RatedAs(digest=manifest.weights_sha256, precision=precision, device="cpu", threads=1), kept
    )
    async with process(tiny, tmp_path, 2) as node:
        assert (await node.next(EngineReady)).rates == slowed(kept, 2)


# ── a mesh ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[LocalMesh]:
    """A node that echoes 40 words a second, and one that plays a node four times slower."""
    async with local_mesh(tmp_path, 1, model="echo:40") as mesh:
        slow = await mesh.start("--slowdown", "4")
        await slow.wait_for("joined")
        await slow.wait_for("engine_ready", 60)
        yield mesh


async def told(mesh: LocalMesh, *arguments: str) -> Any:
    code, out, err = await mesh.run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


async def run_words(mesh: LocalMesh, n_words: int, *arguments: str) -> dict[str, Any]:
    text = " ".join(f"w{k}" for k in range(n_words))
    return dict(await told(mesh, "run", text, "--max-tokens", str(n_words), *arguments))


async def test_a_played_node_is_slower_and_shown_as_emulated_everywhere(pair: LocalMesh) -> None:
    plain, slow = (node.id for node in pair.nodes)
    rows = {row["node"]: row for row in await told(pair, "nodes")}
    assert (rows[plain]["emulated_slowdown"], rows[plain]["rates"]["decode_tokens_per_s"]) == (1.0, 40.0)
    assert (rows[slow]["emulated_slowdown"], rows[slow]["rates"]["decode_tokens_per_s"]) == (4.0, 10.0)
    for command in ("nodes", "status"):
        code, out, _ = await pair.run(command)
        (line,) = [line for line in out.splitlines() if slow in line and "★" not in line.replace(slow, "")][
            :1
        ]
        assert code == 0 and "÷4 (emulated)" in line
        assert all("emulated" not in line for line in out.splitlines() if plain in line)
    status = await told(pair, "status")
    assert {row["node"]: row["emulated_slowdown"] for row in status["nodes"]} == {plain: 1.0, slow: 4.0}

    fast = await run_words(pair, 40)
    assert (await pair.run("drain", plain))[0] == 0
    slowly = await run_words(pair, 40)
    assert (fast["node"], slowly["node"]) == (plain, slow), "the faster one is taken while it is there"
    assert 2.5 < slowly["service_s"] / fast["service_s"] < 6


async def test_each_decision_about_a_task_is_told_with_its_numbers(pair: LocalMesh) -> None:
    plain, slow = (node.id for node in pair.nodes)
    await run_words(pair, 20, "--id", "seen", "--value", "3", "--deadline", "60")
    found = await told(pair, "task", "show", "seen")
    assert (found["task"], found["state"], found["value"], found["node"]) == ("seen", "done", 3.0, plain)
    (start,) = [decision for decision in found["decisions"] if decision["verb"] == "start"]
    assert start["node"] == plain and start["density"] > 0 and 0 < start["laxity_s"] < 60
    candidates = {candidate["node"]: candidate for candidate in start["candidates"]}
    assert candidates[plain]["why_not"] is None and candidates[slow]["why_not"]
    assert candidates[slow]["service_s"] > 2 * candidates[plain]["service_s"]

    code, out, _ = await pair.run("task", "show", "seen")
    assert code == 0
    for piece in (f"started on {plain}", "density", "slack", slow, candidates[slow]["why_not"]):
        assert piece in out, out


async def test_what_is_refused_or_unknown_is_explained_too(pair: LocalMesh) -> None:
    code, _, err = await pair.run(
        "run", " ".join(["w"] * 400), "--max-tokens", "400", "--deadline", "1", "--id", "no"
    )
    assert code == 5, err
    found = await told(pair, "task", "show", "no")
    assert found["state"] == "rejected" and "best node needs" in found["reason"]
    unknown = await told(pair, "task", "show", "never-there")
    assert unknown["state"] is None and unknown["decisions"] == []
    code, out, _ = await pair.run("task", "show", "never-there")
    assert code == 0 and "not known" in out


async def test_status_tells_how_far_off_predictions_were(pair: LocalMesh) -> None:
    for _ in range(3):
        await run_words(pair, 20)
    settings = Settings(state_dir=pair.state_dir, mesh=pair.mesh, interfaces=("lo",))
    async with asyncio.timeout(LONG_S):
        async for view in watch(settings, StateDir(pair.state_dir), every_s=0.2):
            if view.prediction_errors:
                break
    (error,) = (await told(pair, "status"))["prediction_errors"]
    assert error["kind"] == "generate" and error["n"] >= 1 and error["p50"] >= 0
    _, out, _ = await pair.run("status")
    assert "generate" in out and "off by at most" in out
