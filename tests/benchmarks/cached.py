"""Our side of the tuning benchmarks: the parts that ``TuneJob`` is made of, with a clock between them.

A run's seconds hold everything from the texts to the saved adapter: tokens, feature maps (computed or read
from the store), the top of the model, the head start, every step, and the files. What is evaluated in
between is not counted, on either side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from node.compute.backbone.contract import Backbone
from node.compute.backbone.load import load_backbone
from node.compute.backbone.speed import measure_speeds
from node.compute.convert import convert
from node.compute.features.shape import Numerics, prove
from node.compute.features.store import LocalStore
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from node.compute.tune.batches import Example, rows_per_piece
from node.compute.tune.head_start import start_classifier
from node.compute.tune.methods import adapt
from node.compute.tune.recipe import learning_rate
from node.compute.tune.source import FeatureSource
from node.compute.tune.top_model import load_top, read_config, top_bytes
from node.compute.tune.trainer import Recipe, Trainer
from tests.benchmarks.datasets import Labelled, Split
from tests.benchmarks.full_lora import Point, token_ids
from tests.places import models_dir

__all__ = ["Bench", "Run", "prepared_model"]

_BATCH = 16
# Features of a thousand texts of 48 tokens take 110 MB.
_STORE_BYTES = 1 << 30


def prepared_model() -> Path:
    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    return directory


def finish(work: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@dataclass(slots=True)
class Run:
    """What one run took, in seconds."""

    features_s: float = 0.0
    start_s: float = 0.0
    """Loading the top and the head start."""
    epoch_s: list[float] = field(default_factory=list)
    save_s: float = 0.0
    points: list[Point] = field(default_factory=list)
    """Epoch 0 is the head start alone."""

    @property
    def seconds(self) -> float:
        return self.features_s + self.start_s + sum(self.epoch_s) + self.save_s


def _precision(directory: Path) -> str:
    """bfloat16 where this processor reads prompts faster in it, as the baseline has it, too."""
    speeds = measure_speeds(directory)
    return "bf16" if speeds["bf16"].prefill_tok_s > 1.05 * speeds["fp32"].prefill_tok_s else "fp32"


class Bench:
    """A model and runs on it. ``numerics`` and ``precision``: of features that are in the store already; the
    backbone is then not loaded, as on a node that holds the top layers only."""

    def __init__(
        self, directory: Path, *, numerics: Numerics | None = None, precision: str | None = None
    ) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self.n_layers: int = self.config.num_hidden_layers
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._backbone: Backbone | None = None
        self.precision = precision or _precision(directory)
        if numerics is None:
            self._backbone = load_backbone(directory, precision=self.precision)
            numerics = prove(self._backbone)
        self.numerics = numerics

    def store(self, directory: Path | None = None) -> LocalStore:
        """In memory, or on disk where a directory is given."""
        return LocalStore(directory, _STORE_BYTES, _STORE_BYTES if directory else 0)

    def source(self, store: LocalStore) -> FeatureSource:
        return FeatureSource(
            backbone=self._backbone,
            store=store,
            backbone_digest="0" * 64,
            tokenizer_digest="benchmark",
            numerics=self.numerics,
            precision=self.precision,
            store_bytes=_STORE_BYTES,
        )

    def run(
        self,
        split: Split,
        store: LocalStore,
        *,
        top_layers: int,
        n_epochs: int,
        seed: int,
        rate: float | None = None,
        evaluates: bool = True,
        on_validation: bool = False,
    ) -> Iterator[Run]:
        """The run as it is after the head start and after every epoch; the last has the files saved."""
        run = Run()
        clock = _Clock()
        cut = self.n_layers - top_layers
        examples = self._examples(split, split.train)
        maps = self.source(store)(cut)
        maps.read([example.ids for example in examples])
        run.features_s = clock.lap()
        model = load_top(self.directory, cut, "classify", len(split.labels))
        wrapped = adapt(model, "lora", layers=range(cut, self.n_layers), task="classify", rank=8, seed=seed)
        rate = rate or learning_rate("lora", [], "classify")
        n_rows = rows_per_piece(top_bytes(self.config, top_layers, "classify") // 4)
        recipe = Recipe(rate, n_epochs, _BATCH, seed)
        trainer = Trainer(wrapped, cut, "classify", examples, maps.read, recipe, n_rows)
        finish(start_classifier(trainer, examples, len(split.labels)))
        run.start_s = clock.lap()
        judged = self._examples(split, split.validation if on_validation else split.test)

        def note() -> None:
            accuracy = float("nan")
            if evaluates:
                known = [example for example in judged if example.targets[0] >= 0]
                accuracy = finish(trainer.evaluate(known)).accuracy * len(known) / len(judged)
            run.points.append(Point(trainer.epoch, run.seconds, accuracy))
            clock.lap()

        note()
        yield run
        for epoch in range(1, n_epochs + 1):
            clock.lap()
            while trainer.epoch < epoch:
                finish(trainer.take_step())
            run.epoch_s.append(clock.lap())
            if epoch == n_epochs:
                with tempfile.TemporaryDirectory() as place:
                    wrapped.save_pretrained(place, safe_serialization=True, save_embedding_layers=False)
                run.save_s = clock.lap()
            note()
            yield run

    def _examples(self, split: Split, items: Sequence[Labelled]) -> list[Example]:
        number = {label: at for at, label in enumerate(split.labels)}
        return [
            Example(tuple(ids), (len(ids) - 1,), (number.get(item.label, -1),))
            for ids, item in zip(token_ids(self._tokenizer, items), items, strict=True)
        ]


class _Clock:
    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._at = now()

    def lap(self) -> float:
        before, self._at = self._at, self._now()
        return self._at - before
