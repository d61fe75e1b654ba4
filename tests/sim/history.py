"""What happened in one run, in order: the only thing checkers look at."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

__all__ = ["ClientHeard", "Entry", "History"]


class Entry(NamedTuple):
    """``what`` is an effect a core asked for (``Notify`` unwrapped to its fact), or a note of the world."""

    at: float
    node: str
    boot: str
    broker: str
    """The broker incarnation the node was connected to, ``""`` if none: names one total order."""
    what: Any


class ClientHeard(NamedTuple):
    """A client read this status or result of one of its tasks."""

    client: str
    message: Any


class History(list[Entry]):
    def digest(self) -> str:
        """Equal for equal runs: what the simulator's own promise is checked with."""
        digest = hashlib.sha256()
        for entry in self:
            digest.update(repr(entry).encode())
        return digest.hexdigest()

    def lines(self, *, but: tuple[type, ...] = ()) -> str:
        """For people: one line an entry."""
        return "\n".join(
            f"{e.at:9.3f} {e.node:9} {e.boot[:4]:4} {e.broker:8} {e.what}"
            for e in self
            if not isinstance(e.what, but)
        )
