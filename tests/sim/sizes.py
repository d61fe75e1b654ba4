"""How much a core holds on to: the length of every collection in it, by its path."""

from __future__ import annotations

from collections import deque
from random import Random

__all__ = ["collection_sizes"]

# Memories with a bound of their own, kept on purpose after all tasks are gone: ids that ended (100,000),
# attempts that ended here (1,024), what clients said last (256).
KEPT_ON_PURPOSE = ("_tombstones", "_over", "_said")

_PLAIN = (str, bytes, int, float, type(None), type, Random)
_COLLECTIONS = (dict, list, tuple, set, frozenset, deque)
LOOKED_INTO_MAX = 10  # elements of one collection: they are alike


def collection_sizes(thing: object, path: str, seen: set[int] | None = None) -> dict[str, int]:
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, _PLAIN):
        return {}
    seen.add(id(thing))
    found: dict[str, int] = {}
    if isinstance(thing, _COLLECTIONS):
        found[path] = len(thing)
        inside = list(thing.values()) if isinstance(thing, dict) else list(thing)
        for value in inside[:LOOKED_INTO_MAX]:
            found |= collection_sizes(value, f"{path}[]", seen)
    elif type(thing).__module__.startswith(("mesh", "coordinator")):
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        for name in [*getattr(thing, "__dict__", {}), *slots]:
            if name not in KEPT_ON_PURPOSE:
                found |= collection_sizes(getattr(thing, name, None), f"{path}.{name}", seen)
    return found
