"""Sixteen adapters in one batch of sixteen, against the same batch without any, and against peft.

Two kinds of LoRA of rank 8: on q and v of all layers, and on every linear module of the top 4 layers, which
is what ``edgemesh tune`` makes. Each side decodes in every precision it has here; the best one of each side
counts. The ways take turns, a few steps each, so that whatever else the machine does hits all of them.
``limit`` is what reading the adapters' numbers beside the backbone's leaves of the speed.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.contract import Segment
from node.compute.backbone.deltas import Adapter
from node.compute.backbone.load import load_backbone
from node.compute.convert import convert
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from node.profile import physical_cores
from tests.benchmarks.report import Metric, Options, main, spread
from tests.places import models_dir

N = 16
PROMPT_TOKENS = 32
TEXT = (
    "The harbour lay quiet in the early morning, and only a few boats had left for the open sea. An old man "
    "sat on the pier and mended his nets, as he had done for forty years, and watched the tide go out."
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "qv": {"target_modules": ["q_proj", "v_proj"]},
    "top4": {"target_modules": ALL, "layers_to_transform": [26, 27, 28, 29]},
}
OUR_PRECISIONS = ("fp32", "bf16", "int8")
THEIR_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

_HOPELESS = 2.5  # times slower than another precision in a plain step: not measured further

Step = Callable[[], None]


def measure(options: Options) -> Iterator[Metric]:
    rounds, n_steps = (2, 1) if options.quick else (25, 2)
    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(physical_cores())
    ids = AutoTokenizer.from_pretrained(directory)(TEXT).input_ids[:PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as scratch:
        made = {kind: _make(directory, Path(scratch) / kind, kind) for kind in KINDS}
        yield from _measured(directory, made, ids, rounds, n_steps)


def _measured(
    directory: Path, made: dict[str, Path], ids: list[int], rounds: int, n_steps: int
) -> Iterator[Metric]:
    adapters = {kind: _loaded(directory, path) for kind, path in made.items()}
    speeds: dict[tuple[str, str], list[float]] = {}
    weight_bytes: dict[str, int] = {}
    paces_s: dict[str, float] = {}

    for precision in OUR_PRECISIONS:
        backbone = load_backbone(directory, "cpu", precision)
        weight_bytes[precision] = backbone.weight_bytes
        paces_s[precision] = _pace_s(backbone, ids)
        if paces_s[precision] > _HOPELESS * min(paces_s.values()):
            continue  # bf16 without bf16 instructions, for one: not the best, whatever more rounds say
        ways = {"none": _ours(backbone, [None] * N, ids)}
        ways |= {kind: _ours(backbone, found, ids) for kind, found in adapters.items()}
        speeds |= {(precision, way): found for way, found in _take_turns(ways, rounds, n_steps).items()}
        del backbone, ways
    tried = [p for p in OUR_PRECISIONS if (p, "qv") in speeds]
    best = max(tried, key=lambda p: statistics.median(speeds[p, "qv"]))
    for kind, name in (("qv", "multi_adapter_ratio"), ("top4", "multi_adapter_ratio_top4")):
        ratios = _ratios(speeds[best, kind], speeds[best, "none"])
        all_bytes = sum(adapter.n_bytes for adapter in adapters[kind])
        yield Metric(
            name,
            statistics.median(ratios),
            "x",
            ">= 0.9",
            seeds=rounds,
            detail={
                **spread(ratios),
                "precision": best,
                "limit": round(weight_bytes[best] / (weight_bytes[best] + all_bytes), 3),
                "adapters_mb": round(all_bytes / 1e6, 1),
                "backbone_mb": round(weight_bytes[best] / 1e6, 1),
                **{
                    f"at_{p}": round(statistics.median(_ratios(speeds[p, kind], speeds[p, "none"])), 3)
                    for p in tried
                },
            },
        )
    yield from _against_peft(directory, made["qv"], ids, adapters["qv"], best, rounds, paces_s)
    for (precision, way), found in speeds.items():
        yield Metric(
            f"decode16_tok_s_{precision}_{way}", statistics.median(found), "tokens/s", detail=spread(found)
        )


def _against_peft(
    directory: Path,
    made: Path,
    ids: list[int],
    adapters: list[Adapter],
    precision: str,
    rounds: int,
    paces_s: dict[str, float],
) -> Iterator[Metric]:
    backbone = load_backbone(directory, "cpu", precision)
    ways: dict[str, Step] = {"ours": _ours(backbone, adapters, ids)}
    for name, dtype in THEIR_PRECISIONS.items():
        if paces_s[name] > _HOPELESS * min(paces_s[p] for p in THEIR_PRECISIONS):
            continue  # their product is PyTorch's as well
        ways[f"peft_{name}"] = _peft(directory, made, ids, dtype)
    measured = _take_turns(ways, max(rounds // 3, 2), 1)
    theirs = max((way for way in ways if way != "ours"), key=lambda way: statistics.median(measured[way]))
    ratios = _ratios(measured["ours"], measured[theirs])
    yield Metric(
        "multi_adapter_vs_peft",
        statistics.median(ratios),
        "x",
        ">= 4",
        seeds=len(ratios),
        detail={
            **spread(ratios),
            "ours": precision,
            "theirs": theirs,
            **{f"{way}_tok_s": round(statistics.median(found), 1) for way, found in measured.items()},
        },
    )


def _ours(backbone: Any, adapters: list[Any], ids: list[int]) -> Step:
    """One step of all sequences from the end of the prompt, each time anew."""
    states = [backbone.states(len(ids) + 1) for _ in adapters]
    backbone.forward([Segment(states[0], ids)])
    for state in states[1:]:  # whose states they are takes no other time, and reading 16 prompts does
        state.fill(0, *states[0].block(0, len(ids), backbone.n_layers))

    def step() -> None:
        for state in states:
            state.length = len(ids)
        segments = [
            Segment(state, ids[at : at + 1], adapter)
            for at, (state, adapter) in enumerate(zip(states, adapters, strict=True))
        ]
        backbone.logits(backbone.forward(segments).rows, adapters).argmax(-1).tolist()

    return step


def _pace_s(backbone: Any, ids: list[int]) -> float:
    """Seconds of one step of all sequences from their first token, without adapters; the better of two."""
    best_s = float("inf")
    for _ in range(2):
        segments = [Segment(backbone.states(1), ids[at : at + 1]) for at in range(N)]
        started = time.perf_counter()
        backbone.logits(backbone.forward(segments).rows)
        best_s = min(best_s, time.perf_counter() - started)
    return best_s


def _peft(directory: Path, made: Path, ids: list[int], dtype: torch.dtype) -> Step:
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    names = [f"a{at}" for at in range(N)]
    model = PeftModel.from_pretrained(plain, made / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(made / name, adapter_name=name)
    model.to(dtype).eval()  # PEFT holds adapters in float32 beside bf16 weights otherwise, which is slower
    prompt = torch.tensor([ids] * N)
    tokens = torch.tensor([[ids[at % len(ids)]] for at in range(N)])
    with torch.inference_mode():
        cache = model(prompt, adapter_names=names, use_cache=True).past_key_values

    def step() -> None:
        with torch.inference_mode():
            output = model(
                tokens, adapter_names=names, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            output.logits[:, -1].argmax(-1).tolist()
        cache.crop(-1)

    return step


def _take_turns(ways: dict[str, Step], rounds: int, n_steps: int) -> dict[str, list[float]]:
    """Tokens per second of each way in each round."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for step in ways.values():
        step()  # warms kernels and layouts
    for _ in range(rounds):
        for way, step in ways.items():
            started = time.perf_counter()
            for _ in range(n_steps):
                step()
            found[way].append(N * n_steps / (time.perf_counter() - started))
    return found


def _ratios(some: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(some, others, strict=True)]


def _loaded(directory: Path, made: Path) -> list[Adapter]:
    shelf = Shelf(made, BackboneFacts.of(directory), 1 << 30)
    return [shelf.get(f"a{at}") for at in range(N)]


def _make(directory: Path, to: Path, kind: str) -> Path:
    """Sixteen random adapters, written by peft."""
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **KINDS[kind])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config, adapter_name="a0")
    for at in range(1, N):
        model.add_adapter(f"a{at}", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(to)
    return to


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
