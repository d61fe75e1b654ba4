"""The checks messages share. Each names the field and what it must be; NaN fails every one."""

from __future__ import annotations

from mesh.ids import is_id

__all__ = ["check_count", "check_fraction", "check_id", "check_positive", "check_seconds", "check_text"]


def check_id(field: str, value: str) -> None:
    if not is_id(value):
        raise ValueError(f"{field} must be 1 to 63 of a-z, 0-9 and '-', not at an end; got {value[:80]!r}")


def check_count(field: str, value: int, most: int = 2**53 - 1, least: int = 0) -> None:
    if not least <= value <= most:
        raise ValueError(f"{field} must be from {least} to {most}, got {value}")


def check_positive(field: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{field} must be a positive, finite number, got {value}")


def check_fraction(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{field} must be from 0 to 1, got {value}")


def check_seconds(field: str, value: float | None) -> None:
    if value is not None and not 0 <= value < float("inf"):
        raise ValueError(f"{field} must be a finite number of seconds, 0 or more, got {value}")


def check_text(field: str, value: str | None, bytes_max: int) -> None:
    if value is not None and len(value.encode("utf-8", "surrogatepass")) > bytes_max:
        raise ValueError(f"{field} must be at most {bytes_max} bytes of UTF-8")
