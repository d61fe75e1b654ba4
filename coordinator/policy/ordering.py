"""In which order tasks are placed and where each goes, once all are scored. Ties are broken by rule here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats
from coordinator.policy.jobs import JobTable
from coordinator.policy.looking import Look, look, overview
from coordinator.policy.nodes import NodeTable
from coordinator.policy.policies import Policy
from coordinator.policy.recent import RecentTasks

__all__ = ["PAIRS_MAX", "blocks", "column_for", "first_of", "in_order"]

PAIRS_MAX: Final = 100_000
"""Pairs of a task and a node scored at once, about 1 ms; more are taken in blocks."""


_FEW_NODES: Final = 32
"""As many as plain numbers are faster for than arrays."""
_FIRST: Final = np.zeros(1, np.intp)


def blocks(
    policy: Policy,
    jobs: JobTable,
    nodes: NodeTable,
    now: float,
    recent: RecentTasks,
    open_nodes: NDArray[np.intp],
) -> Iterator[tuple[NDArray[np.intp], Look]]:
    """Rows of waiting tasks with their scores: all at once or, if that is too many pairs, in blocks, from the
    first to the last by their scores on their best nodes."""
    n = len(jobs)
    if n * len(open_nodes) <= PAIRS_MAX:
        yield np.arange(n), look(policy, jobs, nodes, now, recent, columns=open_nodes)
        return
    ranks = policy.score(overview(jobs, nodes, now, recent))[:, 0]
    order = in_order(jobs, ranks, np.arange(n))
    size = max(1, PAIRS_MAX // len(open_nodes))
    mean_s: Floats | None = None
    for at in range(0, n, size):
        rows = order[at : at + size]
        seen = look(policy, jobs, nodes, now, recent, rows=rows, columns=open_nodes, mean_s=mean_s)
        mean_s = seen.mean_s
        yield rows, seen


def in_order(jobs: JobTable, best: Floats, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Indexes of ``rows`` that may start (``best`` above ``-inf``), the highest score first."""
    if len(best) == 1:
        return _FIRST if best[0] > -np.inf else _FIRST[:0]
    able = np.flatnonzero(best > -np.inf)
    order = able[np.argsort(-best[able], kind="stable")]
    sorted_best = best[order]
    is_tied = sorted_best[1:] == sorted_best[:-1]
    if not is_tied.any():
        return order
    edges = np.flatnonzero(~is_tied) + 1
    for run in np.split(np.arange(len(order)), edges):
        if len(run) > 1:
            order[run] = sorted(order[run].tolist(), key=lambda index: jobs.tie_of(int(rows[index])))
    return order


def first_of(jobs: JobTable, scores: Floats) -> int | None:
    """The row with the highest score; ``None`` if none may start."""
    best = scores.max()
    if best == -np.inf:
        return None
    ties: list[int] = (scores == best).nonzero()[0].tolist()
    return ties[0] if len(ties) == 1 else min(ties, key=jobs.tie_of)


def column_for(nodes: NodeTable, seen: Look, index: int, place: Literal["first_end", "score"]) -> int | None:
    """Which of the open nodes a task goes to; ties go to the first by id."""
    scores = seen.scores[index]
    if len(scores) <= _FEW_NODES:
        scores_s: list[float] = scores.tolist()
        keys_s = seen.finish_s[index].tolist() if place == "first_end" else [-score for score in scores_s]
        able = [
            (key, at) for at, (key, score) in enumerate(zip(keys_s, scores_s, strict=True)) if score > -np.inf
        ]
        least = min(able)[0] if able else np.inf
        ties = [at for key, at in able if key == least < np.inf]
    else:
        keys = seen.finish_s[index] if place == "first_end" else -scores
        keys = np.where(scores > -np.inf, keys, np.inf)
        best = keys.min()
        ties = (keys == best).nonzero()[0].tolist() if best < np.inf else []
    if len(ties) <= 1:
        return ties[0] if ties else None
    return min(ties, key=lambda column: nodes.ids[seen.nodes[column]])
