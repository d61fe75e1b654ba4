"""Prefixes that other nodes have read: what the engine asks before it reads one itself.

    look ──▶ nobody has it ──▶ the sequence opens and reads
      └────▶ it is coming: the sequence waits, others' steps go on ──▶ it finds it in ``Prefixes``
                 └──▶ nobody else runs: it begins, and each layer waits for its states (``gate``)

Every failure ends in the sequence reading for itself; each looks once only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from node.compute.features.key import BLOCK_TOKENS
from node.compute.serve.arrivals import Arrival, Beginning, Costs, Source
from node.compute.serve.prefix_disk import PrefixDisk
from node.compute.serve.prefix_keys import PrefixKeys
from node.compute.serve.prefixes import SEEN_TOKENS_MIN, Prefixes, Reading
from node.compute.serve.publishing import Publisher
from node.compute.serve.sequences import Sequence as Tokens

__all__ = ["LateError", "Look", "SharedPrefixes"]

log = logging.getLogger(__name__)

# On their way at the same time; a sequence that finds no place reads for itself.
_ARRIVALS_MAX = 4
# Putting a block in place takes about a millisecond per 2 MB: while others wait for tokens, 2 ms of a step.
_PLACE_BYTES_BUSY, _PLACE_BYTES_IDLE = 4 << 20, 64 << 20
# With nothing else to do a step waits for blocks, and messages wait for the step.
_WAIT_S = 0.02
# Until the first prompt has been read: what 50 GFLOP/s make of a row.
_GUESSED_FLOPS = 50e9


class LateError(Exception):
    """States that a pass has begun to see do not come in time."""


@dataclass(frozen=True, slots=True)
class Look:
    """What to do with a sequence that is to open."""

    waits: bool = False
    early: Reading | None = None
    """Open it, seeing this one before it is whole."""


class SharedPrefixes:
    """``sources``: where to ask, the nearest first, by a name for the log. ``disk``: where to publish;
    ``None``: nothing is. ``row_s``: what reading a token may take, as long as none was read; ``None``:
    nobody knows. ``slowdown``: this node plays one that computes so many times slower than is measured."""

    def __init__(
        self,
        prefixes: Prefixes,
        keys: PrefixKeys,
        sources: Sequence[tuple[str, Source]],
        disk: PrefixDisk | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        row_s: float | None = None,
        slowdown: float = 1.0,
    ) -> None:
        self._prefixes, self._keys = prefixes, keys
        self._sources = tuple(sources)
        guess_s = row_s or 24 * keys.width**2 * keys.n_layers / _GUESSED_FLOPS
        self._costs = Costs(guess_s * slowdown, slowdown, clock)
        self._publisher = Publisher(keys, disk, clock) if disk is not None else None
        self._arrivals: dict[Tokens, Arrival] = {}
        self.n_fetched_tokens, self.n_fetched_bytes = 0, 0

    @property
    def has_work(self) -> bool:
        """Something is to be done even if no attempt runs."""
        return bool(self._publisher and self._publisher.has_work)

    @property
    def publisher(self) -> Publisher | None:
        return self._publisher

    def levels(self, cuts: Iterable[int]) -> set[int]:
        """Where rows are to be kept, so that others can go on from there for adapters of these ``cuts``."""
        return {self._keys.level(cut) for cut in cuts}

    # ── a sequence's life ───────────────────────────────────────────────────────────────────────────

    def look(self, sequence: Tokens, *, is_alone: bool) -> Look:
        """Before it opens, as often as it wants to."""
        arrival = self._arrivals.get(sequence)
        if arrival is None:
            begins_alike = self._begins_alike(sequence)
            if begins_alike is not None:
                # It waits in ``Prefixes.open`` for what is coming, and may look later, should nothing come.
                return Look(waits=begins_alike.reading is None)
            if not sequence.may_look or len(self._arrivals) >= _ARRIVALS_MAX:
                return Look()
            sequence.may_look = False
            begins = Beginning(sequence.ids, sequence.reads_as, sequence.reuse_max)
            arrival = Arrival(begins, self._prefixes, self._keys, self._costs, self._room_bytes)
            arrival.ask(self._sources)
            if arrival.is_over:
                return Look()
            self._arrivals[sequence] = arrival
            return Look(waits=True)
        if is_alone and arrival.has_begun(SEEN_TOKENS_MIN):
            return Look(early=arrival.reading)
        return Look(waits=True)

    def _room_bytes(self) -> int:
        """What is on its way is not counted among what is kept: at most half as much as that may be."""
        coming = sum(arrival.planned_bytes for arrival in self._arrivals.values())
        return self._prefixes.budget_bytes // 2 - coming

    def _begins_alike(self, sequence: Tokens) -> Arrival | None:
        first = sequence.ids[:BLOCK_TOKENS]
        alike = (arrival for arrival in self._arrivals.values() if arrival.ids[:BLOCK_TOKENS] == first)
        return next(alike, None)

    def opened(self, sequence: Tokens) -> None:
        """It has opened; if early, it hears whether the rest has come."""
        reading, arrival = sequence.reading, self._arrivals.get(sequence)
        if reading is not None and not reading.is_whole:
            assert arrival is not None, "only who asked begins early"
            arrival.let_begin(reading)

    def may_go_on(self, sequence: Tokens, *, is_alone: bool) -> bool:
        """``False``: its next rows go through layers that are not there, and others would wait with it."""
        reading = sequence.reading
        return reading is None or reading.is_whole or reading.n_entering > 0 or is_alone

    def gate(self, sequences: Iterable[Tokens]) -> Callable[[int], None] | None:
        """To be called before each layer of a pass over ``sequences``; ``None``: all is there.

        The result raises LateError.
        """
        for sequence in sequences:
            reading, arrival = sequence.reading, self._arrivals.get(sequence)
            if reading is not None and not reading.is_whole:
                return lambda layer, arrival=arrival: _wait(arrival, layer)  # type: ignore[misc]
        return None

    def read(self, sequence: Tokens, ids: Sequence[int]) -> None:
        """``ids`` of it have been read, and others may use them."""
        arrival = self._arrivals.get(sequence)
        if arrival is not None and arrival.is_over:
            self._ended(sequence, arrival)
        if self._publisher is not None and sequence.reading is not None:
            levels = self.levels(self._prefixes.cuts)
            self._publisher.offer(sequence.reading, ids, tuple(levels), self._costs.row_s)

    def forget(self, sequence: Tokens) -> None:
        """It has ended."""
        arrival = self._arrivals.get(sequence)
        if arrival is not None:
            arrival.close()
            self._ended(sequence, arrival)

    # ── between steps ───────────────────────────────────────────────────────────────────────────────

    def saw_pass(self, n_rows: int, took_s: float) -> None:
        """A pass over pieces of prompts took so long."""
        self._costs.saw(n_rows, took_s)

    def step(self, *, is_busy: bool) -> None:
        """Put in place what has come, and publish a little. Never waits."""
        for sequence, arrival in list(self._arrivals.items()):
            arrival.step(_PLACE_BYTES_BUSY if is_busy else _PLACE_BYTES_IDLE)
            if arrival.is_over:
                self._ended(sequence, arrival)
        if self._publisher is not None:
            self._publisher.step(is_busy=is_busy)

    def wait(self) -> None:
        """There is nothing else to do: until something comes, for a moment."""
        for arrival in self._arrivals.values():
            arrival.wait(_WAIT_S)
            return

    def _ended(self, sequence: Tokens, arrival: Arrival) -> None:
        del self._arrivals[sequence]
        self.n_fetched_tokens += arrival.n_tokens
        self.n_fetched_bytes += arrival.n_bytes
        if arrival.n_tokens and self._publisher is not None:
            self._publisher.know(key for key in arrival.keys)


def _wait(arrival: Arrival | None, layer: int) -> None:
    if arrival is None or not arrival.wait_for(layer):
        raise LateError
