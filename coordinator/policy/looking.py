"""One look at waiting tasks and nodes: prices, the policy's scores, and what must not start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats, age_factor
from coordinator.policy.few import are_few, few_prices, few_starts
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable
from coordinator.policy.policies import Policy, Scene
from coordinator.policy.pricing import CERTAIN, Prices, Rows, prices
from coordinator.policy.recent import RecentTasks
from coordinator.policy.work import KINDS, PATIENCE

__all__ = ["Look", "look", "overview"]

_TUNE = KINDS.index("tune")
_EVERYTHING = slice(None)
_URGENT = 1.5
"""Times what it takes on its best node: from 1 to 2.5 the same comes out (ADR 0025)."""


@dataclass(slots=True)
class Look:
    nodes: NDArray[np.intp]
    """(m,) Of which nodes."""
    value: Floats
    """(n,) As in ``Scene``."""
    mean_s: Floats
    """(m,) As in ``Scene``, before anything started."""
    scores: Floats
    """(n, m) The policy's, ``-inf`` where the task must not start."""
    cost_s: Floats
    finish_s: Floats
    """(n, m) As in ``Scene``."""
    may_start: bool
    """Whether any score is above ``-inf``."""

    def renew(self, column: int, again: Look) -> None:
        """One node's column is looked at ``again``, because something has started there."""
        if self.cost_s is self.finish_s:
            self.cost_s = self.cost_s.copy()
        self.may_start |= again.may_start
        self.scores[:, column] = again.scores[:, 0]
        self.cost_s[:, column] = again.cost_s[:, 0]
        self.finish_s[:, column] = again.finish_s[:, 0]


def look(
    policy: Policy,
    jobs: JobTable,
    nodes: NodeTable,
    now: float,
    recent: RecentTasks,
    *,
    rows: Rows = _EVERYTHING,
    columns: NDArray[np.intp],
    mean_s: Floats | None = None,
) -> Look:
    """Score the tasks ``rows`` (n) on the nodes ``columns`` (m).

    Args:
        mean_s: (m,) The yardstick of slack; ``None``: the mean of these tasks.
    """
    places: list[int] = columns.tolist()
    if are_few(jobs, nodes, len(jobs) if isinstance(rows, slice) else len(rows), places):
        finish_s = few_prices(jobs, nodes, rows, places)
        starts = few_starts(policy, jobs, nodes, now, rows, columns, finish_s)
        alone_s = np.array(finish_s)
        priced = Prices(alone_s, alone_s, CERTAIN)
        mean_s = _mean(alone_s) if mean_s is None else np.atleast_1d(mean_s)
        if not any(map(any, starts)):
            scores = np.full(alone_s.shape, -np.inf)
            return Look(columns, jobs.columns(rows)[0], mean_s, scores, alone_s, alone_s, False)
        scene = _scene(jobs, nodes, now, rows, columns, priced, mean_s, recent)
        allowed, may_start = np.array(starts), True
    else:
        priced = prices(jobs, nodes, rows, columns, now)
        mean_s = _mean(priced.cost_s) if mean_s is None else np.atleast_1d(mean_s)
        scene = _scene(jobs, nodes, now, rows, columns, priced, mean_s, recent)
        allowed = _allowed(policy, jobs, nodes, rows, scene, priced)
        may_start = bool(allowed.any())
    # Most looks find that nothing may start: then there is nothing to put in order.
    scores = np.where(allowed, policy.score(scene) if may_start else -np.inf, -np.inf)
    return Look(columns, scene.value, mean_s, scores, priced.cost_s, priced.finish_s, may_start)


def overview(jobs: JobTable, nodes: NodeTable, now: float, recent: RecentTasks) -> Scene:
    """All waiting tasks, each on its best node alone: n rows, one column that is no node's."""
    best_s = jobs.column("best_s")[:, None]
    priced = Prices(best_s, best_s, CERTAIN)
    return _scene(jobs, nodes, now, _EVERYTHING, np.zeros(0, np.intp), priced, _mean(best_s), recent)


def _mean(cost_s: Floats) -> Floats:
    """Over tasks, by node; ``ndarray.mean`` takes thrice as long on short columns."""
    mean_s: Floats = np.add.reduce(cost_s, axis=0) / len(cost_s)
    return mean_s


