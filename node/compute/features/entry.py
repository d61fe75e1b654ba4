"""What an entry of the feature cache looks like: a header, then numbers at offsets the header determines.

    magic, version, codec, n, d, n_raw, certificate │ checksum │ which rows are raw │ raw rows │
    outlier channels │ outliers │ minima, scales │ codes

Every size follows from the header, and the header has a checksum: a wrong shape would read other numbers
without anybody noticing. The numbers themselves are guarded by the digest of whoever keeps the entry.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

from mesh.errors import DecodeError

__all__ = [
    "CODE_BITS",
    "EXACT",
    "GROUP",
    "ROWS_MAX",
    "WIDTH_MAX",
    "Certificate",
    "Encoded",
    "Header",
    "Layout",
    "bytes_of",
]

GROUP = 64
"""Numbers that share a minimum and a scale."""
ROWS_MAX = 1 << 20
WIDTH_MAX = 1 << 16
"""Far beyond any model; what a hostile header could make a reader allocate is checked against the payload."""
OUTLIERS = 8

CODE_BITS = {"raw": 0, "int8": 8, "int4": 4}
"""The codecs by name; one of 0 bits keeps every row raw. The order is the number in the header."""
_NAMES = tuple(CODE_BITS)

Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Certificate:
    """Upper bounds of what decoding gives away; all 0 where it is exact.

    ``relative_*`` are of a row: the length of its error divided by its own length.
    """

    max_error: float
    relative_mean: float
    relative_p99: float


EXACT = Certificate(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Encoded:
    """``payload`` describes itself: codec, shape, certificate, numbers."""

    codec: str
    n: int
    d: int
    certificate: Certificate
    payload: Payload

    @property
    def n_bytes(self) -> int:
        return len(memoryview(self.payload))

    @classmethod
    def read(cls, payload: Payload) -> Encoded:
        """What ``payload`` says of itself; its length is what the header promises.

        Raises:
            DecodeError: It is damaged, cut short, too long, or of another version.
        """
        header = Header.read(payload)
        promised = Layout.of(header).end
        if len(memoryview(payload)) != promised:
            raise DecodeError(f"feature entry of {len(memoryview(payload))} bytes instead of {promised}")
        return cls(header.codec, header.n, header.d, header.certificate, payload)


@dataclass(frozen=True, slots=True)
class Header:
    codec: str
    n: int
    d: int
    n_raw: int
    certificate: Certificate

    def write(self) -> bytes:
        c = self.certificate
        errors = (c.max_error, c.relative_mean, c.relative_p99)
        code = _NAMES.index(self.codec)
        head = _HEAD.pack(_MAGIC, _VERSION, code, self.n, self.d, self.n_raw, *errors)
        return head + _CHECKSUM.pack(zlib.crc32(head))

    @classmethod
    def read(cls, payload: Payload) -> Header:
        """Raises: DecodeError."""
        view = memoryview(payload)
        if len(view) < HEADER_BYTES:
            raise DecodeError(f"feature entry of {len(view)} bytes: shorter than its header")
        head = view[: _HEAD.size]
        magic, version, code, n, d, n_raw, *errors = _HEAD.unpack(head)
        if magic != _MAGIC or version != _VERSION:
            raise DecodeError("no feature entry, or one of another version")
        if _CHECKSUM.unpack(view[_HEAD.size : HEADER_BYTES]) != (zlib.crc32(head),):
            raise DecodeError("the header of a feature entry is damaged")
        if code >= len(_NAMES):
            raise DecodeError(f"feature entry of unknown codec {code}")
        if not (n <= ROWS_MAX and 0 < d <= WIDTH_MAX and n_raw <= n):
            raise DecodeError(f"feature entry of impossible shape {n} x {d}, {n_raw} of them raw")
        if not all(math.isfinite(error) and error >= 0 for error in errors):
            raise DecodeError("feature entry with an impossible certificate")
        return cls(_NAMES[code], n, d, n_raw, Certificate(*errors))


_MAGIC, _VERSION = b"EMFM", 1
_HEAD = struct.Struct("<4sHHIIIddd")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEAD.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets of the parts. ``n`` rows have codes; the others are raw."""

    n: int
    groups: int
    """In one row; the last group may be narrower than the others and is filled up."""
    n_outliers: int
    rows: int
    """(n_raw,) uint32, ascending: which rows are raw. Absent in codec ``raw``, where all are."""
    raw: int
    """(n_raw, d) float32"""
    channels: int
    """(n_outliers,) uint32, ascending"""
    outliers: int
    """(n, n_outliers) float16"""
    minima: int
    """(n, groups) float16"""
    scales: int
    """(n, groups) float16"""
    codes: int
    """(n, groups * GROUP * bits / 8) uint8"""
    end: int

    @classmethod
    def of(cls, header: Header) -> Layout:
        """Raises: DecodeError, where codec and number of raw rows contradict each other."""
        bits = CODE_BITS[header.codec]
        if not bits and header.n_raw != header.n:
            raise DecodeError(f"feature entry of codec {header.codec} with rows that are not raw")
        n = header.n - header.n_raw
        groups = -(-header.d // GROUP)
        n_outliers = min(OUTLIERS, header.d) if bits == 4 and n else 0
        ends = [HEADER_BYTES]
        for size in (
            4 * header.n_raw if bits else 0,
            4 * header.n_raw * header.d,
            4 * n_outliers,
            2 * n * n_outliers,
            2 * n * groups,
            2 * n * groups,
            n * groups * GROUP * bits // 8,
        ):
            ends.append(ends[-1] + size)
        return cls(n, groups, n_outliers, *ends)


def bytes_of(codec: str, n: int, d: int) -> int:
    """What an entry of ``n`` rows takes in ``codec``, a row at its beginning kept raw."""
    n_raw = min(n, 1) if CODE_BITS[codec] else n
    return Layout.of(Header(codec, n, d, n_raw, EXACT)).end
