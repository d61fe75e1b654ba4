"""Plays a slower device: what took the engine t seconds is over after ``slowdown`` times t.

The engine reads ``Pace.clock``, which runs ``slowdown`` times as fast while it works, so every duration it
reports is the slower device's. Between two steps the process waits until the real clock has caught up. It
listens meanwhile, so a cancellation is as quick as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Pace"]


class Pace:
    """``slowdown`` 1 changes nothing. ``clock`` is monotonic, in seconds."""

    def __init__(self, slowdown: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        assert slowdown >= 1
        self.slowdown = slowdown
        self._real = clock
        self._since: float | None = None
        self._over_at = float("-inf")

    def clock(self) -> float:
        """The time on the device that is played; never goes back."""
        now = self._real()
        if self._since is not None:
            return self._since + (now - self._since) * self.slowdown
        return max(now, self._over_at)

    @property
    def rest_s(self) -> float:
        """Seconds until the last step is over on the device that is played; 0 = now."""
        return max(0.0, self._over_at - self._real())

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around a step of the engine, and only when ``rest_s`` is 0."""
        assert self._since is None
        self._since = self._real()
        try:
            yield
        finally:
            over_at = self.clock()
            self._since = None
            self._over_at = over_at if self.slowdown > 1 else float("-inf")
