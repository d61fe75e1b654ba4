"""Frozen parts of the layers being adapted.

Linear layers are PyTorch's own. oneDNN's packed layout, which the serving pass uses, was measured for
training as well (layers of SmolLM2, AMD, two cores, forward / backward in GFLOP/s): 113 / 106 against 99 /
107 at 200 rows, 75 / 75 against 82 / 84 at 640. That is not worth two more copies of every weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Absent", "FrozenNorm", "frozen_linear"]


class Absent(nn.Module):  # type: ignore[misc]
    """Stands where a layer would be that this process does not hold, so that names keep their numbers."""

    def forward(self, *_: object, **__: object) -> Tensor:
        raise AssertionError("this layer is not loaded: rows enter above it")


def frozen_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """``nn.Linear`` over ``weight`` as it is, such as a view into a file. Shapes: weight (d_out, d_in)."""
    d_out, d_in = weight.shape
    with torch.device("meta"):  # or a weight would be allocated and filled first
        linear = nn.Linear(d_in, d_out, bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class FrozenNorm(nn.Module):  # type: ignore[misc]
    """Root-mean-square norm with one backward formula in place of six recorded operations.

    Its weight may be trained all the same: that is what LayerNorm tuning copies it for.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _Normed.apply(x, self.weight, self.variance_epsilon)
        return normed


class _Normed(torch.autograd.Function):  # type: ignore[misc]
    """y = w * x / rms(x). Shapes: x, y (rows, d); w (d,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (rows, 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,), (x, weight, scale) = grads, ctx.saved_tensors
        direction = x * scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weighted = g * weight
            along = (weighted * direction).mean(-1, keepdim=True)
            grad_x = weighted.sub_(direction * along).mul_(scale)
        if ctx.needs_input_grad[1]:
            grad_weight = (g * direction).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None
