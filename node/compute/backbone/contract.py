"""What the rest of the engine knows of a frozen model: segments in, rows out.

A model has layers 0 to L-1. The hidden state *entering* layer c, together with the key/value states of
the layers below c, is all that later layers ever see of the earlier ones: the feature map at cut c. An
adapter whose first adapted layer is c or higher does not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from node.compute.backbone.deltas import Adapter
from node.compute.backbone.step import Seat

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
    numerics: str
    """What the last bits of a row depend on beside weights and tokens: library, processor, format."""
    weight_bytes: int
    """What one decoding step reads."""
    held_bytes: int
    """What the weights take in memory."""

    def states(self, capacity: int) -> Any:
        """Room for ``capacity`` tokens of one sequence."""

    def forward(
        self,
        segments: Sequence[Segment],
        *,
        keep_at: Sequence[int] = (),
        before_layer: Callable[[int], None] | None = None,
    ) -> Pass:
        """One pass of all segments through all layers, each segment from its own entrance.

        ``before_layer`` is called before each layer that rows go through, and may wait until the states of
        others in it are there. If it raises, the pass has changed nothing that anybody sees.
        """

    def features(self, segments: Sequence[Segment], cut: int) -> Tensor:
        """Shapes: result (rows, d) entering layer ``cut``; layers from ``cut`` on are not computed.

        Key/value states of the layers below ``cut`` are left in the segments' states.
        """

    def logits(self, rows: Tensor, adapters: Sequence[Adapter | None] = ()) -> Tensor:
        """Shapes: rows (n, d) of a ``Pass`` -> (n, vocabulary), float32. ``adapters``: of each row."""


class KeyValues:
    """Attention states of one sequence: preallocated, filled from the front, never changed once written.

    The first ``starts[layer]`` positions of a layer may be another sequence's, seen where they are
    (``shared``); the sequence's own states follow. Whoever shares keeps the memory alive.

    Shapes:
        keys, values: of each layer (kv_heads, capacity - start, head_dim)
        shared:       of each layer ``None`` or keys and values (kv_heads, start, head_dim)
        cos, sin:     (capacity, 1, head_dim)  rotary factors of each position

    Keys are stored rotated, so a prefix may be used by another sequence at the same positions.
    ``torch.empty`` commits no memory before it is written, so room for ``max_tokens`` that never come
    costs nothing on a CPU.
    """

    __slots__ = ("cos", "keys", "length", "seat", "shared", "sin", "starts", "values")

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        shared: Sequence[tuple[Tensor, Tensor] | None] = (),
        seat: Seat | None = None,
    ) -> None:
        self.keys, self.values = keys, values
        self.cos, self.sin = cos, sin
        self.shared = shared or [None] * len(keys)
        self.starts = [0 if place is None else int(place[0].shape[1]) for place in self.shared]
        self.seat = seat
        """Where keys and values lie beside those of others; ``None``: in memory of their own."""
        self.length = 0

    @property
    def capacity(self) -> int:
        return int(self.cos.shape[0])

    def append(self, layer: int, at: int, keys: Tensor, values: Tensor) -> None:
        """Shapes: (kv_heads, n, head_dim), of positions ``at`` and following."""
        own = at - self.starts[layer]
        assert own >= 0, "states of others are never written to"
        self.keys[layer][:, own : own + keys.shape[1]] = keys
        self.values[layer][:, own : own + keys.shape[1]] = values

    def seen(self, layer: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Where the keys and values of positions 0 to ``stop`` are, in order; views, one or two."""
        start, found = self.starts[layer], []
        if (place := self.shared[layer]) is not None:
            found.append(place if stop >= start else (place[0][:, :stop], place[1][:, :stop]))
        if stop > start:
            found.append((self.keys[layer][:, : stop - start], self.values[layer][:, : stop - start]))
        return found

    def block(self, start: int, stop: int, n_layers: int) -> tuple[Tensor, Tensor]:
        """A copy of the states of positions ``start`` to ``stop`` in the first ``n_layers`` layers.

        Shapes: two of (n_layers, kv_heads, stop - start, head_dim).
        """
        assert 0 <= start <= stop <= self.capacity
        whole = [self.seen(layer, stop) for layer in range(n_layers)]
        keys = [torch.cat([place[0] for place in places], dim=1)[:, start:] for places in whole]
        values = [torch.cat([place[1] for place in places], dim=1)[:, start:] for places in whole]
        return torch.stack(keys), torch.stack(values)

    def fill(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Put ``block``s back; ``length`` is the caller's to move once every layer has its states."""
        for layer in range(len(keys)):
            self.append(layer, start, keys[layer], values[layer])
