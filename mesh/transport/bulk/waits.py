"""How long to wait for one holder before asking the next: learned from recent answers. Pure, no clock.

Two lengths are learned over all holders: from the question to the first byte, and per byte after it. The
second holder is asked when an answer is later than 95 of 100 recent ones, so about one request in twenty is
asked twice. Who is given up on counts with the time it was waited for: when all are slow, patience grows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["WaitConfig", "Waits", "p95"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitConfig:
    """
    Raises:
        ValueError: The bounds are not in order.
    """

    n_recent: int = 128  # two seconds of a busy reader; 1 KB
    n_needed: int = 8  # fewer say nothing about the slowest twentieth
    start_s: float = 0.25  # before anything is learned: 100 round trips of a LAN, 2 of a bad link
    least_s: float = 0.01  # below this a busy processor would cause second questions, not a slow peer
    most_s: float = 1.0  # a dead owner costs this at most before the replica is asked
    start_bytes_per_s: float = 2e6  # 16 Mbit/s: a poor Wi-Fi link

    def __post_init__(self) -> None:
        if not 0 < self.least_s <= self.start_s <= self.most_s < math.inf:
            raise ValueError("waits must be in order: 0 < least_s <= start_s <= most_s")
        if not 0 < self.n_needed <= self.n_recent or not self.start_bytes_per_s > 0:
            raise ValueError("n_needed must be from 1 to n_recent, and start_bytes_per_s positive")


def p95(values: Iterable[float]) -> float:
    """By the nearest rank: always one of the values."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * 0.95) - 1]


class Waits:
    """What recent answers took."""

    def __init__(self, config: WaitConfig | None = None) -> None:
        self._config = config or WaitConfig()
        self._first_s: deque[float] = deque(maxlen=self._config.n_recent)
        self._byte_s: deque[float] = deque(maxlen=self._config.n_recent)

    def began(self, wait_s: float) -> None:
        """The first byte came, or was given up on, after ``wait_s``."""
        self._first_s.append(max(0.0, wait_s))

    def ended(self, length_s: float, n_bytes: int) -> None:
        """``n_bytes`` took ``length_s`` from the first one on, or were given up on then."""
        if n_bytes > 0:
            self._byte_s.append(max(0.0, length_s) / n_bytes)

    @property
    def first_after_s(self) -> float:
        """Without a byte after this long, ask the next holder too."""
        config = self._config
        if len(self._first_s) < config.n_needed:
            return config.start_s
        return min(max(p95(self._first_s), config.least_s), config.most_s)

    def rest_after_s(self, n_bytes: int) -> float:
        """If ``n_bytes`` are not whole this long after the first, ask the next holder too."""
        config = self._config
        is_known = len(self._byte_s) >= config.n_needed
        byte_s = p95(self._byte_s) if is_known else 1 / config.start_bytes_per_s
        return max(byte_s * n_bytes, config.least_s)
