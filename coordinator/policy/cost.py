"""Seconds a task takes on a node: rates times amounts, corrected by what was seen.

``service_s = correction(kind, node) * sum(amounts * unit_s)``. The correction is an exponentially weighted
mean of actual / predicted, per (kind, node), begun from the kind's mean over all nodes, so that what is
true of a kind everywhere (more tokens than thought) is known on a node that has not done one yet.

The same model learns what answers use of ``max_tokens``, how many tokens texts have, and how well it
predicts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from coordinator.policy.rates import PARTS, Rates
from coordinator.policy.tokens import TokenCounts
from coordinator.policy.work import KINDS, Work
from mesh.ids import NodeId
from mesh.messages.task import TaskKind

__all__ = ["CostModel", "Estimate", "Observed", "PredictionError", "amounts_of", "parts_of", "step_share"]

# One surprise moves the correction by a fifth, ten of the same kind by nine tenths of the way.
_WEIGHT_LEAST: Final = 0.2
# A rate that is wrong by more than this is a clock or a message gone wrong, not a slow node.
_RATIO_MAX: Final = 1000.0
_SURPRISE_MAX: Final = 2.0
"""Times longer than expected that an attempt counts of which only that is known: its node may be gone."""
_TRUST_AFTER: Final = 3
"""Outcomes of a kind on a node after which a guessed rate counts as known."""
_PREFILL, _DECODE = PARTS.index("prefill"), PARTS.index("decode")
_ERRORS_KEPT: Final = 256
_NODES_MAX: Final = 4096
"""As in ``coordinator.cluster``."""
_LEAST_S: Final = 1e-6
"""Nothing takes no time: keeps densities finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a task is expected to take on one node, alone unless ``rows`` says otherwise."""

    service_s: float
    parts: Mapping[str, float]
    """Seconds by part (``PARTS``), corrected; they add up to ``service_s``."""
    correction: float
    is_known: bool
    """``False``: from a guess that nothing has confirmed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """How an attempt really went. ``None``: not told."""

    service_s: float
    n_prompt_tokens: float | None = None
    n_tokens: float | None = None
    rows: float = 1.0
    """Answers in its steps, on average over its time, its own included."""
    crowding: float = 1.0
    """Times longer than that for work of others on the node that shares nothing, as far as known."""
    is_whole: bool = True
    """``False``: it was stopped before its end."""


@dataclass(frozen=True, slots=True)
class PredictionError:
    """Of the last outcomes of a kind: half of the predictions were off by at most this share."""

    n: int
    p50: float


@dataclass(slots=True)
class _Mean:
    """Exponentially weighted mean of logarithms, so that twice and half cancel out."""

    log: float = 0.0
    n: int = 0

    def take(self, ratio: float) -> None:
        ratio = min(max(ratio, 1 / _RATIO_MAX), _RATIO_MAX)
        self.n += 1
        self.log += max(_WEIGHT_LEAST, 1 / self.n) * (math.log(ratio) - self.log)

    @property
    def value(self) -> float:
        return math.exp(self.log)


