"""Attention states as entries of the feature cache: 64 tokens in a group of consecutive layers.

All layers of a block are megabytes (SmolLM2: 2.9 MB), one layer is a tenth of one, so a few layers go
together. Groups are counted from the top, in powers of two, since that is how adapters are cut: who changes
the top 4, 8 or 16 layers begins where a group begins. Where the groups lie follows from the shape of the
model alone; nodes need not agree on it.

An entry has a row for each token, of its layers' keys and values one after another, in float32 whatever
the backbone computes in: that is exact for every type there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mesh.errors import DecodeError
from mesh.units import KIB
from node.compute.backbone.contract import KeyValues
from node.compute.features.codec import CODECS
from node.compute.features.entry import Encoded
from node.compute.features.key import BLOCK_TOKENS

__all__ = ["GROUP_BYTES_MAX", "decoded", "fill", "layer_groups", "packed_states", "row_width"]

# Large enough that what each block costs beside its bytes (a digest, a frame, a key) does not count, small
# enough that the first layers can begin long before the last have come.
GROUP_BYTES_MAX = 512 * KIB


def layer_groups(n_layers: int, layer_bytes: int, bytes_max: int = GROUP_BYTES_MAX) -> tuple[range, ...]:
    """The layers of each group, from the first layer on; ``layer_bytes``: a block's in one layer."""
    size = 1
    while 2 * size * layer_bytes <= bytes_max and size < n_layers:
        size *= 2
    bounds = [*range(n_layers, 0, -size), 0][::-1]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def row_width(states: KeyValues) -> int:
    """Numbers that one token leaves in one layer."""
    keys = states.keys[0]
    return int(2 * keys.shape[0] * keys.shape[2])


@torch.no_grad()  # type: ignore[untyped-decorator]
def packed_states(states: KeyValues, layers: range, start: int) -> Tensor:
    """A copy of the states of positions ``start`` to ``start + BLOCK_TOKENS``.

    Shapes: (BLOCK_TOKENS, len(layers) * 2 * kv_heads * head_dim) float32.
    """
    kv_heads, _, head_dim = states.keys[0].shape
    rows = torch.empty(BLOCK_TOKENS, len(layers), 2, kv_heads, head_dim)
    for at, layer in enumerate(layers):
        for here, keys, values in _spans(states, layer, start, start + BLOCK_TOKENS):
            n = keys.shape[1]
            rows[here : here + n, at, 0] = keys.transpose(0, 1)
            rows[here : here + n, at, 1] = values.transpose(0, 1)
    return rows.view(BLOCK_TOKENS, -1)


def _spans(states: KeyValues, layer: int, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Where the positions ``start`` to ``stop`` are, each with how far behind ``start`` it begins."""
    begins = 0
    for keys, values in states.seen(layer, stop):
        ends = begins + keys.shape[1]
        if ends > start:
            skip = max(0, start - begins)
            yield begins + skip - start, keys[:, skip:], values[:, skip:]
        begins = ends


def decoded(encoded: Encoded, codec: str, width: int) -> Tensor:
    """Shapes: (BLOCK_TOKENS, width) float32.

    Raises:
        DecodeError: It is not a whole block of this shape and codec.
    """
    if (encoded.codec, encoded.n, encoded.d) != (codec, BLOCK_TOKENS, width):
        raise DecodeError(
            f"a block of {encoded.n} x {encoded.d} in {encoded.codec} "
            f"instead of {BLOCK_TOKENS} x {width} in {codec}"
        )
    return CODECS[codec].decode(encoded, width)


@torch.no_grad()  # type: ignore[untyped-decorator]
def fill(states: KeyValues, layers: range, start: int, rows: Tensor) -> None:
    """Put ``packed_states`` back. Moving ``length`` is the caller's, once all layers have theirs."""
    kv_heads, _, head_dim = states.keys[0].shape
    shaped = rows.view(len(rows), len(layers), 2, kv_heads, head_dim)
    for at, layer in enumerate(layers):
        states.append(layer, start, shaped[:, at, 0].transpose(0, 1), shaped[:, at, 1].transpose(0, 1))
