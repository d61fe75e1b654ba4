"""Feature codecs: how fast, how small, and what running the rest of the model from their rows changes.

Speed is of float32 bytes in or out, with two threads, on a block of many rows and on one of 64 (an entry of
the cache); the codecs take turns with a plain copy, which is what memory allows. Quality is of hidden states
of the demo model for texts of several kinds, at two cuts: the layers from the cut on are run from the decoded
rows, and their predictions held against those from the exact ones.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AutoTokenizer

from node.compute.backbone.contract import Backbone, Segment
from node.compute.backbone.load import load_backbone
from node.compute.convert import convert
from node.compute.features.codec import CODECS
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from tests.benchmarks.datasets import Labelled, load
from tests.benchmarks.report import Metric, Options, main, percentile, spread
from tests.places import models_dir

CUTS = (22, 26)
SETS = ("r8", "newsgroups", "polarity")
N_TOKENS = 192
SPEED_ROWS = 8192


def measure(options: Options) -> Iterator[Metric]:
    threads = min(2, torch.get_num_threads())
    torch.set_num_threads(threads)
    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    backbone = load_backbone(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    texts = {
        seed: [
            tokenizer(record.text)["input_ids"][:N_TOKENS]
            for name in SETS
            for record in _chosen(name, seed, 1 if options.quick else 4)
        ]
        for seed in seeds
    }
    yield from _speed(backbone, [ids for some in texts.values() for ids in some], threads, options)
    yield from _quality(backbone, texts)


def _chosen(name: str, seed: int, n: int) -> list[Labelled]:
    """``n`` of the longer texts of a set."""
    records = [record for record in load(name).train if len(record.text) > 80]
    return random.Random(seed).sample(records, n)


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────


def _speed(backbone: Backbone, texts: list[list[int]], threads: int, options: Options) -> Iterator[Metric]:
    rows = torch.cat([_features(backbone, ids, CUTS[-1])[1:] for ids in texts])
    big = rows.repeat(-(-SPEED_ROWS // len(rows)), 1)[:SPEED_ROWS].contiguous()
    small = big[:64].contiguous()
    repeats = 5 if options.quick else 40
    best: dict[str, list[float]] = {}
    out = torch.empty_like(big)
    encoded = {name: (codec, codec.encode(big), codec.encode(small)) for name, codec in CODECS.items()}
    for _ in range(repeats):
        _time(best, "copy", big.nbytes, lambda: out.copy_(big))
        for name, (codec, large, entry) in encoded.items():
            _time(best, f"{name} encode", big.nbytes, lambda c=codec: c.encode(big))
            _time(best, f"{name} decode", big.nbytes, lambda c=codec, e=large: c.decode(e, e.d, out))
            for _ in range(8):
                _time(best, f"{name} encode 64", small.nbytes, lambda c=codec: c.encode(small))
                _time(
                    best,
                    f"{name} decode 64",
                    small.nbytes,
                    lambda c=codec, e=entry: c.decode(e, e.d, out[:64]),
                )
    speeds = {name: statistics.median(values) for name, values in best.items()}
    copy_gb_s = speeds["copy"]
    for name in CODECS:
        encode, decode = speeds[f"{name} encode"], speeds[f"{name} decode"]
        yield Metric(
            f"codec_{name}_gb_s",
            min(encode, decode),
            "GB/s",
            ">= 3" if name == "int8" else None,
            seeds=repeats,
            detail={
                "encode": spread(best[f"{name} encode"]),
                "decode": spread(best[f"{name} decode"]),
                "encode_64_rows": round(speeds[f"{name} encode 64"], 2),
                "decode_64_rows": round(speeds[f"{name} decode 64"], 2),
                "threads": threads,
                "limit_copy": round(copy_gb_s, 1),
            },
        )


def _time(times: dict[str, list[float]], name: str, n_bytes: int, call: Callable[[], object]) -> None:
    start_s = time.perf_counter()
    call()
    times.setdefault(name, []).append(n_bytes / (time.perf_counter() - start_s) / 1e9)


# ── quality ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Held:
    """What was seen of one codec at one cut."""

    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    rise: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    certified: list[float] = field(default_factory=list)
    kl_of_seed: list[float] = field(default_factory=list)
    n_bytes: int = 0
    n_rows: int = 0


def _quality(backbone: Backbone, texts: dict[int, list[list[int]]]) -> Iterator[Metric]:
    held = {(name, cut): _Held() for name in ("fp16", "int8", "int4") for cut in CUTS}
    for some in texts.values():
        before = {at: len(seen.kl) for at, seen in held.items()}
        for ids in some:
            for cut in CUTS:
                x = _features(backbone, ids, cut)
                exact = _tail(backbone, ids, x, cut)
                for name in ("fp16", "int8", "int4"):
                    _compare(backbone, ids, cut, name, x, exact, held[name, cut])
        for at, seen in held.items():
            seen.kl_of_seed.append(statistics.fmean(seen.kl[before[at] :]))
    for name, bound in (("fp16", None), ("int8", 1e-3), ("int4", 1e-2)):
        worst = max(CUTS, key=lambda cut: statistics.fmean(held[name, cut].kl))
        detail: dict[str, object] = {"worst_cut": worst}
        for cut in CUTS:
            seen = held[name, cut]
            detail[f"cut{cut}"] = {
                "kl": f"{statistics.fmean(seen.kl):.2e}",
                "kl_of_seeds": [f"{kl:.2e}" for kl in seen.kl_of_seed],
                "top1": round(statistics.fmean(seen.agreement), 4),
                "rise_of_cross_entropy": round(statistics.fmean(seen.rise), 5),
                "relative_error": f"{statistics.fmean(seen.errors):.2e}",
                "certified_p99": f"{percentile(seen.certified, 100):.2e}" if seen.certified else "none",
                "bytes_per_token": round(seen.n_bytes / seen.n_rows, 1),
                "rows": seen.n_rows,
            }
        yield Metric(
            f"codec_{name}_kl",
            statistics.fmean(held[name, worst].kl),
            "nats",
            None if bound is None else f"<= {bound:g}",
            seeds=len(texts),
            detail=detail,
        )


def _compare(
    backbone: Backbone, ids: list[int], cut: int, name: str, x: Tensor, exact: Tensor, seen: _Held
) -> None:
    """Into ``seen``: what codec ``name`` does to ``x`` (T, d). ``exact``: (T, vocabulary), logarithms."""
    if name == "fp16":
        y = x.half().float()
        y[0] = x[0]  # as in the codecs
        n_bytes = 2 * x.numel() + 2 * x.shape[1]
    else:
        # Block by block, as the cache has them.
        y = torch.empty_like(x)
        n_bytes = 0
        for start in range(0, len(x), 64):
            block = CODECS[name].encode(x[start : start + 64], has_sink=start == 0)
            CODECS[name].decode(block, x.shape[1], y[start : start + 64])
            n_bytes += block.n_bytes
            seen.certified.append(block.certificate.relative_p99)
    rounded = _tail(backbone, ids, y, cut)
    kl = (exact.exp() * (exact - rounded)).sum(-1)
    seen.kl += kl.tolist()
    seen.agreement += (exact.argmax(-1) == rounded.argmax(-1)).float().tolist()
    targets = torch.tensor(ids[1:])[:, None]
    seen.rise += (exact[:-1].gather(1, targets) - rounded[:-1].gather(1, targets))[:, 0].tolist()
    seen.errors += ((x - y).norm(dim=1) / x.norm(dim=1))[1:].tolist()
    seen.n_bytes += n_bytes
    seen.n_rows += len(x)


def _features(backbone: Backbone, ids: list[int], cut: int) -> Tensor:
    """(T, d) entering ``cut``."""
    return backbone.features([Segment(backbone.states(len(ids)), ids)], cut).clone()


def _tail(backbone: Backbone, ids: list[int], x: Tensor, cut: int) -> Tensor:
    """(T, vocabulary): log-probabilities from the layers from ``cut`` on."""
    segment = Segment(backbone.states(len(ids)), ids, hidden=x, enters=cut, n_wanted=len(ids))
    return backbone.logits(backbone.forward([segment]).rows).log_softmax(-1)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
