"""What the parts of a prefix are called across nodes, and which there are.

A part is one block of 64 tokens: the attention states of a group of layers, or the rows entering a cut. A
name holds all that the numbers depend on (``node.compute.features.key``); never an adapter, because only what
lies below an adapter's first layer is published at all.

``numerics`` are those of serving: the kernels, the kind of processor, the library. Rows of answers and
prompts share passes of every shape, and in floating point their last bits differ by the company they had, as
they do between two answers of one node. So the name promises the same arithmetic, not the same order of
additions, and differs from the name of feature maps, which are made in passes of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from node.compute.backbone.llama import LlamaBackbone
from node.compute.features.entry import EXACT, Header, Layout
from node.compute.features.key import BLOCK_TOKENS, FeatureSpace
from node.compute.features.kv import GROUP_BYTES_MAX, layer_groups, row_width

__all__ = ["CODEC", "Part", "PrefixKeys"]

# Exact. Eight bits would be a quarter of the bytes, and an answer other than the one read here.
CODEC = "raw"


@dataclass(frozen=True, slots=True)
class Part:
    """One entry: ``block`` in the layers of ``group``; ``None``: the rows entering ``cut``."""

    key: bytes
    block: int
    group: range | None
    cut: int

    @property
    def start(self) -> int:
        """Its first position."""
        return self.block * BLOCK_TOKENS


class PrefixKeys:
    """Names for one backbone; ``group_bytes_max`` is for tests with models of a few kilobytes."""

    def __init__(
        self,
        backbone: LlamaBackbone,
        *,
        backbone_digest: str,
        tokenizer_digest: str,
        group_bytes_max: int = GROUP_BYTES_MAX,
    ) -> None:
        self.n_layers, self.width = backbone.n_layers, backbone.width
        self.layer_width = row_width(backbone.states(1))
        layer_bytes = BLOCK_TOKENS * self.layer_width * torch.float32.itemsize
        self.groups = layer_groups(backbone.n_layers, layer_bytes, group_bytes_max)
        self._common = (backbone_digest, backbone.precision, tokenizer_digest)
        self._numerics = f"{backbone.numerics}, served"

    def level(self, cut: int) -> int:
        """The highest layer at or below ``cut`` where a group begins, or the top."""
        bounds = [*(group.start for group in self.groups), self.n_layers]
        return max(bound for bound in bounds if bound <= cut)

    def below(self, level: int) -> list[range]:
        return [group for group in self.groups if group.stop <= level]

    def parts(self, what: range | int, ids: Sequence[int]) -> list[Part]:
        """Of each whole block of ``ids``; ``what``: a group, or a cut below the top."""
        digest, precision, tokenizer = self._common
        group = what if isinstance(what, range) else None
        cut, until = (what.start, what.stop) if isinstance(what, range) else (what, 0)
        space = FeatureSpace(
            digest, precision, tokenizer, cut, "kv" if group else "hidden", self._numerics, CODEC, until
        )
        whole = ids[: len(ids) // BLOCK_TOKENS * BLOCK_TOKENS]
        return [Part(key, at, group, cut) for at, key in enumerate(space.keys(whole))]

    def width_of(self, part: Part) -> int:
        return self.width if part.group is None else len(part.group) * self.layer_width

    def bytes_of(self, part: Part) -> int:
        return Layout.of(Header(CODEC, BLOCK_TOKENS, self.width_of(part), BLOCK_TOKENS, EXACT)).end
