"""How long reading from peers takes, as it took lately: a wait, and then so many bytes a second. Pure."""

from __future__ import annotations

__all__ = ["Pace"]

START_WAIT_S = 0.01  # two round trips on a LAN, and a thread
START_BYTES_PER_S = 10e6  # a gigabit link gives ten times that, a good Wi-Fi link half
WEIGHT = 0.2  # of the newest; a fifth of a dozen reads ago still counts
CLOCK_STEP_S = 1e-9  # a shorter time was not measured
SMALL_BYTES = 64 << 10
"""A read of fewer tells how long the wait is; one of more, how fast bytes come."""


class Pace:
    """Learns from finished reads."""

    def __init__(self) -> None:
        self.wait_s = START_WAIT_S
        self.bytes_per_s = START_BYTES_PER_S
        self._is_known = False

    def read(self, n_bytes: int, length_s: float) -> None:
        """So many bytes took so long, with nothing else being read for this node meanwhile."""
        if length_s < CLOCK_STEP_S or not n_bytes:
            return
        if n_bytes < SMALL_BYTES:
            self.wait_s += WEIGHT * (length_s - n_bytes / self.bytes_per_s - self.wait_s)
            self.wait_s = max(self.wait_s, 0.0)
            return
        rate = n_bytes / max(length_s - self.wait_s, length_s / 2)
        # Times are averaged, not rates: one slow read of many is what will be waited for.
        pace_s = 1 / rate if not self._is_known else (1 - WEIGHT) / self.bytes_per_s + WEIGHT / rate
        self.bytes_per_s = 1 / pace_s
        self._is_known = True

    def expected_s(self, n_bytes: int) -> float:
        return self.wait_s + n_bytes / self.bytes_per_s
