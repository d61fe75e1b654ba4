"""A real compute process: what it says, how it ends, and what happens when it ends badly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from coordinator.facts import (
    AttemptFinished,
    AttemptText,
    EngineLost,
    EngineReady,
    StartAttempt,
    StopAttempt,
)
from mesh.errors import ConfigError, DecodeError
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import Assign, Submit
from node import worker as worker_module
from node.compute import __main__ as compute_module
from node.compute.backbone.precision import Speed, write_speeds
from node.compute.messages import (
    LENGTH_BYTES,
    Load,
    Run,
    Text,
    frame,
    frame_size,
    read_frame,
)
from node.compute.models import resolve
from node.worker import COMMAND, ComputeWorker, pause_s
from tests.tiny import tiny_llama

EPOCH = Epoch(3, NodeId("node-1"))
LONG_S = 20.0  # a bound on waiting, not a wait: a loaded machine starts Python in seconds

F = TypeVar("F")


class Facts:
    """What the worker told the node, in order; tests wait for the next of a kind."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def learn(self, fact: Any) -> None:
        self.all.append(fact)
        self._queue.put_nowait(fact)

    async def next(self, kind: type[F]) -> F:
        async with asyncio.timeout(LONG_S):
            while not isinstance(fact := await self._queue.get(), kind):
                pass
        return fact


@asynccontextmanager
async def compute(model: str, models_dir: Path, **options: Any) -> AsyncIterator[tuple[ComputeWorker, Facts]]:
    facts = Facts()
    worker = ComputeWorker(load(model, models_dir), learn=facts.learn, **options)
    task = asyncio.create_task(worker.run())
    try:
        yield worker, facts
    finally:
        await worker.stop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert worker.pid is None


def start(task: str, prompt: str, **submit: Any) -> StartAttempt:
    body = Submit(prompt=prompt, **submit)
    return StartAttempt(Assign(epoch=EPOCH, task=TaskId(task), attempt=1, submit=body, budget_s=None))


def load(model: str, state_dir: Path) -> Load:
    return Load(
        model=model,
        models_dir=str(state_dir),
        adapters_dir=str(state_dir / "adapters"),
        datasets_dir=str(state_dir / "datasets"),
        features_dir=str(state_dir / "features"),
    )


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


async def until(condition: Any) -> None:
    """For what no event announces: another process's end, a line of text."""
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_attempt_is_answered_in_pieces_and_once_as_a_whole(tmp_path: Path) -> None:
    async with compute("echo:100", tmp_path) as (worker, facts):
        ready = await facts.next(EngineReady)
        assert (ready.model, ready.slots, worker.device) == ("echo", 4, "cpu")
        prompt = " ".join(f"word{i}" for i in range(30))
        worker.carry_out(start("t1", prompt))
        assert worker.activity == "1 task"
        outcome = (await facts.next(AttemptFinished)).outcome
        pieces = [fact for fact in facts.all if isinstance(fact, AttemptText)]
        assert "".join(piece.text for piece in pieces) == outcome.text == prompt
        assert sum(piece.n_tokens for piece in pieces) == outcome.n_tokens == 30
        assert 3 <= len(pieces) <= 15, "0.3 s of text, in batches of about 70 ms"
        assert (outcome.state, outcome.retry, outcome.epoch, outcome.attempt) == ("done", False, EPOCH, 1)
        assert worker.activity == "idle" and worker.tokens_per_s > 0


async def test_stopping_an_attempt_ends_it_early_with_what_it_has(tmp_path: Path) -> None:
    async with compute("echo:50", tmp_path) as (worker, facts):
        await facts.next(EngineReady)
        worker.carry_out(start("t1", "word " * 4000, max_tokens=4000))
        first = await facts.next(AttemptText)
        worker.carry_out(StopAttempt(TaskId("t1"), 1, "cancelled by the client"))
        worker.carry_out(StopAttempt(TaskId("t1"), 1, "cancelled by the client"))
        outcome = (await facts.next(AttemptFinished)).outcome
        assert (outcome.state, outcome.reason) == ("cancelled", "cancelled by the client")
        assert outcome.text.startswith(first.text) and outcome.n_tokens < 4000
        worker.carry_out(start("t2", "still here"))
        assert (await facts.next(AttemptFinished)).outcome.text == "still here"


