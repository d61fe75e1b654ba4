"""Fetch features from peers or compute them again: by what either took so far.

    fetching   what the node expects of the holders × how far that was off lately, here at the end that waits
    computing  rows × layers below the cut × seconds for one row and layer, as the last passes took

The choice stays until the other side is clearly better, so that two close estimates do not make it flap. And
since what is not done is not measured, the other side is tried now and then: whenever that would cost less
than a tenth of what was spent since it was last tried. One bad estimate is so corrected, soon if it is a
little off, later if it is far off (``docs/adr/0020``).

Pure: it is told what things took, and asks no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["FetchOrCompute", "Verdict"]

Side = Literal["fetch", "compute"]

_WEIGHT = 0.3
"""Of the newest measurement: the last five or so count."""
_CLEARLY = 0.75
_TRIAL_SHARE = 0.1
_OFF_MIN, _OFF_MAX = 0.05, 1000.0
# Of a fetch that brought nothing: it might come next time, but do not count on it.
_FAILED = 8.0
_SOME = 0.01
_FLOOR_S = 1e-3
"""Shorter than this, waiting is noise of the scheduler."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``fetch_s`` and ``compute_s`` are what was expected of either; infinite where there is no way."""

    side: Side
    fetch_s: float
    compute_s: float
    is_trial: bool = False

    @property
    def text(self) -> str:
        """For people."""
        other = "computing" if self.side == "fetch" else "fetching"
        own_s, other_s = self.fetch_s, self.compute_s
        if self.side == "compute":
            own_s, other_s = other_s, own_s
        why = " (to see how fast it is now)" if self.is_trial else ""
        if math.isinf(other_s):
            return f"about {_seconds(own_s)}{why}"
        return f"about {_seconds(own_s)}, {other} them would take {_seconds(other_s)}{why}"


class FetchOrCompute:
    """``row_layer_s``: seconds to compute one row of one layer, guessed until it is measured. ``slowdown``:
    this node plays one that computes so many times slower than what is measured.
    """

    def __init__(self, row_layer_s: float, slowdown: float = 1.0) -> None:
        assert row_layer_s > 0 and slowdown >= 1
        self.row_layer_s = row_layer_s * slowdown
        self._slowdown = slowdown
        self.n_fetches = self.n_computes = 0
        """Requests where there was a choice, by what was chosen."""
        self.verdict: Verdict | None = None
        """The newest of these."""
        self._took_s = self._expected_s = _FLOOR_S
        self._is_measured = False
        self._side: Side | None = None
        self._since_trial_s = 0.0

    @property
    def off(self) -> float:
        """Fetches take so many times what is expected of them."""
        return min(max(self._took_s / self._expected_s, _OFF_MIN), _OFF_MAX)

    def computed(self, n_rows: int, n_layers: int, took_s: float) -> None:
        """A pass over ``n_rows`` took so long."""
        if n_rows <= 0 or n_layers <= 0 or took_s <= 0:
            return
        seen = self._slowdown * took_s / (n_rows * n_layers)
        # A guess is worth nothing beside a measurement.
        weight = _WEIGHT if self._is_measured else 1.0
        self.row_layer_s += weight * (seen - self.row_layer_s)
        self._is_measured = True

    def fetched(self, expected_s: float, took_s: float, share: float = 1.0) -> None:
        """A fetch of which the node expected ``expected_s`` took so long, and brought ``share`` of it."""
        if not math.isfinite(expected_s):
            return
        expected_s, took_s = max(expected_s, _FLOOR_S), max(took_s, 0.0)
        if share > _SOME:
            took_s /= share
        else:
            took_s = max(took_s, _FAILED * self.off * expected_s)
        # Sums, not a mean of ratios: of two fetches under way together the second seems to take no time.
        self._took_s += _WEIGHT * (took_s - self._took_s)
        self._expected_s += _WEIGHT * (expected_s - self._expected_s)

    def compute_s(self, n_rows: int, n_layers: int) -> float:
        return n_rows * n_layers * self.row_layer_s

    def fetch_s(self, expected_s: float | None) -> float:
        """``expected_s``: what the node expects; ``None`` = nobody has it."""
        return math.inf if expected_s is None else self.off * max(expected_s, _FLOOR_S)

    def decide(self, fetch_s: float, compute_s: float) -> Verdict:
        """Of one request. At least one of the two is finite, or there is nothing to choose."""
        if math.isinf(fetch_s) or math.isinf(compute_s):
            return Verdict("compute" if math.isinf(fetch_s) else "fetch", fetch_s, compute_s)
        self.verdict = self._weighed({"fetch": fetch_s, "compute": compute_s})
        if self.verdict.side == "fetch":
            self.n_fetches += 1
        else:
            self.n_computes += 1
        return self.verdict

    def _weighed(self, seconds: dict[Side, float]) -> Verdict:
        side: Side = "fetch" if seconds["fetch"] <= seconds["compute"] else "compute"
        if self._side is not None and seconds[side] > _CLEARLY * seconds[self._side]:
            side = self._side
        self._side = side
        other: Side = "compute" if side == "fetch" else "fetch"
        is_trial = seconds[other] - seconds[side] < _TRIAL_SHARE * self._since_trial_s
        if is_trial:
            side, self._since_trial_s = other, 0.0
        else:
            self._since_trial_s += seconds[side]
        return Verdict(side, seconds["fetch"], seconds["compute"], is_trial)


def _seconds(s: float) -> str:
    return f"{s:.2g} s" if s < 10 else f"{s:,.0f} s"
