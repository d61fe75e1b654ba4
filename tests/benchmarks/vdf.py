"""What the scheduler is worth: the mesh's default policy against the others, on virtual time.

The workload is that of ``edgemesh sim``: a trace (``--trace FILE``, else requests of the generator), 4
unequal nodes (1, 1, 0.5 and 6 times a Pi 5), 2 % tuning jobs, costs estimated 30 % wrong; values and
deadlines by ``coordinator.virtual.workload``. Rejected and never-run tasks are timeouts. Every seed draws
everything anew; halves of 95 % intervals are in the detail.

``timeouts_vs_fifo``       percent fewer than FIFO, the worst of three loads
``value_vs_edf_points``    points of value above EDF with drop and chunk, the worst of the loads from 1 on
``timeouts_vs_edf_points`` points of timeouts below it, the same
``optimum_share``          of the exact clairvoyant optimum on one machine (tests.reference.optimum)
``failover_points``        more timeouts with a failover every 30 s
``baseline_…``             timeouts of the others at load 1, each with drop and chunk
``decision_ms``            1,000 waiting tasks, 16 nodes have become free (tests.benchmarks.decisions)
``decision_large_ms``      10,000 waiting tasks, one of 1,000 nodes becomes free
``sim_tasks_per_minute``   through the default policy, per minute of one processor core; most decisions
                           there are about few tasks, in plain numbers (``coordinator.policy.few``)

    python -m tests.benchmarks.vdf [--quick] [--json] [--trace FILE [--limit TASKS]]
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from coordinator.policy.policies import DEFAULT_POLICY, POLICIES, policy_named
from coordinator.virtual.devices import NodeSpec, parse_nodes
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import run
from coordinator.virtual.metrics import Interval, RunMetrics, interval
from coordinator.virtual.traces import Request
from coordinator.virtual.workload import Mix, VirtualTask, at_load, tasks_of
from node.cli.sim import read_trace
from tests.benchmarks import decisions
from tests.benchmarks.report import Metric, Options, main

NODES = parse_nodes("1,1,0.5,6")
ONE_MACHINE = parse_nodes("8.5")
LOADS = (0.8, 1.0, 1.2)
RULES = "+drop+chunk"
EDF = f"edf{RULES}"
FAILOVER_EVERY_S = 30.0


@dataclass(slots=True)
class Runs:
    """Runs of one workload, each made once and kept."""

    options: Options
    seeds: Sequence[int]
    trace: list[Request] | None
    n_simulated: int = 0
    busy_s: float = 0.0
    """Processor time of this process in runs of the default policy."""
    _made: dict[tuple[str, float, float | None], list[RunMetrics]] = field(default_factory=dict)

    def of(self, policy: str, load: float, failover_every_s: float | None = None) -> list[RunMetrics]:
        """One for each seed."""
        key = (policy, load, failover_every_s)
        if key not in self._made:
            self._made[key] = [self._run(policy, load, seed, failover_every_s) for seed in self.seeds]
            print(f"simulated {policy} at load {load}", file=sys.stderr, flush=True)
        return self._made[key]

    def tasks(
        self, load: float, seed: int, nodes: Sequence[NodeSpec] = NODES, mix: Mix | None = None
    ) -> list[VirtualTask]:
        return at_load(tasks_of(self._requests(seed), mix or Mix(), seed, nodes), nodes, load)

    def _requests(self, seed: int) -> Sequence[Request]:
        if self.trace is not None:
            return self.trace[: 500 if self.options.quick else self.options.limit]
        n_tasks = 300 if self.options.quick else (self.options.limit or 4000)
        return generate(GeneratorSpec(tasks=n_tasks), Random(f"requests/{seed}"))

    def _run(self, policy: str, load: float, seed: int, failover_every_s: float | None) -> RunMetrics:
        tasks = self.tasks(load, seed)
        began_s = time.process_time()
        metrics = run(tasks, NODES, policy_named(policy), failover_every_s=failover_every_s)
        if policy == DEFAULT_POLICY and failover_every_s is None:
            self.busy_s += time.process_time() - began_s
            self.n_simulated += len(tasks)
        return metrics


def measure(options: Options) -> Iterator[Metric]:
    """Yields each metric as soon as it is known; one run at a time, in this process."""
    n_seeds = options.seeds or (1 if options.quick else 5)
    trace = read_trace(options.trace) if options.trace is not None else None
    runs = Runs(options, range(options.seed, options.seed + n_seeds), trace)
    yield _against_fifo(runs)
    yield _value_against_edf(runs)
    yield _timeouts_against_edf(runs)
    yield _failovers(runs)
    yield from _baselines(runs)
    yield from _optimum(runs)
    yield Metric("decision_ms", decisions.decision_ms(), "ms", "<= 5", 1, {"waiting": 1000, "nodes": 16})
    yield Metric(
        "decision_large_ms",
        decisions.decision_large_ms(),
        "ms",
        "<= 50",
        1,
        {"waiting": 10_000, "nodes": 1000},
    )
    yield Metric(
        "sim_tasks_per_minute", 60 * runs.n_simulated / runs.busy_s, "tasks", ">= 100000", n_seeds,
        {"tasks": runs.n_simulated, "policy": DEFAULT_POLICY},
    )  # fmt: skip


def _against_fifo(runs: Runs) -> Metric:
    fewer: dict[float, float] = {}
    detail: dict[str, object] = {"policy": DEFAULT_POLICY}
    for load in LOADS:
        ours, fifo = runs.of(DEFAULT_POLICY, load), runs.of("fifo", load)
        each = [100 * (1 - one.timeouts / other.timeouts) for one, other in zip(ours, fifo, strict=True)]
        found = interval(each)
        fewer[load] = found.mean
        both = f"{_percent(ours, 'timeouts')} against {_percent(fifo, 'timeouts')}"
        detail[f"load {load}"] = f"{_words(found)} ({both})"
    return Metric("timeouts_vs_fifo", min(fewer.values()), "% fewer", ">= 63", len(runs.seeds), detail)


def _value_against_edf(runs: Runs) -> Metric:
    points, detail = _points(runs, "value_kept", sign=1)
    return Metric("value_vs_edf_points", points, "points", ">= 3", len(runs.seeds), detail)


def _timeouts_against_edf(runs: Runs) -> Metric:
    points, detail = _points(runs, "timeouts", sign=-1)
    return Metric("timeouts_vs_edf_points", points, "points fewer", ">= 0", len(runs.seeds), detail)


def _points(runs: Runs, metric: str, sign: int) -> tuple[float, dict[str, object]]:
    """The worst of the loads from 1 on, and all of them in words."""
    worst, detail = float("inf"), dict[str, object]()
    for load in (load for load in LOADS if load >= 1):
        ours, edf = runs.of(DEFAULT_POLICY, load), runs.of(EDF, load)
        pairs = zip(ours, edf, strict=True)
        found = interval(100 * sign * (getattr(one, metric) - getattr(other, metric)) for one, other in pairs)
        worst = min(worst, found.mean)
        both = f"{_percent(ours, metric)} against {_percent(edf, metric)}"
        detail[f"load {load}"] = f"{_words(found)} ({both})"
    return worst, detail


def _failovers(runs: Runs) -> Metric:
    calm, stormy = runs.of(DEFAULT_POLICY, 1.0), runs.of(DEFAULT_POLICY, 1.0, FAILOVER_EVERY_S)
    more = interval(100 * (two.timeouts - one.timeouts) for one, two in zip(calm, stormy, strict=True))
    detail = {
        "±": round(more.half, 2),
        "failovers": sum(one.failovers for one in stormy),
        "every_s": FAILOVER_EVERY_S,
    }
    return Metric("failover_points", more.mean, "points more", "<= 5", len(runs.seeds), detail)


def _baselines(runs: Runs) -> Iterator[Metric]:
    """All others at load 1, with the rules that part of the gain is due to."""
    for name, policy in POLICIES.items():
        if name == DEFAULT_POLICY:
            continue
        full = name if policy.drop and policy.chunk else name + RULES
        made = runs.of(full, 1.0)
        detail = {"value kept": _percent(made, "value_kept"), "timeouts": _percent(made, "timeouts")}
        value = 100 * interval(one.timeouts for one in made).mean
        yield Metric(f"baseline_{full.replace('+', '_')}", value, "% timeouts", None, len(runs.seeds), detail)


def _optimum(runs: Runs) -> Iterator[Metric]:
    """On one machine as fast as the four nodes together, in windows of 50 tasks; the worst of the loads."""
    if importlib.util.find_spec("scipy") is None:  # solves the integer programs; a dependency of tests only
        print("optimum_share needs scipy", file=sys.stderr)
        return
    from tests.reference.optimum import optimum_share

    policy, shares, detail = policy_named(DEFAULT_POLICY), dict[float, float](), dict[str, object]()
    n_tasks = 100 if runs.options.quick else 500
    for load in LOADS:
        by_seed = (runs.tasks(load, seed, ONE_MACHINE, Mix(adapters=0))[:n_tasks] for seed in runs.seeds)
        found = interval(100 * optimum_share(policy, tasks, ONE_MACHINE[0]) for tasks in by_seed)
        shares[load] = found.mean
        detail[f"load {load}"] = _words(found, 2)
    yield Metric("optimum_share", min(shares.values()), "%", ">= 97", len(runs.seeds), detail)


def _percent(made: Sequence[RunMetrics], metric: str) -> str:
    found = interval(100 * getattr(one, metric) for one in made)
    return f"{_words(found)} %"


def _words(found: Interval, digits: int = 1) -> str:
    """With half of its 95 % interval, where there is one."""
    return f"{found.mean:.{digits}f}" + (f" ±{found.half:.{digits}f}" if found.half else "")


if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0] if __doc__ else "", measure, takes_trace=True))
