"""Descriptions on one line, such as ``rate=5,burstiness=3,tightness=0.5..4,values=1:0.9/10:0.1``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["keys_of", "made_from", "parse_spec"]

T = TypeVar("T")


def parse_spec(text: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values; each value becomes what the default of its key in ``known`` is.

    ``0.5..4`` are two numbers, ``1:0.9/10:0.1`` pairs of numbers.

    Raises:
        ValueError: A key is unknown or comes twice, or its value is not one.
    """
    found: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, is_given, value = (part.strip() for part in item.partition("="))
        if not is_given or key not in known:
            raise ValueError(f"{item!r} is not KEY=VALUE with a key of {', '.join(known)}")
        if key in found:
            raise ValueError(f"{key} is given twice")
        try:
            found[key] = _like(known[key], value)
        except ValueError:
            raise ValueError(f"{key} must look like {_shown(known[key])}, got {value!r}") from None
    return found


def keys_of(kind: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass with their defaults."""
    return {one.name: one.default for one in fields(kind)}


def made_from(kind: type[T], found: Mapping[str, Any]) -> T:
    """A dataclass from those of the values that are its fields.

    Raises:
        ValueError: It does not accept one.
    """
    return kind(**{key: value for key, value in found.items() if key in keys_of(kind)})


def _like(default: Any, value: str) -> Any:
    match default:
        case int():
            return int(value)
        case float():
            return float(value)
        case (float(), float()):
            low, is_two, high = value.partition("..")
            return float(low), float(high if is_two else low)
        case _:
            pairs = [pair.split(":") for pair in value.split("/")]
            return tuple((float(first), float(second)) for first, second in pairs)


def _shown(default: Any) -> str:
    match default:
        case int() | float():
            return f"{default:g}"
        case (float() as low, float() as high):
            return f"{low:g}..{high:g}"
        case _:
            return "/".join(f"{first:g}:{second:g}" for first, second in default)
