"""Nodes that serve many at once, simulated: what is missed as answers, texts and tuning join one another.

Two workloads: the tasks of ``vdf_real`` on three nodes such as it runs, and those that ``edgemesh sim``
draws, on nodes of speeds 1, 1, 0.5 and 6; all with 16 slots. The figures of docs/adr/0025.

    python -m tests.benchmarks.joining [--quick] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from statistics import fmean

from coordinator.policy.policies import DEFAULT_POLICY, policy_named
from coordinator.policy.rates import Rates
from coordinator.policy.work import KINDS
from coordinator.virtual.devices import NodeSpec, parse_nodes
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import run
from coordinator.virtual.workload import Mix, VirtualTask, at_load, tasks_of
from mesh.ids import NodeId
from mesh.messages.task import TaskKind
from tests.benchmarks.report import Metric, Options, main
from tests.benchmarks.vdf_real import SLOWDOWNS, tasks_for

POLICIES = (DEFAULT_POLICY, "edf+drop+chunk", "fifo")
SLOTS = 16
SMOLLM2 = Rates(
    prefill_tokens_per_s=330, decode_tokens_per_s=75, row_cost=0.28, features_tokens_per_s=330,
    tune_tokens_per_s=1150, adapter_load_s=0.02,
)  # fmt: skip
"""As one thread of a current x86 core said of itself."""
FACTORS: dict[TaskKind, float] = {**dict.fromkeys(KINDS, 1.0), "generate": 1.2, "score": 1.15, "tune": 1.8}
"""As ``vdf_real`` found them there."""

Draw = Callable[[int, float], Sequence[VirtualTask]]
"""Tasks of a seed, at a load."""


def measure(options: Options) -> Iterator[Metric]:
    n_real, n_drawn, n_seeds = (60, 100, 1) if options.quick else (200, 500, 3)
    seeds = range(options.seed, options.seed + n_seeds)
    played = [
        NodeSpec(id=NodeId(f"n{k}"), rates=SMOLLM2.scaled(1 / slowdown), slots=SLOTS)
        for k, slowdown in enumerate(SLOWDOWNS)
    ]
    unequal = [replace(node, slots=SLOTS) for node in parse_nodes("1,1,0.5,6")]

    def real(seed: int, load: float) -> Sequence[VirtualTask]:
        return tasks_for(n_real, seed, played, FACTORS, load)

    def drawn(seed: int, load: float) -> Sequence[VirtualTask]:
        requests = generate(GeneratorSpec(tasks=n_drawn), Random(seed))
        return at_load(tasks_of(requests, Mix(), seed, unequal), unequal, load)

    yield from _compared("real", played, real, (0.5, 1.2), seeds)
    yield from _compared("drawn", unequal, drawn, (0.8, 1.0, 1.2), seeds)


def _compared(
    name: str, nodes: Sequence[NodeSpec], draw: Draw, loads: Sequence[float], seeds: Sequence[int]
) -> Iterator[Metric]:
    for load in loads:
        for policy in POLICIES:
            made = [run(draw(seed, load), nodes, policy_named(policy)) for seed in seeds]
            missed = [one.timeouts for one in made]
            detail = {
                "value kept": round(fmean(one.value_kept for one in made), 3),
                "min": round(min(missed), 3),
                "max": round(max(missed), 3),
            }
            metric = f"missed_{name}_{load:g}_{policy.replace('+', '_')}"
            yield Metric(metric, fmean(missed), "share", None, len(seeds), detail)


if __name__ == "__main__":
    sys.exit(main("nodes that serve many at once, simulated", measure))
