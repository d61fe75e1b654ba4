"""What adapters add to a frozen layer, for rows that belong to different adapters in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["Adapter", "AdapterRows", "Slot"]

Slot = Literal["qkv", "out", "gate_up", "down", "head"]
"""The stacked matrices of a block, as ``node.compute.backbone.llama`` has them, and the output head."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, ready to be applied to any rows."""

    name: str
    first_layer: int
    """Its cut: no layer below is changed."""
    n_bytes: int
    deltas: Mapping[tuple[int, Slot], object] = field(default_factory=dict)


class AdapterRows:
    """Which rows of one pass belong to which adapter."""

    @classmethod
    def of(cls, parts: Sequence[tuple[Adapter | None, int]]) -> AdapterRows | None:
        """``parts``: adapter and number of rows, segment by segment; ``None`` if nobody has one."""
        if all(adapter is None for adapter, _ in parts):
            return None
        raise AssertionError("adapters are not served yet")

    def linear(self, layer: int, slot: Slot, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``base(x)`` with every row's own adapter applied. Shapes: (rows, d_in) -> (rows, d_out)."""
        return base(x)
