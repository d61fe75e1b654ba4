"""``x @ weight.T + bias`` at the speed the memory gives.

On x86, PyTorch's own float32 product goes to MKL, which on AMD processors reads weights at a third of the
memory's speed (measured: 11 GB/s of 33 for one row, and half of that for two rows). oneDNN, which
PyTorch also carries, keeps up once the weights are laid out its way: 24 to 33 GB/s for 1 to 8 rows, and
prompts run 1.3 to 1.5 times faster as well. The layout is a private copy made at load time; the result
is ordinary float32 arithmetic in another order of additions.

Which way is taken depends on machine and type alone, never on a timing, so a node's answers do not
depend on how busy it was when it started.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Linear"]

# Rows the layout is made for. Measured for 1, 16, 512 and none: with 16, every row count from 1 to 512
# was at or near its best.
_ROWS_HINT = 16


class Linear:
    """One weight matrix, ready to multiply.

    Shapes: weight (d_out, d_in); bias (d_out,) or ``None``; ``linear(x)``: (rows, d_in) -> (rows, d_out).
    """

    __slots__ = ("_bias", "_packed", "_weight", "nbytes")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.nbytes = weight.nbytes
        self._bias = bias
        self._weight: Tensor | None = weight
        self._packed: Tensor | None = None
        if _can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
            self._weight = None  # not held twice

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
            return product
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)


def _can_pack(weight: Tensor) -> bool:
    """x86 only: measured there. The two operations are what PyTorch's own compiler emits for CPUs."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
