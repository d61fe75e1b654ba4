"""The default policy against FIFO on three real processes with SmolLM2, and the simulator against both.

Three nodes of one thread each play devices 1.5, 3 and 6 times slower, so that together they ask for little
more than one core. Generation, scoring, embedding and small tuning jobs arrive at 1.2 times what the nodes
can do by their own measured rates; values and deadlines are drawn as ``edgemesh sim`` draws them. Two
meshes of the same nodes differ in ``--policy`` alone and play the same tasks in turns. The same tasks then
go through the simulator with the rates that the nodes said.

A kind's *factor* is what a first task took against what the rates say, alone on an idle mesh: loading the
top of a model is no token. Coordinators learn it from the same tasks; deadlines, load and simulator know it.

Whoever else computes on this machine slows the nodes: ``lag_s`` in the detail is the median time from saying
a task to its acknowledgement, 0.02 s on a quiet one. Five seeds take about ten minutes; --quick a minute
and a half.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from coordinator.policy.policies import DEFAULT_POLICY, policy_named
from coordinator.policy.rates import Rates
from coordinator.policy.work import KINDS, Work
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import run
from coordinator.virtual.metrics import RunMetrics, interval
from coordinator.virtual.traces import Request
from coordinator.virtual.workload import Mix, VirtualTask, at_load, service_s, tasks_of
from mesh.ids import MeshName, NodeId, TaskId
from mesh.messages import NodeRates, Submit, TuneSpec
from mesh.messages.task import TaskKind
from node.client import watch
from node.compute.convert import convert
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from node.faces.view import View
from node.local_mesh import LocalMesh
from node.state import StateDir
from tests.benchmarks.report import Metric, Options, main
from tests.places import models_dir
from tests.playing import metrics_of, play
from tests.traffic import Traffic, settings_of, traffic

SLOWDOWNS = (1.5, 3, 6)
BASELINE = "fifo"
POLICIES = (BASELINE, DEFAULT_POLICY)
LOAD = 1.2
START_TIMEOUT_S = 180.0
RATES_TIMEOUT_S = 40.0
"""Measuring takes three seconds a node, one after the other, in moments when nobody wants anything."""

MIX = Mix(tune=0.05, tune_tokens=200, tune_spread=0.4, tune_epochs=2, adapters=0, error=0.0)
REQUESTS = GeneratorSpec(
    prompt_tokens=40, prompt_spread=0.8, prompt_tokens_max=200, answer_tokens=25, answer_spread=0.6,
    answer_tokens_max=80,
)  # fmt: skip
READING = {"score": 0.15, "embed": 0.15}
"""Share of the requests that only read: as many tokens as would take about as long as an answer."""
READ_TOKENS = 4.0
"""Times a request's tokens."""
TOP_LAYERS = 4  # what nodes rate

FIRST = (
    Work(kind="generate", n_prompt_tokens=40, n_tokens=25),
    Work(kind="score", n_prompt_tokens=260),
    Work(kind="embed", n_prompt_tokens=260),
    Work(kind="tune", n_feature_tokens=200, n_tune_tokens=200 * MIX.tune_epochs),
)
"""What a mesh does first, each alone."""
FIRST_DEADLINE_S = 120.0

WORDS = tuple(
    "river stone winter letter garden window market engine summer island silver copper bridge forest "  # noqa: SIM905
    "morning station harvest village lantern teacher kitchen mountain journey weather".split()
)


def measure(options: Options) -> Iterator[Metric]:
    # Converted here, if need be, and not three times at once.
    prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    n_tasks = 10 if options.quick else 60
    seeds = [options.seed + k for k in range(1 if options.quick else options.seeds or 5)]
    yield from asyncio.run(_measured(seeds, n_tasks))


# ── the workload ────────────────────────────────────────────────────────────────────────────────────


