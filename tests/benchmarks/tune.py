"""Cached fine-tuning of the top layers against full LoRA by plain transformers and peft.

Both sides train on the same texts in one process with the same threads, an epoch of one after an epoch of
the other. Evaluation is not counted on either side. The baseline's learning rate is the one in
``tests.benchmarks.full_lora`` (which also searches for it), our settings are the engine's defaults; figures
are on test texts. Three seeds of five baseline epochs on two data sets take about an hour on two quiet cores
without AVX-512, ``--seeds 1`` a third of that; --quick takes two minutes.

``ceiling`` is what the speed-up would be if only the arithmetic that nobody can leave out took time: for a
warm epoch the layers that are trained (the last one's rows that are read), for a cold run one forward pass
of every text up to the cut, as measured.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from node.profile import physical_cores
from tests.benchmarks.cached import Bench, Run, prepared_model
from tests.benchmarks.datasets import Split, from_files, load
from tests.benchmarks.full_lora import RATE, RATES, FullLora, Point
from tests.benchmarks.report import Metric, Options, main, spread
from tests.places import ROOT

__all__ = ["arithmetic_ceiling", "interval", "splits_of"]

_WARM_TOP = 4
_COLD_TOP, _COLD_EPOCHS = 2, 20
# How many layers are to reach full LoRA's accuracy is chosen on validation texts, like its learning rate. For
# these it was: topics are in the pool of all rows, and more layers add nothing to the head start.
_REACH_TOP = {"r8": 1, "r52": 1, "newsgroups": 1}
_REACH_TOPS = (1, 4, 8)
_REACH_EPOCHS = 5
_BASELINE_EPOCHS = 5
_POINT = 0.01
_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


@dataclass(slots=True)
class _Seed:
    """What one seed gave on one data set."""

    reach_top: int
    full: list[Point] = field(default_factory=list)
    is_bf16: bool = False
    warm: Run | None = None
    cold: Run | None = None
    reach: list[Point] = field(default_factory=list)
    reach_features_s: float = 0.0

    def full_epoch_s(self) -> list[float]:
        ends = [0.0, *(point.seconds for point in self.full)]
        return [after - before for before, after in itertools.pairwise(ends)]

    @property
    def wanted(self) -> float:
        return max(point.accuracy for point in self.full) - _POINT


def measure(options: Options) -> Iterator[Metric]:
    torch.set_num_threads(physical_cores())
    directory = prepared_model()
    bench = Bench(directory)
    n_seeds = 1 if options.quick else options.seeds or 3
    results: dict[str, list[_Seed]] = {}
    for at, split in enumerate(splits_of(options, ("r8", "newsgroups"))):
        top = _REACH_TOPS[0] if options.quick else _REACH_TOP.get(split.name) or _chosen_top(bench, split)
        seeds = [
            _one_seed(bench, split, options.seed + number, options.quick, top, is_first=at == 0)
            for number in range(n_seeds)
        ]
        results[split.name] = seeds
        if at == 0:
            yield from _epochs_metrics(bench, split, seeds)
    yield from _reach_metrics(results)
    yield from _memory(bench, options.quick)


def splits_of(options: Options, names: Sequence[str]) -> list[Split]:
    if options.train is not None and options.test is not None:
        return [from_files(options.train, options.test)]
    if options.quick:
        return [load(names[0], n_train=48, n_test=24)]
    return [load(name) for name in names]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Spread and the half width of the mean's 95 % confidence interval."""
    found: dict[str, Any] = dict(spread(values))
    if len(values) > 1:
        half = _T_95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
        found["ci95"] = f"{statistics.mean(values):.3g} ± {half:.2g}"
    return found