@dataclass(slots=True)
class CostModel:
    """Learned by one coordinator while it coordinates; a new one starts from the nodes' own rates."""

    _by_node: dict[tuple[TaskKind, NodeId], _Mean] = field(default_factory=dict)
    _by_kind: dict[TaskKind, _Mean] = field(default_factory=lambda: {kind: _Mean() for kind in KINDS})
    _errors: dict[TaskKind, deque[float]] = field(
        default_factory=lambda: {kind: deque(maxlen=_ERRORS_KEPT) for kind in KINDS}
    )
    _sorted_errors: dict[TaskKind, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    _last_errors: dict[TaskKind, PredictionError] = field(default_factory=dict)
    """Of the kinds that have learned nothing since they were asked for."""
    _answers: _Mean = field(default_factory=_Mean)
    counts: TokenCounts = field(default_factory=TokenCounts)

    # ── predictions ─────────────────────────────────────────────────────────────────────────────────

    def estimate(
        self,
        work: Work,
        node: NodeId,
        rates: Rates,
        *,
        reuse: float = 0.0,
        far: float = 0.0,
        rows: float = 1.0,
    ) -> Estimate:
        """Seconds from start to end on ``node``.

        Args:
            reuse: Share (0 to 1) of what ``work.reuses`` names that the node still has.
            far: Share of it that it would fetch from other nodes.
            rows: Attempts in the node's batch, this one included.
        """
        correction = self.correction(work.kind, node)
        parts = parts_of(work, rates, correction, reuse, far, rows=rows)
        return Estimate(
            service_s=max(sum(parts.values()), _LEAST_S),
            parts=parts,
            correction=correction,
            is_known=self.is_known(work.kind, node, rates),
        )

    def correction(self, kind: TaskKind, node: NodeId) -> float:
        """Actual / predicted, as learned; 1 before anything was."""
        return self._by_node.get((kind, node), self._by_kind[kind]).value

    def is_known(self, kind: TaskKind, node: NodeId, rates: Rates) -> bool:
        """Whether an estimate is good enough to refuse a task for it."""
        seen = self._by_node.get((kind, node))
        return rates.is_measured or (seen is not None and seen.n >= _TRUST_AFTER)

    @property
    def answer_share(self) -> float:
        """Tokens of an answer / ``max_tokens``, as ``work_of`` takes it; 1 before anything was seen."""
        return min(1.0, self._answers.value)

    def errors(self) -> dict[TaskKind, PredictionError]:
        """Of each kind that was seen: p50 of ``|actual / predicted - 1|`` over the last 256 outcomes."""
        for kind, seen in self._sorted_errors.items():
            if seen and kind not in self._last_errors:
                middle = len(seen) // 2
                p50 = seen[middle] if len(seen) % 2 else (seen[middle - 1] + seen[middle]) / 2
                self._last_errors[kind] = PredictionError(len(seen), p50)
        return {kind: self._last_errors[kind] for kind in self._errors if kind in self._last_errors}

    # ── lessons ─────────────────────────────────────────────────────────────────────────────────────

    def learn(
        self,
        work: Work,
        node: NodeId,
        rates: Rates,
        observed: Observed,
        *,
        reuse: float = 0.0,
        far: float = 0.0,
        predicted_s: float | None = None,
    ) -> None:
        """Take in how one attempt went.

        The rates are corrected by what the attempt turned out to be (its real counts of tokens, its company
        in the batch); the error is that of ``predicted_s``, made at its start and revised when others joined
        it. One that was stopped counts as well, or only those would teach that were quick enough: an answer
        by the tokens that it has, others where they had taken longer already than all of it was to take.
        """
        actual_s = max(observed.service_s, _LEAST_S)
        if predicted_s is None:
            found = self.estimate(work, node, rates, reuse=reuse, far=far, rows=observed.rows)
            predicted_s = found.service_s
        ratio = actual_s / max(_rated_s(work, rates, observed, reuse, far), _LEAST_S)
        if observed.is_whole:
            self._last_errors.pop(work.kind, None)
            self._note_error(work.kind, abs(actual_s / max(predicted_s, _LEAST_S) - 1))
        elif observed.n_tokens is None:
            known = self.correction(work.kind, node)
            if ratio <= known:
                return
            ratio = min(ratio, _SURPRISE_MAX * known)
        key = (work.kind, node)
        if key not in self._by_node:
            while len(self._by_node) >= _NODES_MAX * len(KINDS):
                self._by_node.pop(next(iter(self._by_node)))
            self._by_node[key] = _Mean()
        self._by_node[key].take(ratio)
        self._by_kind[work.kind].take(ratio)

    def _note_error(self, kind: TaskKind, error: float) -> None:
        errors, in_order = self._errors[kind], self._sorted_errors[kind]
        if len(errors) == _ERRORS_KEPT:
            del in_order[bisect_left(in_order, errors[0])]
        errors.append(error)
        insort(in_order, error)

    def learn_answer(self, *, max_tokens: int, n_tokens: int) -> None:
        """An answer that was allowed ``max_tokens`` took ``n_tokens``."""
        self._answers.take(max(n_tokens, 1) / max_tokens)

    def forget(self, node: NodeId) -> None:
        """The node left for good, or measured itself anew."""
        for kind in KINDS:
            self._by_node.pop((kind, node), None)


def parts_of(
    work: Work, rates: Rates, correction: float, reuse: float, far: float, *, rows: float
) -> dict[str, float]:
    """Seconds by part, corrected, as in ``Estimate.parts``."""
    amounts = amounts_of(work, reuse=reuse, far=far)
    seconds = [amount * unit_s for amount, unit_s in zip(amounts, rates.unit_s, strict=True)]
    seconds[_DECODE] *= step_share(rows, rates.row_cost)
    return {name: part_s * correction for name, part_s in zip(PARTS, seconds, strict=True)}


def amounts_of(work: Work, *, reuse: float = 0.0, far: float = 0.0) -> tuple[float, ...]:
    """Amounts in the order of ``PARTS``, to be multiplied by ``Rates.unit_s``."""
    return (
        work.n_adapter_loads * (1 - reuse),
        work.n_feature_tokens * (1 - reuse - far),
        work.n_prompt_tokens,
        work.n_tokens,
        work.n_tune_tokens,
        work.n_feature_bytes * far,
    )


def step_share(rows: float, row_cost: float) -> float:
    """How much longer a step with ``rows`` rows takes than a step alone.

    >>> step_share(6, 0.2)
    2.0
    """
    return 1 + max(0.0, rows - 1) * row_cost


def _rated_s(work: Work, rates: Rates, observed: Observed, reuse: float, far: float) -> float:
    """What the rates alone say of an attempt as it turned out to be."""
    amounts = list(amounts_of(work, reuse=reuse, far=far))
    if observed.n_prompt_tokens:
        amounts[_PREFILL] = observed.n_prompt_tokens
    if work.kind == "generate" and observed.n_tokens is not None:
        amounts[_DECODE] = observed.n_tokens
    amounts[_DECODE] *= step_share(observed.rows, rates.row_cost)
    rated_s = sum(amount * unit_s for amount, unit_s in zip(amounts, rates.unit_s, strict=True))
    return rated_s * observed.crowding
