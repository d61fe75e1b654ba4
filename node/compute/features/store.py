"""Where feature entries lie: in memory, then on disk; both bounded in bytes.

Every failure is a miss, never an error and never a wrong value: a damaged file, a full disk, a directory
without rights, a pack that another process removed a moment ago. What saves fewest seconds per byte goes
first (``gdsf``); what running tasks have pinned does not go at all.

Several processes may share the directory. Each bounds what it sees there, so together they exceed the
budget by at most one pack each, until the next one is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from node.compute.features.disk import PackDirectory
from node.compute.features.entry import Encoded
from node.compute.features.gdsf import Gdsf

__all__ = ["Catalogue", "Entry", "FeatureStore", "Found", "LocalStore"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is put: an encoded block, and what it took to make."""

    encoded: Encoded
    recompute_s: float


@dataclass(slots=True)
class Found:
    """Blocks that one tier had, their bytes, and the seconds of computing that this spared."""

    hits: int = 0
    n_bytes: int = 0
    saved_s: float = 0.0

    def count(self, entry: Entry) -> None:
        self.hits += 1
        self.n_bytes += entry.encoded.n_bytes
        self.saved_s += entry.recompute_s


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a store holds, as it would tell its peers."""

    keys: frozenset[bytes]
    memory_bytes: int
    disk_bytes: int


class FeatureStore(Protocol):
    """The same interface for this node and for the mesh."""

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """An entry for each key; ``None`` is a miss, whatever the reason."""

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Keep these if there is room for them; never fails."""

    def catalogue(self) -> Catalogue:
        """What is there now."""

    def pinned(self, keys: Iterable[bytes]) -> AbstractContextManager[None]:
        """A context in which these keys are not evicted here."""


class LocalStore:
    """Memory before disk. ``directory`` ``None``, or a budget of 0, leaves that tier out.

    ``clock``: monotonic seconds. Not safe for several threads; the engine has one that computes.
    """

    def __init__(
        self,
        directory: Path | None,
        memory_bytes: int,
        disk_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert memory_bytes >= 0 and disk_bytes >= 0
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._clock = clock
        self._pins: Counter[bytes] = Counter()
        self._memory: dict[bytes, Entry] = {}
        self._memory_order: Gdsf[bytes] = Gdsf()
        self.memory_found, self.disk_found = Found(), Found()
        self._disk = (
            PackDirectory(directory, disk_bytes, self._pins, clock) if directory and disk_bytes else None
        )

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        found: dict[bytes, Entry] = {}
        missing = []
        for key in dict.fromkeys(keys):
            if key in self._memory:
                found[key] = self._memory[key]
                self._memory_order.use(key)
                self.memory_found.count(found[key])
            else:
                missing.append(key)
        if missing and self._disk is not None:
            for key, payload, recompute_s in self._disk.get(missing):
                found[key] = entry = Entry(payload, recompute_s)
                self.disk_found.count(entry)
                self._remember(key, entry)
        return [found.get(key) for key in keys]

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        self.remember(entries)
        if self._disk is not None:
            self._disk.put({k: (entry.encoded.payload, entry.recompute_s) for k, entry in entries.items()})

    def remember(self, entries: Mapping[bytes, Entry]) -> None:
        """Keep these in memory only."""
        for key, entry in entries.items():
            self._remember(key, entry)

    def forget(self, keys: Iterable[bytes]) -> None:
        """These are not what they should be: out of memory with them."""
        for key in keys:
            if self._memory.pop(key, None) is not None:
                self._memory_order.drop(key)

    def look(self) -> None:
        """Learn of what other processes have put on disk. Cheap if asked often."""
        if self._disk is not None:
            self._disk.look()

    def has(self, key: bytes) -> bool:
        """Whether ``get`` would most likely find it; nothing is read."""
        return key in self._memory or (self._disk is not None and key in self._disk.places)

    def catalogue(self) -> Catalogue:
        keys = set(self._memory)
        disk_bytes = 0
        if self._disk is not None:
            self._disk.look()
            keys.update(self._disk.places)
            disk_bytes = self._disk.n_bytes
        return Catalogue(frozenset(keys), self._memory_order.n_bytes, disk_bytes)

    @property
    def has_pins(self) -> bool:
        return bool(self._pins)

    @contextmanager
    def pinned(self, keys: Iterable[bytes]) -> Iterator[None]:
        held = list(keys)
        self._pins.update(held)
        try:
            yield
        finally:
            self._pins.subtract(held)
            for key in held:
                if self._pins[key] <= 0:
                    del self._pins[key]

    def _remember(self, key: bytes, entry: Entry) -> None:
        """Into memory, if that is worth more than what has to leave for it."""
        n_bytes, order = entry.encoded.n_bytes, self._memory_order
        if n_bytes > self._memory_bytes:
            return
        order.drop(key)
        self._memory.pop(key, None)
        room = self._memory_bytes - order.n_bytes - n_bytes
        worth = order.value_of(n_bytes, entry.recompute_s)
        leaving = []
        for candidate in order.least() if room < 0 else ():
            if room >= 0:
                break
            if candidate in self._pins:
                continue
            if key not in self._pins and order.value(candidate) > worth:
                break
            leaving.append(candidate)
            room += self._memory[candidate].encoded.n_bytes
        if room < 0:
            return
        for candidate in leaving:
            order.let_go(candidate)
            del self._memory[candidate]
        self._memory[key] = entry
        order.add(key, n_bytes, entry.recompute_s)
        assert order.n_bytes <= self._memory_bytes
