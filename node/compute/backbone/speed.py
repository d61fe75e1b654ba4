"""How fast each weight format is on this machine: ``python -m node.compute.backbone.speed DIRECTORY HOME``.

Multiplies the model's own matrix shapes (one block and the head) with random weights, formats in turns so
that a busy moment hits all of them, and keeps the fastest of several tries: about two seconds. On a machine
that is busy one thread measures, since two beside a busy neighbour say more of the neighbour. Attention and
norms are left out; they are the same for every format. The result is written beside the model, see
``node.compute.backbone.precision``.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

import torch

from node.compute.backbone.linear import Linear, compute_dtype, make_linear
from node.compute.backbone.load import best_device
from node.compute.backbone.precision import PRECISIONS, Speed, read_speeds, write_speeds
from node.profile import physical_cores

__all__ = ["main", "measure_speeds", "measured_speeds"]

_TRIES = 5
_COPIES = 4  # blocks multiplied in a row, as many as it takes for weights to come from memory and not a cache
_PREFILL_ROWS = 64


def measure_speeds(directory: Path, device: str = "cpu", tries: int = _TRIES) -> dict[str, Speed]:
    """Shapes are read from ``config.json``; weights are not."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    d, d_mlp, n_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    kv_heads = config.get("num_key_value_heads", heads)
    block = [
        ((heads + 2 * kv_heads) * head_dim, d),
        (d, heads * head_dim),
        (2 * d_mlp, d),
        (d, d_mlp),
    ]
    head = (config["vocab_size"], d)
    best: dict[tuple[str, str, int], float] = {}
    made: dict[str, dict[str, list[tuple[Linear, int]]]] = {}
    for precision in PRECISIONS:
        made[precision] = {
            "block": [_made(shape, precision, device) for _ in range(_COPIES) for shape in block],
            "head": [_made(head, "int8" if precision == "int4" else precision, device)],
        }
    with torch.inference_mode():
        for _ in range(tries):
            for precision, parts in made.items():
                for part, linears in parts.items():
                    for n_rows in (1, _PREFILL_ROWS) if part == "block" else (1,):
                        key = (precision, part, n_rows)
                        best[key] = min(
                            best.get(key, float("inf")), _once(linears, n_rows, precision, device)
                        )
    found = {}
    for precision in PRECISIONS:
        head_s = best[precision, "head", 1]
        decode_s = best[precision, "block", 1] / _COPIES * n_layers + head_s
        prefill_s = best[precision, "block", _PREFILL_ROWS] / _COPIES * n_layers + head_s
        found[precision] = Speed(round(1 / decode_s, 1), round(_PREFILL_ROWS / prefill_s, 1))
    return found


def _made(shape: tuple[int, int], precision: str, device: str) -> tuple[Linear, int]:
    """A matrix of random weights, and the width of its input."""
    weight = torch.randn(shape, device=device, dtype=compute_dtype(precision))
    return make_linear(weight, None, precision), shape[1]


def _once(linears: list[tuple[Linear, int]], n_rows: int, precision: str, device: str) -> float:
    """Seconds for ``n_rows`` rows through all of them."""
    widths = {width for _, width in linears}
    rows = {w: torch.randn(n_rows, w, device=device, dtype=compute_dtype(precision)) for w in widths}
    start_s = time.perf_counter()
    for linear, width in linears:
        result = linear(rows[width])
    float(result[0, 0])  # a GPU has finished when a number is there
    return time.perf_counter() - start_s


def measured_speeds(directory: Path, home: Path, *, again: bool = False) -> dict[str, Speed]:
    """What is known of this machine and the model in ``directory``; measured now if nothing is, or ``again``.

    One process of a machine measures at a time: two at once would measure each other. A busy machine is
    measured only when somebody asks: what it said would be kept, and be wrong on every other day.
    """
    is_busy = os.getloadavg()[0] > physical_cores() / 2
    with (home / ".speeds.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        speeds = {} if again else read_speeds(home)
        if not speeds and (again or not is_busy):
            threads = torch.get_num_threads()
            torch.set_num_threads(1 if is_busy else physical_cores())
            speeds = measure_speeds(directory, best_device())
            torch.set_num_threads(threads)
            write_speeds(home, speeds)
        return speeds


def main(argv: list[str]) -> int:
    measured_speeds(Path(argv[0]), Path(argv[1]), again=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