async def test_a_child_that_cannot_be_started_is_no_end_of_the_node(tmp_path: Path) -> None:
    async with compute("echo", tmp_path, command=(str(tmp_path / "nothing"),)) as (worker, facts):
        assert "could not be started" in (await facts.next(EngineLost)).reason
        await until(lambda: "again in" in worker.activity)


async def test_a_killed_child_fails_its_attempts_for_a_retry_and_comes_back(tmp_path: Path) -> None:
    async with compute("echo:5", tmp_path) as (worker, facts):
        await facts.next(EngineReady)
        worker.carry_out(start("t1", "one two three four five"))
        worker.carry_out(start("t2", "one two three four five"))
        await facts.next(AttemptText)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(2):
            outcome = (await facts.next(AttemptFinished)).outcome
            assert (outcome.state, outcome.retry) == ("failed", True)
            assert "out of memory" in (outcome.reason or "")
        assert "out of memory" in (await facts.next(EngineLost)).reason
        assert not worker.is_ready
        await facts.next(EngineReady)
        worker.carry_out(start("t1", "again"))
        assert (await facts.next(AttemptFinished)).outcome.text == "again"


async def test_an_attempt_without_a_loaded_model_fails_at_once_for_a_retry(tmp_path: Path) -> None:
    facts = Facts()
    worker = ComputeWorker(load("echo", tmp_path), learn=facts.learn)
    worker.carry_out(start("t1", "too early"))
    outcome = (await facts.next(AttemptFinished)).outcome
    assert outcome.retry and "no model is loaded" in (outcome.reason or "")


async def test_a_node_that_stops_hands_back_what_runs(tmp_path: Path) -> None:
    async with compute("echo:1", tmp_path) as (worker, facts):
        await facts.next(EngineReady)
        worker.carry_out(start("t1", "one two three"))
        pid = worker.pid
        assert pid is not None
        await worker.stop()
        outcome = (await facts.next(AttemptFinished)).outcome
        assert outcome.retry and has_ended(pid)


async def test_an_unknown_model_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    async with compute("no-such-model", tmp_path) as (worker, facts):
        lost = await facts.next(EngineLost)
        assert "smollm2-135m" in lost.reason, "it names what there is"
        await until(lambda: worker.activity.startswith("cannot compute"))
        assert [fact for fact in facts.all if isinstance(fact, EngineLost)] == [lost]


async def test_a_child_that_talks_nonsense_is_ended_and_replaced(tmp_path: Path) -> None:
    nonsense = (sys.executable, "-c", "import sys; print('x' * 100, flush=True); sys.stdin.read()")
    async with compute("echo", tmp_path, command=nonsense) as (_, facts):
        assert "no message" in (await facts.next(EngineLost)).reason


async def test_a_child_that_dies_at_start_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_PAUSE_S_FIRST", 0.001)
    broken = (sys.executable, "-c", "raise SystemExit('libtorch is missing')")
    async with compute("echo", tmp_path, command=broken) as (worker, facts):
        for _ in range(worker_module._QUICK_ENDS_MAX):
            assert "exit code 1" in (await facts.next(EngineLost)).reason
        await until(lambda: "again in" in worker.activity and " 0 s" not in worker.activity)
        assert worker.activity.split()[-2] >= "150", "after five quick ends it waits minutes"


async def test_missed_deadlines_bring_a_faster_format_between_two_tasks(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "model"))
    # A sixth is not worth int8 where nobody hurries, and is where half of the deadlines are missed.
    speeds = {"fp32": Speed(100.0, 1000.0), "int8": Speed(120.0, 1000.0)}
    async with compute(model, tmp_path) as (worker, facts):
        assert (await facts.next(EngineReady)).precision == "fp32"
        write_speeds(tmp_path / resolve(model).slug, speeds)
        for number in range(8):
            order = start(f"t{number}", "w1 w2", max_tokens=2)
            worker.carry_out(StartAttempt(replace(order.assign, budget_s=1e-6 if number % 2 else 60.0)))
            await facts.next(AttemptFinished)
        again = await facts.next(EngineReady)
        assert again.precision == "int8" and "deadline presses" in again.precision_reason
        assert [fact.reason for fact in facts.all if isinstance(fact, EngineLost)] == ["exit code 0"]


