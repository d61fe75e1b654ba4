"""Quantization by table: every value a code can mean is written down, and the nearest is looked for.

Number by number, in double precision, by the rules in the head of ``node.compute.features.codec``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

__all__ = ["by_table", "outlier_channels"]


def by_table(group: Sequence[float], bits: int) -> list[float]:
    """What each number of one group becomes."""
    minimum = _half(min(group) - (abs(min(group)) * 2.0**-11 + 2.0**-24))
    scale = _half((max(group) - minimum) * (1 + 2.0**-10) / (2**bits - 1) + 2.0**-24)
    table = [_float(_float(code * scale) + minimum) for code in range(2**bits)]
    return [min(table, key=lambda value: (abs(value - number), value)) for number in group]


def outlier_channels(rows: Sequence[Sequence[float]], n: int) -> list[int]:
    """The ``n`` channels of most energy, ascending."""
    energy = [math.fsum(row[channel] ** 2 for row in rows) for channel in range(len(rows[0]))]
    return sorted(sorted(range(len(energy)), key=lambda channel: -energy[channel])[:n])


def _half(number: float) -> float:
    half: float = struct.unpack("<e", struct.pack("<e", number))[0]
    return half


def _float(number: float) -> float:
    single: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return single
