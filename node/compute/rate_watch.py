"""Measures the node in idle moments, and says what it found.

    kept? ──yes──▶ said with Ready, done
      │ no: guessed
      ▼
    idle for a second ──lock──▶ pieces of a few tenths of a second ──▶ measured: kept and said
      ▲                            │ work came: given up                └─ busy machine: said, not kept
      └────────────────────────────┴────────────────── again later ───────────┘

Answering never waits for it longer than for one piece. One process of a machine measures at a time: two at
once would measure each other, and the second finds what the first has kept.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import IO

from mesh.messages import NodeRates
from node.compute.rates import RatedAs, read_rates, write_rates
from node.profile import physical_cores

__all__ = ["Measure", "RateWatch", "is_busy"]

log = logging.getLogger(__name__)

Measure = Callable[[bool], Generator[None, None, NodeRates]]
"""Starts a measurement: a piece of it at each ``next``, and its rates at the end. Told whether the machine is
busy: two threads beside a busy neighbour would say more of the neighbour."""

_CALM_S = 1.0  # who just joined is asked soon; who was idle for a second is mostly idle for the next two
_LOCKED_S = 0.5
_BUSY_S_FIRST = 60.0  # the load average forgets in a minute
_BUSY_TRIES = 6  # the last an hour after the first; from then on what the work itself shows is better


def is_busy() -> bool:
    """Whether others compute on this machine: more than half of its cores over the last minute."""
    return os.getloadavg()[0] > physical_cores() / 2


class RateWatch:
    """``rates`` is the best there is. ``say`` hears of better ones, for the loop that calls ``step``.

    ``measure`` is ``None`` where there is nothing to measure. ``home``: the model's directory.
    """

    def __init__(
        self,
        rates: NodeRates,
        say: Callable[[NodeRates], None],
        *,
        home: Path | None = None,
        rated_as: RatedAs | None = None,
        measure: Measure | None = None,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[], bool] = is_busy,
    ) -> None:
        self.rates = rates
        self._say = say
        self._home = home
        self._rated_as = rated_as
        self._measure = measure
        self._clock = clock
        self._busy = busy
        self._running: Generator[None, None, NodeRates] | None = None
        self._lock: IO[str] | None = None
        self._was_busy = False
        self._n_busy = 0
        self._due_at: float | None = clock() + _CALM_S if measure is not None else None

    @property
    def due_s(self) -> float | None:
        """Seconds until ``step`` has something to do, if nothing else has; ``None`` = never."""
        return None if self._due_at is None else max(0.0, self._due_at - self._clock())

    def interrupt(self) -> None:
        """Somebody wants an answer: give up, and begin again when all is calm."""
        self._release()
        if self._due_at is not None:
            self._due_at = max(self._due_at, self._clock() + _CALM_S)

    def step(self) -> None:
        """One piece."""
        if self._running is None and not self._begin():
            return
        assert self._running is not None
        try:
            next(self._running)
            self._due_at = self._clock()
        except StopIteration as end:
            self._found(end.value)
        except Exception:
            # Too little memory, a full disk, or a fault of ours: answers matter, this does not.
            log.exception("this node could not measure itself; it goes on with what it guessed")
            self._release()
            self._due_at = None

    def _begin(self) -> bool:
        assert self._measure is not None and self._home is not None and self._rated_as is not None
        try:
            lock = (self._home / ".rates.lock").open("w")
        except OSError as error:
            log.info("this node does not measure itself: %s", error)
            self._due_at = None
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            self._due_at = self._clock() + _LOCKED_S
            return False
        self._lock = lock
        if (kept := read_rates(self._home, self._rated_as)) is not None:
            self._release()
            self._due_at = None
            self._tell(kept)
            return False
        self._was_busy = self._busy()
        self._running = self._measure(self._was_busy)
        return True

    def _found(self, rates: NodeRates) -> None:
        assert self._home is not None and self._rated_as is not None
        if self._was_busy:
            rates = replace(rates, origin="busy")
            self._due_at = self._clock() + _BUSY_S_FIRST * 2**self._n_busy
            self._n_busy += 1
            if self._n_busy >= _BUSY_TRIES:
                self._due_at = None
        else:
            write_rates(self._home, self._rated_as, rates)
            self._due_at = None
        self._release()
        self._tell(rates)

    def _tell(self, rates: NodeRates) -> None:
        self.rates = rates
        self._say(rates)

    def _release(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
