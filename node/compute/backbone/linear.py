"""``x @ weight.T + bias`` at the speed the memory gives, in the precision asked for.

``make_linear`` is the one way in; 8 and 4 bits are in ``node.compute.backbone.formats``.

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
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from node.compute.backbone.formats import GROUP, Int4Linear, Int8Linear, int8_kernel

__all__ = ["FloatLinear", "Linear", "compute_dtype", "make_linear", "numerics"]

# Rows the layout is made for. Measured for 1, 16, 512 and none: with 16, every row count from 1 to 512
# was at or near its best.
_ROWS_HINT = 16


class Linear(Protocol):
    """One weight matrix, ready to multiply. Shapes: ``linear(x)``: (rows, d_in) -> (rows, d_out)."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


def compute_dtype(precision: str) -> torch.dtype:
    """What rows and attention states are held in: 8- and 4-bit weights multiply float32 rows."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def make_linear(weight: Tensor, bias: Tensor | None, precision: str) -> Linear:
    """``weight`` (d_out, d_in) in ``precision``. Rows that are no multiple of 32 long get 8 bits for 4."""
    match precision:
        case "int8":
            return Int8Linear(weight, bias)
        case "int4":
            return Int4Linear(weight, bias) if weight.shape[1] % GROUP == 0 else Int8Linear(weight, bias)
        case "fp32" | "bf16" | "fp16":
            return FloatLinear(weight, bias)
        case _:
            raise AssertionError(f"no weight format {precision!r}: settings are checked before")


def numerics(precision: str, device: str) -> str:
    """What the last bits of a result depend on beside weights and rows, in words that go into keys.

    Of an 8-bit product that is nothing (see ``node.compute.backbone.formats``), but norms and attention
    add floating-point numbers in every precision, in an order of the library and the kind of processor.
    """
    kinds = {"cpu": torch.backends.cpu.get_cpu_capability, "cuda": torch.cuda.get_device_name}
    kind = kinds[device]() if device in kinds else platform.machine()
    product = f"int8 {int8_kernel()}" if precision == "int8" and device == "cpu" else precision
    return f"{product}, {device} {kind}, torch {torch.__version__}"


class FloatLinear:
    """Weights in the float type they come in.

    Shapes: weight (d_out, d_in); bias (d_out,) or ``None``; ``linear(x)``: (rows, d_in) -> (rows, d_out).
    """

    __slots__ = ("_weight", "bias", "nbytes", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.nbytes = weight.nbytes
        self.bias = bias
        self._weight: Tensor | None = weight
        self.packed: Tensor | None = None
        if _can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
            self._weight = None  # not held twice

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return product
        assert self._weight is not None
        return F.linear(x, self._weight, self.bias)


def _can_pack(weight: Tensor) -> bool:
    """x86 only: measured there. The two operations are what PyTorch's own compiler emits for CPUs."""
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bf16()))
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _has_bf16() -> bool:
    """Without the processor's own instructions oneDNN refuses to lay out bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
