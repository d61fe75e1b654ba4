"""The rule of preemption: generation gives way to twice its density if it still ends in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats, laxity_s, slack_discount, value_density
from coordinator.policy.few import few_prices
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable, Running
from coordinator.policy.policies import SLACK_K
from coordinator.policy.pricing import prices

__all__ = ["Pairs", "may_preempt"]

_FEW_MAX: Final = 16


def may_preempt(
    newcomer: Floats,
    runner: Floats,
    newcomer_s: Floats,
    runner_left_s: Floats,
    runner_deadline_in_s: Floats,
    ratio: float,
) -> NDArray[np.bool_]:
    """The rule on arrays that broadcast: densities, seconds of service, seconds to the runner's deadline.

    >>> bool(may_preempt(np.float64(2), np.float64(1), np.float64(3), np.float64(4), np.float64(7), 2.0))
    True
    """
    is_dense: NDArray[np.bool_] = newcomer >= ratio * runner
    return is_dense & (newcomer_s + runner_left_s <= runner_deadline_in_s)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which of k newcomers may go before which of r runners."""

    runners: Sequence[Running]
    rows: list[int]
    """Rows of the newcomers that may go before somebody."""
    _may: dict[int, NDArray[np.bool_]]
    _finish_s: dict[int, Floats]

    @classmethod
    def found(
        cls,
        jobs: JobTable,
        nodes: NodeTable,
        rows: NDArray[np.intp],
        runners: Sequence[Running],
        now: float,
        *,
        mean_s: float,
        ratio: float,
        margin: float = 1.0,
        only_late: bool = False,
    ) -> Pairs:
        """Apply the rule to the waiting tasks ``rows`` (k), as if each runner alone stood still.

        Args:
            margin: Times the estimates, both must end in time.
            only_late: Newcomers that end in time after the runner wait for it.

        Cost: about 20 passes over k * r numbers.
        """
        if not len(rows):
            return cls(runners, [], {}, {})
        if _is_never(jobs, nodes, rows, runners, now, margin=margin, only_late=only_late):
            return cls(runners, [], {}, {})
        columns = np.array([nodes.row(runner.node) for runner in runners])
        priced = prices(jobs, nodes, rows, columns, now, n_away=1)  # (k, r)
        deadline_in_s = (jobs.column("deadline_at")[rows] - now)[:, None]
        left_s = np.array([runner.left_s(now) for runner in runners])
        runner_deadline_in_s = np.array([runner.job.deadline_at - now for runner in runners])
        ends_s, after_s = margin * priced.finish_s, margin * left_s
        may = (ends_s <= deadline_in_s) & (ends_s + after_s <= runner_deadline_in_s)
        if only_late:
            may &= ends_s + after_s > deadline_in_s
        if not may.any():
            return cls(runners, [], {}, {})
        mean = np.array(mean_s)
        ours = value_density(jobs.column("value")[rows][:, None], priced.finish_s) * slack_discount(
            deadline_in_s - priced.finish_s, mean, SLACK_K
        )
        # Without a deadline there is nothing to discount: it has waited for its turn already.
        laxity = np.where(np.isinf(runner_deadline_in_s), 0.0, laxity_s(runner_deadline_in_s, 0.0, left_s))
        theirs = value_density(np.array([runner.job.value for runner in runners]), left_s) * slack_discount(
            laxity, mean, SLACK_K
        )
        may &= may_preempt(ours, theirs, ends_s, after_s, runner_deadline_in_s, ratio)
        found = np.flatnonzero(may.any(axis=1)).tolist()
        return cls(
            runners,
            [int(rows[index]) for index in found],
            {int(rows[index]): may[index] for index in found},
            {int(rows[index]): priced.finish_s[index] for index in found},
        )

    def of(self, row: int) -> Iterator[tuple[float, Running]]:
        """Runners the newcomer may go before, with the seconds it would take in each one's place."""
        for index in map(int, np.flatnonzero(self._may[row])):
            yield float(self._finish_s[row][index]), self.runners[index]


def _is_never(
    jobs: JobTable,
    nodes: NodeTable,
    rows: NDArray[np.intp],
    runners: Sequence[Running],
    now: float,
    *,
    margin: float,
    only_late: bool,
) -> bool:
    """Whether no pair of these few keeps both deadlines, the common case, in plain numbers: what
    ``Pairs.found`` asks first, to the last bit. ``False`` also where there are many, or others on a runner's
    node."""
    places = [nodes.row(runner.node) for runner in runners]
    if len(rows) * len(places) > _FEW_MAX or not nodes.has_everything or jobs.n_fetching:
        return False
    if any(nodes.is_shared.item(node) or nodes.n_rows.item(node) > 1 for node in places):
        return False
    finish_s = few_prices(jobs, nodes, rows, places)
    deadlines_at = jobs.column("deadline_at")[rows].tolist()
    for column, runner in enumerate(runners):
        after_s, runner_deadline_in_s = margin * runner.left_s(now), runner.job.deadline_at - now
        for index, deadline_at in enumerate(deadlines_at):
            ends_s, deadline_in_s = margin * finish_s[index][column], deadline_at - now
            is_in_time = ends_s <= deadline_in_s and ends_s + after_s <= runner_deadline_in_s
            if is_in_time and not (only_late and ends_s + after_s <= deadline_in_s):
                return False
    return True
