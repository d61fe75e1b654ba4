"""One tuning task from records to an adapter on the shelf, in chunks of a few tenths of a second.

reading ─▶ choosing (only where the number of layers is ``auto``) ─▶ features ─▶ training ─▶ saving

``step()`` does one chunk, so the engine can give tokens to others between two. What the job has done is kept
in a checkpoint named by everything that determines the result; the same task on the same data goes on from
there, whoever killed it, and ends in the same bits.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mesh.errors import ConfigError
from mesh.ids import TaskId
from mesh.messages import AdapterCard, FeaturesHeld, Output, TaskProgress, TuneSpec
from node.compute.adapters.card import Card, digest_of, read_card, write_card
from node.compute.features.maps import FeatureMaps
from node.compute.lean import give_back
from node.compute.tune import auto
from node.compute.tune.batches import Example, TuneTokens, encoded, rows_per_piece
from node.compute.tune.checkpoint import Checkpoints
from node.compute.tune.data import records_of
from node.compute.tune.head_start import start_classifier
from node.compute.tune.held import features_held
from node.compute.tune.identity import spec_digest
from node.compute.tune.methods import adapt, check_method
from node.compute.tune.recipe import learning_rate
from node.compute.tune.records import Records
from node.compute.tune.source import MapsFactory
from node.compute.tune.top_model import Kind, check_cut, load_top, read_config, top_bytes, weights_of_row
from node.compute.tune.trainer import Recipe, Trainer
from node.durable import replace_directory
from node.profile import memory_free_bytes

__all__ = ["Phase", "Snapshot", "TuneEvent", "TuneJob", "is_finite"]

_log = logging.getLogger(__name__)

Phase = Literal["reading", "features", "choosing", "training", "saving"]

_CHECKPOINT_S = 10.0
# Tokenizing a text takes a tenth of a millisecond to a few milliseconds.
_TEXTS_PER_LOOK = 16
# Libraries' own buffers, and the pages of the tokenizer; measured 60 MB.
_MEMORY_MARGIN_BYTES = 100_000_000
# Backward costs twice as much as forward, and only the forward pass goes through the layers below.
_TRAINING_COST = 3.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far the job is; see ``mesh.messages.TaskProgress`` for what each means."""

    phase: Phase = "reading"
    fraction: float = 0.0
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    metric: float | None = None
    eta_s: float | None = None
    cache_hits: int = 0
    cache_misses: int = 0
    text: str = ""

    def message(self, task: TaskId, attempt: int, seq: int) -> TaskProgress:
        return TaskProgress(
            task=task,
            attempt=attempt,
            seq=seq,
            **{name: getattr(self, name) for name in self.__slots__},
        )


