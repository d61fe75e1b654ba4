"""``--top-layers auto``: how many layers to adapt, by trying on a slice of the data.

More layers learn more and take longer. Neither can be known beforehand, both can be measured: a few numbers
of layers are trained for some steps on the same small part of the records and judged on another part. Their
seconds a step say how long the whole would take, and the best that is in time for the deadline is taken, or
the smallest that is as good as the best within the noise of the measurement.

Feature maps at the lowest cut serve every candidate: the frozen layers between are run once.

The seconds are this machine's of this moment, so the choice may differ elsewhere. What follows from it does
not: given the number of layers, the adapter is the same to the bit. The choice is kept in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from node.compute.tune.batches import Example, batches
from node.compute.tune.forward import Layout, TopPass
from node.compute.tune.trainer import Read, Recipe, Trainer

__all__ = ["CANDIDATES", "Choice", "Measured", "Trial", "decide"]

CANDIDATES = (1, 2, 4, 8, 12)
_TRAINED = 64
_HELD_OUT = 64
_LEAST = 16
"""Fewer records cannot be split into something to learn and something to judge by."""
_TOKENS_MAX = 16_384  # of the slice; its maps are held in memory: 38 MB for a width of 576
_EPOCHS = 4
_BUDGET_S = 60.0
_BUDGET_SHARE = 0.15
"""Of the time left. A trial that eats the time it wants to use well would be a bad joke."""
_DEADLINE_SHARE = 0.9
"""Of the time that is left after the trial, which the run may fill: extrapolations are off by a tenth."""
_TOO_FEW = 4

T = TypeVar("T")


class _Maps(Protocol):
    def read(self, ids: Sequence[Sequence[int]]) -> Sequence[Tensor]: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What the trial found for one number of layers."""

    top_layers: int
    loss: float
    loss_error: float
    """Standard error of ``loss`` over the records it was measured on."""
    accuracy: float
    whole_s: float
    """How long the whole run would take, feature maps included."""


@dataclass(frozen=True, slots=True)
class Choice:
    top_layers: int
    reason: str
    """One sentence with the numbers."""
    measured: tuple[Measured, ...] = ()


