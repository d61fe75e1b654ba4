"""Weights in 8 and 4 bits, held against the same arithmetic by loops and tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from node.compute.backbone import formats
from node.compute.backbone.formats import (
    GROUP,
    Int4Linear,
    Int8Linear,
    dequantized_4,
    int8_kernel,
    quantized_4,
    quantized_8,
)
from node.compute.backbone.linear import Linear, make_linear

D_OUT, D_IN = 96, 64
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
ROWS = (1, 2, 3, 15, 16, 17, 64, 300)


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(n: int, d: int = D_IN) -> Tensor:
    """As in a language model: two columns a hundred times the others, and one row a thousand times."""
    x = drawn(n, d, seed=7)
    x[:, 3] *= 100
    x[:, d - 1] *= -80
    x[n // 2] *= 1000
    return x


def relative(found: Tensor, expected: Tensor) -> float:
    """The worst row's error against that row's own size."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.fixture(params=["kernel", "anywhere"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the processor's own kernels, and as a device without them computes."""
    if request.param == "anywhere":
        monkeypatch.setattr(formats, "int8_kernel", lambda: "dequantize")
        monkeypatch.setattr(formats, "_has_int4", lambda: False)
    return str(request.param)


def test_8_bit_codes_are_the_nearest_ones() -> None:
    weight = drawn(4, 8)
    codes, scales = quantized_8(weight)
    for row in range(4):
        step = float(weight[row].abs().max()) / 127
        assert float(scales[row]) == pytest.approx(step)
        for column in range(8):
            assert int(codes[row, column]) == round(float(weight[row, column]) / step)


def test_4_bit_codes_are_the_nearest_of_sixteen_steps_of_their_group() -> None:
    weight = drawn(3, 2 * GROUP)
    codes, scales_zeros = quantized_4(weight)
    made = dequantized_4(codes, scales_zeros)
    for row in range(3):
        for group in range(2):
            scale, zero = scales_zeros[group, row].tolist()
            steps = [zero + scale * (code - 8) for code in range(16)]
            for column in range(group * GROUP, (group + 1) * GROUP):
                value = float(weight[row, column])
                nearest = min(steps, key=lambda step: abs(step - value))
                assert float(made[row, column]) == pytest.approx(nearest, abs=1e-5)


def test_an_8_bit_product_is_that_of_its_weights(path: str) -> None:
    weight, bias, x = drawn(D_OUT, D_IN), drawn(D_OUT, seed=6), activations(20)
    codes, scales = quantized_8(weight)
    expected = x.double() @ (codes.double() * scales.double()[:, None]).T + bias.double()
    found = Int8Linear(weight, bias)(x)
    assert found.dtype == torch.float32
    assert relative(found.double(), expected) < 5e-4, (
        "two digits of seven bits: steps of 1 in 7,938 of the largest"
    )


def test_a_4_bit_product_is_that_of_its_weights(path: str) -> None:
    weight, bias, x = drawn(D_OUT, D_IN), drawn(D_OUT, seed=6), activations(20)
    expected = x.double() @ dequantized_4(*quantized_4(weight)).double().T + bias.double()
    assert relative(Int4Linear(weight, bias)(x).double(), expected) < 4e-3, "activations in bfloat16"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_row_is_the_same_to_the_last_bit_whatever_rows_are_beside_it(precision: str, path: str) -> None:
    linear = make_linear(drawn(D_OUT, D_IN), None, precision)
    x = activations(max(ROWS))
    alone = torch.cat([linear(row[None]) for row in x])
    for n in ROWS:
        assert torch.equal(linear(x[:n]), alone[:n])
        assert torch.equal(linear(x[-n:]), alone[-n:])


@pytest.mark.parametrize("threads", [1, 2])
def test_8_bit_products_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    linear = Int8Linear(drawn(512, 256))
    x = activations(33, 256)
    before = torch.get_num_threads()
    expected = linear(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(linear(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_zeros_and_tiny_rows_stay_finite(precision: str) -> None:
    linear = made(precision, drawn(D_OUT, D_IN))
    x = torch.zeros(3, D_IN, dtype=dtype_of(precision))
    x[1] = 1e-37
    assert torch.equal(linear(x)[0], torch.zeros_like(linear(x)[0]))
    assert torch.isfinite(linear(x)).all()


def test_constant_weights_and_weights_of_zero_survive_4_bits() -> None:
    weight = torch.stack((torch.zeros(D_IN), torch.full((D_IN,), 0.5), torch.full((D_IN,), -3.0)))
    made_of = dequantized_4(*quantized_4(weight))
    assert torch.allclose(made_of, weight, atol=1e-6)


def test_the_integer_sums_of_this_processor_are_exact_at_the_extremes() -> None:
    """What ``int8_kernel`` checks at start-up, at the width of a real matrix."""
    if int8_kernel() != "fbgemm":
        pytest.skip("no FBGEMM on this processor: 8 bits take the path that works anywhere")
    weight = torch.full((D_OUT, 2048), 127.0)
    weight[::2, ::2] *= -1
    x = torch.full((2, 2048), 63.0)
    x[1, ::2] *= -1
    assert torch.equal(Int8Linear(weight)(x), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 5)])
def test_bytes_held_are_the_bits_and_the_scales(precision: str, bits: float) -> None:
    linear = made(precision, drawn(512, 1024))
    assert linear.nbytes == pytest.approx(512 * 1024 * bits / 8, rel=0.01)


@pytest.mark.parametrize("d_in", [40, 72])
def test_rows_that_do_not_divide_into_groups_get_8_bits(d_in: int) -> None:
    assert isinstance(make_linear(drawn(D_OUT, d_in), None, "int4"), Int8Linear)


def test_outputs_that_no_4_bit_kernel_takes_are_computed_all_the_same() -> None:
    weight, x = drawn(13, D_IN), activations(3)
    expected = x.double() @ dequantized_4(*quantized_4(weight)).double().T
    assert relative(Int4Linear(weight)(x).double(), expected) < 4e-3


def dtype_of(precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def made(precision: str, weight: Tensor) -> Linear:
    return make_linear(weight.to(dtype_of(precision)), None, precision)