def _scene(
    jobs: JobTable,
    nodes: NodeTable,
    now: float,
    rows: Rows,
    columns: NDArray[np.intp],
    priced: Prices,
    mean_s: Floats,
    recent: RecentTasks,
) -> Scene:
    value, deadline_at, arrived_at, patience_s, best_s = jobs.columns(rows)
    if jobs.n_virtual:
        value = value * age_factor(now, deadline_at, patience_s)
    return Scene(
        now=now,
        value=value,
        deadline_at=deadline_at,
        is_virtual=patience_s < np.inf,
        arrived_at=arrived_at,
        cost_s=priced.cost_s,
        finish_s=priced.finish_s,
        mean_s=mean_s,
        best_s=best_s,
        open_nodes=columns,
        room_in_s=lambda: nodes.room_in_s(now),
        capacity=lambda: nodes.capacity(_mean(jobs.amounts.T)),
        recent=recent.arrays,
        all_finish_s=lambda: prices(jobs, nodes, rows, _EVERYTHING, now, alone=True).finish_s,
    )


def _allowed(
    policy: Policy, jobs: JobTable, nodes: NodeTable, rows: Rows, scene: Scene, priced: Prices
) -> NDArray[np.bool_]:
    """(n, m) Where a start breaks no promise."""
    allowed: NDArray[np.bool_]
    if policy.drop:
        left_s = (scene.deadline_at - scene.now)[:, None]
        likely_s = scene.finish_s
        if policy.margin != 1.0:
            is_lost = scene.best_s * policy.margin > left_s[:, 0] if policy.gambles else np.False_
            likely_s = likely_s * np.where(is_lost, 1.0, policy.margin)[..., None]
        allowed = likely_s <= left_s
        if not nodes.knows_everything:
            allowed |= ~priced.is_known & (left_s > 0)
        if jobs.n_virtual:
            allowed |= scene.is_virtual[:, None]
        if nodes.is_shared[scene.open_nodes].any():
            # A joiner slows all who run there. If that makes some late it must be worth more than they are,
            # and it waits as long as it can: a moment later it may start where nobody minds.
            harm = nodes.harm(scene.open_nodes, scene.cost_s, scene.now)
            is_urgent = left_s <= _URGENT * scene.best_s[:, None]
            is_worth_it = (harm == 0) | ((scene.value[:, None] > harm) & is_urgent)
            for column, node in enumerate(scene.open_nodes.tolist()):
                if (company := nodes.company(node, scene.now)) is not None:
                    is_worth_it[:, column] &= company.welcomes(scene.value, scene.cost_s[:, column])
            if jobs.n_tunes:  # what stands back is in nobody's way
                is_tune = (jobs.numbers("kind")[rows] == _TUNE)[:, None]
                is_worth_it |= is_tune & (PATIENCE * scene.cost_s < (scene.deadline_at - scene.now)[:, None])
            allowed &= is_worth_it if nodes.knows_everything else is_worth_it | ~priced.is_known
    else:
        allowed = np.ones(scene.finish_s.shape, np.bool_)
    if not nodes.has_everything:
        allowed &= scene.finish_s < np.inf
    has_room = nodes.has_room[scene.open_nodes]
    if not has_room.all():
        allowed &= has_room
    if policy.keeps is not None:
        allowed &= jobs.kept[rows][:, None]
    if jobs.n_tunes and not nodes.has_tune_room[scene.open_nodes].all():
        is_tune = jobs.numbers("kind")[rows] == _TUNE
        allowed &= ~is_tune[:, None] | nodes.has_tune_room[scene.open_nodes]
    if jobs.avoiding:
        _shun(jobs, nodes, rows, scene, allowed)
    return allowed


def _shun(jobs: JobTable, nodes: NodeTable, rows: Rows, scene: Scene, allowed: NDArray[np.bool_]) -> None:
    """Strike out nodes that refused or failed a task a moment ago. Few tasks have any."""
    chosen = range(len(jobs))[rows] if isinstance(rows, slice) else [int(row) for row in rows]
    at = {row: index for index, row in enumerate(chosen)}
    for task in jobs.avoiding:
        index = at.get(jobs.row(task))
        if index is None:
            continue
        for node, until in jobs.jobs[jobs.row(task)].avoid.items():
            if until > scene.now and node in nodes:
                allowed[index, scene.open_nodes == nodes.row(node)] = False
