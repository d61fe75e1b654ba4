"""LoRA on a frozen linear layer as one operation in each direction.

PEFT's own forward scales and adds in operations of their own, which autograd repeats on the way back: four
passes over rows that the matrix products can do on the side. Only plain LoRA is taken over; whatever else
PEFT has wrapped (DoRA, activated LoRA, other methods) is called as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

__all__ = ["call"]


def call(module: Any, x: Tensor, **arguments: object) -> Tensor:
    """``module(x)``, by the short way where it is plain LoRA. Shapes: (rows, d_in) -> (rows, d_out)."""
    if not arguments and type(module) is LoraLinear and (name := _plain(module)) is not None:
        base = module.base_layer
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        short: Tensor = _LowRank.apply(x, base.weight, base.bias, a, b, module.scaling[name])
        return short
    result: Tensor = module(x, **arguments)
    return result


def _plain(module: Any) -> str | None:
    """The name of the one adapter, if it is LoRA and nothing more."""
    active = module.active_adapters
    if (
        len(active) != 1
        or module.disable_adapters
        or module.merged
        or type(module.base_layer) is not nn.Linear
    ):
        return None
    name: str = active[0]
    is_plain = (
        name in module.lora_A
        and name not in module.lora_variant
        and not module.lora_bias[name]
        and isinstance(module.lora_dropout[name], nn.Identity)
    )
    return name if is_plain else None


class _LowRank(torch.autograd.Function):  # type: ignore[misc]
    """y = x W' + s (x A') B'. Shapes: x (n, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        (g,), (x, weight, a, b, inner) = grads, ctx.saved_tensors
        grad_inner = (g @ b).mul_(ctx.scale)
        grad_x = (g @ weight).addmm_(grad_inner, a) if ctx.needs_input_grad[0] else None
        grad_b = (g.t() @ inner).mul_(ctx.scale)
        return grad_x, None, None, grad_inner.t() @ x, grad_b, None
