"""Whether deadlines press on this device: the share of its recent attempts that ran out of time."""

from __future__ import annotations

from collections import deque

__all__ = ["Hurry"]

_RECENT = 32
_LEAST = 8  # attempts with a deadline before their share says anything


class Hurry:
    def __init__(self) -> None:
        self._missed: deque[bool] = deque(maxlen=_RECENT)

    def saw(self, budget_s: float | None, took_s: float) -> None:
        """An attempt ended, after ``took_s`` of the ``budget_s`` it had (``None``: no deadline)."""
        if budget_s is not None:
            self._missed.append(took_s >= budget_s)

    @property
    def pressure(self) -> float:
        """0 = nobody waits too long, 1 = every deadline is missed."""
        return sum(self._missed) / len(self._missed) if len(self._missed) >= _LEAST else 0.0

    def forget(self) -> None:
        """Start over: what was seen was seen under other circumstances."""
        self._missed.clear()
