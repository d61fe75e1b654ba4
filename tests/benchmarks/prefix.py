"""Time to the first token after a prefix of 2,000 tokens: read before, or not.

Everything goes through the engine as a node runs it: a prompt comes in as text, the first token goes out.
Each repetition makes up new prefixes, so nothing can be left of an earlier one, and takes cold and warm in
turns, so that whatever else the machine does hits all:

cold        nobody has read the prefix
warm        the plain model has read it, the plain model goes on
warm_same   an adapter has read it, the same goes on
cross       only another adapter of the top 4 layers has read it

The precision is the one that reads a prompt fastest on this machine, because that is the hardest cold time
to beat. ``limit`` of the warm ones: reading all weights once at this machine's memory bandwidth; of the
cross one: layers / layers adapted.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import torch

from mesh.ids import TaskId
from mesh.messages import Submit
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.contract import Segment
from node.compute.backbone.llama import LlamaBackbone
from node.compute.backbone.load import load_backbone
from node.compute.convert import convert
from node.compute.messages import Ended, Run
from node.compute.model_engine import ModelEngine, Tokens
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from node.profile import physical_cores
from tests.benchmarks.machine import memory_gb_s
from tests.benchmarks.report import Metric, Options, main, spread
from tests.places import models_dir
from tests.reference.made_adapters import make_adapter

PREFIX_TOKENS = 2000
TOP_LAYERS = 4
_WORDS = (
    *("apple", "river", "stone", "cloud", "paper", "green", "seven", "music", "house", "light", "train"),
    *("winter", "bread", "glass", "horse", "ocean", "garden", "silver", "window", "market", "letter"),
    *("bridge", "forest", "summer", "candle", "doctor", "island", "kitchen", "morning", "number", "orange"),
)
_QUESTIONS = ("What is it?", "Who was there?", "Why so many?", "How does it end?", "Which came first?")


def measure(options: Options) -> Iterator[Metric]:
    repeats, n_prefix = (1, 500) if options.quick else (7, PREFIX_TOKENS)
    directory, manifest = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    threads = physical_cores()
    torch.set_num_threads(threads)
    backbone, paces = _fastest(directory, ("fp32",) if options.quick else ("fp32", "bf16", "int8"))
    tokens = Tokens(directory)
    rng = random.Random(options.seed)
    times: dict[str, list[float]] = {}
    n_suffix: list[int] = []
    with tempfile.TemporaryDirectory() as scratch:
        first = backbone.n_layers - TOP_LAYERS
        for seed, name in enumerate(("one", "two")):
            _adapter(Path(scratch) / name, directory, range(first, backbone.n_layers), seed)
        facts = BackboneFacts.of(directory, manifest.weights_sha256)
        engine = ModelEngine(
            (DEFAULT_MODEL,),
            backbone,
            tokens,
            threads,
            shelf=Shelf(Path(scratch), facts, 1 << 30),
        )
        assert engine.prefixes is not None
        for repeat in range(repeats + 1):
            found: dict[str, float] = {}
            engine.prefixes.clear()
            prefix = _prefix(rng, tokens, n_prefix)
            found["cold"] = _ttft_s(engine, prefix + _QUESTIONS[0], None)
            found["warm"] = _ttft_s(engine, prefix + _QUESTIONS[1], None)
            engine.prefixes.clear()
            prefix = _prefix(rng, tokens, n_prefix)
            found["cold_adapter"] = _ttft_s(engine, prefix + _QUESTIONS[2], "one")
            found["cross"] = _ttft_s(engine, prefix + _QUESTIONS[3], "two")
            found["warm_same"] = _ttft_s(engine, prefix + _QUESTIONS[4], "one")
            n_suffix.append(len(tokens.encode(Submit(prompt=prefix + _QUESTIONS[1]))) - n_prefix)
            if repeat:  # the first warms kernels and loads the adapters
                for name, value in found.items():
                    times.setdefault(name, []).append(value)
        held = engine.prefixes.held_bytes
    bandwidth_gb_s = memory_gb_s()
    weights_ms = backbone.weight_bytes / bandwidth_gb_s / 1e6
    cold_ms = statistics.median(times["cold"]) * 1e3
    common = {
        "precision": backbone.precision,
        "piece_ms": paces,
        "prefix_tokens": n_prefix,
        "suffix_tokens": statistics.median(n_suffix),
        "threads": threads,
    }
    gates = not options.quick
    for metric, cold, warm, target, limit in (
        ("prefix_ttft_speedup", "cold", "warm", ">= 12", cold_ms / weights_ms),
        ("prefix_ttft_speedup_same_adapter", "cold_adapter", "warm_same", ">= 12", cold_ms / weights_ms),
        ("cross_adapter_ttft_speedup", "cold_adapter", "cross", ">= 4", backbone.n_layers / TOP_LAYERS),
    ):
        ratios = [a / b for a, b in zip(times[cold], times[warm], strict=True)]
        yield Metric(
            metric,
            statistics.median(ratios),
            "x",
            target if gates else None,
            seeds=repeats,
            detail={**spread(ratios), "limit": round(limit, 1), **common},
        )
    for name, values in times.items():
        values_ms = [1e3 * value for value in values]
        yield Metric(
            f"ttft_{name}_ms", statistics.median(values_ms), "ms", seeds=repeats, detail=spread(values_ms)
        )
    yield Metric(
        "prefix_bytes_per_token",
        held / n_prefix,
        "bytes",
        detail={"what": "two adapters' states of one prefix, and the rows entering the cut"},
    )


def _fastest(directory: Path, precisions: tuple[str, ...]) -> tuple[LlamaBackbone, dict[str, float]]:
    """The backbone that reads a piece of a prompt fastest, and the milliseconds of each."""
    best: LlamaBackbone | None = None
    paces: dict[str, float] = {}
    for precision in precisions:
        backbone = load_backbone(directory, precision=precision)
        assert isinstance(backbone, LlamaBackbone)
        seconds = []
        for _ in range(3):
            states = backbone.states(256)
            start_s = time.perf_counter()
            backbone.forward([Segment(states, list(range(256)))])
            seconds.append(time.perf_counter() - start_s)
        paces[precision] = round(1e3 * min(seconds), 1)
        if paces[precision] == min(paces.values()):
            best = backbone
    assert best is not None
    return best, paces


def _adapter(into: Path, model: Path, layers: range, seed: int) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(layers),
        layers_pattern="layers",
    )
    make_adapter(into, model, config, seed=seed, size=0.01)


def _prefix(rng: random.Random, tokens: Tokens, n: int) -> str:
    """Random words that make the tokens before the question ``n``, give or take one."""
    words: list[str] = []
    have = 0
    while have < n:
        words += rng.choices(_WORDS, k=max(1, (n - have) // 2))
        text = " ".join(words) + ". "
        with_question = tokens.encode(Submit(prompt=text + _QUESTIONS[0]))
        have = len(with_question) - len(tokens.continuation(_QUESTIONS[0])) - len(_tail(tokens))
    return text


def _tail(tokens: Tokens) -> list[int]:
    """What the chat template puts behind a question."""
    one, other = (tokens.encode(Submit(prompt=text)) for text in ("a", "b"))
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return one[len(one) - same :]


def _ttft_s(engine: ModelEngine, prompt: str, adapter: str | None) -> float:
    submit = Submit(prompt=prompt, max_tokens=1, adapter=adapter)
    assert engine.start(Run(task=TaskId("t"), attempt=1, submit=submit)) == []
    ended: list[Ended] = []
    while engine.due_s is not None:
        ended += [event for event in engine.step() if isinstance(event, Ended)]
    assert ended[0].ttft_s is not None, ended[0].reason
    return ended[0].ttft_s


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
