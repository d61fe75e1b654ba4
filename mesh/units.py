"""Sizes and times as people read them."""

from __future__ import annotations

__all__ = ["GIB", "KIB", "MIB", "bytes_text", "seconds_text"]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def bytes_text(n_bytes: float) -> str:
    """``bytes_text(1536) == '1.5 KiB'``: three significant digits, binary prefixes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def seconds_text(length_s: float) -> str:
    """``seconds_text(0.012) == '12 ms'``, ``seconds_text(75) == '1 min 15 s'``."""
    if length_s < 1:
        return f"{length_s * 1000:.0f} ms"
    if length_s < 60:
        return f"{length_s:.1f} s"
    minutes, rest_s = divmod(round(length_s), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"
