"""One pass of packed rows through the top layers, whatever PEFT has wrapped there.

Rows of all texts stand one behind another without padding, so every linear layer computes real rows only.
Attention alone needs texts side by side: texts of like length share a padded group. The last layer computes
only what is read afterwards: keys and values of all rows, everything else of the wanted rows. That is
exact, because a row that nobody reads has no gradient either.

Every submodule is *called*, so any method that wraps modules works; plain LoRA by a shorter way to the same
result (``node.compute.tune.lowrank``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from node.compute.tune.lowrank import call

__all__ = ["Layout", "TopPass"]

# Texts share a group while padding adds at most a quarter to their rows: attention is a tenth of the work
# of a layer for texts below 512 tokens, and each group costs a call in each direction.
_PADDING_MAX = 1.25


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts side by side. Queries are the wanted rows only, where they are not all."""

    n_texts: int
    n_keys: int
    n_queries: int
    mask: Tensor | None
    """(texts, 1, queries, keys), where queries are not simply all rows."""


@dataclass(frozen=True, slots=True)
class _Side:
    """Where rows stand in the padded groups. ``places`` (rows,): distinct, one for each row."""

    places: Tensor | None
    """``None``: there is no padding and the order is the same."""
    n_padded: int


class Layout:
    """How the rows of some texts are packed, computed once for a piece and used in every layer.

    ``lengths``: rows of each text, in the order of the rows. ``wanted``: of each text, the positions whose
    output is read, ascending. ``active_from``: of each text, the first position an activated adapter
    changes (``None``: methods that change all).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        wanted: Sequence[Sequence[int]],
        active_from: Sequence[int] | None = None,
    ) -> None:
        assert len(lengths) == len(wanted) > 0 and all(map(len, wanted)), "every text has a row to read"
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.n_rows = starts[-1]
        self.positions = torch.cat([torch.arange(length) for length in lengths])
        self.wanted = torch.tensor(
            [start + at for start, positions in zip(starts, wanted, strict=False) for at in positions]
        )
        self.wants_all = len(self.wanted) == self.n_rows
        order = sorted(range(len(lengths)), key=lambda text: (lengths[text], text))
        members = _grouped(order, lengths)
        self.all_groups, self.all_side = _groups(members, lengths, [range(n) for n in lengths], is_all=True)
        self.last_groups, self.last_side = _groups(members, lengths, wanted, is_all=False)
        self.active: list[int | None] | None = None
        if active_from is not None:
            # PEFT's activated LoRA counts from the end; a row alone is its own end.
            self.active = [
                1 if at >= first else None
                for first, length in zip(active_from, lengths, strict=True)
                for at in range(length)
            ]


class TopPass:
    """The pass through ``model``, a ``load_top`` with or without PEFT's wrapping, from layer ``cut`` on."""

    def __init__(self, model: nn.Module, cut: int) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config
        self._base = base
        self._body = base.model
        self._cut = cut
        self._n_layers: int = config.num_hidden_layers
        self._head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    def rows(self, x: Tensor, layout: Layout) -> Tensor:
        """Shapes: x (rows, d) entering the cut -> (wanted, d) after the final norm."""
        rotary = self._rotary(x, layout)
        for index in range(self._cut, self._n_layers):
            x = self._layer(index, x, layout, rotary, is_last=index == self._n_layers - 1)
        normed: Tensor = self._body.norm(x)
        return normed

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def between(self, x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
        """Shapes: x (rows, d) entering layer ``start`` -> (rows, d) entering layer ``stop``."""
        rotary = self._rotary(x, layout)
        for index in range(start, stop):
            x = self._layer(index, x, layout, rotary, is_last=False)
        return x

    def logits(self, rows: Tensor) -> Tensor:
        """Shapes: (wanted, d) -> (wanted, labels) or (wanted, vocabulary)."""
        head = self._base.score if hasattr(self._base, "score") else self._base.lm_head
        logits: Tensor = head(rows)
        return logits

    def _rotary(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Shapes: two of (rows, 1, head_dim)."""
        cos, sin = self._body.rotary_emb(x, layout.positions[None])
        sin = sin[0][:, None]
        # Half of what turns is negated; the sign is kept in the table instead.
        half = sin.shape[-1] // 2
        return cos[0][:, None], torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)

    def _layer(
        self, index: int, x: Tensor, layout: Layout, rotary: tuple[Tensor, Tensor], *, is_last: bool
    ) -> Tensor:
        layer = self._body.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        is_pruned = is_last and not layout.wants_all
        of_all = {} if layout.active is None else {"alora_offsets": layout.active}
        of_read = of_all
        (cos, sin), head_dim = rotary, self._head_dim
        normed = layer.input_layernorm(x)
        k = _rotated(call(attention.k_proj, normed, **of_all).unflatten(-1, (-1, head_dim)), cos, sin)
        v = call(attention.v_proj, normed, **of_all).unflatten(-1, (-1, head_dim))
        if is_pruned:
            x, normed, cos, sin = (part[layout.wanted] for part in (x, normed, cos, sin))
            if layout.active is not None:
                of_read = {"alora_offsets": [layout.active[at] for at in layout.wanted.tolist()]}
        q = _rotated(call(attention.q_proj, normed, **of_read).unflatten(-1, (-1, head_dim)), cos, sin)
        attended = _attended(q, k, v, layout, is_pruned=is_pruned)
        x = x + call(attention.o_proj, attended, **of_read)
        normed = layer.post_attention_layernorm(x)
        gate, up = call(mlp.gate_proj, normed, **of_read), call(mlp.up_proj, normed, **of_read)
        result: Tensor = x + call(mlp.down_proj, F.silu(gate) * up, **of_read)
        return result


def _attended(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, is_pruned: bool) -> Tensor:
    """Causal attention within each text.

    Shapes: q (queries, heads, head_dim); k, v (rows, kv_heads, head_dim) -> (queries, heads * head_dim).
    """
    groups = layout.last_groups if is_pruned else layout.all_groups
    query_side = layout.last_side if is_pruned else layout.all_side
    areas_q = [group.n_texts * group.n_queries for group in groups]
    areas_k = [group.n_texts * group.n_keys for group in groups]
    parts = zip(
        groups,
        _spread(q, query_side).split(areas_q),
        _spread(k, layout.all_side).split(areas_k),
        _spread(v, layout.all_side).split(areas_k),
        strict=True,
    )
    results = []
    for group, query, key, value in parts:
        attended = F.scaled_dot_product_attention(
            query.unflatten(0, (group.n_texts, -1)).transpose(1, 2),  # (texts, heads, queries, head_dim)
            key.unflatten(0, (group.n_texts, -1)).transpose(1, 2),
            value.unflatten(0, (group.n_texts, -1)).transpose(1, 2),
            attn_mask=group.mask,
            is_causal=group.mask is None,
            enable_gqa=True,
        )
        results.append(attended.transpose(1, 2).flatten(0, 1))
    together = results[0] if len(results) == 1 else torch.cat(results)
    return _collected(together, query_side).flatten(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as ``transformers`` applies them. Shapes: x (rows, heads, head_dim)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def _grouped(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """``order`` (shortest first) cut into groups whose padding stays below ``_PADDING_MAX``."""
    groups: list[list[int]] = []
    n_real = 0
    for text in order:
        length = lengths[text]
        if groups and (len(groups[-1]) + 1) * length <= _PADDING_MAX * (n_real + length):
            groups[-1].append(text)
            n_real += length
        else:
            groups.append([text])
            n_real = length
    return groups


def _groups(
    members: list[list[int]],
    lengths: Sequence[int],
    queries: Sequence[Sequence[int]],
    *,
    is_all: bool,
) -> tuple[list[_Group], _Side]:
    """The groups, and where each query stands in them. ``queries``: positions, of each text."""
    groups: list[_Group] = []
    places_of: dict[int, range] = {}
    n_padded = 0
    for texts in members:
        n_keys = max(lengths[text] for text in texts)
        n_queries = max(len(queries[text]) for text in texts)
        mask = None
        if not is_all:
            # Padding asks about the first key only; nobody reads what it hears.
            sees = torch.zeros(len(texts), n_queries, dtype=torch.long)
            for at, text in enumerate(texts):
                sees[at, : len(queries[text])] = torch.tensor(list(queries[text]))
            mask = (torch.arange(n_keys) <= sees[:, :, None])[:, None]
        groups.append(_Group(len(texts), n_keys, n_queries, mask))
        for at, text in enumerate(texts):
            start = n_padded + at * n_queries
            places_of[text] = range(start, start + len(queries[text]))
        n_padded += len(texts) * n_queries
    places = [place for text in range(len(lengths)) for place in places_of[text]]
    is_same = places == list(range(n_padded))
    return groups, _Side(None if is_same else torch.tensor(places), n_padded)


def _spread(x: Tensor, side: _Side) -> Tensor:
    """Rows to their places, zeros elsewhere. Shapes: (rows, …) -> (padded, …)."""
    if side.places is None:
        return x
    spread: Tensor = _Spread.apply(x, side.places, side.n_padded)
    return spread


def _collected(x: Tensor, side: _Side) -> Tensor:
    """Rows from their places. Shapes: (padded, …) -> (rows, …)."""
    if side.places is None:
        return x
    collected: Tensor = _Collected.apply(x, side.places)
    return collected


class _Spread(torch.autograd.Function):  # type: ignore[misc]
    """Places are distinct, so each direction is a copy and no addition: the same bits every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, n_padded: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(n_padded, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _Collected(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.n_padded = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        g = grads[0]
        return g.new_zeros(ctx.n_padded, *g.shape[1:]).index_copy_(0, places, g), None
