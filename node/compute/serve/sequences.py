"""One list of tokens on its way through the model, from the first token read to the last one written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from node.compute.backbone.contract import Segment
from node.compute.backbone.deltas import Adapter
from node.compute.serve.prefixes import Prefixes, Reading

__all__ = ["Sequence"]

# Rows that join at a cut meet few weights, and beyond this many their own values leave the processor's cache
# (2,000 of them through the top 4 layers of SmolLM2: 0.95 s by 512 or 256, 1.05 s at once).
_ENTERING_ROWS_MAX = 512


class Sequence:
    """Tokens, where they are in the model, and what of them comes back.

    ``n_wanted``: of the tokens given at the start so many at the end give a row each. ``n_shared``: so many
    at the beginning may be of use to others; with ``shares_answer`` all that is written later as well.
    """

    def __init__(
        self,
        ids: list[int],
        adapter: Adapter | None,
        *,
        capacity: int,
        n_wanted: int = 1,
        n_shared: int = 0,
        shares_answer: bool = False,
    ) -> None:
        assert 0 < n_wanted <= len(ids) <= capacity
        self.ids = ids
        self.adapter = adapter
        self.capacity = capacity
        self.n_given = len(ids)
        self._wanted_from = len(ids) - n_wanted
        # An activated adapter is off before its invocation: what is read until then is everybody's.
        self._active_from = adapter.active_from(ids) if adapter is not None else 0
        if self._active_from >= len(ids):
            self.adapter, self._active_from = None, 0
        self._n_shared = min(n_shared, self._active_from) if self._active_from else n_shared
        self._shares_answer = shares_answer and not self._active_from
        self._states: Any = None
        self.reading: Reading | None = None
        self.may_look = True
        """It has not asked yet whether other nodes have read its beginning."""

    @property
    def is_open(self) -> bool:
        return self._states is not None

    @property
    def n_read(self) -> int:
        return int(self._states.length) if self.is_open else 0

    @property
    def n_left(self) -> int:
        """Tokens the model has not seen yet."""
        return len(self.ids) - self.n_read

    @property
    def is_reading(self) -> bool:
        """Not yet through what was given at the start."""
        return self.n_read < self.n_given

    @property
    def reads_as(self) -> Adapter | None:
        """Whose the states are that others may share."""
        return None if self._active_from else self.adapter

    @property
    def reuse_max(self) -> int:
        """Tokens from this one on are computed whatever is known."""
        return min(self._wanted_from, self._active_from or self._wanted_from)

    @property
    def shared_ids(self) -> list[int]:
        """Those that others may share."""
        return self.ids[: len(self.ids) if self._shares_answer else self._n_shared]

    def open(self, backbone: Any, prefixes: Prefixes | None, early: Reading | None = None) -> bool:
        """Take room in the model; ``False`` if another sequence is just reading the same beginning.

        ``early``: see ``Prefixes.open``.
        """
        if prefixes is None:
            self._states = backbone.states(self.capacity)
            return True
        self.reading = prefixes.open(
            self.ids,
            self.reads_as,
            capacity=self.capacity,
            reuse_max=self.reuse_max,
            n_shared=self._n_shared,
            early=early,
        )
        if self.reading is None:
            return False
        self._states = self.reading.states
        return True

    def close(self, prefixes: Prefixes | None) -> None:
        if prefixes is not None and self.reading is not None:
            prefixes.close(self.reading, self.shared_ids)
        self._states = self.reading = None

    def segment(self, n_rows: int, n_layers: int) -> tuple[Segment, int]:
        """What to compute next, about as much as ``n_rows`` rows through all layers; and how much that is."""
        assert n_rows > 0
        at = self.n_read
        if self.reading is not None and self.reading.n_entering:
            above = n_layers - self.reading.enters
            n = min(self.reading.n_entering, _ENTERING_ROWS_MAX, max(1, n_rows * n_layers // above))
            hidden = self.reading.take_entering(n)
            segment = Segment(
                self._states, self.ids[at : at + n], self.adapter_at(at), hidden, self.reading.enters, 0
            )
            return segment, -(-n * above // n_layers)
        stop = min(len(self.ids), at + n_rows)
        if at < self._active_from:
            stop = min(stop, self._active_from)
        n_wanted = stop - max(at, self._wanted_from) if stop > self._wanted_from else 0
        ids = self.ids[at:stop]
        return Segment(self._states, ids, self.adapter_at(at), n_wanted=n_wanted), len(ids)

    def keep(self, prefixes: Prefixes, segment: Segment, kept: Mapping[int, Tensor]) -> None:
        """After the pass: rows of ``segment`` that entered some layers."""
        at = self.n_read - len(segment.ids)
        if self.reading is not None and at < len(self.reading.ids) + self._shares_answer * self.capacity:
            prefixes.keep(self.reading, at, kept)

    def adapter_at(self, position: int) -> Adapter | None:
        """Whose the row at ``position`` is."""
        return self.adapter if position >= self._active_from else None