def tasks_for(
    n_tasks: int, seed: int, nodes: Sequence[NodeSpec], factors: Mapping[TaskKind, float], load: float = LOAD
) -> list[VirtualTask]:
    """``n_tasks`` that arrive at ``load``, with the work they take by the kind's factor."""
    requests = generate(replace(REQUESTS, tasks=n_tasks), Random(seed))
    kinds = [_kind(Random(f"kind/{seed}/{k}").random()) for k in range(n_tasks)]
    read = [
        request if kind == "generate" else _only_read(request)
        for request, kind in zip(requests, kinds, strict=True)
    ]
    tasks = tasks_of(read, MIX, seed, nodes)
    known = [
        task if task.work.kind == "tune" else replace(task, work=replace(task.work, kind=kind))
        for task, kind in zip(tasks, kinds, strict=True)
    ]
    # Deadlines come from a service time without the factor: they move along with it.
    return at_load([_longer(task, factors[task.work.kind]) for task in known], nodes, load)


def _only_read(request: Request) -> Request:
    n_tokens = round(READ_TOKENS * (request.n_prompt_tokens + request.n_tokens))
    return replace(request, n_prompt_tokens=n_tokens, n_tokens=0)


def _kind(draw: float) -> TaskKind:
    for kind in KINDS:
        draw -= READING.get(kind, 0.0)
        if draw < 0 and kind in READING:
            return kind
    return "generate"


def _longer(task: VirtualTask, factor: float) -> VirtualTask:
    patience_s = 0.0 if task.work.kind == "tune" else MIX.patience_s
    given_s = task.deadline_at - task.arrives_at - patience_s
    return replace(
        task, work=_times(task.work, factor), deadline_at=task.arrives_at + patience_s + given_s * factor
    )


def _times(work: Work, factor: float) -> Work:
    return replace(
        work,
        n_prompt_tokens=work.n_prompt_tokens * factor,
        n_tokens=work.n_tokens * factor,
        n_feature_tokens=work.n_feature_tokens * factor,
        n_tune_tokens=work.n_tune_tokens * factor,
    )


def body_of(task: VirtualTask, factors: Mapping[TaskKind, float], once: str) -> Submit:
    """A submission that takes just this work: its factor is taken out again. The words are those of ``once``
    alone: adapters, features and beginnings of prompts that another mesh or run has left are of no use."""
    work, rng = _times(task.work, 1 / factors[task.work.kind]), Random(f"{once}/{task.id}")
    match work.kind:
        case "generate":
            asked = f"Write a very long story with these words: {_text(rng, work.n_prompt_tokens - 10)}"
            return Submit(prompt=asked, max_tokens=max(1, round(work.n_tokens)), stream=False)
        case "tune":
            records = [
                json.dumps({"text": _text(rng, 16.0), "label": ("warm", "cold")[k % 2]})
                for k in range(max(8, round(work.n_feature_tokens / 16)))
            ]
            spec = TuneSpec(
                adapter=f"real-{rng.randrange(4)}", data="\n".join(records), epochs=MIX.tune_epochs,
                top_layers=TOP_LAYERS,
            )  # fmt: skip
            return Submit(kind="tune", tune=spec, stream=False)
        case kind:
            n_texts = max(1, round(work.n_prompt_tokens / 50))
            texts = [_text(rng, work.n_prompt_tokens / n_texts) for _ in range(n_texts)]
            return Submit(kind=kind, texts=texts, stream=False)


def _text(rng: Random, n_tokens: float) -> str:
    """About that many tokens: one a word, of the words there are."""
    return " ".join(rng.choice(WORDS) for _ in range(max(1, round(n_tokens))))


# ── the meshes ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Side:
    """A mesh of one policy, and what was seen of it."""

    policy: str
    mesh: LocalMesh
    client: Traffic
    once: str
    """Drawn anew by every run, for each mesh."""
    real: list[RunMetrics] = field(default_factory=list)
    virtual: list[RunMetrics] = field(default_factory=list)


@asynccontextmanager
async def _side(policy: str) -> AsyncIterator[_Side]:
    """In the state directory that has the model; what this mesh leaves there goes with it."""
    name, directory = MeshName(f"bench-{secrets.token_hex(3)}"), models_dir().parent
    flags = ("--model", DEFAULT_MODEL, "--threads", "1", "--policy", policy)
    async with LocalMesh(directory, name, flags=flags) as mesh:
        first = await mesh.start("--new", "--slowdown", str(SLOWDOWNS[0]))
        await first.wait_for("joined", START_TIMEOUT_S)
        for slowdown in SLOWDOWNS[1:]:
            await mesh.start("--slowdown", str(slowdown))
        await asyncio.gather(*(node.wait_for("engine_ready", START_TIMEOUT_S) for node in mesh.nodes))
        async with traffic(mesh) as client:
            yield _Side(policy, mesh, client, secrets.token_hex(4))
    shutil.rmtree(directory / "meshes" / name, ignore_errors=True)


