"""What adapters do to the rows of one matrix, one row, one module and one rank at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from node.compute.backbone.deltas import Delta

__all__ = ["linear_by_loop"]


def linear_by_loop(weight: Tensor, x: Tensor, deltas: Sequence[Delta | None]) -> Tensor:
    """Shapes: weight (d_out, d_in), x (rows, d_in), one of ``deltas`` a row -> (rows, d_out)."""
    result = []
    for row, delta in zip(x.double(), deltas, strict=True):
        if delta is None:
            result.append(weight.double() @ row)
            continue
        y = weight.double() @ (row if delta.in_scale is None else row * delta.in_scale.double())
        at = 0
        for up in delta.ups:
            for rank in range(up.b.shape[1]):
                assert delta.a is not None
                amount = delta.a[at].double() @ row
                for out in range(up.b.shape[0]):
                    y[up.start + out] += up.b[out, rank].double() * amount
                at += 1
        for dense in delta.dense:
            y[dense.start : dense.start + len(dense.weight)] += dense.weight.double() @ row
        if delta.out_scale is not None:
            y = y * delta.out_scale.double()
        if delta.bias is not None:
            y = y + delta.bias.double()
        result.append(y)
    return torch.stack(result)
