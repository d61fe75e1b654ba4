"""A text whose rows come from the cache: it enters the model at a cut, above layers that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from node.compute.backbone.contract import Segment
from node.compute.serve.prefixes import Prefixes
from node.compute.serve.sequences import Sequence

__all__ = ["FedSequence"]


class FedSequence(Sequence):
    """``feed`` comes before ``open``. It shares nothing with others: what could be shared is in the cache."""

    _rows: Tensor | None = None
    _cut = 0

    def feed(self, rows: Tensor, cut: int) -> None:
        """Shapes: rows (len(ids), d), entering layer ``cut``."""
        assert len(rows) == len(self.ids), "every token has its row"
        self._rows, self._cut = rows, cut

    def open(self, backbone: Any, prefixes: Prefixes | None = None, *_: Any) -> bool:
        assert self._rows is not None, "fed before it is opened"
        self._states = backbone.states(self.capacity)
        return True

    def close(self, prefixes: Prefixes | None = None) -> None:
        self._states = self._rows = None

    def keep(self, prefixes: Prefixes, segment: Segment, kept: Mapping[int, Tensor]) -> None:
        raise AssertionError("what is below the cut was computed elsewhere")

    def segment(self, n_rows: int, n_layers: int) -> tuple[Segment, int]:
        """The next ``n_rows`` rows at most; and how many they are."""
        assert n_rows > 0 and self._rows is not None
        at = self.n_read
        stop = min(len(self.ids), at + n_rows)
        if at < self._active_from:
            stop = min(stop, self._active_from)
        n_wanted = stop - max(at, self._wanted_from) if stop > self._wanted_from else 0
        ids, rows = self.ids[at:stop], self._rows[at:stop]
        return Segment(self._states, ids, self.adapter_at(at), rows, self._cut, n_wanted), len(ids)
