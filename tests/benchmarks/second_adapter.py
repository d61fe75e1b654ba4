"""A second adapter on data whose features exist already, five epochs, against five epochs of full LoRA.

The first adapter's run leaves its feature maps in a store on disk; the second (another seed) reads them and
never runs the layers below its cut. Its time holds everything from the texts to the saved files. Three seeds
take about 25 minutes on two quiet cores, nearly all of it the baseline; --quick takes under two minutes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from node.profile import physical_cores
from tests.benchmarks.cached import Bench, Run, prepared_model
from tests.benchmarks.full_lora import RATE, RATES, FullLora
from tests.benchmarks.report import Metric, Options, main, spread
from tests.benchmarks.tune import arithmetic_ceiling, interval, splits_of

_TOP_LAYERS = 2
_EPOCHS = 5


def measure(options: Options) -> Iterator[Metric]:
    torch.set_num_threads(physical_cores())
    bench = Bench(prepared_model())
    (split,) = splits_of(options, ("r8",))
    n_seeds, n_epochs = (1, 1) if options.quick else (options.seeds or 3, _EPOCHS)
    speedups: list[float] = []
    full_s: list[float] = []
    theirs: list[float] = []
    ours: list[float] = []
    runs: list[Run] = []
    for seed in range(options.seed, options.seed + n_seeds):
        with tempfile.TemporaryDirectory() as place:
            first = bench.store(Path(place))
            for _ in bench.run(
                split, first, top_layers=_TOP_LAYERS, n_epochs=1, seed=seed + 100, evaluates=False
            ):
                pass
            rate = RATES.get(split.name, RATE)
            full = FullLora(bench.directory, split, rate=rate, n_epochs=n_epochs, seed=seed)
            points = list(full.epochs())
            del full
            # A new store on the same directory: nothing is in memory yet.
            second = bench.store(Path(place))
            *_, run = bench.run(split, second, top_layers=_TOP_LAYERS, n_epochs=n_epochs, seed=seed)
        runs.append(run)
        full_s.append(points[-1].seconds)
        speedups.append(points[-1].seconds / run.seconds)
        theirs.append(max(point.accuracy for point in points))
        ours.append(run.points[-1].accuracy)
        told = f"{full_s[-1]:.0f} s {theirs[-1]:.3f} / {run.seconds:.1f} s {ours[-1]:.3f}"
        print(f"seed {seed}: {told}", file=sys.stderr, flush=True)
    yield Metric("full_lora_s", statistics.median(full_s), "s", seeds=n_seeds, detail=spread(full_s))
    yield Metric("full_lora_accuracy", statistics.mean(theirs), "", seeds=n_seeds, detail=interval(theirs))
    run = runs[0]
    yield Metric(
        "second_adapter_speedup",
        statistics.median(speedups),
        "x",
        ">= 17",
        seeds=n_seeds,
        detail={
            **interval(speedups),
            "ceiling": round(arithmetic_ceiling(bench.config, _TOP_LAYERS), 1),
            "top_layers": _TOP_LAYERS,
            "read_s": round(run.features_s, 2),
            "start_s": round(run.start_s, 2),
            "epoch_s": round(statistics.median(run.epoch_s), 2),
            "save_s": round(run.save_s, 2),
        },
    )
    yield Metric(
        "second_adapter_accuracy_gap",
        100 * (statistics.mean(theirs) - statistics.mean(ours)),
        "points",
        "<= 1.5",
        seeds=n_seeds,
        detail=interval(ours),
    )


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure, takes_files=True))