def arithmetic_ceiling(config: Any, top_layers: int) -> float:
    """Of a warm epoch: all layers forward and back, against those trained, of the last only what is read."""
    d, d_mlp = config.hidden_size, config.intermediate_size
    kv = 2 * d * config.num_key_value_heads * (d // config.num_attention_heads)
    layer = 2 * d * d + kv + 3 * d * d_mlp
    return float(config.num_hidden_layers * layer / ((top_layers - 1) * layer + kv))


def _chosen_top(bench: Bench, split: Split) -> int:
    """The number of layers that is soonest within half a point of the best that any of them reaches, on
    validation texts and a seed that is not measured."""
    points: dict[int, list[Point]] = {}
    for top in _REACH_TOPS:
        *_, run = bench.run(split, bench.store(), top_layers=top, n_epochs=3, seed=1000, on_validation=True)
        points[top] = run.points
        told = " ".join(f"{point.accuracy:.3f}" for point in run.points)
        _say(f"{split.name}: top {top} of {bench.n_layers}, validation {told}, {run.seconds:.0f} s")
    best = max(point.accuracy for several in points.values() for point in several)
    soonest = {
        top: min((p.seconds for p in several if p.accuracy >= best - _POINT / 2), default=float("inf"))
        for top, several in points.items()
    }
    return min(soonest, key=soonest.__getitem__)


def _one_seed(
    bench: Bench, split: Split, seed: int, is_quick: bool, reach_top: int, *, is_first: bool
) -> _Seed:
    found = _Seed(reach_top=reach_top)
    n_full = 2 if is_quick else _BASELINE_EPOCHS
    full = FullLora(bench.directory, split, rate=RATES.get(split.name, RATE), n_epochs=n_full, seed=seed)
    found.is_bf16 = full.is_bf16
    # The warm run's features are made before, the cold ones' within their time.
    warm_store = bench.store()
    warm = None
    if is_first:
        list(bench.run(split, warm_store, top_layers=_WARM_TOP, n_epochs=1, seed=seed, evaluates=False))
        warm = bench.run(split, warm_store, top_layers=_WARM_TOP, n_epochs=n_full, seed=seed)
        found.warm = next(warm)
    for point in full.epochs():
        found.full.append(point)
        if warm is not None:
            next(warm)
        _say(f"{split.name} seed {seed}: full epoch {point.epoch} {point.seconds:.0f} s {point.accuracy:.3f}")
    del full
    if is_first:
        n_cold = 2 if is_quick else _COLD_EPOCHS
        *_, found.cold = bench.run(split, bench.store(), top_layers=_COLD_TOP, n_epochs=n_cold, seed=seed)
    for run in bench.run(split, bench.store(), top_layers=reach_top, n_epochs=_REACH_EPOCHS, seed=seed):
        found.reach, found.reach_features_s = list(run.points), run.features_s
        if run.points[-1].accuracy >= found.wanted:
            break
    last = found.reach[-1]
    _say(
        f"{split.name} seed {seed}: top {reach_top}, epoch {last.epoch}, {last.seconds:.1f} s, "
        f"{last.accuracy:.3f}"
    )
    return found


def _epochs_metrics(bench: Bench, split: Split, seeds: list[_Seed]) -> Iterator[Metric]:
    full_s = [value for seed in seeds for value in seed.full_epoch_s()]
    best = [max(point.accuracy for point in seed.full) for seed in seeds]
    warm = [seed.warm for seed in seeds if seed.warm is not None]
    ratios = [
        theirs / ours
        for seed in seeds
        if seed.warm is not None
        for theirs, ours in zip(seed.full_epoch_s(), seed.warm.epoch_s, strict=True)
    ]
    warm_best = [max(point.accuracy for point in run.points) for run in warm]
    yield Metric(
        "full_lora_epoch_s",
        statistics.median(full_s),
        "s",
        seeds=len(seeds),
        detail={**spread(full_s), "bf16": seeds[0].is_bf16, "threads": torch.get_num_threads()},
    )
    yield Metric("full_lora_accuracy", statistics.mean(best), "", seeds=len(seeds), detail=interval(best))
    yield Metric(
        "warm_epoch_speedup",
        statistics.median(ratios),
        "x",
        ">= 10",
        seeds=len(seeds),
        detail={**interval(ratios), "ceiling": round(arithmetic_ceiling(bench.config, _WARM_TOP), 1)},
    )
    yield Metric(
        "warm_accuracy_gap",
        100 * (statistics.mean(best) - statistics.mean(warm_best)),
        "points",
        "<= 1",
        seeds=len(seeds),
        detail={**interval(warm_best), "epochs": len(seeds[0].full)},
    )
    cold = [(seed, seed.cold) for seed in seeds if seed.cold is not None]
    speedups = [len(run.epoch_s) * statistics.median(seed.full_epoch_s()) / run.seconds for seed, run in cold]
    ceilings = [
        len(run.epoch_s) * statistics.median(seed.full_epoch_s()) / run.features_s for seed, run in cold
    ]
    _, run = cold[0]
    yield Metric(
        "cold_20_speedup",
        statistics.median(speedups),
        "x",
        ">= 12",
        seeds=len(seeds),
        detail={
            **interval(speedups),
            "ceiling": round(statistics.median(ceilings), 1),
            "top_layers": _COLD_TOP,
            "features_s": round(run.features_s, 1),
            "start_s": round(run.start_s, 1),
            "epoch_s": round(statistics.median(run.epoch_s), 2),
            "full": "extrapolated from its measured epochs",
        },
    )
    accuracies = [run.points[-1].accuracy for _, run in cold]
    yield Metric(
        "cold_20_accuracy", statistics.mean(accuracies), "", seeds=len(seeds), detail=interval(accuracies)
    )


def _reach_metrics(results: dict[str, list[_Seed]]) -> Iterator[Metric]:
    """How soon the baseline's best accuracy, less one point, is reached."""
    medians: dict[str, float] = {}
    detail: dict[str, Any] = {}
    for name, seeds in results.items():
        speedups, whole, ceilings, rows = [], [], [], []
        for seed in seeds:
            theirs = next(point for point in seed.full if point.accuracy >= seed.wanted)
            ours = next((point for point in seed.reach if point.accuracy >= seed.wanted), None)
            speedups.append(theirs.seconds / ours.seconds if ours else 0.0)
            whole.append(seed.full[-1].seconds / ours.seconds if ours else 0.0)
            ceilings.append(theirs.seconds / seed.reach_features_s)
            reached = f"{ours.seconds:.1f} s (epoch {ours.epoch})" if ours else "not reached"
            rows.append(f"{seed.wanted:.3f}: {theirs.seconds:.0f} s (epoch {theirs.epoch}) / {reached}")
        medians[name] = statistics.median(speedups)
        detail[name] = {
            **interval(speedups),
            "ceiling": round(statistics.median(ceilings), 1),
            "top_layers": seeds[0].reach_top,
            "against_all_its_epochs": round(statistics.median(whole), 1),
            "seeds": rows,
        }
    n_seeds = min(map(len, results.values()))
    for name, value in medians.items():
        yield Metric(f"time_to_accuracy_{name}", value, "x", seeds=n_seeds, detail=detail[name])
    yield Metric(
        "time_to_accuracy_speedup",
        min(medians.values()),
        "x",
        ">= 8",
        seeds=n_seeds,
        detail={"of": "the slowest of " + ", ".join(medians)},
    )


# ── memory, in processes of their own ───────────────────────────────────────────────────────────────────


def _memory(bench: Bench, is_quick: bool) -> Iterator[Metric]:
    """Peak resident memory of one epoch; features come from the disk, or (cold) are made in the process."""
    n_train = 32 if is_quick else 96
    split = load("r8", n_train=n_train, n_test=8)
    with tempfile.TemporaryDirectory() as place:
        store = bench.store(Path(place))
        list(bench.run(split, store, top_layers=_WARM_TOP, n_epochs=1, seed=1, evaluates=False))
        numerics = json.dumps(asdict(bench.numerics))
        given = [str(n_train), place, numerics, bench.precision]
        peaks = {kind: _peak_mb([kind, *given]) for kind in ("full", "cached", "cold")}
    detail: dict[str, Any] = {f"{kind}_mb": round(peak) for kind, peak in peaks.items()}
    saving = 100 * (1 - peaks["cached"] / peaks["full"])
    imports = _peak_mb(["imports", *given])
    detail["ceiling"] = round(100 * (1 - imports / peaks["full"]), 1)
    detail["imports_mb"] = round(imports)
    yield Metric("tune_memory_saving", saving, "%", ">= 60", detail=detail)
    yield Metric("tune_memory_saving_cold", 100 * (1 - peaks["cold"] / peaks["full"]), "%")


def _peak_mb(arguments: list[str]) -> float:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.tune_memory", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    return float(done.stdout.split()[-1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure, takes_files=True))
