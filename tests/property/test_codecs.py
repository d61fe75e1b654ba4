"""Feature codecs on whatever may come: the certificate holds, bytes are stable, damage is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mesh.errors import DecodeError
from node.compute.features.codec import CODECS, _outliers
from node.compute.features.entry import HEADER_BYTES, Encoded
from tests.reference.quantization import by_table, outlier_channels

QUANTIZED = ("int8", "int4")
SHAPES = st.tuples(st.integers(0, 40), st.sampled_from([1, 3, 8, 63, 64, 65, 130, 192, 576]))


@st.composite
def features(draw: Any) -> Tensor:
    """Rows as they come out of models, and rows as they hopefully never do."""
    n, d = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(n, d, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 37.0]))
    for kind in draw(
        st.lists(st.sampled_from(["sink", "row", "channel", "constant", "tiny", "huge", "zero"]))
    ):
        row = draw(st.integers(0, max(n - 1, 0)))
        channel = draw(st.integers(0, d - 1))
        if n and kind == "sink":
            x[0] *= 1000
        elif n and kind == "row":
            x[row] *= 1000
        elif kind == "channel":
            x[:, channel] *= 300
        elif n and kind == "constant":
            x[row] = draw(st.floats(-1e4, 1e4, width=32))
        elif n and kind == "tiny":
            x[row] = torch.randn(d, generator=generator) * 1e-41  # denormal
        elif n and kind == "huge":
            x[row, channel] = draw(st.sampled_from([3e38, -3e38, 65504.0, 1e20, 60_001.0]))
        elif n and kind == "zero":
            x[row] = 0
    return x.clamp(-3.4e38, 3.4e38)


@given(x=features(), codec=st.sampled_from(list(CODECS)), has_sink=st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_comes_back_is_within_the_certificate(x: Tensor, codec: str, has_sink: bool) -> None:
    encoded = CODECS[codec].encode(x, has_sink=has_sink)
    y = CODECS[codec].decode(encoded, x.shape[1])
    assert y.shape == x.shape and bool(torch.isfinite(y).all())
    if not len(x):
        return
    errors = (x.double() - y.double()).abs()
    assert float(errors.max()) <= encoded.certificate.max_error
    lengths = x.double().norm(dim=1)
    relative = torch.where(lengths > 0, errors.norm(dim=1) / lengths.clamp_min(1e-300), 0.0)
    quantized = relative[1:] if has_sink else relative
    if codec == "raw":
        assert torch.equal(x, y)
    elif len(quantized):
        # Rows kept raw are exact; the certificate is of the others, so it holds for all.
        assert float(relative.mean()) <= encoded.certificate.relative_mean
    if has_sink:
        assert torch.equal(x[0], y[0])


@given(x=features(), codec=st.sampled_from(list(CODECS)))
@settings(max_examples=50, deadline=None)
def test_the_same_rows_give_the_same_bytes_and_bytes_the_same_rows(x: Tensor, codec: str) -> None:
    first, second = CODECS[codec].encode(x), CODECS[codec].encode(x.clone())
    assert bytes(first.payload) == bytes(second.payload)
    read = Encoded.read(bytes(first.payload))
    assert (read.codec, read.n, read.d, read.certificate) == (codec, *x.shape, first.certificate)
    out = torch.full_like(x, 7.0)
    assert CODECS[codec].decode(read, x.shape[1], out) is out
    assert torch.equal(out, CODECS[codec].decode(first, x.shape[1]))


@given(
    x=features(),
    codec=st.sampled_from(list(CODECS)),
    where=st.integers(0, HEADER_BYTES * 8 - 1),
    cut=st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_a_damaged_header_or_length_is_refused(x: Tensor, codec: str, where: int, cut: int) -> None:
    payload = bytes(CODECS[codec].encode(x).payload)
    flipped = bytearray(payload)
    flipped[where // 8] ^= 1 << where % 8
    for damaged in (bytes(flipped), payload[: max(0, len(payload) - cut)], payload + bytes(cut)):
        with pytest.raises(DecodeError):
            Encoded.read(damaged)
        with pytest.raises(DecodeError):
            CODECS[codec].decode(Encoded(codec, *x.shape, None, damaged), x.shape[1])  # type: ignore[arg-type]


@given(junk=st.binary(max_size=300))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(DecodeError):
        Encoded.read(junk)


@given(x=features(), codec=st.sampled_from(QUANTIZED), at=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_damaged_numbers_decode_to_rows_or_are_refused_and_nothing_else(
    x: Tensor, codec: str, at: int, bit: int
) -> None:
    """The digest of the store is what notices; the codec must not fail in any third way."""
    payload = bytearray(CODECS[codec].encode(x).payload)
    if len(payload) == HEADER_BYTES:
        return
    payload[HEADER_BYTES + at % (len(payload) - HEADER_BYTES)] ^= 1 << bit
    try:
        y = CODECS[codec].decode(Encoded.read(payload), x.shape[1])
    except DecodeError:
        return
    assert y.shape == x.shape


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(codec: str, bad: float) -> None:
    for row in (0, 2):
        x = torch.ones(3, 64)
        x[row, 5] = bad
        with pytest.raises(ValueError, match="wider precision"):
            CODECS[codec].encode(x)


def chosen_outliers(x: Tensor) -> list[int]:
    """Those the codec takes: as energetic as the reference's, which may break a tie by rounding otherwise."""
    n = min(8, x.shape[1])
    energy = x.double().square().sum(0)
    found: list[int] = _outliers(x, n).tolist()
    least = min(float(energy[at]) for at in outlier_channels(x.tolist(), n))
    assert all(float(energy[at]) >= least * (1 - 1e-5) for at in found)
    return found


@given(x=features(), codec=st.sampled_from(QUANTIZED))
@settings(max_examples=15, deadline=None)
def test_the_codes_are_as_good_as_the_nearest_entries_of_a_table(x: Tensor, codec: str) -> None:
    n, d = x[:6].shape
    x = x[:6].clamp(-5e4 / d**0.5, 5e4 / d**0.5)
    lengths = x.norm(dim=1)
    x[lengths < 2e-3] = 0.5  # no row is kept raw but the first
    y = CODECS[codec].decode(CODECS[codec].encode(x), d)
    if n < 2:
        assert torch.equal(x, y)
        return
    rows, bits = x[1:].tolist(), int(codec[3:])
    channels = chosen_outliers(x[1:]) if codec == "int4" else []
    for row, decoded in zip(rows, y[1:].tolist(), strict=True):
        kept = [0.0 if at in channels else number for at, number in enumerate(row)]
        for start in range(0, d, 64):
            group = kept[start : start + 64]
            filled = group + [group[-1]] * (64 - len(group))
            for at, best in enumerate(by_table(filled, bits)[: len(group)], start):
                if at in channels:
                    assert decoded[at] == float(torch.tensor(row[at]).half())
                else:
                    # At the middle between two entries the last bit of a product may decide either way.
                    slack = 1e-6 * (abs(row[at]) + max(map(abs, filled)))
                    assert abs(decoded[at] - row[at]) <= abs(best - row[at]) + slack
