"""A host's monotonic clock: its own zero, its own speed, and nothing to do with the date."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

__all__ = ["LocalClock"]


@dataclass(frozen=True, slots=True)
class LocalClock:
    """Every start of a host draws a new one: after a reboot the old readings mean nothing.

    There is no wall clock here because cores are given none: a jump of an hour is a jump of a number
    they never see (``tests/unit/test_layers.py`` holds them to it).
    """

    zero_s: float
    rate: float
    born_at: float

    @staticmethod
    def draw(rng: Random, drift: float, born_at: float) -> LocalClock:
        return LocalClock(rng.uniform(0, 1e6), 1 + rng.uniform(-drift, drift), born_at)

    def local(self, true_time: float) -> float:
        return self.zero_s + (true_time - self.born_at) * self.rate

    def true(self, local_time: float) -> float:
        return self.born_at + (local_time - self.zero_s) / self.rate
