"""A look at few tasks and idle nodes in plain numbers, where calling numpy takes longer than its work there.

Most decisions of a mesh at home are about one to three waiting tasks and one node that has room. The numbers
are those of ``pricing.prices`` and of ``looking``, to the last bit: the same products and sums in the same
order (tests/property/test_few.py). What is rare, or takes long anyway, is left to the arrays: company on a
node, guessed rates, tasks without a deadline, nodes that lack a model or refused a task, feature maps of
peers.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable
from coordinator.policy.policies import Policy
from coordinator.policy.pricing import Rows, price_alone
from coordinator.policy.work import KINDS

__all__ = ["are_few", "few_prices", "few_starts"]

_PAIRS_MAX: Final = 16
"""Pairs of a task and a node: from about so many on arrays are faster."""
_TUNE: Final = KINDS.index("tune")


def are_few(jobs: JobTable, nodes: NodeTable, n: int, columns: list[int]) -> bool:
    """Whether the functions below can tell of ``n`` tasks on these nodes."""
    return (
        n * len(columns) <= _PAIRS_MAX
        and nodes.has_everything
        and nodes.knows_everything
        and not (jobs.n_virtual or jobs.n_fetching or jobs.avoiding)
        and not any(nodes.is_shared.item(node) or nodes.n_rows.item(node) for node in columns)
    )


def few_prices(jobs: JobTable, nodes: NodeTable, rows: Rows, columns: list[int]) -> list[list[float]]:
    """(n, m) Seconds that the tasks ``rows`` take on the nodes ``columns``, which is also what they cost."""
    amounts = jobs.amounts[:, rows].T.tolist()
    numbers = jobs.all_numbers(rows).T.tolist()
    by_node = [
        (node, nodes.unit_s[:, node].tolist(), nodes.corrections[:, node].tolist()) for node in columns
    ]
    return [
        [
            price_alone(
                parts, unit_s, 1.0 - nodes.warm.item(reuse, node) if jobs.n_spared else 1.0, corrections[kind]
            )
            for node, unit_s, corrections in by_node
        ]
        for parts, (kind, _, reuse) in zip(amounts, numbers, strict=True)
    ]


def few_starts(
    policy: Policy,
    jobs: JobTable,
    nodes: NodeTable,
    now: float,
    rows: Rows,
    columns: NDArray[np.intp],
    finish_s: list[list[float]],
) -> list[list[bool]]:
    """(n, m) Where a start breaks no promise: ``looking._allowed``, pair by pair."""
    tasks = jobs.columns(rows)[[1, 4]].T.tolist()
    kept = jobs.kept[rows].tolist() if policy.keeps is not None else [True] * len(tasks)
    rooms = nodes.has_room[columns].tolist()
    tune_rooms = nodes.has_tune_room[columns].tolist() if jobs.n_tunes else rooms
    kinds = jobs.numbers("kind")[rows].tolist()
    starts: list[list[bool]] = []
    for (deadline_at, best_s), is_kept, kind, ends_s in zip(tasks, kept, kinds, finish_s, strict=True):
        may = tune_rooms if kind == _TUNE else rooms
        if not is_kept:
            may = [False] * len(rooms)
        elif policy.drop:
            left_s, margin = deadline_at - now, policy.margin
            if policy.gambles and margin != 1.0 and best_s * margin > left_s:
                margin = 1.0  # lost everywhere, with it
            may = [room and end_s * margin <= left_s for room, end_s in zip(may, ends_s, strict=True)]
        starts.append(may)
    return starts