class Trial:
    """``trainer`` makes one for a cut, examples, a source of feature maps and a recipe; ``prepare`` is what a
    job does with it before the first step.

    ``fits`` says whether training so many layers has room in memory. ``left_s``: seconds to the deadline.
    """

    def __init__(
        self,
        *,
        base: Callable[[int], Any],
        n_layers: int,
        examples: Sequence[Example],
        maps_factory: Callable[[int], _Maps],
        trainer: Callable[[int, Sequence[Example], Read, Recipe], Trainer],
        prepare: Callable[[Trainer, Sequence[Example]], Generator[None, None, None]],
        recipe: Recipe,
        left_s: float | None,
        fits: Callable[[int], bool],
        is_classifier: bool,
        clock: Callable[[], float],
    ) -> None:
        self._base = base
        self._n_layers = n_layers
        self._examples = examples
        self._maps_factory = maps_factory
        self._trainer = trainer
        self._prepare = prepare
        self._recipe = recipe
        self._left_s = left_s
        self._fits = fits
        self._is_classifier = is_classifier
        self._clock = clock
        self._spent_s = 0.0
        self.choice: Choice | None = None

    def run(self) -> Iterator[str]:
        """Chunks of work, each with a word on how it goes; ``choice`` is there at the end."""
        candidates = [k for k in CANDIDATES if k <= self._n_layers and self._fits(k)] or [1]
        if len(self._examples) < _LEAST:
            k = min(_TOO_FEW, self._n_layers, candidates[-1])
            self.choice = Choice(
                k, f"{k} of {self._n_layers} layers: {len(self._examples)} records are too few for a trial"
            )
            return
        learned, judged = self._slice()
        lowest = self._n_layers - candidates[-1]
        maps: dict[tuple[int, ...], Tensor] = {}
        before = self._spent_s
        yield from self._build(lowest, [*learned, *judged], maps)
        row_layer_s = (self._spent_s - before) / max(1, lowest * sum(map(len, maps)))
        model = self._base(lowest)
        found: list[Measured] = []
        for k in candidates:
            cut = self._n_layers - k
            trainer = self._trainer(
                cut, learned, _Above(TopPass(model, lowest), lowest, cut, maps), self._trial_recipe()
            )
            yield from self._timed(self._prepare(trainer, learned), f"trying {k} layers")
            start_s = self._spent_s
            while trainer.step < trainer.n_steps:
                yield from self._timed(trainer.take_step(), f"trying {k} layers")
            learned_rows = sum(len(e.ids) for e in learned) * self._trial_recipe().epochs
            row_s = (self._spent_s - start_s) / learned_rows
            judgement = yield from self._timed(trainer.evaluate(judged), f"judging {k} layers")
            whole_s = self._whole_s(cut, row_layer_s, row_s)
            found.append(Measured(k, judgement.loss, judgement.loss_error, judgement.accuracy, whole_s))
            if self._is_enough(found, candidates):
                break
        left_s = None if self._left_s is None else max(0.0, self._left_s - self._spent_s)
        self.choice = decide(found, self._n_layers, left_s, is_classifier=self._is_classifier)

    def _slice(self) -> tuple[list[Example], list[Example]]:
        """Records to learn from and records to judge by, chosen by the seed."""
        (order,) = batches(len(self._examples), len(self._examples), self._recipe.seed, epoch=-1)
        n_judged = min(_HELD_OUT, len(order) // 3)
        chosen: list[Example] = []
        n_tokens = 0
        for number in order[: n_judged + _TRAINED]:
            n_tokens += len(self._examples[number].ids)
            if n_tokens > _TOKENS_MAX and len(chosen) >= _LEAST:
                break
            chosen.append(self._examples[number])
        n_judged = min(n_judged, len(chosen) // 3)
        return chosen[n_judged:], chosen[:n_judged]

    def _build(
        self, cut: int, examples: Sequence[Example], maps: dict[tuple[int, ...], Tensor]
    ) -> Iterator[str]:
        source = self._maps_factory(cut)
        for example in examples:
            if example.ids not in maps:
                before = self._clock()
                maps[example.ids] = source.read([example.ids])[0]
                self._spent_s += self._clock() - before
                yield "computing feature maps for the trial"

    def _timed(self, work: Generator[None, None, T], text: str) -> Generator[str, None, T]:
        """Between two chunks the engine does other things: only our own seconds count."""
        while True:
            before = self._clock()
            try:
                next(work)
            except StopIteration as end:
                self._spent_s += self._clock() - before
                yield text
                return end.value  # type: ignore[no-any-return]
            self._spent_s += self._clock() - before
            yield text

    def _trial_recipe(self) -> Recipe:
        return replace(self._recipe, epochs=min(_EPOCHS, self._recipe.epochs))

    def _whole_s(self, cut: int, row_layer_s: float, row_s: float) -> float:
        rows = sum(len(example.ids) for example in self._examples)
        return rows * (cut * row_layer_s + self._recipe.epochs * row_s)

    def _is_enough(self, found: list[Measured], candidates: list[int]) -> bool:
        """Whether the next candidate is not worth trying: no time for the trial, or for what it tries."""
        if len(found) == len(candidates):
            return True
        growth = candidates[len(found)] / candidates[len(found) - 1]
        budget_s = _BUDGET_S if self._left_s is None else min(_BUDGET_S, _BUDGET_SHARE * self._left_s)
        is_hopeless = self._left_s is not None and found[-1].whole_s > _DEADLINE_SHARE * self._left_s
        return is_hopeless or self._spent_s * growth > budget_s


def decide(found: Sequence[Measured], n_layers: int, left_s: float | None, *, is_classifier: bool) -> Choice:
    """The number of layers to adapt, from what was measured (smallest first)."""
    in_time = [m for m in found if left_s is None or m.whole_s <= _DEADLINE_SHARE * left_s]
    if not in_time:
        quickest = min(found, key=lambda m: m.whole_s)
        return Choice(
            quickest.top_layers,
            f"{quickest.top_layers} of {n_layers} layers: the quickest, and still about "
            f"{quickest.whole_s:,.0f} s with {left_s or 0:,.0f} s left",
            tuple(found),
        )
    best = min(in_time, key=lambda m: m.loss)
    taken = next(m for m in in_time if m.loss <= best.loss + best.loss_error)

    def quality(m: Measured) -> str:
        return f"{m.accuracy:.0%} right" if is_classifier else f"loss {m.loss:.2f}"

    others = ", ".join(f"{m.top_layers}: {quality(m)}" for m in found if m is not taken)
    left = "" if left_s is None else f" of the {left_s:,.0f} s left"
    late = [m.top_layers for m in found if m not in in_time]
    too_late = f"; {late[0]} would be too late" if late else ""
    return Choice(
        taken.top_layers,
        f"{taken.top_layers} of {n_layers} layers: {quality(taken)} on held-out records in a short trial"
        f"{f' ({others})' if others else ''}, about {taken.whole_s:,.0f} s{left}{too_late}",
        tuple(found),
    )


class _Above:
    """Feature maps at a higher cut, run up from those at the lowest."""

    def __init__(self, below: TopPass, lowest: int, cut: int, maps: dict[tuple[int, ...], Tensor]) -> None:
        self._below, self._lowest, self._cut = below, lowest, cut
        self._low = maps
        self._high: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        found = []
        for key in map(tuple, ids):
            if key not in self._high:
                low = self._low[key]
                layout = Layout([len(low)], [[len(low) - 1]])
                self._high[key] = self._below.between(low, layout, self._lowest, self._cut)
            found.append(self._high[key])
        return found
