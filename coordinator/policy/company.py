"""What those who run on a node take from a task that joins them, and it from them.

A node shares its time equally among those that want it: each prompt that is read, each text, each tuning job,
and all answers together, which share every step (``node.compute.model_engine``). So who joins with work
``f`` that shares nothing, and steps ``s``, takes

    f + s + sum over the others of min(what each has left that shares nothing, f + s)
          + min(f, how long answers are still written)

which is processor sharing (Kleinrock 1976) with nobody else to come. Sharing what nothing is gained by makes
all of them late: two texts read at once both end when the second would have ended. So a task waits for those
who read, unless it is so short, or worth so much, that waiting costs more than it makes the others wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats

__all__ = ["Company"]


@dataclass(frozen=True, slots=True)
class Company:
    """Those who run on one node now. Sums are of the first so many, (k + 1,)."""

    alone_s: Floats
    """(k,) What each still has of work that shares nothing, in node seconds, ascending."""
    sums_s: Floats
    values: Floats
    """Sums of values."""
    waiting_s: Floats
    """Sums of value times ``alone_s``."""
    answers_s: float
    """For so long answers are still written; 0 = nobody writes."""

    @classmethod
    def of(cls, runners: Iterable[tuple[float, float]], answers_s: float) -> Company | None:
        """``None``: nobody who would be felt.

        Args:
            runners: Of each what it has left that shares nothing, in node seconds, and its value.
        """
        table = np.array(sorted((alone_s, value) for alone_s, value in runners if alone_s > 0))
        if not len(table):
            return cls(_NOBODY, _NOTHING, _NOTHING, _NOTHING, answers_s) if answers_s > 0 else None
        alone_s, values = table.T
        return cls(alone_s, _sums(alone_s), _sums(values), _sums(alone_s * values), answers_s)

    def extra_s(self, alone_s: Floats, steps_s: Floats) -> Floats:
        """(n,) Seconds that tasks take longer in this company.

        Args:
            alone_s: (n,) Work of each that shares nothing.
            steps_s: (n,) Steps of its answer, as long as they are beside the others' answers.

        >>> two = Company.of([(1.0, 1.0), (5.0, 1.0)], answers_s=0.0)
        >>> two.extra_s(np.array([2.0]), np.array([0.0]))  # all of the short one, and as much of the other
        array([3.])
        """
        whole_s = alone_s + steps_s
        n_shorter = np.searchsorted(self.alone_s, whole_s)
        longer: Floats = self.sums_s[n_shorter] + (len(self.alone_s) - n_shorter) * whole_s
        return longer + np.minimum(alone_s, self.answers_s)

    def welcomes(self, value: Floats, cost_s: Floats) -> NDArray[np.bool_]:
        """(n,) Whether joining now saves a task more, by value times seconds, than it makes the others wait.

        Args:
            value: (n,)
            cost_s: (n,) Node seconds it takes from the others.

        >>> one = Company.of([(5.0, 1.0)], answers_s=0.0)
        >>> one.welcomes(np.array([1.0, 1.0, 3.0]), np.array([2.0, 4.0, 3.0]))
        array([ True, False,  True])
        """
        n_shorter = np.searchsorted(self.alone_s, cost_s)
        n_longer = len(self.alone_s) - n_shorter
        saved_s = self.sums_s[-1] - self.sums_s[n_shorter] - n_longer * cost_s
        lost = self.waiting_s[n_shorter] + (self.values[-1] - self.values[n_shorter]) * cost_s
        welcome: NDArray[np.bool_] = value * saved_s >= lost
        return welcome


_NOBODY = np.zeros(0)
_NOTHING = np.zeros(1)


def _sums(column: Floats) -> Floats:
    return np.concatenate([_NOTHING, np.cumsum(column)])
