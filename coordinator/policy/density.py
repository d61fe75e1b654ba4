"""The formulas of value-density-first scheduling, on whole arrays.

Value density is value per second of service (Koren & Shasha, RTSS 1992). The slack discount is the
apparent-tardiness-cost rule (Vepsalainen & Morton, Management Science 1987): work with time to spare waits,
and becomes urgent as its laxity shrinks to a few mean service times.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["AGE_DOUBLINGS_MAX", "Floats", "age_factor", "laxity_s", "slack_discount", "value_density"]

Floats = NDArray[np.float64]

# 2**40: more than any ratio of densities that ``Submit`` allows people to mean; 2.0**40 is far from overflow.
AGE_DOUBLINGS_MAX: Final = 40.0


def laxity_s(deadline_at: Floats, now: float, service_s: Floats) -> Floats:
    """Seconds to spare if started now; negative: lost. Infinite without a deadline."""
    return deadline_at - now - service_s


def value_density(value: Floats, cost_s: Floats) -> Floats:
    """Value per second of node time."""
    return value / cost_s


def slack_discount(laxity: Floats, mean_s: Floats, k: float) -> Floats:
    """``exp(-max(laxity, 0) / (k * mean_s))``: 1 with nothing to spare, 0.37 with ``k`` mean services."""
    return np.exp(np.maximum(laxity, 0.0) / (-k * mean_s))


def age_factor(now: float, virtual_deadline_at: Floats, patience_s: Floats) -> Floats:
    """By what the value of a task without a deadline has grown: doubled every ``patience_s`` after its
    virtual deadline, so that it overtakes any steady stream of others in the end.

    ``patience_s`` is infinite for tasks with a deadline of their own, whose factor stays 1.
    """
    return np.exp2(np.clip((now - virtual_deadline_at) / patience_s, 0.0, AGE_DOUBLINGS_MAX))
