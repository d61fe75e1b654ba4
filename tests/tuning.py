"""Tuning jobs on a tiny model, for several test files."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from mesh.messages import TuneSpec
from node.compute.backbone.contract import Backbone
from node.compute.backbone.load import load_backbone
from node.compute.features.proof import Proof
from node.compute.features.shape import Numerics, prove
from node.compute.features.store import FeatureStore, LocalStore
from node.compute.rates import RatedAs
from node.compute.tune.job import TuneJob
from node.compute.tune.source import FeatureSource

__all__ = [
    "chat_lines",
    "class_lines",
    "completion_lines",
    "job",
    "kept_proof",
    "memory",
    "run",
    "source",
    "spec",
]


def source(model: Path, store: FeatureStore, *, holds_all: bool = True) -> FeatureSource:
    """Feature maps of ``model``; one that does not hold all its layers has no backbone to make any."""
    backbone, numerics = _loaded(model)
    return FeatureSource(
        backbone=backbone if holds_all else None,
        store=store,
        backbone_digest="f" * 64,
        tokenizer_digest="t",
        numerics=numerics,
        precision=backbone.precision,
        store_bytes=1 << 24,
    )


@lru_cache(maxsize=2)
def _loaded(model: Path) -> tuple[Backbone, Numerics]:
    backbone = load_backbone(model)
    return backbone, prove(backbone)


def kept_proof(model: Path, backbone: Backbone) -> Proof:
    """Of how one thread computes, made once for each precision and kept beside ``model``."""
    rated_as = RatedAs(digest="f" * 64, precision=backbone.precision, device=backbone.device, threads=1)
    return Proof(backbone, 1, home=model, rated_as=rated_as)


def memory() -> LocalStore:
    return LocalStore(None, 1 << 24, 0)


def class_lines(n: int = 48, seed: int = 0, classes: int = 3) -> str:
    """Texts whose label is the word they contain more often than others."""
    source = random.Random(seed)
    lines = []
    for number in range(n):
        label = number % classes
        words = [f"w{source.randrange(80)}" for _ in range(source.randrange(3, 14))]
        words += [f"w{label}"] * 3
        source.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": f"class {label}"}))
    return "\n".join(lines)


def completion_lines(n: int = 24, seed: int = 0) -> str:
    source = random.Random(seed)
    lines = []
    for _ in range(n):
        start = source.randrange(60)
        words = [f"w{start + step}" for step in range(source.randrange(3, 9))]
        lines.append(json.dumps({"prompt": " ".join(words[:-2]), "completion": " ".join(words[-2:])}))
    return "\n".join(lines)


def chat_lines(n: int = 24, seed: int = 0) -> str:
    source = random.Random(seed)
    lines = []
    for _ in range(n):
        start = source.randrange(60)
        messages = [
            {"role": "user", "content": f"w{start} w{start + 1}"},
            {"role": "assistant", "content": f"w{start + 2} w{start + 3}"},
        ]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines)


def spec(**changes: Any) -> TuneSpec:
    fields: dict[str, Any] = {
        "adapter": "a",
        "data": class_lines(),
        "top_layers": 2,
        "epochs": 2,
        "batch": 8,
        "rank": 4,
        **changes,
    }
    return TuneSpec(**fields)


def job(model: Path, work: Path, wish: TuneSpec, **changes: Any) -> TuneJob:
    """A job with its shelf and checkpoints in ``work``."""
    arguments: dict[str, Any] = {
        "directory": model,
        "digest": "f" * 64,
        "shelf_dir": work / "shelf",
        "checkpoint_dir": work / "checkpoints",
        "maps_factory": None,
        "threads": 1,
        **changes,
    }
    if arguments["maps_factory"] is None:
        arguments["maps_factory"] = source(model, memory())
    return TuneJob(wish, **arguments)


def run(tuning: TuneJob, steps_max: int = 100_000) -> list[Any]:
    """All events to the end."""
    events = []
    for _ in range(steps_max):
        events.append(tuning.step())
        if events[-1].is_done:
            return events
    raise AssertionError("the job does not end")