def test_pauses_double_with_jitter_and_become_long() -> None:
    rng = Random(7)
    assert [0.5 * 2**n >= pause_s(n, rng) >= 0.25 * 2**n for n in range(1, 5)] == [True] * 4
    assert 150 <= pause_s(5, rng) <= 300
    assert len({pause_s(3, rng) for _ in range(10)}) == 10


def test_the_child_ends_when_its_input_ends(tmp_path: Path) -> None:
    child = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(frame(load("echo", tmp_path)))
    child.stdin.flush()
    assert type(read_frame(child.stdout)).__name__ == "Ready"  # type: ignore[arg-type]
    child.stdin.close()
    assert child.wait(LONG_S) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG and oom_score_adj are Linux's")
def test_the_child_dies_with_a_killed_node_and_is_the_first_to_go_without_memory(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib
from node.settings import Settings
from node.state import StateDir
from node.worker import ComputeWorker, load_of
async def main():
    path = pathlib.Path({str(tmp_path)!r})
    load = load_of("echo", Settings(state_dir=path), StateDir(path))
    worker = ComputeWorker(load, learn=lambda fact: print(worker.pid, flush=True))
    await worker.run()
asyncio.run(main())
"""
    node = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert node.stdout is not None
    pid = int(node.stdout.readline())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= 500
    node.kill()
    node.wait()
    asyncio.run(until(lambda: has_ended(pid)))


def test_ctrl_c_in_the_terminal_does_not_kill_the_child_before_the_node_says_so(tmp_path: Path) -> None:
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(frame(load("echo", tmp_path)))
    child.stdin.flush()
    read_frame(child.stdout)  # type: ignore[arg-type]
    child.send_signal(signal.SIGINT)
    child.stdin.write(frame(Run(task=TaskId("t1"), attempt=1, submit=Submit(prompt="hi"))))
    child.stdin.flush()
    assert isinstance(read_frame(child.stdout), Text)  # type: ignore[arg-type]
    child.stdin.close()
    assert child.wait(LONG_S) == 0


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "memory_free_bytes", lambda: 600 * 2**20)
    with pytest.raises(compute_module._NoMemoryError, match=r"needs 1\.1 GiB, 600 MiB free.*smaller model"):
        compute_module._check_memory("loading Big", int(1.1 * 2**30))
    compute_module._check_memory("loading Small", 500 * 2**20)


def a_model(directory: Path, n: int = 1000) -> Path:
    """The headers of a model's files, which is all that is looked at before loading."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    shapes = {"model.layers.0.mlp.up_proj.weight": [1024 * n, 1024]}
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return directory


@pytest.mark.parametrize(
    ("free_mib", "wanted", "given"),
    [
        (8000, "auto", "fp32"),
        (3000, "auto", "bf16"),
        (1700, "auto", "int8"),
        (8000, "int4", "int4"),
    ],
)
def test_the_most_exact_weights_that_fit_are_loaded_or_what_the_operator_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_mib: int, wanted: Any, given: str
) -> None:
    monkeypatch.setattr(compute_module, "memory_free_bytes", lambda: free_mib * 2**20)
    told = replace(load("x", tmp_path), precision=wanted)
    precision, reason = compute_module._choose(told, a_model(tmp_path / "m"), tmp_path)
    assert precision == given and reason


@pytest.mark.parametrize(("wanted", "says"), [("auto", "even int4 needs"), ("fp32", "fp32 needs")])
def test_weights_that_do_not_fit_are_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any, says: str
) -> None:
    monkeypatch.setattr(compute_module, "memory_free_bytes", lambda: 600 * 2**20)
    told = replace(load("x", tmp_path), precision=wanted)
    with pytest.raises(compute_module._NoMemoryError, match=rf"{says}.*, 600 MiB free.*smaller model"):
        compute_module._choose(told, a_model(tmp_path / "m"), tmp_path)


def test_a_format_this_kind_of_model_does_not_have_is_the_operator_s_to_change(tmp_path: Path) -> None:
    told = replace(load("x", tmp_path), precision="int8")
    with pytest.raises(ConfigError, match="choose one of fp32, bf16"):
        compute_module._choose(told, a_model(tmp_path / "m"), tmp_path, formats=("fp32", "bf16"))


def test_a_frame_longer_than_any_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(DecodeError):
        frame_size(b"\xff" * LENGTH_BYTES)
