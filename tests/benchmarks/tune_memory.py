"""One short training run in a process of its own; prints the most memory it ever held, in MB.

python -m tests.benchmarks.tune_memory full|cached|cold|imports N_TRAIN STORE_DIR NUMERICS PRECISION
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from node.compute.features.shape import Numerics
from node.profile import physical_cores
from tests.benchmarks.cached import Bench, prepared_model
from tests.benchmarks.datasets import load
from tests.benchmarks.full_lora import FullLora

_TOP_LAYERS = 4


def run(kind: str, n_train: int, store: Path, numerics: Numerics, precision: str) -> None:
    torch.set_num_threads(physical_cores())
    directory = prepared_model()
    split = load("r8", n_train=n_train, n_test=8)
    if kind == "full":
        list(FullLora(directory, split, rate=1e-3, n_epochs=1, seed=1).epochs(evaluates=False))
    elif kind in ("cached", "cold"):
        # As a node does that holds the top layers only, or the whole model and nothing cached.
        bench = Bench(directory, numerics=numerics if kind == "cached" else None, precision=precision)
        place = bench.store(store if kind == "cached" else None)
        list(bench.run(split, place, top_layers=_TOP_LAYERS, n_epochs=1, seed=1, evaluates=False))


def peak_mb() -> float:
    """Linux counts for this program only; ``getrusage`` would start from what the parent held at the fork."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Numerics(**json.loads(sys.argv[4])), sys.argv[5])
    print(peak_mb())