async def _measured(seeds: Sequence[int], n_tasks: int) -> list[Metric]:
    async with AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(_side(policy)) for policy in POLICIES]
        specs = await _specs(sides[0].mesh)
        factors, _ = await asyncio.gather(*(_factors(side, specs) for side in sides))
        _say(f"factors { ({kind: round(factor, 2) for kind, factor in factors.items()}) }")
        began_at, lags_s = time.monotonic(), list[float]()
        for k, seed in enumerate(seeds):
            tasks = tasks_for(n_tasks, seed, specs, factors)
            for side in sides[:: -1 if k % 2 else 1]:
                lags_s.append(await _play(side, tasks, seed, specs, factors))
        seconds = time.monotonic() - began_at
        errors = await _errors(sides[-1].mesh)
    return _metrics(sides, errors, {"lag_s": round(statistics.median(lags_s), 3), "seconds": round(seconds)})


async def _play(
    side: _Side,
    tasks: Sequence[VirtualTask],
    seed: int,
    specs: Sequence[NodeSpec],
    factors: Mapping[TaskKind, float],
) -> float:
    """One trace on one mesh and in the simulator; the median lag in seconds."""
    name = f"s{seed}"
    body = partial(body_of, factors=factors, once=f"{side.once}/{name}")
    ends, _ = await play(side.client, tasks, body, name=name)
    failed = [end for end in ends if end.how == "lost"]
    assert not failed, f"{len(failed)} tasks failed, such as {failed[0].task}: {failed[0].reason}"
    side.real.append(metrics_of(ends))
    side.virtual.append(run(tasks, specs, policy_named(side.policy)))
    real, virtual = side.real[-1], side.virtual[-1]
    by_kind = {kind: round(share, 2) for kind, share in real.timeouts_by_kind.items()}
    _say(
        f"seed {seed} {side.policy}: {real.timeouts:.3f} missed (simulated {virtual.timeouts:.3f}), value "
        f"{real.value_kept:.3f} ({virtual.value_kept:.3f}), rejected {real.rejected:.2f}, "
        f"late {real.late:.2f}, {by_kind}"
    )
    client = side.client
    return statistics.median(client.acknowledged_at[end.task] - client.said_at[end.task] for end in ends)  # type: ignore[index]


async def _specs(mesh: LocalMesh) -> list[NodeSpec]:
    """The nodes as they say of themselves, once they have measured."""
    rows: dict[NodeId, NodeRates] = {}
    slots: dict[NodeId, int] = {}
    until = time.monotonic() + RATES_TIMEOUT_S
    async for view in _views(mesh):
        for row in view.nodes:
            if row.rates is not None and row.slots:
                rows[row.node], slots[row.node] = row.rates, row.slots
        is_known = len(rows) == len(SLOWDOWNS) and all(one.origin != "guessed" for one in rows.values())
        if is_known or time.monotonic() > until:
            break
    specs = [NodeSpec(id=node, rates=_rates(said), slots=slots[node]) for node, said in sorted(rows.items())]
    for spec in specs:
        rates = spec.rates
        _say(
            f"{spec.id}: ÷{rates.emulated_slowdown:g}, {rates.decode_tokens_per_s:.1f} tok/s, a row "
            f"{rates.row_cost:.2f}, prompts {rates.prefill_tokens_per_s:.0f}, "
            f"tuning {rates.tune_tokens_per_s:.0f}"
        )
    return specs


def _rates(said: NodeRates) -> Rates:
    assert said.features_tokens_per_s and said.tune_tokens_per_s, "this model can be tuned"
    return Rates(
        prefill_tokens_per_s=said.prefill_tokens_per_s,
        decode_tokens_per_s=said.decode_tokens_per_s,
        row_cost=said.row_cost,
        features_tokens_per_s=said.features_tokens_per_s,
        tune_tokens_per_s=said.tune_tokens_per_s,
        adapter_load_s=said.adapter_load_s,
        emulated_slowdown=said.emulated_slowdown,
    )


