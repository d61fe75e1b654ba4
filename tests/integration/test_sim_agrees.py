"""The simulator's answer to "what if" is what happens: one small trace on three real processes and in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean, median

import pytest

from coordinator.policy.policies import DEFAULT_POLICY, policy_named
from coordinator.policy.rates import Rates
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import run
from coordinator.virtual.metrics import RunMetrics
from coordinator.virtual.workload import Mix, VirtualTask, at_load, tasks_of
from mesh.ids import NodeId
from mesh.messages import Submit
from node.compute.echo import SLOTS
from node.compute.rates import echo_rates
from node.local_mesh import LocalMesh
from tests.integration.meshes import local_mesh
from tests.playing import metrics_of, play
from tests.traffic import traffic

pytestmark = pytest.mark.timeout(180)

TOKENS_PER_S = 20.0
SLOWDOWNS = (1, 2, 4)
# More than the mesh can do: some time out whatever the policy, half under FIFO.
LOAD = 1.8
# 60 tasks of 1.5 s in the middle on the fastest node arrive within 8 s.
N_TASKS = 60
MIX = Mix(patience_s=1.0, tightness=(1.5, 4.0), tune=0.0, adapters=0, error=0.0)
POINTS = 0.15
SHAKEN_S = 0.06
"""What the way through a mesh takes on a busy machine."""
LAG_MAX_S = 0.3
"""An acknowledgement takes 0.02 s, 0.05 s on a busy machine. Where it takes a third of a second, nodes and
the clock of arrivals stand still for seconds now and then, and are not the three nodes that are simulated."""


def nodes() -> list[NodeSpec]:
    said = echo_rates(TOKENS_PER_S)
    rates = Rates(
        prefill_tokens_per_s=said.prefill_tokens_per_s,
        decode_tokens_per_s=said.decode_tokens_per_s,
        row_cost=said.row_cost,
    )
    return [
        NodeSpec(id=NodeId(f"n{k}"), rates=rates.scaled(1 / slowdown), slots=SLOTS)
        for k, slowdown in enumerate(SLOWDOWNS)
    ]


def trace(seed: int) -> list[VirtualTask]:
    """Answers of 30 words in the middle; the prompt is the answer, and takes no time to read."""
    spec = GeneratorSpec(
        tasks=N_TASKS, prompt_tokens=1, prompt_spread=0, answer_tokens=30, answer_spread=0.5,
        answer_tokens_max=60,
    )  # fmt: skip
    specs = nodes()
    return at_load(tasks_of(generate(spec, Random(seed)), MIX, seed, specs), specs, LOAD)


def shaken(tasks: list[VirtualTask], seed: int) -> list[VirtualTask]:
    """The same trace by a little other clock: who ends just in time must not decide."""
    rng = Random(seed)
    moved = [replace(task, arrives_at=task.arrives_at + rng.uniform(0, SHAKEN_S)) for task in tasks]
    return sorted(moved, key=lambda task: task.arrives_at)


def words_of(task: VirtualTask) -> Submit:
    n_words = round(task.work.n_tokens)
    return Submit(prompt=" ".join(f"w{k}" for k in range(n_words)), max_tokens=n_words, stream=False)


@asynccontextmanager
async def unequal_mesh(directory: Path, policy: str) -> AsyncIterator[LocalMesh]:
    async with local_mesh(directory, 1, "--policy", policy, model=f"echo:{TOKENS_PER_S:g}") as mesh:
        others = [await mesh.start("--slowdown", str(slowdown)) for slowdown in SLOWDOWNS[1:]]
        for node in others:
            await node.wait_for("joined", 60)
            await node.wait_for("engine_ready", 60)
        yield mesh


async def played(directory: Path, policy: str, tasks: list[VirtualTask]) -> RunMetrics:
    async with unequal_mesh(directory, policy) as mesh, traffic(mesh) as client:
        ends, _ = await play(client, tasks, words_of, name="real")
        assert client.lost == [] and client.doubled == []
        lag_s = median(client.acknowledged_at[task] - said_at for task, said_at in client.said_at.items())
    assert not [end for end in ends if end.how == "lost"], "nothing fails"
    if lag_s > LAG_MAX_S:
        pytest.skip(
            f"no processor for a trace in real time: {lag_s:.2f} s from saying a task to hearing of it"
        )
    return metrics_of(ends)


@pytest.mark.parametrize("policy", ["fifo", DEFAULT_POLICY])
async def test_a_trace_on_three_processes_and_in_the_simulator_differ_by_less_than_15_points(
    tmp_path: Path, policy: str
) -> None:
    tasks = trace(seed=1)
    real = await played(tmp_path, policy, tasks)
    virtual = fmean(run(shaken(tasks, k), nodes(), policy_named(policy)).timeouts for k in range(8))
    assert abs(real.timeouts - virtual) < POINTS, (virtual, real)
