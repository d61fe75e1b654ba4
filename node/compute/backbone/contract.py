"""What the rest of the engine knows of a frozen model: segments in, rows out.

A model has layers 0 to L-1. The hidden state *entering* layer c, together with the key/value states of
the layers below c, is all that later layers ever see of the earlier ones: the feature map at cut c. An
adapter whose first adapted layer is c or higher does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from node.compute.backbone.deltas import Adapter

__all__ = ["Backbone", "KeyValues", "Pass", "Segment"]


@dataclass(frozen=True, slots=True)
class Segment:
    """``ids`` go on from where ``states`` end; the pass leaves them there, that many tokens longer."""

    states: Any
    """What the sequence has left in the model; ``KeyValues`` where the backbone has layers of its own."""
    ids: Sequence[int]
    adapter: Adapter | None = None
    hidden: Tensor | None = None
    """(len(ids), d) entering layer ``enters``, instead of the embeddings of ``ids``. The key/value states of
    the layers below are in ``states`` already."""
    enters: int = 0
    n_wanted: int = 1
    """How many of the last rows come back, 0 to len(ids)."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass gives. Rows are in the order of the segments."""

    rows: Tensor
    """(sum of n_wanted, d): the wanted rows after the final norm, ready for ``Backbone.logits``."""
    kept: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> (rows that were below it, d) entering that layer, for every layer in ``keep_at``."""


class Backbone(Protocol):
    """What the engine needs of a model."""

    context_tokens: int
    device: str
    n_layers: int
    width: int
    """d: numbers in one row."""
    precision: str
    weight_bytes: int
    """What one decoding step reads."""

    def states(self, capacity: int) -> Any:
        """Room for ``capacity`` tokens of one sequence."""

    def forward(self, segments: Sequence[Segment], *, keep_at: Sequence[int] = ()) -> Pass:
        """One pass of all segments through all layers, each segment from its own entrance."""

    def features(self, segments: Sequence[Segment], cut: int) -> Tensor:
        """Shapes: result (rows, d) entering layer ``cut``; layers from ``cut`` on are not computed.

        Key/value states of the layers below ``cut`` are left in the segments' states.
        """

    def logits(self, rows: Tensor, adapters: Sequence[Adapter | None] = ()) -> Tensor:
        """Shapes: rows (n, d) of a ``Pass`` -> (n, vocabulary), float32. ``adapters``: of each row."""


class KeyValues:
    """Attention states of one sequence: preallocated, filled from the front.

    Shapes:
        keys, values: (layers, kv_heads, capacity, head_dim)
        cos, sin:     (capacity, 1, head_dim)  rotary factors of each position

    Keys are stored rotated, so a prefix may be copied into another sequence at the same positions.
    ``torch.empty`` commits no memory before it is written, so room for ``max_tokens`` that never come
    costs nothing on a CPU.
    """

    __slots__ = ("cos", "keys", "length", "sin", "values")

    def __init__(self, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor) -> None:
        self.keys, self.values = keys, values
        self.cos, self.sin = cos, sin
        self.length = 0

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    def block(self, start: int, stop: int, n_layers: int) -> tuple[Tensor, Tensor]:
        """A copy of the states of positions ``start`` to ``stop`` in the first ``n_layers`` layers.

        Shapes: two of (n_layers, kv_heads, stop - start, head_dim).
        """
        assert 0 <= start <= stop <= self.capacity
        return self.keys[:n_layers, :, start:stop].clone(), self.values[:n_layers, :, start:stop].clone()

    def fill(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Put ``block``s back; ``length`` is the caller's to move once every layer has its states."""
        n_layers, _, n, _ = keys.shape
        self.keys[:n_layers, :, start : start + n] = keys
        self.values[:n_layers, :, start : start + n] = values
