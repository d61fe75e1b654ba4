"""Decoding and reading prompts: our engine's pass against llama.cpp on the same GGUF, in one run, in turns.

    decode_vs_llamacpp      one sequence
    decode16_vs_llamacpp    16 sequences at once, prompts of a few tokens, first to last token
    prefill_vs_llamacpp     a prompt of 512 tokens

llama.cpp is the ``xllamacpp`` wheel (``pip install xllamacpp``) in a process of its own; its own clock tells
the single decode and the prompt. Ours is the best weight format for each
figure, found in a first round; the greedy choice of each token is inside the time on both sides. Beside
each figure stands what the machine allows: weights over memory bandwidth for one row, multiplications
for many.

``OMP_NUM_THREADS`` sets the threads of both.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from node.compute.backbone.contract import Backbone, Segment
from node.compute.backbone.load import load_backbone
from node.compute.convert import convert
from node.compute.models import CATALOGUE, DEFAULT_MODEL, _fetch, prepare, resolve
from node.profile import physical_cores
from tests.benchmarks.llamacpp import LlamaCpp
from tests.benchmarks.report import Metric, Options, main, spread
from tests.places import models_dir

PROMPT_TOKENS = 512
MANY = 16
TARGETS = {"decode": ">= 1", "decode16": ">= 2", "prefill": ">= 8"}
FORMATS = ("fp32", "bf16", "int8", "int4")

_HOPELESS = 2.5  # times slower than another format


def measure(options: Options) -> Iterator[Metric]:
    repeats, n_tokens = (2, 8) if options.quick else (7, 64)
    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(physical_cores())
    with LlamaCpp(_gguf(), torch.get_num_threads()) as server:
        yield from _compared(server, directory, repeats, n_tokens)


def _compared(server: LlamaCpp, directory: Path, repeats: int, n_tokens: int) -> Iterator[Metric]:
    theirs: dict[str, Callable[[], float]] = {
        "decode": lambda: server.decode(n_tokens),
        "decode16": lambda: server.decode_many(n_tokens),
        "prefill": lambda: server.prefill(PROMPT_TOKENS),
    }
    backbones = {precision: load_backbone(directory, "cpu", precision) for precision in FORMATS}
    ours: dict[str, Callable[[Backbone], float]] = {
        "decode": lambda backbone: _decode(backbone, 1, n_tokens),
        "decode16": lambda backbone: _decode(backbone, MANY, n_tokens),
        "prefill": _prefill,
    }
    for name, run in ours.items():
        theirs[name]()
        first = _first_round(run, backbones)
        best = max(first, key=first.__getitem__)
        found: list[float] = []
        others: list[float] = []
        for _ in range(repeats):
            found.append(run(backbones[best]))
            others.append(theirs[name]())
        ratios = [a / b for a, b in zip(found, others, strict=True)]
        yield Metric(
            f"{name}_vs_llamacpp",
            statistics.median(ratios),
            "x",
            TARGETS[name],
            seeds=repeats,
            detail={
                **spread(ratios),
                "precision": best,
                "tok_s": spread(found),
                "llamacpp_tok_s": spread(others),
                "all_formats_tok_s": {p: round(value, 1) for p, value in first.items()},
                "limit_tok_s": round(_limit(name, backbones[best]), 1),
                "threads": torch.get_num_threads(),
            },
        )


def _first_round(run: Callable[[Backbone], float], backbones: Mapping[str, Backbone]) -> dict[str, float]:
    """Tokens/s of each format, roughly. The second run counts, as the first one warms caches and lays kernels
    out; a format that is hopeless in the first one gets no second."""
    found: dict[str, float] = {}
    for precision, backbone in backbones.items():
        found[precision] = run(backbone)
        if found[precision] * _HOPELESS > max(found.values()):
            found[precision] = max(found[precision], run(backbone))
    return found


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────


def _decode(backbone: Backbone, n: int, n_tokens: int) -> float:
    """Tokens/s of ``n`` sequences that are all ``n_tokens`` long, after a prompt of a few tokens."""
    sequences = [backbone.states(n_tokens + 8) for _ in range(n)]
    prompts = [[20 + 7 * at, 300 + at, 512] for at in range(n)]
    segments = [Segment(states, ids) for states, ids in zip(sequences, prompts, strict=True)]
    tokens = backbone.logits(backbone.forward(segments).rows).argmax(-1).tolist()
    start_s = time.perf_counter()
    for _ in range(n_tokens):
        segments = [Segment(states, [token]) for states, token in zip(sequences, tokens, strict=True)]
        tokens = backbone.logits(backbone.forward(segments).rows).argmax(-1).tolist()
    return n * n_tokens / (time.perf_counter() - start_s)


def _prefill(backbone: Backbone) -> float:
    ids = list(range(1000, 1000 + PROMPT_TOKENS))
    states = backbone.states(PROMPT_TOKENS)
    start_s = time.perf_counter()
    backbone.logits(backbone.forward([Segment(states, ids)]).rows).argmax(-1).tolist()
    return PROMPT_TOKENS / (time.perf_counter() - start_s)


def _limit(name: str, backbone: Backbone) -> float:
    """Tokens/s if nothing but reading the weights (one row) or multiplying them (many) took time."""
    if name == "decode":
        block = torch.ones(64 * 1024 * 1024)
        read_s = min(_time(block.sum) for _ in range(3))
        return block.nbytes / read_s / backbone.weight_bytes
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    per_s = 2 * 1024**3 / min(_time(lambda: a @ b) for _ in range(5))
    n_weights = CATALOGUE[DEFAULT_MODEL].weight_bytes // 4
    in_head = 0 if name == "decode16" else 49152 * 576  # a prompt needs the head for its last token only
    return per_s / (2 * (n_weights - in_head))


def _time(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


# ── llama.cpp ───────────────────────────────────────────────────────────────────────────────────────


def _gguf() -> Path:
    """The catalogue's file, kept beside the models once it was fetched."""
    entry = CATALOGUE[DEFAULT_MODEL]
    kept = models_dir().parent / "gguf" / Path(entry.member).name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as into:
            _fetch(entry, Path(into), lambda text, fraction: print(text, file=sys.stderr)).rename(kept)
    return kept


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
