"""Decoding speed and time to first token of the demo model: our engine, and plain ``transformers``.

Both run the same float32 weights in one process with the same threads, taking turns, so that whatever
else the machine does hits both. ``limit_tok_s`` is what reading every weight once per token allows at the
memory bandwidth measured in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mesh.ids import TaskId
from mesh.messages import Submit
from node.compute.backbone.load import load_backbone
from node.compute.convert import convert
from node.compute.messages import Ended, Run
from node.compute.model_engine import ModelEngine, Tokens
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from node.profile import physical_cores
from tests.benchmarks.machine import memory_gb_s
from tests.benchmarks.report import Metric, Options, main, spread
from tests.places import models_dir

PROMPT = "Explain in detail how tides work, and why there are two of them each day."


def measure(options: Options) -> Iterator[Metric]:
    repeats, n_tokens = (2, 16) if options.quick else (5, 64)
    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    threads = physical_cores()
    torch.set_num_threads(threads)
    backbone = load_backbone(directory)
    tokens = Tokens(directory)
    # The same prompt again and again: what was read of it must not be found.
    engine = ModelEngine((DEFAULT_MODEL,), backbone, tokens, threads, prefix_bytes=0)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt_ids = tokens.encode(Submit(prompt=PROMPT))

    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    batched: list[float] = []
    bandwidths: list[float] = []
    for repeat in range(repeats + 1):
        mine = _ours(engine, n_tokens)
        other = _plain(plain, prompt_ids, n_tokens, threads)
        four = _batch(engine, n_tokens)
        bandwidth = memory_gb_s()
        if repeat:  # the first round warms caches, kernels and the choice of threads
            ours.append(mine)
            theirs.append(other)
            batched.append(four)
            bandwidths.append(bandwidth)

    decode = [run["decode_tok_s"] for run in ours]
    ttft = [run["ttft_ms"] for run in ours]
    ratios = [a["decode_tok_s"] / b["decode_tok_s"] for a, b in zip(ours, theirs, strict=True)]
    limit = statistics.median(bandwidths) * 1e9 / backbone.weight_bytes
    plain_decode = [run["decode_tok_s"] for run in theirs]
    plain_ttft = [run["ttft_ms"] for run in theirs]
    yield Metric(
        "decode_tok_s",
        statistics.median(decode),
        "tokens/s",
        seeds=repeats,
        detail={**spread(decode), "limit_tok_s": round(limit, 1), "threads": threads},
    )
    yield Metric(
        "decode_tok_s_batch4", statistics.median(batched), "tokens/s", seeds=repeats, detail=spread(batched)
    )
    yield Metric(
        "ttft_ms",
        statistics.median(ttft),
        "ms",
        seeds=repeats,
        detail={**spread(ttft), "prompt_tokens": len(prompt_ids)},
    )
    yield Metric(
        "plain_decode_tok_s",
        statistics.median(plain_decode),
        "tokens/s",
        seeds=repeats,
        detail=spread(plain_decode),
    )
    yield Metric(
        "plain_ttft_ms", statistics.median(plain_ttft), "ms", seeds=repeats, detail=spread(plain_ttft)
    )
    yield Metric("ratio", statistics.median(ratios), "x", ">= 1", seeds=repeats, detail=spread(ratios))
    yield Metric(
        "memory_gb_s", statistics.median(bandwidths), "GB/s", seeds=repeats, detail=spread(bandwidths)
    )


def _ours(engine: ModelEngine, n_tokens: int) -> dict[str, float]:
    (ended,) = _answers(engine, 1, n_tokens)
    assert ended.ttft_s is not None
    return {
        "decode_tok_s": (ended.n_tokens - 1) / (ended.service_s - ended.ttft_s),
        "ttft_ms": ended.ttft_s * 1000,
    }


def _batch(engine: ModelEngine, n_tokens: int) -> float:
    """Tokens of four answers at once, per second from the last one's first token on."""
    ended = _answers(engine, 4, n_tokens)
    start_s = max(end.ttft_s or 0.0 for end in ended)
    return sum(end.n_tokens - 1 for end in ended) / (max(end.service_s for end in ended) - start_s)


def _answers(engine: ModelEngine, n: int, n_tokens: int) -> list[Ended]:
    for i in range(n):
        submit = Submit(prompt=PROMPT, max_tokens=n_tokens)
        assert engine.start(Run(task=TaskId(f"t{i}"), attempt=1, submit=submit)) == []
    ended = []
    while engine.due_s is not None:
        ended += [event for event in engine.step() if isinstance(event, Ended)]
    return ended


class _Clocked:
    """A streamer that notes when tokens arrive; ``transformers`` hands it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.monotonic())

    def end(self) -> None: ...


def _plain(model: Any, prompt_ids: list[int], n_tokens: int, threads: int) -> dict[str, float]:
    """``generate`` alone: its time does not include template and decoding, ours does."""
    torch.set_num_threads(threads)
    clock = _Clocked()
    start_s = time.monotonic()
    inputs = torch.tensor([prompt_ids])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=n_tokens,
        do_sample=False,
        streamer=clock,
    )
    n = output.shape[1] - len(prompt_ids)
    first_s = clock.times[1]
    return {"decode_tok_s": (n - 1) / (clock.times[-1] - first_s), "ttft_ms": (first_s - start_s) * 1000}


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