async def _views(mesh: LocalMesh) -> AsyncIterator[View]:
    async for view in watch(settings_of(mesh), StateDir(mesh.state_dir), every_s=0.5):
        yield view


async def _errors(mesh: LocalMesh) -> dict[str, tuple[int, float]]:
    """Outcomes and p50 of the prediction error by kind, as ``edgemesh status`` tells them."""
    until = time.monotonic() + 20.0
    async for view in _views(mesh):
        if view.prediction_errors or time.monotonic() > until:
            return {error.kind: (error.n, error.p50) for error in view.prediction_errors}
    return {}


async def _factors(side: _Side, specs: Sequence[NodeSpec]) -> dict[TaskKind, float]:
    """By kind, what tasks took alone on an idle mesh against what the rates of the fastest node say. The
    second of each kind counts: the first one wakes threads and imports."""
    fastest = min((spec.rates for spec in specs), key=lambda rates: rates.unit_s)
    factors: dict[TaskKind, float] = dict.fromkeys(KINDS, 1.0)
    plain = dict(factors)
    for work in FIRST:
        for n in range(2):
            task = VirtualTask(
                id=TaskId(f"{work.kind}-{n}"), arrives_at=0, deadline_at=FIRST_DEADLINE_S, value=1,
                work=work, true_factor=1,
            )  # fmt: skip
            body = partial(body_of, factors=plain, once=side.once)
            ends, results = await play(side.client, [task], body, name="first")
            assert ends[0].how == "done", ends[0]
            (result,) = results.values()
            factors[work.kind] = result.service_s / service_s(work, fastest)
    return factors


# ── what it comes to ────────────────────────────────────────────────────────────────────────────────


def _metrics(
    sides: Sequence[_Side], errors: Mapping[str, tuple[int, float]], detail: dict[str, float]
) -> list[Metric]:
    base, ours = sides
    n = len(base.real)
    fewer = [
        100 * (1 - mine.timeouts / theirs.timeouts) if theirs.timeouts else 0.0
        for mine, theirs in zip(ours.real, base.real, strict=True)
    ]
    missed = {side.policy: round(statistics.fmean(one.timeouts for one in side.real), 3) for side in sides}
    whole = _fewer(ours.real, base.real)
    metrics = [
        Metric(
            "real_timeouts_vs_fifo", whole, "% fewer", ">= 50", n,
            {"missed": missed, "ci95": _interval(fewer), **detail},
        )
    ]  # fmt: skip
    for side in sides:
        kept = [one.value_kept for one in side.real]
        metrics.append(
            Metric(f"real_value_{side.policy}", statistics.fmean(kept), "share", None, n,
                   {"ci95": _interval(kept)})
        )  # fmt: skip
    for kind, (n_outcomes, p50) in sorted(errors.items()):
        metrics.append(
            Metric(f"prediction_error_{kind}", 100 * p50, "% p50", "<= 25" if n_outcomes >= 20 else None, n,
                   {"of": n_outcomes})
        )  # fmt: skip
    apart = {
        side.policy: 100 * abs(statistics.fmean(
            real.timeouts - virtual.timeouts for real, virtual in zip(side.real, side.virtual, strict=True)
        ))
        for side in sides
    }  # fmt: skip
    simulated = {
        side.policy: round(statistics.fmean(one.timeouts for one in side.virtual), 3) for side in sides
    }
    metrics.append(
        Metric("sim_agrees_points", max(apart.values()), "points", "<= 15", n,
               {"missed": missed, "simulated": simulated})
    )  # fmt: skip
    return metrics


def _fewer(ours: Sequence[RunMetrics], base: Sequence[RunMetrics]) -> float:
    """Over all seeds together: a seed where little is missed must not weigh as much as the others."""
    theirs = math.fsum(one.timeouts for one in base)
    return 100 * (1 - math.fsum(one.timeouts for one in ours) / theirs) if theirs else 0.0


def _interval(values: Sequence[float]) -> str:
    found = interval(values)
    return f"{found.mean:.3g} ± {found.half:.2g}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0] if __doc__ else "", measure))