@dataclass(frozen=True, slots=True)
class TuneEvent:
    """What one chunk did. ``text`` is a line for the log where there is something to say."""

    progress: Snapshot
    is_done: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a job was, as its checkpoint says."""

    step: int
    losses: tuple[float, ...]
    metrics: tuple[float, ...]
    """After each epoch, as far as measured."""
    threads: int
    """Sums are split among threads, so their number is part of what gives the same bits."""
    top_layers: int
    why: str
    codec: str
    """Of the feature maps; one run never mixes two."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> _Place | None:
        """``None`` where something is missing: the job starts over."""
        try:
            return cls(
                step=int(found["step"]),
                losses=tuple(map(float, found["losses"])),
                metrics=tuple(map(float, found["metrics"])),
                threads=int(found["threads"]),
                top_layers=int(found["top_layers"]),
                why=str(found["why"]),
                codec=str(found["codec"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            _log.warning("the checkpoint does not say where the job was (%s); starting over", error)
            return None


class TuneJob:
    """``directory`` holds the model, ``digest`` is its weights' SHA-256; ``features_name`` says how they
    compute (precision, kernels), as other features are another task. ``datasets_dir`` has the records by
    their SHA-256.

    ``deadline_s``: seconds that are left, for the choice of layers. ``checkpoint_steps``: save after every so
    many steps, besides every ten seconds.

    Raises (from ``step`` and on construction):
        ConfigError: The task cannot be done as asked; the text says what to change.
    """

    def __init__(
        self,
        spec: TuneSpec,
        *,
        directory: Path,
        digest: str,
        shelf_dir: Path,
        checkpoint_dir: Path,
        maps_factory: MapsFactory,
        features_name: str = "",
        datasets_dir: Path | None = None,
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
        deadline_s: float | None = None,
        checkpoint_steps: int | None = None,
        memory_free: Callable[[], int] = memory_free_bytes,
    ) -> None:
        self.spec = spec
        self._directory = directory
        self._digest = digest
        self._features_name = features_name
        self._shelf_dir = shelf_dir
        self._maps_factory = maps_factory
        self._datasets_dir = datasets_dir
        self._threads = threads
        self._clock = clock
        self._deadline_at = None if deadline_s is None else clock() + deadline_s
        self._checkpoint_steps = checkpoint_steps
        self._memory_free = memory_free
        self._checkpoint_dir = checkpoint_dir
        self._config = read_config(directory)
        check_method(spec.method, spec.targets, spec.task)
        if spec.top_layers is not None:
            check_cut(self._config, spec.top_layers)
        self._kind: Kind = "classify" if spec.task == "classify" else "lm"
        self.progress = Snapshot(epochs=spec.epochs)
        self.result: AdapterCard | None = None
        self.held: FeaturesHeld | None = None
        self._say = ""
        self._hits = self._misses = 0
        self._work = self._whole()

    @property
    def output(self) -> Output:
        """What there is to tell once it is done."""
        return Output(adapter=self.result, features=self.held)

    def step(self) -> TuneEvent:
        """One chunk of work; ``is_done`` once ``result`` is there."""
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self._say = ""
        with torch.inference_mode(False), torch.enable_grad():
            is_done = next(self._work, "end") == "end"
        assert not is_done or self.output != Output(), "a job that is done has made something"
        return TuneEvent(self.progress, is_done, self._say)

    def close(self) -> None:
        """Give up; what the last checkpoint holds stays for another time."""
        self._work.close()

    # ── the phases ──────────────────────────────────────────────────────────────────────────────────

    def _whole(self) -> Generator[None, None, None]:
        spec = self.spec
        records, held_out = self._records()
        backbone = f"{self._digest} {self._features_name}"
        own = spec_digest(spec, records.sha256, held_out.sha256 if held_out else "", backbone)
        yield
        if self._is_on_shelf(own):
            self._show(phase="saving", fraction=1.0, text="this adapter was trained before; nothing to do")
            return
        checkpoints = Checkpoints(self._checkpoint_dir, own)
        saved = checkpoints.latest()
        place = None if saved is None else _Place.of(saved.place)
        if place is not None:
            self._threads = place.threads
            self._tell(f"going on after step {place.step} of an earlier attempt")
            yield
        tokens = TuneTokens(self._directory, spec.max_tokens)
        yield
        invocation = tokens.invocation() if spec.method == "alora" else ()
        examples: list[Example] = []
        for found in encoded(records, tokens, invocation, skip_bad=spec.skip_bad):
            examples.append(found)
            if len(examples) % _TEXTS_PER_LOOK == 0:
                self._show(fraction=0.0, text=f"{len(examples)} of {len(records.items)} records read")
                yield
        evaluation: list[Example] = []
        if held_out is not None:
            for found in encoded(
                held_out, tokens, invocation, skip_bad=spec.skip_bad, name="the evaluation data"
            ):
                evaluation.append(found)
                if len(evaluation) % _TEXTS_PER_LOOK == 0:
                    yield
        # It takes as much memory as a layer or two, and training is where most is needed.
        del tokens
        give_back()
        top_layers, why = spec.top_layers, ""
        if place is not None:
            top_layers, why = place.top_layers, place.why
        elif top_layers is None:
            choice = yield from self._choose(examples, len(records.labels), invocation)
            top_layers, why = choice.top_layers, choice.reason
            self._tell(why)
        cut = check_cut(self._config, top_layers)
        self._check_memory(top_layers)
        maps = self._maps(cut, [*examples, *evaluation], place.codec if place is not None else None)
        trainer = self._trainer(cut, examples, maps.read, len(records.labels), invocation, self._recipe())
        yield
        metrics: list[float] = []
        if saved is not None and place is not None:
            try:
                trainer.restore(place.step, place.losses, saved.tensors)
                metrics = list(place.metrics)
            except ValueError as error:
                self._tell(f"the checkpoint does not fit ({error}); starting over")
        self._progress_of(trainer, maps, metrics, why, phase="features")
        texts = list(dict.fromkeys(example.ids for example in [*examples, *evaluation]))
        with maps.pinned(texts):
            if trainer.step < trainer.n_steps:
                began_at = self._clock()
                yield from self._features(maps, texts, trainer, why)
                self._note_features(maps, texts, top_layers, self._clock() - began_at)
            if trainer.step == 0:
                yield from self._start_head(trainer, examples, len(records.labels))
            yield from self._train(trainer, maps, evaluation, metrics, checkpoints, why)
        self._progress_of(trainer, maps, metrics, why, phase="saving")
        yield
        self._save(trainer, own, cut, records, metrics)
        checkpoints.remove()
        self._progress_of(trainer, maps, metrics, why, phase="saving", fraction=1.0)

    def _records(self) -> tuple[Records, Records | None]:
        records, held_out = records_of(self.spec, self._datasets_dir)
        if records.n_skipped:
            self._tell(f"{records.n_skipped} bad lines left out, such as {records.skipped[0]}")
        return records, held_out

    def _choose(
        self, examples: list[Example], n_labels: int, invocation: Sequence[int]
    ) -> Generator[None, None, auto.Choice]:
        n_layers: int = self._config.num_hidden_layers
        trial = auto.Trial(
            base=lambda cut: load_top(self._directory, cut, self._kind, n_labels),
            n_layers=n_layers,
            examples=examples,
            maps_factory=lambda cut: self._maps(cut, examples, None),
            trainer=lambda cut, chosen, read, recipe: self._trainer(
                cut, chosen, read, n_labels, invocation, recipe
            ),
            prepare=lambda trainer, chosen: self._start_head(trainer, chosen, n_labels),
            recipe=self._recipe(),
            left_s=None if self._deadline_at is None else self._deadline_at - self._clock(),
            fits=lambda k: self._training_bytes(k) <= self._memory_free(),
            is_classifier=self._kind == "classify",
            clock=self._clock,
        )
        for text in trial.run():
            self._show(phase="choosing", text=text)
            yield
        assert trial.choice is not None
        return trial.choice

    def _maps(self, cut: int, examples: Sequence[Example], codec: str | None) -> FeatureMaps:
        n_bytes = 4 * self._config.hidden_size * sum(len(example.ids) for example in examples)
        return self._maps_factory(cut, error=self.spec.feature_error, n_bytes=n_bytes, codec=codec)

    def _features(
        self, maps: FeatureMaps, texts: Sequence[tuple[int, ...]], trainer: Trainer, why: str
    ) -> Iterator[None]:
        """Every map once, a pass at a time; training finds them afterwards."""
        reading = maps.reading(texts, keep=False)
        share = self._features_share(trainer)
        started_at, is_told = self._clock(), False
        while not reading.step():
            spent_s, done = self._clock() - started_at, max(reading.fraction, 1e-9)
            eta_s = spent_s / done * (1 - done) + spent_s / done * (1 - share) / max(share, 1e-9)
            text = reading.text
            if text and not is_told:
                is_told = True
                self._tell(text)
            self._progress_of(
                trainer, maps, [], text or why, phase="features", fraction=share * done, eta_s=eta_s
            )
            yield

    def _note_features(
        self, maps: FeatureMaps, texts: Sequence[tuple[int, ...]], top_layers: int, spent_s: float
    ) -> None:
        """For those who place the next job on these records."""
        profile = f"{maps.space.precision} {maps.space.numerics}"
        held = features_held(maps, texts, top_layers=top_layers, profile=profile)
        # Where something was computed, too, nobody can say what of the time the fetching took.
        fetch_s = spent_s if held.n_fetched and not held.n_computed else 0.0
        self.held = replace(held, fetch_s=fetch_s)

    def _start_head(
        self, trainer: Trainer, examples: Sequence[Example], n_labels: int
    ) -> Generator[None, None, None]:
        """Where training begins: what can be solved from the frozen model's rows need not be learned."""
        if self._kind != "classify":
            return
        start = yield from start_classifier(trainer, examples, n_labels)
        give_back()
        self._tell(f"starts at {start.accuracy:.1%} on records left out, solved in closed form")

    def _train(
        self,
        trainer: Trainer,
        maps: FeatureMaps,
        evaluation: Sequence[Example],
        metrics: list[float],
        checkpoints: Checkpoints,
        why: str,
    ) -> Iterator[None]:
        saved_at, started_at, began = self._clock(), self._clock(), trainer.step
        share = self._features_share(trainer)
        while True:
            if evaluation and len(metrics) < trainer.epoch:
                judgement = yield from trainer.evaluate(evaluation)
                metrics.append(judgement.accuracy if self._kind == "classify" else judgement.loss)
                self._progress_of(trainer, maps, metrics, why, phase="training")
                continue
            if trainer.step == trainer.n_steps:
                break
            yield from trainer.take_step()
            if not all(map(is_finite, list(trainer.losses)[-1:])):
                raise ConfigError(
                    f"training diverged at step {trainer.step}: the loss is no number any more. Choose a "
                    f"smaller --learning-rate than {self._recipe().learning_rate:g}"
                )
            now = self._clock()
            pace_s = (now - started_at) / (trainer.step - began)
            self._progress_of(
                trainer,
                maps,
                metrics,
                why,
                phase="training",
                fraction=share + (1 - share) * trainer.step / trainer.n_steps,
                eta_s=pace_s * (trainer.n_steps - trainer.step),
            )
            by_count = self._checkpoint_steps is not None and trainer.step % self._checkpoint_steps == 0
            if by_count or now - saved_at >= _CHECKPOINT_S:
                self._checkpoint(trainer, maps, metrics, checkpoints, why)
                saved_at = self._clock()
            yield

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────

    def _recipe(self) -> Recipe:
        spec = self.spec
        rate = spec.learning_rate or learning_rate(spec.method, spec.targets, spec.task)
        return Recipe(rate, spec.epochs, spec.batch, spec.seed)

    def _trainer(
        self,
        cut: int,
        examples: Sequence[Example],
        read: Callable[[Sequence[Sequence[int]]], Sequence[Tensor]],
        n_labels: int,
        invocation: Sequence[int],
        recipe: Recipe,
    ) -> Trainer:
        spec = self.spec
        model: Any = load_top(self._directory, cut, self._kind, n_labels)
        if self._kind == "classify":
            _start_head(model.score, spec.seed)
        wrapped = adapt(
            model,
            spec.method,
            layers=range(cut, self._config.num_hidden_layers),
            task=spec.task,
            targets=spec.targets,
            rank=spec.rank,
            alpha=spec.alpha,
            seed=spec.seed,
            invocation=tuple(invocation) or None,
        )
        top_layers = self._config.num_hidden_layers - cut
        n_rows = rows_per_piece(weights_of_row(self._config, top_layers, self._kind))
        return Trainer(
            wrapped, cut, self._kind, examples, read, recipe, n_rows, is_activated=spec.method == "alora"
        )

    def _check_memory(self, top_layers: int) -> None:
        """Raises:
        ConfigError: Training would need more memory than is free.
        """
        needed = self._training_bytes(top_layers)
        free = self._memory_free()
        if needed > free:
            raise ConfigError(
                f"training the top {top_layers} layers needs about {needed / 1e6:,.0f} MB and "
                f"{free / 1e6:,.0f} MB are free; choose fewer layers (--top-layers), a lower rank, or end "
                "other programs"
            )

    def _training_bytes(self, top_layers: int) -> int:
        return training_bytes(self._config, top_layers, self._kind, self.spec.rank)

    def _checkpoint(
        self, trainer: Trainer, maps: FeatureMaps, metrics: list[float], checkpoints: Checkpoints, why: str
    ) -> None:
        place = _Place(
            step=trainer.step,
            losses=tuple(trainer.losses),
            metrics=tuple(metrics),
            threads=self._threads,
            top_layers=self._config.num_hidden_layers - trainer.cut,
            why=why,
            codec=maps.space.codec,
        )
        try:
            checkpoints.save(asdict(place), trainer.tensors())
        except OSError as error:
            self._tell(f"no checkpoint could be written ({error.strerror}); training goes on without")

    def _is_on_shelf(self, own: str) -> bool:
        path = self._shelf_dir / self.spec.adapter
        try:
            card = read_card(path)
            if card is None or card.spec_digest != own or digest_of(path) != card.digest:
                return False
        except ConfigError:
            return False
        self.result = card.listing()
        return True

    def _save(
        self,
        trainer: Trainer,
        own: str,
        cut: int,
        records: Records,
        metrics: list[float],
        *,
        made: str = "",
    ) -> None:
        """``made``: how, for people, where that is not the usual way."""
        spec = self.spec
        self._shelf_dir.mkdir(parents=True, exist_ok=True)
        draft = self._shelf_dir / f".{spec.adapter}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        model = trainer.model
        for config in model.peft_config.values():
            config.base_model_name_or_path = self._directory.name
            config.inference_mode = True
        model.save_pretrained(draft, safe_serialization=True, save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # PEFT's form for publishing, with nothing filled in
        card = Card(
            name=spec.adapter,
            digest=digest_of(draft),
            method=spec.method,
            task=spec.task,
            first_layer=cut,
            top_layers=self._config.num_hidden_layers - cut,
            labels=records.labels,
            backbone_sha256=self._digest,
            spec_digest=own,
            metric=metrics[-1] if metrics else None,
            made=made,
            bytes=sum(path.stat().st_size for path in draft.iterdir()),
        )
        write_card(draft, card)
        replace_directory(draft, self._shelf_dir / spec.adapter)
        self.result = card.listing()

    # ── telling ─────────────────────────────────────────────────────────────────────────────────────

    def _features_share(self, trainer: Trainer) -> float:
        """What part of all the work the feature maps are, were none of them there."""
        below: int = trainer.cut
        above = _TRAINING_COST * (self._config.num_hidden_layers - below) * self.spec.epochs
        return float(below / (below + above))

    def _tell(self, text: str) -> None:
        _log.info("tuning %s: %s", self.spec.adapter, text)
        self._say = text

    def _show(self, **changes: Any) -> None:
        fields = {name: getattr(self.progress, name) for name in Snapshot.__slots__}
        self.progress = Snapshot(**{**fields, **changes})

    def _progress_of(
        self, trainer: Trainer, maps: FeatureMaps, metrics: list[float], why: str, **changes: Any
    ) -> None:
        self._show(
            **{
                "epoch": trainer.epoch,
                "step": trainer.step,
                "steps": trainer.n_steps,
                "loss": trainer.loss,
                "metric": metrics[-1] if metrics else None,
                "cache_hits": maps.hits,
                "cache_misses": maps.misses,
                "text": why,
                **changes,
            }
        )


def training_bytes(config: Any, top_layers: int, kind: Kind, rank: int) -> int:
    """About what training takes at its peak, besides feature maps: weights, optimizer, one piece's rows."""
    d, d_mlp = config.hidden_size, config.intermediate_size
    weights = top_bytes(config, top_layers, kind)
    # Weight, gradient and two moments of A and B on seven matrices a layer.
    adapter = 16 * top_layers * rank * (8 * d + 3 * (d + d_mlp))
    n_rows = max(512, rows_per_piece(weights_of_row(config, top_layers, kind)))  # one text may be longer
    # Counted in the pass: 12 rows of width d and 6 of the MLP's are kept a layer, twice while they go back.
    rows = 4 * 2 * n_rows * top_layers * (12 * d + 6 * d_mlp)
    logits = 4 * 3 * n_rows * config.vocab_size if kind == "lm" else 0
    return int(weights + adapter + rows + logits + _MEMORY_MARGIN_BYTES)


def _start_head(head: Any, seed: int) -> None:
    """Small random weights, as ``transformers`` starts a head, but from ``seed``."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=source))


def is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
