"""Costs of waiting tasks on nodes, as arrays.

Sums of products are written out part by part instead of as a matrix product: every element is then rounded in
the same way wherever it stands, so equal tasks get equal scores and ties are ties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable
from coordinator.policy.rates import PARTS

__all__ = ["Prices", "fastest_s", "prices"]

_SPARED: Final = (PARTS.index("adapter_load"), PARTS.index("features"))
_DECODE: Final = PARTS.index("decode")
_PLAIN: Final = (PARTS.index("prefill"), PARTS.index("tune"))
_LEAST_S: Final = 1e-6

Rows = NDArray[np.intp] | slice


@dataclass(frozen=True, slots=True)
class Prices:
    """Of n tasks on m nodes, all (n, m)."""

    cost_s: Floats
    """Node seconds taken from others."""
    finish_s: Floats
    """From start to end; infinite where the node has not what the task needs."""
    is_known: NDArray[np.bool_]
    """Whether the estimate may forbid a start."""


def prices(jobs: JobTable, nodes: NodeTable, rows: Rows, columns: Rows, *, alone: bool = False) -> Prices:
    """Costs of the tasks ``rows`` on the nodes ``columns``, joining what runs there unless ``alone``.

    Cost: about 14 passes over n * m numbers.
    """
    amounts, unit_s = jobs.amounts[:, rows], nodes.unit_s[:, columns]
    kinds, needs, reuses = (jobs.numbers(name)[rows] for name in ("kind", "needs", "reuse"))
    row_cost = nodes.row_cost[columns]
    n_others = nodes.n_rows[columns] * (0.0 if alone else 1.0)
    spared = sum_of_parts(amounts, unit_s, _SPARED) * (1.0 - nodes.warm[reuses][:, columns])
    fixed = sum_of_parts(amounts, unit_s, _PLAIN) + spared
    decode = amounts[_DECODE][:, None] * unit_s[_DECODE][None, :]
    correction = nodes.corrections[kinds][:, columns]
    finish_s = np.maximum((fixed + decode * (1.0 + n_others * row_cost)) * correction, _LEAST_S)
    if alone or not n_others.any():
        cost_s = finish_s
    else:
        # A row that joins a batch makes its steps longer by row_cost; the step itself runs anyway.
        share = np.where(n_others > 0, row_cost, 1.0)
        cost_s = np.maximum((fixed + decode * share) * correction, _LEAST_S)
    finish_s = np.where(nodes.has[needs][:, columns], finish_s, np.inf)
    return Prices(cost_s, finish_s, nodes.is_known[kinds][:, columns])


def sum_of_parts(amounts: Floats, unit_s: Floats, parts: tuple[int, ...]) -> Floats:
    """(parts, n), (parts, m) -> (n, m)"""
    first, second = parts
    return amounts[first][:, None] * unit_s[first] + amounts[second][:, None] * unit_s[second]


def fastest_s(jobs: JobTable, nodes: NodeTable, row: int) -> tuple[float, float]:
    """Seconds one task takes on its best node alone: as estimated, and as far as anything is certain.

    The second is 0 where a node may be the best that nobody knows enough of, or where no node will do now:
    one may come.
    """
    if not len(nodes):
        return 0.0, 0.0
    priced = prices(jobs, nodes, np.array([row]), slice(None), alone=True)
    finish_s, is_known = priced.finish_s[0], priced.is_known[0]
    best_s = float(finish_s.min())
    if best_s == np.inf:
        return 0.0, 0.0
    certain_s = float(np.where(is_known | np.isinf(finish_s), finish_s, 0.0).min())
    return best_s, certain_s
