"""Weights in 8 and 4 bits: a quarter and a sixth of float32's memory, products that no neighbour changes.

``Int8Linear``  one scale per output; on x86 both factors are integers (FBGEMM, which PyTorch carries)
``Int4Linear``  a scale and a zero per 32 weights of a row; half of int8's memory, slower with many rows

**Activations in two digits.** A language model's activations have a few values a hundred times the others,
and one 8-bit scale per row costs this repository's model 9 to 16 % of perplexity. So a row is written as
``s * (high + low / 126)`` with two digits of -63 to 63 each, 14 bits together; both digits go through
the weights as two rows of one product: for few rows the weights are read once either way, and for
many it is still integer arithmetic. Perplexity is that of the 8-bit weights alone. Seven bits a digit,
because AVX2 adds two products of 8-bit numbers in 16 bits, where 8-bit digits overflow.

A sum of integers is the same in every order: a row's result depends neither on the rows beside it, nor on
the number of threads, nor on the processor. The other paths, which add floating-point numbers, run blocks
of one fixed number of rows to reach the same independence of neighbours.

Which path is taken depends on the device and on a check of its arithmetic, never on a timing.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "GROUP",
    "IN_DIGITS",
    "Int4Linear",
    "Int8Linear",
    "dequantized_4",
    "int8_kernel",
    "quantized_4",
    "quantized_8",
]

GROUP = 32
"""Weights of one row that share a scale and a zero in 4 bits."""

_DIGIT = 63  # the largest magnitude of one digit
_SMALLEST = 1e-30  # scale of a row of zeros

# The low digit is 126 times the rest, which is at most half a unit of the high one; the kernel rounds its
# input as ``round`` does. TorchScript, because for one row a dozen small operations called from Python take
# half as long as the product between them (measured: 157 µs a call, 108 as script, 97 the product alone).
IN_DIGITS = """
def in_digits(x: Tensor, packed: __torch__.torch.classes.quantized.LinearPackedParamsBase) -> Tensor:
    n = x.size(0)
    scale = x.abs().amax([-1], True).mul_(0.015873015873015872).clamp_min_(1e-30)
    both = torch.empty(2 * n, x.size(1))
    high, low = both.narrow(0, 0, n), both.narrow(0, n, n)
    torch.div(x, scale, out=high)
    torch.round(high, out=low)
    torch.sub(high, low, out=low)
    low.mul_(126.0)
    products = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, 63, packed)
    return products.narrow(0, 0, n).add_(products.narrow(0, n, n), alpha=0.007936507936507936).mul_(scale)
