"""A real engine on a tiny random model with real adapters on its shelf, and ways to drive it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft

from mesh.ids import TaskId
from mesh.messages import Submit
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.llama import LlamaBackbone
from node.compute.backbone.load import load_backbone
from node.compute.engine import Event
from node.compute.messages import Ended, Run
from node.compute.model_engine import ModelEngine
from tests.reference.made_adapters import N_LAYERS, VOCABULARY, make_adapter, make_model

__all__ = ["ADAPTERS", "INVOCATION", "Letters", "World", "drive", "run_of"]

INVOCATION = (150, 151)
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _lora(first_layer: int, **more: Any) -> peft.LoraConfig:
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": _ALL, **more}
    layers = list(range(first_layer, N_LAYERS))
    return peft.LoraConfig(**config, layers_to_transform=layers, layers_pattern="layers")


ADAPTERS: dict[str, tuple[Any, int]] = {
    "top": (_lora(4), 0),
    "top-too": (_lora(4), 0),
    "middle": (_lora(2), 0),
    "whole": (_lora(0), 0),
    "classifier": (_lora(3, task_type="SEQ_CLS", modules_to_save=["score"]), 3),
    "activated": (_lora(0, alora_invocation_tokens=list(INVOCATION), target_modules=["q_proj", "v_proj"]), 0),
}
"""Configuration and number of labels."""


class Letters:
    """A tokenizer whose tokens are the letters of a text; what the engine needs of ``Tokens``."""

    ends = frozenset({2})

    def encode(self, submit: Submit, *, completes: bool = False) -> list[int]:
        assert submit.prompt is not None
        return self.plain(submit.prompt)

    def plain(self, text: str) -> list[int]:
        return [ord(letter) % (VOCABULARY - 10) + 10 for letter in text]

    continuation = plain

    def beginning(self) -> list[int]:
        return [1]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x100 + token) for token in ids)

    def text(self, ids: Sequence[int]) -> str:
        """What ``plain`` makes ``ids`` of; each of 10 or more."""
        return "".join(chr(VOCABULARY - 10 + token - 10) for token in ids)


class World:
    """Model, shelf and any number of engines over them."""

    def __init__(self, directory: Path, names: Iterable[str] = tuple(ADAPTERS)) -> None:
        self.model = make_model(directory / "model")
        self.shelf_dir = directory / "adapters"
        self.shelf_dir.mkdir()
        for seed, name in enumerate(names):
            config, n_labels = ADAPTERS[name]
            make_adapter(self.shelf_dir / name, self.model, config, seed=seed + 1, n_labels=n_labels)
        backbone = load_backbone(self.model)
        assert isinstance(backbone, LlamaBackbone)
        self.backbone = backbone
        self.tokens = Letters()
        self._alone: dict[str, Ended] = {}
        self.shelf = Shelf(self.shelf_dir, BackboneFacts.of(self.model), 100_000_000)

    def engine(self, **more: Any) -> ModelEngine:
        return ModelEngine(("tiny",), self.backbone, self.tokens, shelf=self.shelf, **more)  # type: ignore[arg-type]

    def alone(self, **submit: Any) -> Ended:
        """The end of one task on an engine that has seen nothing before."""
        key = repr(sorted(submit.items()))
        if key not in self._alone:
            self._alone[key] = drive(self.engine(), {"alone": submit})["alone"]
            assert self._alone[key].state == "done", self._alone[key].reason
        return self._alone[key]


def run_of(task: str, **submit: Any) -> Run:
    return Run(task=TaskId(task), attempt=1, submit=Submit(**{"max_tokens": 8, **submit}))


def drive(engine: ModelEngine, submits: Mapping[str, Mapping[str, Any]]) -> dict[str, Ended]:
    """Start all at once and run until nothing runs."""
    events: list[Event] = []
    for task, submit in submits.items():
        events += engine.start(run_of(task, **submit))
    while engine.due_s is not None:
        events += engine.step()
    return {event.task: event for event in events if isinstance(event, Ended)}
