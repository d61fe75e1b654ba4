"""Attention of new rows over states that lie in several places, without copying any of them together.

A sequence whose prompt somebody has read before sees that reader's states where they are, and its own
behind them. Softmax over two places is the two softmaxes weighted by how much of the whole each has, which
its logarithm of summed exponentials tells (as FlashAttention puts its blocks together, arXiv 2205.14135).
The same splits a prompt's piece into what it sees entirely and the triangle it sees in part: two calls of
the plain kernel cost less than one with a mask.

Heads that share a key head stand side by side as queries, so grouped attention copies no keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Place", "attend"]

Place = tuple[Tensor, Tensor]
"""Keys and values, each (kv_heads, positions, head_dim)."""

_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What PyTorch's own attention calls on a CPU; unlike that, it gives the logarithms, too."""


def attend(query: Tensor, seen: Sequence[Place], own: Place) -> Tensor:
    """Row i sees all positions ``seen`` and those of ``own`` up to its own.

    Shapes: query (n, heads, head_dim), the last n positions of the sequence; ``own`` holds those n. Only for
    one row it may hold earlier ones as well. Result (n, heads * head_dim).
    """
    n, heads, head_dim = query.shape
    kv_heads = own[0].shape[0]
    seen = [place for place in seen if place[0].shape[1]]
    grouped = query.view(n, kv_heads, heads // kv_heads, head_dim)
    if not seen and n == 1:
        query = grouped[0][None]  # (1, kv_heads, group, head_dim): the group stands in for positions
        return F.scaled_dot_product_attention(query, own[0][None], own[1][None]).reshape(1, -1)
    if not seen:
        result = F.scaled_dot_product_attention(
            grouped.permute(1, 2, 0, 3), _by_head(own[0], grouped), _by_head(own[1], grouped), is_causal=True
        )
        return result.permute(2, 0, 1, 3).reshape(n, -1)
    if _flash is None or query.device.type != "cpu":
        return _joined(grouped, [*seen, own])
    together = grouped.transpose(0, 1).reshape(1, kv_heads, -1, head_dim)
    if n == 1:
        result, weight = _flash(together, own[0][None], own[1][None])
        for keys, values in seen:
            result, weight = _merged(result, weight, *_flash(together, keys[None], values[None]))
        whole: Tensor = result.reshape(1, -1)
        return whole
    result, weight = _flash(
        grouped.permute(1, 2, 0, 3), _by_head(own[0], grouped), _by_head(own[1], grouped), 0.0, True
    )
    result, weight = result.permute(2, 0, 1, 3), weight.permute(2, 0, 1)  # (n, kv_heads, group, ...)
    for keys, values in seen:
        more, its = _flash(together, keys[None], values[None])
        more = more.view(kv_heads, n, -1, head_dim).transpose(0, 1)
        result, weight = _merged(result, weight, more, its.view(kv_heads, n, -1).transpose(0, 1))
    return result.reshape(n, -1)


def _merged(one: Tensor, its: Tensor, other: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results and the logarithms of their sums, as one."""
    share = torch.sigmoid(others - its)[..., None].to(one.dtype)
    return torch.lerp(one, other, share), torch.logaddexp(its, others)


def _by_head(states: Tensor, grouped: Tensor) -> Tensor:
    """(kv_heads, positions, head_dim) -> (kv_heads, group, positions, head_dim), the same memory."""
    kv_heads, positions, head_dim = states.shape
    return states[:, None].expand(kv_heads, grouped.shape[2], positions, head_dim)


def _joined(grouped: Tensor, places: Sequence[Place]) -> Tensor:
    """The plain way, where the kernel gives no logarithms: one copy of all states, and a mask."""
    n, kv_heads, group, head_dim = grouped.shape
    keys = torch.cat([place[0] for place in places], dim=1)
    values = torch.cat([place[1] for place in places], dim=1)
    end = keys.shape[1]
    mask = torch.ones(n, end, dtype=torch.bool, device=keys.device).tril_(end - n)
    result = F.scaled_dot_product_attention(
        grouped.permute(1, 2, 0, 3), _by_head(keys, grouped), _by_head(values, grouped), attn_mask=mask
    )
    return result.permute(2, 0, 1, 3).reshape(n, kv_heads * group * head_dim)
