"""Costs of waiting tasks on nodes, as arrays.

Sums of products are written out part by part instead of as a matrix product: every element is then rounded
in the same way wherever it stands, so equal tasks get equal scores and ties are ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable
from coordinator.policy.rates import PARTS
from coordinator.policy.work import KINDS

__all__ = ["CERTAIN", "Prices", "Rows", "all_fastest_s", "fastest_s", "price_alone", "prices"]

_SPARED: Final = (PARTS.index("adapter_load"), PARTS.index("features"))
_DECODE: Final = PARTS.index("decode")
_PREFILL, _TUNE, _FETCH = PARTS.index("prefill"), PARTS.index("tune"), PARTS.index("fetch")
_TUNE_KIND: Final = KINDS.index("tune")
_LEAST_S: Final = 1e-6
_EVERYBODY: Final = 1_000_000
_FEW_NODES: Final = 8
"""As many as plain numbers are faster for than arrays."""
CERTAIN: Final = np.ones((1, 1), np.bool_)
"""``Prices.is_known`` where no estimate is a guess."""

Rows = NDArray[np.intp] | slice


@dataclass(slots=True)
class Prices:
    """Of n tasks on m nodes."""

    cost_s: Floats
    """(n, m) Node seconds taken from others."""
    finish_s: Floats
    """(n, m) From start to end; infinite where the node has not what the task needs."""
    is_known: NDArray[np.bool_]
    """(n, m) or (1, 1) Whether the estimate may forbid a start."""


def prices(
    jobs: JobTable,
    nodes: NodeTable,
    rows: Rows,
    columns: Rows,
    now: float,
    *,
    alone: bool = False,
    n_away: int = 0,
) -> Prices:
    """Costs of the tasks ``rows`` on the nodes ``columns``, joining what runs there unless ``alone``.

    Parts that no waiting task has are left out, so the cost is 5 to 14 passes over n * m numbers.

    Args:
        n_away: So many of the attempts that run on each node stand still.
    """
    if not alone and not isinstance(columns, slice) and len(columns) == 1:
        return _prices_on_one(jobs, nodes, rows, int(columns[0]), n_away, now)
    amounts, unit_s = jobs.amounts[:, rows], nodes.unit_s[:, columns]
    kinds = jobs.numbers("kind")[rows]
    decode = amounts[_DECODE][:, None] * unit_s[_DECODE]
    fixed = amounts[_PREFILL][:, None] * unit_s[_PREFILL]
    if jobs.n_tunes:
        fixed = fixed + amounts[_TUNE][:, None] * unit_s[_TUNE]
    if jobs.n_spared:
        first, second = _SPARED
        spared = amounts[first][:, None] * unit_s[first] + amounts[second][:, None] * unit_s[second]
        left = 1.0 - nodes.warm[:, columns][jobs.numbers("reuse")[rows]]
        if jobs.n_fetching:
            far = nodes.far[:, columns][jobs.numbers("reuse")[rows]]
            left = left - far
            fixed = fixed + amounts[_FETCH][:, None] * unit_s[_FETCH] * far
        fixed = fixed + spared * left
    correction = nodes.corrections[:, columns][kinds]
    n_others = nodes.n_rows[columns] - n_away
    if alone or not ((n_others > 0) | nodes.is_shared[columns]).any():
        finish_s = cost_s = np.maximum((fixed + decode) * correction, _LEAST_S)
    else:
        row_cost = nodes.row_cost[columns]
        steps = decode * (1.0 + np.maximum(n_others, 0.0) * row_cost)
        finish_s = np.maximum((fixed + steps) * correction, _LEAST_S)
        places = np.arange(len(nodes))[columns]
        for at in nodes.is_shared[columns].nonzero()[0].tolist():
            node = int(places[at])
            if (company := nodes.company(node, now)) is not None:
                factor = correction[:, at]
                finish_s[:, at] += company.extra_s(
                    fixed[:, at] * factor, steps[:, at] * factor, kinds == _TUNE_KIND
                )
        # A row that joins a batch makes its steps longer by row_cost; the step itself runs anyway.
        marginal = decode * np.where(n_others > 0, row_cost, 1.0)
        cost_s = np.maximum((fixed + marginal) * correction, _LEAST_S)
    if not nodes.has_everything:
        finish_s = np.where(nodes.has[:, columns][jobs.numbers("needs")[rows]], finish_s, np.inf)
    is_known = CERTAIN if nodes.knows_everything else nodes.is_known[:, columns][kinds]
    return Prices(cost_s, finish_s, is_known)


def _prices_on_one(
    jobs: JobTable, nodes: NodeTable, rows: Rows, node: int, n_away: int, now: float
) -> Prices:
    """``prices`` on one node, the common case, in half the time; the same numbers to the last bit."""
    amounts, kinds = jobs.amounts[:, rows], jobs.numbers("kind")[rows]
    unit_s: list[float] = nodes.unit_s[:, node].tolist()
    decode = amounts[_DECODE] * unit_s[_DECODE]
    fixed = amounts[_PREFILL] * unit_s[_PREFILL]
    if jobs.n_tunes:
        fixed = fixed + amounts[_TUNE] * unit_s[_TUNE]
    if jobs.n_spared:
        first, second = _SPARED
        spared = amounts[first] * unit_s[first] + amounts[second] * unit_s[second]
        left = 1.0 - nodes.warm[:, node][jobs.numbers("reuse")[rows]]
        if jobs.n_fetching:
            far = nodes.far[:, node][jobs.numbers("reuse")[rows]]
            left = left - far
            fixed = fixed + amounts[_FETCH] * unit_s[_FETCH] * far
        fixed = fixed + spared * left
    correction = nodes.corrections[:, node][kinds]
    n_others = max(float(nodes.n_rows[node]) - n_away, 0.0)
    row_cost = float(nodes.row_cost[node])
    steps = decode * (1.0 + n_others * row_cost)
    finish_s = np.maximum((fixed + steps) * correction, _LEAST_S)
    cost_s = finish_s
    if n_away < _EVERYBODY and (company := nodes.company(node, now)) is not None:
        tunes = kinds == _TUNE_KIND
        finish_s = finish_s + company.extra_s(fixed * correction, steps * correction, tunes)
    if n_others > 0:
        cost_s = np.maximum((fixed + decode * row_cost) * correction, _LEAST_S)
    if not nodes.has_everything:
        finish_s = np.where(nodes.has[:, node][jobs.numbers("needs")[rows]], finish_s, np.inf)
    is_known = CERTAIN if nodes.knows_everything else nodes.is_known[:, node][kinds][:, None]
    if cost_s is finish_s:
        cost_s = finish_s = finish_s[:, None]
        return Prices(cost_s, finish_s, is_known)
    return Prices(cost_s[:, None], finish_s[:, None], is_known)


def price_alone(amounts: Sequence[float], unit_s: Sequence[float], left: float, correction: float) -> float:
    """``prices`` of one task on one node where nobody runs, in plain numbers; the same to the last bit.

    Args:
        amounts: By part, nothing to be fetched.
        left: Share of what reuse may spare that it does not.
    """
    first, second = _SPARED
    fixed = amounts[_PREFILL] * unit_s[_PREFILL] + amounts[_TUNE] * unit_s[_TUNE]
    fixed = fixed + (amounts[first] * unit_s[first] + amounts[second] * unit_s[second]) * left
    return max((fixed + amounts[_DECODE] * unit_s[_DECODE]) * correction, _LEAST_S)


def all_fastest_s(jobs: JobTable, nodes: NodeTable) -> tuple[Floats, Floats]:
    """``fastest_s`` of every waiting task, (n,) each. Cost: about 15 passes over n numbers for each node."""
    n = len(jobs)
    best_s = np.full(n, np.inf)
    is_guess = np.zeros(n, np.bool_)
    for node in range(len(nodes)):
        priced = prices(jobs, nodes, slice(None), np.array([node]), -np.inf, n_away=_EVERYBODY)
        finish_s = priced.finish_s[:, 0]
        best_s = np.minimum(best_s, finish_s)
        if not nodes.knows_everything:
            is_guess |= ~priced.is_known[:, 0] & (finish_s < np.inf)
    best_s = np.where(best_s < np.inf, best_s, 0.0)
    return best_s, np.where(is_guess, 0.0, best_s)


def fastest_s(jobs: JobTable, nodes: NodeTable, row: int) -> tuple[float, float]:
    """Seconds one task takes on its best node alone: as estimated, and as far as anything is certain.

    The second is 0 where a node may be the best that nobody knows enough of, or where no node will do now:
    one may come.
    """
    if not len(nodes):
        return 0.0, 0.0
    if len(nodes) <= _FEW_NODES and nodes.has_everything and nodes.knows_everything and not jobs.n_fetching:
        return (_fastest_of_few_s(jobs, nodes, row),) * 2
    service_s = np.zeros(len(nodes))
    reuse = jobs.numbers("reuse")[row]
    left = 1.0 - nodes.warm[reuse] if jobs.n_spared else None
    if left is not None and jobs.n_fetching:
        left = left - nodes.far[reuse]
    for part, amount in enumerate(jobs.amounts[:, row].tolist()):
        if amount:
            part_s = amount * nodes.unit_s[part]
            if part == _FETCH:
                part_s = part_s * nodes.far[reuse]
            service_s += part_s if left is None or part not in _SPARED else part_s * left
    kind = int(jobs.numbers("kind")[row])
    service_s = np.maximum(service_s * nodes.corrections[kind], _LEAST_S)
    if not nodes.has_everything:
        service_s = np.where(nodes.has[jobs.numbers("needs")[row]], service_s, np.inf)
    best_s = float(service_s.min())
    if best_s == np.inf:
        return 0.0, 0.0
    if nodes.knows_everything:
        return best_s, best_s
    is_guess = ~nodes.is_known[kind] & (service_s < np.inf)
    return best_s, 0.0 if is_guess.any() else best_s


def _fastest_of_few_s(jobs: JobTable, nodes: NodeTable, row: int) -> float:
    """``fastest_s`` where nothing is a guess or missing, in plain numbers; the same to the last bit."""
    kind, _, reuse = jobs.all_numbers(slice(row, row + 1))[:, 0].tolist()
    amounts = jobs.amounts[:, row].tolist()
    some = [(part, amount) for part, amount in enumerate(amounts) if amount]
    corrections = nodes.corrections[kind].tolist()
    warm = nodes.warm[reuse].tolist() if jobs.n_spared else None
    best_s = np.inf
    for node, unit_s in enumerate(nodes.unit_s.T.tolist()):
        service_s = 0.0
        for part, amount in some:
            part_s = amount * unit_s[part]
            service_s += part_s if warm is None or part not in _SPARED else part_s * (1.0 - warm[node])
        best_s = min(best_s, max(service_s * corrections[node], _LEAST_S))
    return best_s
