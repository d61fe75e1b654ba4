"""What those who run on a node take from a task that joins them, and it from them.

In every pass all answers get a token, and what is read gets a piece (``node.compute.model_engine``): who
reads, a prompt or a text, hardly feels answers, and they stand almost still meanwhile. Those who read take
turns. Tuning comes when nobody reads, and then takes as much time as all answers together. So who joins and
reads for ``f``, then answers for ``s`` in all, takes

    f + s + what each that reads has left, of a text at most f (it has no s)
          + sum over those who tune of min(what each has left, s)

and who joins to tune for ``f``

    f + what each that reads has left + sum over those who tune of min(what each has left, f)
      + min(f, how long answers are still written)

which is processor sharing (Kleinrock 1976) in two classes, with nobody else to come. Sharing what nothing is
gained by makes all of them late: two texts read at once both end when the second would have ended. So a task
waits for those who read, unless it is so short, or worth so much, that waiting costs more than it makes the
others wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.density import Floats

__all__ = ["Company"]


@dataclass(frozen=True, slots=True)
class _Line:
    """Those of one class, by what they have left."""

    alone_s: Floats
    """(k,) What each still has of work that shares nothing, in node seconds, ascending."""
    sums_s: Floats
    """(k + 1,) Sums of the first so many."""

    @classmethod
    def of(cls, alone_s: Floats) -> _Line:
        return cls(alone_s, _sums(alone_s))

    def taken_s(self, most_s: Floats) -> Floats:
        """(n,) What they take from somebody who wants ``most_s`` as well, in turns."""
        n_shorter = np.searchsorted(self.alone_s, most_s)
        taken_s: Floats = self.sums_s[n_shorter] + (len(self.alone_s) - n_shorter) * most_s
        return taken_s


@dataclass(frozen=True, slots=True)
class Company:
    """Those who run on one node now. Sums are of the first so many, (k + 1,)."""

    readers: _Line
    tuners: _Line
    all: _Line
    values: Floats
    """Sums of values of ``all``."""
    waiting_s: Floats
    """Sums of value times ``alone_s``."""
    answers_s: float
    """For so long answers are still written; 0 = nobody writes."""

    @classmethod
    def of(cls, runners: Iterable[tuple[float, float, bool]], answers_s: float) -> Company | None:
        """``None``: nobody who would be felt.

        Args:
            runners: Of each what it has left that shares nothing, in node seconds, its value, and whether it
                tunes.
        """
        found = sorted((alone_s, value, tunes) for alone_s, value, tunes in runners if alone_s > 0)
        if not found and answers_s <= 0:
            return None
        alone_s, values, flags = np.array(found).reshape(-1, 3).T
        tunes = flags > 0
        return cls(
            _Line.of(alone_s[~tunes]), _Line.of(alone_s[tunes]), _Line.of(alone_s),
            _sums(values), _sums(alone_s * values), answers_s,
        )  # fmt: skip

    def extra_s(self, alone_s: Floats, steps_s: Floats, tunes: NDArray[np.bool_]) -> Floats:
        """(n,) Seconds that tasks take longer in this company.

        Args:
            alone_s: (n,) Work of each that shares nothing.
            steps_s: (n,) Steps of its answer, as long as they are beside the others' answers.
            tunes: (n,) Whether that work is tuning; else it is read.

        >>> two = Company.of([(1.0, 1.0, False), (5.0, 1.0, False)], answers_s=3.0)
        >>> text, tuning = np.array([False]), np.array([True])
        >>> two.extra_s(np.array([2.0]), np.array([0.0]), text)  # all of the short one, as much of the other
        array([3.])
        >>> two.extra_s(np.array([2.0]), np.array([0.0]), tuning)  # all that is read, as much as answers take
        array([8.])
        """
        waits = tunes | (steps_s > 0)
        read_s = np.where(waits, self.readers.sums_s[-1], self.readers.taken_s(alone_s))
        tuned_s = self.tuners.taken_s(np.where(tunes, alone_s, steps_s))
        return read_s + tuned_s + np.where(tunes, np.minimum(alone_s, self.answers_s), 0.0)

    def welcomes(self, value: Floats, cost_s: Floats) -> NDArray[np.bool_]:
        """(n,) Whether joining now saves a task more, by value times seconds, than it makes the others wait.

        Args:
            value: (n,)
            cost_s: (n,) Node seconds it takes from the others.

        >>> one = Company.of([(5.0, 1.0, False)], answers_s=0.0)
        >>> one.welcomes(np.array([1.0, 1.0, 3.0]), np.array([2.0, 4.0, 3.0]))
        array([ True, False,  True])
        """
        n_shorter = np.searchsorted(self.all.alone_s, cost_s)
        saved_s = self.all.sums_s[-1] - self.all.taken_s(cost_s)
        lost = self.waiting_s[n_shorter] + (self.values[-1] - self.values[n_shorter]) * cost_s
        welcome: NDArray[np.bool_] = value * saved_s >= lost
        return welcome


_NOTHING = np.zeros(1)


def _sums(column: Floats) -> Floats:
    return np.concatenate([_NOTHING, np.cumsum(column)])
