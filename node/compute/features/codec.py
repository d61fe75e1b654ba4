"""Rows of features as bytes, and back, with a certificate of what that cost.

A layer's input cannot be rounded by one scale per tensor: the first token of a text (the attention sink)
is 100 to 1000 times as long as the others, and a few channels dominate every row. So the first row stays
raw, and every 64 numbers of the others have a minimum and a scale of their own:

    raw    32 bits a number, exact
    int8   8 bits, and 16 + 16 for each group of 64: 8.5 in all
    int4   4 bits, groups as above, and 8 outlier channels of the entry in 16 bits: 4.72 at d = 576

Minimum and scale are rounded to 16 bits *first* (outwards), then the codes are computed with the rounded
ones. Half a scale is therefore a true bound of every number's error, known without decoding anything, and
the certificate is made of these bounds. (Measured errors are about 0.58 of them, as rounding errors are
spread evenly.)

Only additions, multiplications and casts of whole blocks are used, each rounded as IEEE 754 says: an entry
decodes to the same bits on every machine.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mesh.errors import ConfigError, DecodeError
from node.compute.features.entry import (
    CODE_BITS,
    EXACT,
    GROUP,
    HEADER_BYTES,
    ROWS_MAX,
    WIDTH_MAX,
    Certificate,
    Encoded,
    Header,
    Layout,
)

__all__ = ["CODECS", "Choice", "Codec", "choose_codec"]

# A row longer than this may have numbers that do not fit a 16-bit float; one shorter than that (in a model:
# none, or zeros) would have scales below the finest step of one. Both stay raw.
_LONGEST, _SHORTEST = 60_000.0, 1e-3
# Rows worked on at once: scratch of 2.4 MB at d = 576 stays in the cache from one operation to the next,
# while the price of starting an operation is paid rarely.
_CHUNK_ROWS = 1024
# What arithmetic in float32 adds to half a scale, as a share of the largest number in the group.
_FLOAT_SLACK = 2.0**-21
# ... and what 32-bit sums over a row may be off, as a share.
_SUM_SLACK = 2.0**-14
_HALF_STEP = 2.0**-11  # rounding to 16 bits moves a number by at most this share of it ...
_HALF_TINY = 2.0**-24  # ... or by less than this, where 16 bits are subnormal


class Codec(Protocol):
    """One way to write rows down. Stateless; the same rows give the same bytes."""

    @property
    def name(self) -> str: ...

    def encode(self, x: Tensor, *, has_sink: bool = True) -> Encoded:
        """Shapes: x (n, d) float32. ``has_sink``: row 0 is the first token of a text and stays raw.

        Raises:
            ValueError: A number is not finite, or the shape is none of ours.
        """

    def decode(self, encoded: Encoded, d: int, out: Tensor | None = None) -> Tensor:
        """Shapes: (n, d) float32, written into ``out`` where given.

        Raises:
            DecodeError: The entry is damaged, of another codec, or of another width than ``d``.
        """


class _Raw:
    name = "raw"

    def encode(self, x: Tensor, *, has_sink: bool = True) -> Encoded:
        x = _checked(x)
        n, d = x.shape
        if n and not bool(torch.isfinite(torch.stack(x.aminmax())).all()):
            raise ValueError(_NOT_FINITE)
        header = Header(self.name, n, d, n, EXACT)
        payload = bytearray(Layout.of(header).end)
        payload[: len(header.write())] = header.write()
        _view(payload, Layout.of(header).raw, torch.float32, (n, d)).copy_(x)
        return Encoded(self.name, n, d, EXACT, payload)

    def decode(self, encoded: Encoded, d: int, out: Tensor | None = None) -> Tensor:
        header, payload = _opened(encoded, self.name, d)
        rows = _view(payload, Layout.of(header).raw, torch.float32, (header.n, d))
        return _room(out, header).copy_(rows)


class _Grouped:
    """int8 and int4: codes of ``bits`` bits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bits = CODE_BITS[name]
        self._top = 2**self._bits - 1

    # ── to bytes ────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def encode(self, x: Tensor, *, has_sink: bool = True) -> Encoded:
        x = _checked(x)
        n = len(x)
        first = 1 if has_sink and n else 0
        if first and not bool(torch.isfinite(x[:first]).all()):
            raise ValueError(_NOT_FINITE)
        found = self._encode(x, list(range(first)), x[first:])
        if found is None:  # rarely: then which rows they are is worth a pass of its own
            quantized = x[first:]
            fits = _fits(torch.linalg.vector_norm(quantized, dim=1))
            if not bool(torch.isfinite(quantized[~fits]).all()):
                raise ValueError(_NOT_FINITE)
            raw = [*range(first), *((~fits).nonzero()[:, 0] + first).tolist()]
            found = self._encode(x, raw, quantized[fits])
            assert found is not None, "rows that fit alone fit together"
        return found

    def _encode(self, x: Tensor, raw: list[int], quantized: Tensor) -> Encoded | None:
        """``raw`` rows of ``x`` as they are, and ``quantized``, the others; ``None`` if one of those does not
        fit."""
        n, d = x.shape
        header = Header(self.name, n, d, len(raw), EXACT)
        layout = Layout.of(header)
        payload = bytearray(layout.end)
        if raw:
            memoryview(payload)[layout.rows : layout.raw].cast("I")[:] = array("I", raw)
            _view(payload, layout.raw, torch.float32, (len(raw), d)).copy_(x[raw])
        if layout.n:
            certificate = self._quantize(quantized, payload, layout)
            if certificate is None:
                return None
            header = Header(self.name, n, d, len(raw), certificate)
        payload[:HEADER_BYTES] = header.write()
        return Encoded(self.name, n, d, header.certificate, payload)

    def _quantize(self, x: Tensor, payload: bytearray, layout: Layout) -> Certificate | None:
        """Shapes: x (n, d). ``None`` if a row does not fit."""
        n, d = x.shape
        groups, n_outliers = layout.groups, layout.n_outliers
        width = groups * GROUP
        minima = _view(payload, layout.minima, torch.float16, (n, groups))
        scales = _view(payload, layout.scales, torch.float16, (n, groups))
        codes = _view(payload, layout.codes, torch.uint8, (n, groups, GROUP * self._bits // 8))
        channels = None
        lengths = x.new_empty(n)  # of the rows
        squares, max_error = None, 0.0  # squares: of the length of each row's error, at most
        if n_outliers:
            channels = _outliers(x, n_outliers)
            _view(payload, layout.channels, torch.int32, (n_outliers,)).copy_(channels)
            outliers = _view(payload, layout.outliers, torch.float16, (n, n_outliers))
            exact = x.index_select(1, channels)
            outliers.copy_(exact)
            squares = exact.sub_(outliers).square_().sum(1)
            max_error = float(exact.max()) ** 0.5
        rows = min(n, _CHUNK_ROWS)
        copied = x.new_empty(rows, width) if n_outliers or width != d else None
        scratch, short = x.new_empty(rows, groups, GROUP), x.new_empty(rows, groups, GROUP, dtype=torch.int16)
        pairs = x.new_empty(rows, groups, GROUP, dtype=torch.uint8) if self._bits == 4 else None
        for start in range(0, n, rows):
            here = slice(start, min(start + rows, n))
            m = here.stop - here.start
            block = x[here]
            if not bool(_fits(torch.linalg.vector_norm(block, dim=1, out=lengths[here])).all()):
                return None
            if copied is not None:
                copied[:m, :d] = block
                if channels is not None:
                    copied[:m].index_fill_(1, channels, 0.0)  # they would stretch their groups' scales
                if width != d:
                    copied[:m, d:] = copied[:m, d - 1 : d]  # nor shall what fills the last group up
                block = copied[:m]
            block = block.view(m, groups, GROUP)
            # Rounded to 16 bits so that no number falls outside; what is used is what is stored.
            low = block.amin(-1)
            low = minima[here].copy_(low.sub_(low.abs().mul_(_HALF_STEP).add_(_HALF_TINY))).float()
            scale = block.amax(-1).sub_(low).mul_((1 + 2 * _HALF_STEP) / self._top).add_(_HALF_TINY)
            scale = scales[here].copy_(scale).float()
            # floor(y + 1/2) by a cast that cuts off: y is never negative. The half is added to the minimum.
            y = torch.sub(block, torch.sub(low, scale, alpha=0.5)[..., None], out=scratch[:m])
            y.mul_(scale.reciprocal()[..., None])
            whole = short[:m].copy_(y)
            if pairs is None:
                codes[here].copy_(whole)
            else:
                both = pairs[:m].copy_(whole)
                torch.bitwise_or(both[..., : GROUP // 2], both[..., GROUP // 2 :] << 4, out=codes[here])
        low, scale = minima.float().abs_(), scales.float()
        errors = low.add_(scale, alpha=self._top).mul_(_FLOAT_SLACK).add_(scale, alpha=0.5)
        max_error = max(max_error, float(errors.max()))
        lost = errors.square_().sum(1).mul_(GROUP)
        if squares is not None:
            lost += squares
        relative = lost.sqrt_().div_(lengths).mul_(1 + _SUM_SLACK)
        p99 = relative.kthvalue(min(n, int(0.99 * n) + 1)).values
        return Certificate(max_error, float(relative.double().mean()), float(p99))

    # ── and back ────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def decode(self, encoded: Encoded, d: int, out: Tensor | None = None) -> Tensor:
        header, payload = _opened(encoded, self.name, d)
        layout = Layout.of(header)
        out = _room(out, header)
        n, groups, n_outliers = layout.n, layout.groups, layout.n_outliers
        raw = _ascending(payload, layout.rows, header.n_raw, header.n)
        # Rows between two raw ones are decoded where they belong; usually there is one such stretch.
        is_direct = raw in ([], [0])
        if n:
            rows = out[header.n_raw :] if is_direct else out.new_empty(n, d)
            minima = _view(payload, layout.minima, torch.float16, (n, groups)).float()
            scales = _view(payload, layout.scales, torch.float16, (n, groups)).float()
            codes = _view(payload, layout.codes, torch.uint8, (n, groups, GROUP * self._bits // 8))
            self._dequantize(rows, minima, scales, codes)
            if n_outliers:
                channels = torch.tensor(_ascending(payload, layout.channels, n_outliers, d))
                outliers = _view(payload, layout.outliers, torch.float16, (n, n_outliers))
                rows.index_copy_(1, channels, outliers.float())
            if not is_direct:
                others = torch.ones(header.n, dtype=torch.bool)
                others[raw] = False
                out[others] = rows
        if raw:
            kept = _view(payload, layout.raw, torch.float32, (header.n_raw, d))
            if is_direct:
                out[0].copy_(kept[0])
            else:
                out[raw] = kept
        return out

    def _dequantize(self, rows: Tensor, minima: Tensor, scales: Tensor, codes: Tensor) -> None:
        """Shapes: rows (n, d), to be written; minima, scales (n, groups); codes (n, groups, bytes)."""
        n, d = rows.shape
        groups = minima.shape[1]
        step = max(1, min(n, _CHUNK_ROWS))
        is_direct = d == groups * GROUP and rows.is_contiguous()
        scratch = None if is_direct else rows.new_empty(step, groups, GROUP)
        for start in range(0, n, step):
            here = slice(start, min(start + step, n))
            m = here.stop - here.start
            block = rows[here].view(m, groups, GROUP) if scratch is None else scratch[:m]
            code = codes[here]
            if self._bits == 8:
                block.copy_(code)
            else:
                block[..., : GROUP // 2] = code & 15
                block[..., GROUP // 2 :] = code >> 4
            block.mul_(scales[here, :, None]).add_(minima[here, :, None])
            if scratch is not None:
                rows[here] = block.view(m, -1)[:, :d]


CODECS: dict[str, Codec] = {"raw": _Raw(), "int8": _Grouped("int8"), "int4": _Grouped("int4")}


# ── which one ───────────────────────────────────────────────────────────────────────────────────────

# Certified error (99 of 100 rows) of hidden states of SmolLM2-135M at layers 22 and 26, rounded up; and the
# share of the raw bytes that is left. ``tests.benchmarks.codec`` prints both.
_USUAL_ERROR = {"raw": 0.0, "int8": 0.03, "int4": 0.25}
_SHARE = {"raw": 1.0, "int8": 0.27, "int4": 0.15}
# Other texts want their place in the cache, too: what takes less than this is no reason to round.
_ROOMY = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    codec: str
    reason: str


def choose_codec(error_bound: float, pressure: float) -> Choice:
    """The codec for a task that accepts a relative error of ``error_bound`` in 99 of 100 rows (0: none).

    ``pressure``: bytes that the features take raw, divided by the bytes the cache may hold.

    Raises:
        ConfigError: One of them is negative or no number.
    """
    if not (error_bound >= 0 and pressure >= 0):
        raise ConfigError(f"an error bound and a cache pressure are 0 or more, not {error_bound}, {pressure}")
    fitting = [name for name, usual in _USUAL_ERROR.items() if usual <= error_bound]
    if fitting == ["raw"]:
        why = f"int8 may be off by {_USUAL_ERROR['int8']:g}" if error_bound else "no error is accepted"
        return Choice("raw", f"raw: an error of {error_bound:g} is accepted and {why}")
    if pressure <= _ROOMY:
        return Choice("raw", f"raw: takes {pressure:.0%} of the cache, so nothing is gained by rounding")
    chosen = next((name for name in fitting if pressure * _SHARE[name] <= _ROOMY), fitting[-1])
    return Choice(
        chosen,
        f"{chosen}: takes {pressure * _SHARE[chosen]:.0%} of the cache, raw would take {pressure:.0%}; "
        f"off by about {_USUAL_ERROR[chosen]:g} where {error_bound:g} is accepted",
    )


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────

_NOT_FINITE = "features with NaN or infinity are not kept: the model overflowed; use a wider precision"


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 2 or x.dtype != torch.float32:
        raise ValueError(f"features are (n, d) float32, not {tuple(x.shape)} {x.dtype}")
    if x.shape[0] > ROWS_MAX or not 0 < x.shape[1] <= WIDTH_MAX:
        raise ValueError(f"features of shape {tuple(x.shape)}: at most {ROWS_MAX} x {WIDTH_MAX}")
    return x.detach().cpu().contiguous()


def _fits(lengths: Tensor) -> Tensor:
    """Which rows can be quantized. No number is larger than its row is long, so those of moderate length have
    numbers that fit 16 bits; and NaN or infinity makes a length that is not moderate.
    """
    return (lengths >= _SHORTEST) & (lengths <= _LONGEST)


def _outliers(x: Tensor, n: int) -> Tensor:
    """The channels with most energy, ascending. A sample of the rows tells: they are the same in all."""
    every = max(1, len(x) // 256)
    energy = x[::every].square().sum(0)
    # A stable sort and no ``topk``, so that equal channels come out the same on every machine.
    return energy.sort(descending=True, stable=True).indices[:n].sort().values


def _opened(encoded: Encoded, name: str, d: int) -> tuple[Header, bytearray | memoryview]:
    payload = encoded.payload
    header = Header.read(payload)
    promised = Layout.of(header).end
    if len(memoryview(payload)) != promised:
        raise DecodeError(f"feature entry of {len(memoryview(payload))} bytes instead of {promised}")
    if header.codec != name:
        raise DecodeError(f"feature entry of codec {header.codec} given to {name}")
    if header.d != d:
        raise DecodeError(f"feature entry of width {header.d} where {d} was asked for")
    # torch has no tensors that cannot be written to; this copy is of the small form.
    return header, bytearray(payload) if memoryview(payload).readonly else payload  # type: ignore[return-value]


def _room(out: Tensor | None, header: Header) -> Tensor:
    if out is None:
        return torch.empty(header.n, header.d)
    assert out.shape == (header.n, header.d) and out.dtype == torch.float32, "decoding into another shape"
    return out


def _view(payload: bytearray | memoryview, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(payload, dtype=dtype, count=count, offset=at).view(shape)


def _ascending(payload: bytearray | memoryview, at: int, n: int, end: int) -> list[int]:
    """``n`` different numbers below ``end``, in order."""
    numbers = memoryview(payload)[at : at + 4 * n].cast("I").tolist()
    if numbers and not (numbers[-1] < end and all(a < b for a, b in pairwise(numbers))):
        raise DecodeError("feature entry whose rows or channels are out of order")
    return numbers
