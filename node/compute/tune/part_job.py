"""One step of a job that is trained on several nodes; ``coordinator.rounds`` says which comes next.

    begin    ─▶ choosing (where the number of layers is ``auto``)
    train    ─▶ the states of the round before, averaged ─▶ features ─▶ one epoch on a part of the records
    merge    ─▶ the states of the last round, averaged ─▶ evaluation ─▶ an adapter on the shelf

AdamW's moments start anew in every round: they belong to a path of weights that averaging has left, and with
them a state would be three times as large. The learning rate goes on falling over all rounds, and is as many
times that of one node as there are parts: an epoch has so many times fewer steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from mesh.errors import ConfigError, EdgemeshError
from mesh.messages import FeaturesHeld, Output, TuneSpec
from node.compute.features.codec import choose_codec
from node.compute.tune.batches import Example, TuneTokens, encoded
from node.compute.tune.data import records_of
from node.compute.tune.identity import spec_digest
from node.compute.tune.job import TuneJob, is_finite
from node.compute.tune.parts import BlockStore, States, averaged, split
from node.compute.tune.records import Records
from node.compute.tune.top_model import check_cut
from node.compute.tune.trainer import Recipe, Trainer

__all__ = ["OtherNumericsError", "PartJob", "tune_job"]

_STATES_WITHIN_S: Final = 20.0
"""What another node left is announced within a second or two; what has not come then is made again."""
_ASK_AGAIN_S: Final = 0.5
_TEXTS_PER_LOOK: Final = 16
_RATE_FACTOR_MAX: Final = 4
"""Measured up to 3; steps that are much longer leave the ground that gradients describe."""
_FILL: Final = 1.0
"""Codecs are chosen as if features filled the store to so much of it: stores differ, and parts must not."""


class OtherNumericsError(EdgemeshError):
    """This node computes features otherwise than the parts before: another one must do this part."""


class PartJob(TuneJob):
    """``store``: where states are kept and found, as feature maps are. Otherwise see ``TuneJob``."""

    def __init__(self, spec: TuneSpec, *, store: BlockStore, **arguments: Any) -> None:
        super().__init__(spec, **arguments)
        assert spec.part is not None, "a step says which"
        self._part = spec.part
        self._store = store
        self._threads = spec.part.threads
        self.state: str | None = None
        self.lacking: tuple[int, ...] = ()

    @property
    def output(self) -> Output:
        return Output(adapter=self.result, features=self.held, state=self.state, lacking=list(self.lacking))

    def _whole(self) -> Generator[None, None, None]:
        part, spec = self._part, self.spec
        if part.profile and part.profile != self._features_name:
            raise OtherNumericsError(
                f"this node computes features as {self._features_name}, and this job's are {part.profile}"
            )
        records, held_out = records_of(spec, self._datasets_dir)
        if spec.nodes > len(records.items):
            raise ConfigError(f"{len(records.items)} records cannot be split into {spec.nodes} parts")
        tokens = TuneTokens(self._directory, spec.max_tokens)
        invocation = tokens.invocation() if spec.method == "alora" else ()
        yield
        match part.stage:
            case "begin":
                yield from self._begin(records, tokens, invocation)
            case "train":
                own = split(len(records.items), spec.nodes, spec.seed)[part.index]
                yield from self._train_part(records, own, tokens, invocation)
            case _:
                yield from self._merge(records, held_out, tokens, invocation)
        self._show(phase="saving", fraction=1.0)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────

    def _recipe(self) -> Recipe:
        recipe = super()._recipe()
        return replace(recipe, learning_rate=recipe.learning_rate * min(self.spec.nodes, _RATE_FACTOR_MAX))

    def _begin(
        self, records: Records, tokens: TuneTokens, invocation: Sequence[int]
    ) -> Generator[None, None, None]:
        top_layers = self.spec.top_layers
        if top_layers is None:
            examples = yield from self._encode(records, tokens, invocation)
            choice = yield from self._choose(examples, len(records.labels), invocation)
            top_layers = choice.top_layers
            self._tell(choice.reason)
        check_cut(self._config, top_layers)
        self._check_memory(top_layers)
        self.held = FeaturesHeld(top_layers=top_layers, profile=self._features_name, n_tokens=0, n_bytes=0)

    def _train_part(
        self, records: Records, own: Sequence[int], tokens: TuneTokens, invocation: Sequence[int]
    ) -> Generator[None, None, None]:
        part = self._part
        examples = yield from self._encode(records, tokens, invocation, own)
        trainer, maps = self._trainer_of(examples, records, invocation)
        began_at = self._clock()
        start = yield from self._start(trainer, records)
        if self.lacking:
            return
        texts = list(dict.fromkeys(example.ids for example in examples))
        with maps.pinned(texts):
            asked_at = self._clock()
            yield from self._features(maps, texts, trainer, "")
            self._note_features(maps, texts, self._top_layers, self._clock() - asked_at)
            if start is None:
                yield from self._start_head(trainer, examples, len(records.labels))
            else:
                trainer.restore(part.round * trainer.steps_per_epoch, [], start)
            yield from self._epoch(trainer)
        states = States(self._store, _weights(trainer))
        self.state = states.keep(_weights(trainer), self._clock() - began_at)

    def _epoch(self, trainer: Trainer) -> Iterator[None]:
        end = (self._part.round + 1) * trainer.steps_per_epoch
        while trainer.step < end:
            yield from trainer.take_step()
            if not is_finite(trainer.losses[-1]):
                raise ConfigError(
                    f"training diverged at step {trainer.step}: the loss is no number any more. Choose a "
                    f"smaller --learning-rate than {self._recipe().learning_rate:g}"
                )
            done = 1 - (end - trainer.step) / trainer.steps_per_epoch
            self._show(
                phase="training", fraction=done, epoch=self._part.round, step=trainer.step,
                steps=trainer.n_steps, loss=trainer.loss,
            )  # fmt: skip
            yield

    def _merge(
        self, records: Records, held_out: Records | None, tokens: TuneTokens, invocation: Sequence[int]
    ) -> Generator[None, None, None]:
        spec = self.spec
        evaluation: list[Example] = []
        if held_out is not None:
            evaluation = yield from self._encode(held_out, tokens, invocation)
        one = yield from self._encode(records, tokens, invocation, [0])
        trainer, maps = self._trainer_of([*one, *evaluation], records, invocation)
        start = yield from self._start(trainer, records)
        if start is None:
            return
        trainer.restore(0, [], start)
        metrics: list[float] = []
        if evaluation:
            texts = list(dict.fromkeys(example.ids for example in evaluation))
            yield from self._features(maps, texts, trainer, "")
            judgement = yield from trainer.evaluate(evaluation)
            metrics.append(judgement.accuracy if self._kind == "classify" else judgement.loss)
        made = f"the mean of {spec.nodes} parts, after each of {spec.epochs} epochs"
        backbone = f"{self._digest} {self._features_name}"
        own = spec_digest(spec, records.sha256, held_out.sha256 if held_out else "", backbone)
        self._save(trainer, own, trainer.cut, records, metrics, made=made)

    # ── pieces ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def _top_layers(self) -> int:
        assert self.spec.top_layers is not None, "chosen before the first round"
        return self.spec.top_layers

    def _encode(
        self,
        records: Records,
        tokens: TuneTokens,
        invocation: Sequence[int],
        only: Sequence[int] | None = None,
    ) -> Generator[None, None, list[Example]]:
        """The records as examples; ``only`` those of these numbers."""
        chosen = records if only is None else records.some(only)
        examples: list[Example] = []
        for found in encoded(chosen, tokens, invocation, skip_bad=self.spec.skip_bad):
            examples.append(found)
            if len(examples) % _TEXTS_PER_LOOK == 0:
                self._show(text=f"{len(examples)} of {len(chosen.items)} records read")
                yield
        if not examples:
            raise ConfigError("a part has no records that can be learned from; ask for fewer --nodes")
        return examples

    def _trainer_of(
        self, examples: Sequence[Example], records: Records, invocation: Sequence[int]
    ) -> tuple[Trainer, Any]:
        cut = check_cut(self._config, self._top_layers)
        self._check_memory(self._top_layers)
        codec = choose_codec(self.spec.feature_error, _FILL).codec
        maps = self._maps(cut, examples, codec)
        recipe = self._recipe()
        return self._trainer(cut, examples, maps.read, len(records.labels), invocation, recipe), maps

    def _start(self, trainer: Trainer, records: Records) -> Generator[None, None, dict[str, Tensor] | None]:
        """The mean of the states of the round before; ``None`` in the first, or where some are lacking."""
        starts = self._part.starts
        if not starts:
            return None
        states = States(self._store, _weights(trainer))
        found: dict[int, dict[str, Tensor]] = {}
        until, again_at = self._clock() + _STATES_WITHIN_S, -1.0
        while len(found) < len(starts):
            now = self._clock()
            if now >= again_at:
                again_at = now + _ASK_AGAIN_S
                for index, digest in enumerate(starts):
                    if index not in found and not states.may_come(digest):
                        state = states.find(digest)
                        if state is not None:
                            found[index] = state
                        else:
                            states.ask(digest)
            if len(found) == len(starts):
                break
            if now >= until:
                self.lacking = tuple(index for index in range(len(starts)) if index not in found)
                self._tell(f"nobody has the states of parts {list(self.lacking)} of the round before")
                return None
            self._show(phase="reading", text=f"{len(found)} of {len(starts)} states of the round before")
            yield
        sizes = [len(part) for part in split(len(records.items), self.spec.nodes, self.spec.seed)]
        return averaged([found[index] for index in range(len(starts))], sizes)


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    """What training changes, by the names that ``Trainer.restore`` knows; without the optimizer's moments."""
    return {name: t for name, t in trainer.tensors().items() if name.startswith("weight.")}


def tune_job(spec: TuneSpec, *, store: BlockStore, **arguments: Any) -> TuneJob:
    """The job that does what ``spec`` asks: all of it, or its part. ``arguments``: see ``TuneJob``."""
    return TuneJob(spec, **arguments) if spec.part is None else PartJob(spec, store=store, **arguments)