"""

_OUTPUTS_AT_ONCE = 4096  # outputs whose weights are float32 at once: loading must not need the whole head
_ROWS_BLOCK = 16  # rows of one product where sums depend on how many there are


class Int8Linear:
    """Shapes: weight (d_out, d_in) float; bias (d_out,) or ``None``; call: (rows, d_in) -> (rows, d_out).

    Takes and gives the float type it is called with.
    """

    __slots__ = ("_scales", "_weight", "bias", "nbytes", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        codes, scales = quantized_8(weight)
        self.bias = bias
        self.packed: Any = None
        self._weight: Tensor | None = None
        self._scales = scales
        if weight.device.type == "cpu" and int8_kernel() == "fbgemm":
            self.packed = _pack(codes, scales)
        else:
            self._weight = codes
        # FBGEMM keeps the sum of each output's weights beside its scale.
        self.nbytes = codes.nbytes + 2 * scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        y = _dequantizing(x, self._codes_as, self._scales) if self.packed is None else self._digits(x)
        return y if self.bias is None else y.add_(self.bias)

    def _digits(self, x: Tensor) -> Tensor:
        y: Tensor = _in_digits()(x.float(), self.packed)
        return y.to(x.dtype)

    def _codes_as(self, dtype: torch.dtype) -> Tensor:
        assert self._weight is not None
        return self._weight.to(dtype)


class Int4Linear:
    """Shapes as ``Int8Linear``; d_in must be a multiple of ``GROUP``.

    On CPUs the kernel takes activations in bfloat16, which costs no measurable perplexity.
    """

    __slots__ = ("_codes", "_d_out", "_scales_zeros", "bias", "nbytes", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        codes, scales_zeros = quantized_4(weight)
        self.bias = bias
        self._d_out = len(weight)
        self._scales_zeros = scales_zeros
        self.packed: tuple[Tensor, Tensor] | None = None
        if weight.device.type == "cpu" and self._d_out % _ROWS_BLOCK == 0 and _has_int4():
            self._codes = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.packed = (self._codes, scales_zeros)
        else:
            codes = codes.to(torch.uint8)
            self._codes = codes[:, ::2] << 4 | codes[:, 1::2]
        self.nbytes = self._codes.nbytes + scales_zeros.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.to(torch.bfloat16), self._codes, GROUP, self._scales_zeros
            ).to(x.dtype)
        else:
            y = _dequantizing(x, self._weight_as, None)
        return y if self.bias is None else y.add_(self.bias)

    def _weight_as(self, dtype: torch.dtype) -> Tensor:
        codes = torch.stack((self._codes >> 4, self._codes & 15), dim=-1).view(self._d_out, -1)
        return dequantized_4(codes, self._scales_zeros).to(dtype)


def quantized_8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (d_out, d_in) int8 within -127 to 127, and their scales (d_out,) float32."""
    codes, scales = [], []
    for block in weight.split(_OUTPUTS_AT_ONCE):
        block = block.float()
        scale = (block.abs().amax(1) / 127).clamp_min(_SMALLEST)
        codes.append((block / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def quantized_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (d_out, d_in) int32 of 0 to 15, and (d_in / GROUP, d_out, 2) scale and zero in bfloat16.

    Scale and zero are rounded to their stored type first, and the codes are made with those.
    """
    d_out, d_in = weight.shape
    assert d_in % GROUP == 0, f"4-bit weights come in groups of {GROUP}, got rows of {d_in}"
    groups = weight.float().view(d_out, d_in // GROUP, GROUP)
    least, most = groups.amin(-1), groups.amax(-1)
    scales = ((most - least) / 15).clamp_min(_SMALLEST).bfloat16().float()
    zeros = (least + 8 * scales).bfloat16().float()
    codes = ((groups - zeros[..., None]) / scales[..., None]).round_().add_(8).clamp_(0, 15)
    scales_zeros = torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous().bfloat16()
    return codes.view(d_out, d_in).to(torch.int32), scales_zeros


def dequantized_4(codes: Tensor, scales_zeros: Tensor) -> Tensor:
    """Shapes: as ``quantized_4`` gives them -> (d_out, d_in) float32."""
    d_out, d_in = codes.shape
    scales, zeros = scales_zeros.float().transpose(0, 1).unbind(-1)
    groups = codes.view(d_out, d_in // GROUP, GROUP).float() - 8
    return (groups * scales[..., None] + zeros[..., None]).view(d_out, d_in)


def _dequantizing(x: Tensor, weight_as: Any, scales: Tensor | None) -> Tensor:
    """The product with weights made float for this call, wherever PyTorch runs."""
    weight = weight_as(x.dtype)
    n = len(x)
    padded = F.pad(x, (0, 0, 0, -n % _ROWS_BLOCK))
    y = torch.cat([F.linear(block, weight) for block in padded.split(_ROWS_BLOCK)])[:n]
    return y if scales is None else y * scales.to(y.dtype)


@cache
def int8_kernel() -> str:
    """``fbgemm`` where it is there and its integer sums are exact, else ``dequantize``."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "dequantize"
    # Largest digits on largest weights, signs in runs: where 16-bit sums overflow, they do here.
    digits = torch.full((2, 64), float(_DIGIT))
    digits[1, ::2] *= -1
    codes = torch.full((8, 64), 127, dtype=torch.int8)
    codes[::2, ::2] = -127
    try:
        found = _PRODUCT(digits, 1.0, _DIGIT, _pack(codes, torch.ones(8)))
    except (RuntimeError, AttributeError):  # an engine that lists itself and cannot run here
        return "dequantize"
    return "fbgemm" if torch.equal(found, digits @ codes.float().T) else "dequantize"


@cache
def _has_int4() -> bool:
    """x86 only: measured there; elsewhere the operation may be a slow reference."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


@cache
def _in_digits() -> Any:
    """``in_digits`` compiled; once, and not before somebody needs it."""
    return torch.jit.CompilationUnit(IN_DIGITS).in_digits


def _pack(codes: Tensor, scales: Tensor) -> Any:
    with warnings.catch_warnings():
        # PyTorch means to drop quantized tensors; the packed weights made from them have no other maker.
        warnings.filterwarnings("ignore", message=".*quantized tensor", category=UserWarning)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        tensor = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        return torch.ops.quantized.linear_prepack(tensor, None)
    finally:
        torch.backends.quantized.engine = before


# Quantizes its input to whole numbers (scale 1, zero point 63), multiplies, gives float32.
_PRODUCT = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
