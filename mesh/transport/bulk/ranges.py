"""How a blob is gathered from several holders: which range is asked of whom, and what is still missing.

Pure: ``now`` is passed in. Holders take the next range when they have finished one, so a fast one
brings more. When nothing is left to begin, an idle holder is given what another is late with, once: the
slowest holder does not decide when the blob is whole.

    missing ──begin──▶ in flight ──arrived──▶ had          every byte is in exactly one of the first two
        ▲                  │                               or had; a doubled range is in flight twice
        └──────ended───────┘ what did not arrive
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from mesh.ids import NodeId

__all__ = ["Fault", "Flight", "Gathering", "Spans"]

STRIKES_MAX = 3
"""So often may a holder break off without a byte, or be too slow, before it is not asked again. A range that
it brings whole wipes the slate."""


class Fault(Enum):
    """Why a range ended early."""

    CUT = auto()
    """The connection broke, or there was none. It may be asked again."""
    SLOW = auto()
    """It lives and brings next to nothing."""
    LIED = auto()
    """It answered what cannot be true, or has not got it: not asked again."""


class Spans:
    """A set of byte positions as sorted, disjoint, non-touching spans ``[start, stop)``."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def add(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        low = bisect_right(self._stops, start - 1)  # the first that ends at start or later
        high = bisect_right(self._starts, stop)  # past the last that begins at stop or earlier
        if low < high:
            start, stop = min(start, self._starts[low]), max(stop, self._stops[high - 1])
        self._starts[low:high], self._stops[low:high] = [start], [stop]

    def remove(self, start: int, stop: int) -> None:
        kept = [
            (a, b)
            for span in self
            for a, b in ((span[0], min(span[1], start)), (max(span[0], stop), span[1]))
        ]
        self._starts, self._stops = [], []
        for a, b in kept:
            if a < b:
                self.add(a, b)

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What of ``[start, stop)`` is not in the set."""
        gaps = []
        for a, b in self:
            if b <= start:
                continue
            if a >= stop:
                break
            if a > start:
                gaps.append((start, a))
            start = max(start, b)
        if start < stop:
            gaps.append((start, stop))
        return gaps


@dataclass(slots=True, eq=False)
class Flight:
    """One range, asked of one holder. ``reached`` is where its bytes end so far."""

    holder: NodeId
    start: int
    stop: int
    began_at: float
    is_double: bool = False
    reached: int = field(init=False)

    def __post_init__(self) -> None:
        self.reached = self.start

    @property
    def n_left(self) -> int:
        return self.stop - self.reached


class Gathering:
    """One blob of ``size`` bytes, from ``holders``, at most ``range_bytes`` in one request."""

    def __init__(
        self, size: int, holders: Iterable[NodeId], range_bytes: int, had: Spans | None = None
    ) -> None:
        """``had``: what an earlier gathering brought; it grows."""
        assert size >= 0 and range_bytes > 0
        self._size = size
        self._range_bytes = range_bytes
        self._had = had if had is not None else Spans()
        self._missing = Spans(self._had.gaps(0, size))
        self._flights: list[Flight] = []
        self._strikes = dict.fromkeys(holders, 0)
        self._out: set[NodeId] = set()
        self.sources: dict[NodeId, Spans] = {}
        """Who brought which bytes: if the digest is wrong, one of them did it."""

    @property
    def is_complete(self) -> bool:
        return len(self._had) == self._size

    @property
    def is_hopeless(self) -> bool:
        return not self.is_complete and all(holder in self._out for holder in self._strikes)

    @property
    def n_had(self) -> int:
        return len(self._had)

    def may_ask(self, holder: NodeId) -> bool:
        return holder in self._strikes and holder not in self._out

    def begin(self, holder: NodeId, now: float, patience_s: float) -> Flight | None:
        """The next range for this holder; ``None`` if there is nothing it could do now.

        A range that was begun ``patience_s`` ago or earlier is late.
        """
        if not self.may_ask(holder):
            return None
        flight = self._fresh(holder, now) or self._double(holder, now, patience_s)
        if flight is not None:
            self._flights.append(flight)
        return flight

    def news(self, flight: Flight, n_bytes: int) -> list[tuple[int, int]]:
        """Which of the next ``n_bytes`` of a flight nobody has brought yet: only they are to be written."""
        assert 0 <= n_bytes <= flight.n_left, "a holder cannot bring more than it was asked for"
        return self._had.gaps(flight.reached, flight.reached + n_bytes)

    def arrived(self, flight: Flight, n_bytes: int) -> None:
        """The next ``n_bytes`` of a flight came, and are written."""
        assert flight in self._flights, "a flight ends once"
        for start, stop in self.news(flight, n_bytes):
            self.sources.setdefault(flight.holder, Spans()).add(start, stop)
        start, flight.reached = flight.reached, flight.reached + n_bytes
        self._had.add(start, flight.reached)
        self._missing.remove(start, flight.reached)  # a failed double may have put it back

    def ended(self, flight: Flight, fault: Fault | None = None) -> None:
        """A flight is over; what it did not bring is missing again, unless another is bringing it."""
        self._flights.remove(flight)
        if fault is None:
            self._strikes[flight.holder] = 0
        elif fault is Fault.SLOW or flight.reached == flight.start:
            self._strikes[flight.holder] += 1
        if fault is Fault.LIED or self._strikes[flight.holder] >= STRIKES_MAX:
            self._out.add(flight.holder)
        for start, stop in self._had.gaps(flight.reached, flight.stop):
            others = Spans((other.reached, other.stop) for other in self._flights)
            for a, b in others.gaps(start, stop):
                self._missing.add(a, b)

    def _fresh(self, holder: NodeId, now: float) -> Flight | None:
        for start, stop in self._missing:
            flight = Flight(holder, start, min(stop, start + self._range_bytes), now)
            self._missing.remove(flight.start, flight.stop)
            return flight
        return None

    def _double(self, holder: NodeId, now: float, patience_s: float) -> Flight | None:
        doubled = [(other.start, other.stop) for other in self._flights if other.is_double]
        late = [flight for flight in self._flights if now - flight.began_at >= patience_s]
        for other in sorted(late, key=lambda flight: (flight.began_at, flight.start)):
            is_doubled = any(start < other.stop and other.reached < stop for start, stop in doubled)
            if not other.is_double and other.holder != holder and not is_doubled:
                for start, stop in self._had.gaps(other.reached, other.stop):
                    return Flight(holder, start, stop, now, is_double=True)
        return None
