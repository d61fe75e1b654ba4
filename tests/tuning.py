"""Tuning jobs on a tiny model, for several test files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesh.messages import TuneSpec
from node.compute.backbone.contract import Segment
from node.compute.backbone.load import load_backbone
from node.compute.tune.job import TuneJob

__all__ = ["PlainMaps", "chat_lines", "class_lines", "completion_lines", "job", "run", "spec"]


class PlainMaps:
    """The slow reference: every text alone through the frozen layers, each time anew."""

    def __init__(self, directory: Path, cut: int) -> None:
        self._backbone = load_backbone(directory)
        self._cut = cut
        self.hits = self.misses = 0

    def read(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        self.misses += len(ids)
        return [self._one(list(text)) for text in ids]

    def _one(self, text: list[int]) -> Tensor:
        segment = Segment(self._backbone.states(len(text)), text)
        return torch.Tensor(self._backbone.features([segment], self._cut).clone())


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
    maps: Callable[[int, float], Any] = lambda cut, error: PlainMaps(model, cut)  # noqa: E731
    arguments: dict[str, Any] = {
        "directory": model,
        "digest": "f" * 64,
        "shelf_dir": work / "shelf",
        "checkpoint_dir": work / "checkpoints",
        "maps_factory": maps,
        "threads": 1,
        **changes,
    }
    return TuneJob(wish, **arguments)


def run(tuning: TuneJob, steps_max: int = 100_000) -> list[Any]:
    """All events to the end."""
    events = []
    for _ in range(steps_max):
        events.append(tuning.step())
        if events[-1].is_done:
            return events
    raise AssertionError("the job does not end")
