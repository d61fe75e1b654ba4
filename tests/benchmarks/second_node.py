"""A second node tunes an adapter on data whose features a first node computed, against full LoRA there.

Two real nodes on loopback with SmolLM2, over the whole way: a task comes by MQTT, the second node asks its
peers' catalogues, fetches the feature maps over TLS, trains the top layers for five epochs and saves an
adapter. It holds no share of the cache (``--feature-disk 0``), or the mesh would bring it the features before
anybody asks for them, and it is started anew for every seed, so nothing is in its memory. While one side is
measured the other rests. Both have the same cores.

``whole`` is from the submission to the result, as the client sees it; ``job`` what the node says it took.
``ceiling`` is what the speed-up would be if only the arithmetic of the layers that are trained took time.
Three seeds take about 25 minutes on two quiet cores, nearly all of it the baseline; --quick proves that it
runs.

    python -m tests.benchmarks.second_node [--quick] [--json] [--seeds N]
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from mesh.ids import MeshName, TaskId
from mesh.messages import Submit, TaskResult, TuneSpec
from node.compute.models import DEFAULT_MODEL
from node.compute.tune.top_model import read_config
from node.local_mesh import LocalMesh, NodeProcess
from node.profile import physical_cores
from tests.benchmarks.cached import prepared_model
from tests.benchmarks.datasets import Labelled, Split, jsonl
from tests.benchmarks.full_lora import MAX_TOKENS, RATE, RATES, FullLora
from tests.benchmarks.report import Metric, Options, main, spread
from tests.benchmarks.tune import arithmetic_ceiling, interval, splits_of
from tests.places import models_dir
from tests.traffic import Traffic, traffic

_TOP_LAYERS = 2
_EPOCHS = 5
_START_TIMEOUT_S = 300.0
_TUNE_TIMEOUT_S = 1200.0


def measure(options: Options) -> Iterator[Metric]:
    torch.set_num_threads(physical_cores())
    directory = prepared_model()
    (split,) = splits_of(options, ("r8",))
    n_seeds, n_epochs = (1, 2) if options.quick else (options.seeds or 3, _EPOCHS)
    seeds = range(options.seed, options.seed + n_seeds)
    full_s, whole_s, results = asyncio.run(_measured(directory, split, seeds, n_epochs))
    job_s = [result.service_s or 0.0 for result in results]
    speedups = [full / whole for full, whole in zip(full_s, whole_s, strict=True)]
    yield Metric("full_lora_s", statistics.median(full_s), "s", seeds=n_seeds, detail=spread(full_s))
    yield Metric("second_node_s", statistics.median(whole_s), "s", seeds=n_seeds, detail=spread(whole_s))
    held = results[0].output.features if results[0].output is not None else None
    assert held is not None
    yield Metric(
        "second_node_speedup",
        statistics.median(speedups),
        "x",
        ">= 15",
        seeds=n_seeds,
        detail={
            **interval(speedups),
            "ceiling": round(arithmetic_ceiling(read_config(directory), _TOP_LAYERS), 1),
            "top_layers": _TOP_LAYERS,
            "epochs": n_epochs,
            "job_s": round(statistics.median(job_s), 2),
            "features_s": round(held.fetch_s, 2),
            "tokens": held.n_tokens,
            "fetched_tokens": held.n_fetched,
            "MB": round(held.n_bytes / 1e6, 1),
        },
    )
    outputs = [result.output for result in results if result.output is not None]
    computed = sum(output.features.n_computed for output in outputs if output.features is not None)
    yield Metric("second_node_tokens_computed", computed, "", "<= 0", seeds=n_seeds)


async def _measured(
    directory: Path, split: Split, seeds: range, n_epochs: int
) -> tuple[list[float], list[float], list[TaskResult]]:
    """Seconds of full LoRA and of the second node's job, and what that job gave, for each seed."""
    full_s: list[float] = []
    whole_s: list[float] = []
    results: list[TaskResult] = []
    data = jsonl(tuple(_short(item) for item in split.train))
    async with _mesh() as (mesh, first), traffic(mesh) as client:
        _, made = await _tuned(client, first, data, seed=seeds.start + 100, n_epochs=1)
        assert made.output is not None and made.output.features is not None
        _say(f"the first node has computed {made.output.features.n_computed} tokens")
        for seed in seeds:
            full_s.append(await asyncio.to_thread(_full_lora_s, directory, split, n_epochs, seed))
            second = await mesh.start("--feature-disk", "0")
            await second.wait_for("engine_ready", _START_TIMEOUT_S)
            await _drained(mesh, first)
            took_s, result = await _tuned(client, second, data, seed=seed, n_epochs=n_epochs)
            await _drained(mesh, first, "--resume")
            await second.stop()
            whole_s.append(took_s)
            results.append(result)
            _say(f"seed {seed}: full LoRA {full_s[-1]:.0f} s, second node {took_s:.1f} s")
    return full_s, whole_s, results


@asynccontextmanager
async def _mesh() -> AsyncIterator[tuple[LocalMesh, NodeProcess]]:
    """The mesh and the node that computes the features; a third one hosts the broker and coordinates."""
    name, directory = MeshName(f"bench-{secrets.token_hex(3)}"), models_dir().parent
    flags = ("--threads", str(physical_cores()))
    async with LocalMesh(directory, name, flags=flags) as mesh:
        await mesh.start_many(1, "--no-compute", "--feature-disk", "0")
        first = await mesh.start("--model", DEFAULT_MODEL)
        await first.wait_for("engine_ready", _START_TIMEOUT_S)
        yield mesh, first
    shutil.rmtree(directory / "meshes" / name, ignore_errors=True)


async def _tuned(
    client: Traffic, node: NodeProcess, data: str, *, seed: int, n_epochs: int
) -> tuple[float, TaskResult]:
    """Seconds from the submission to the result, and the result."""
    spec = TuneSpec(
        adapter=f"bench-{secrets.token_hex(4)}",
        data=data,
        top_layers=_TOP_LAYERS,
        epochs=n_epochs,
        seed=seed,
        max_tokens=MAX_TOKENS,
    )
    began_s = time.perf_counter()
    task = client.submit(Submit(kind="tune", tune=spec, id=TaskId(f"b-{secrets.token_hex(6)}")))
    await client.wait(lambda: bool(client.results[task]), _TUNE_TIMEOUT_S, "an adapter")
    took_s = time.perf_counter() - began_s
    result = client.results[task][-1]
    shutil.rmtree(models_dir().parent / "adapters" / spec.adapter, ignore_errors=True)
    assert result.state == "done" and result.node == node.id, (result.state, result.reason, result.node)
    return took_s, result


async def _drained(mesh: LocalMesh, node: NodeProcess, *flags: str) -> None:
    code, _, said = await mesh.run("drain", *flags, node.id)
    assert not code, said


def _full_lora_s(directory: Path, split: Split, n_epochs: int, seed: int) -> float:
    rate = RATES.get(split.name, RATE)
    full = FullLora(directory, split, rate=rate, n_epochs=n_epochs, seed=seed)
    return list(full.epochs(evaluates=False))[-1].seconds


def _short(item: Labelled) -> Labelled:
    """No token has less than one character but a space: what is cut off would not be read anyway."""
    return Labelled(" ".join(item.text.split()[: MAX_TOKENS + 1]), item.label)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure, takes_files=True))
