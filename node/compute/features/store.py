"""Where feature entries lie: in memory, then on disk; both bounded in bytes.

Every failure is a miss, never an error and never a wrong value: a damaged file, a full disk, a directory
without rights, a pack that another process removed a moment ago. What saves fewest seconds per byte goes
first (``gdsf``); what running tasks have pinned does not go at all.

Several processes may share the directory. Each bounds what it sees there, so together they exceed the
budget by at most one pack each, until the next one is written.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mesh.errors import DecodeError
from node.compute.features.entry import Encoded
from node.compute.features.gdsf import Gdsf
from node.compute.features.packs import ENTRIES_MAX, SUFFIX, Place, read_entries, read_index, write_pack

__all__ = ["Catalogue", "Entry", "FeatureStore", "LocalStore"]

_log = logging.getLogger(__name__)

# A pack is let go of as a whole, so it should not be a large part of a small budget; nor should there be
# more files than a directory is comfortable with: 64 GB in packs of this size are 8,000.
_PACK_BYTES = 8 << 20
# Nobody writes a pack for longer: what is older was left by a process that died.
_PARTIAL_AGE_S = 600.0
# How often a use is noted in the file system, where other processes see it (as the pack's time).
_TOUCH_S = 60.0
# How often to look whether other processes have left packs: only a miss asks.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """What is put: an encoded block, and what it took to make."""

    encoded: Encoded
    recompute_s: float


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
        self._disk = _Disk(directory, disk_bytes, self._pins, clock) if directory and disk_bytes else None

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        found: dict[bytes, Entry] = {}
        missing = []
        for key in dict.fromkeys(keys):
            if key in self._memory:
                found[key] = self._memory[key]
                self._memory_order.use(key)
            else:
                missing.append(key)
        if missing and self._disk is not None:
            for key, entry in self._disk.get(missing):
                found[key] = entry
                self._remember(key, entry)
        return [found.get(key) for key in keys]

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        self.remember(entries)
        if self._disk is not None:
            self._disk.put(entries)

    def remember(self, entries: Mapping[bytes, Entry]) -> None:
        """Keep these in memory only."""
        for key, entry in entries.items():
            self._remember(key, entry)

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


class _Disk:
    """The packs of one directory, as far as this process knows them."""

    def __init__(
        self, directory: Path, bytes_max: int, pins: Mapping[bytes, int], clock: Callable[[], float]
    ) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._pins = pins
        self._clock = clock
        self.places: dict[bytes, tuple[str, Place]] = {}
        self._keys_of: dict[str, list[bytes]] = {}
        self._order: Gdsf[str] = Gdsf()
        self._touched_at: dict[str, float] = {}
        self._looked_at = -_LOOK_S
        self._is_told = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            self._tell("cannot be written", error)

    @property
    def n_bytes(self) -> int:
        return self._order.n_bytes

    def get(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, Entry]]:
        if any(key not in self.places for key in keys):
            self.look()
        by_pack: dict[str, list[bytes]] = {}
        for key in keys:
            if key in self.places:
                by_pack.setdefault(self.places[key][0], []).append(key)
        for name, wanted in by_pack.items():
            wanted.sort(key=lambda key: self.places[key][1].start)
            places = [self.places[key][1] for key in wanted]
            try:
                payloads = read_entries(self._directory / name, places)
                for key, place, payload in zip(wanted, places, payloads, strict=True):
                    yield key, Entry(Encoded.read(payload), place.recompute_s)
                self._use(name)
            except FileNotFoundError:
                self._forget(name)  # another process needed the room
            except (OSError, DecodeError) as error:
                _log.warning("features of %s are lost: %s; they will be computed again", name, error)
                self._remove(name)

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        self.look()
        batch: dict[bytes, tuple[bytes | bytearray | memoryview, float]] = {}
        size = 0
        for key, entry in entries.items():
            if key in self.places:
                continue
            batch[key] = (entry.encoded.payload, entry.recompute_s)
            size += entry.encoded.n_bytes
            if size >= min(_PACK_BYTES, self._bytes_max // 8) or len(batch) == ENTRIES_MAX:
                self._write(batch, size)
                batch, size = {}, 0
        if batch:
            self._write(batch, size)

    def look(self) -> None:
        """Learn of packs that are new or gone. Cheap if asked often."""
        now = self._clock()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        try:
            with os.scandir(self._directory) as listing:
                there = {item.name: item.stat() for item in listing if item.name.endswith(SUFFIX)}
        except OSError as error:
            self._tell("cannot be read", error)
            return
        for name in [name for name in self._order if name not in there]:
            self._forget(name)
        new = [name for name in there if name not in self._order]
        for name in sorted(new, key=lambda name: (there[name].st_mtime_ns, name)):
            try:
                self._learn(name, read_index(self._directory / name), there[name].st_size)
            except FileNotFoundError:
                continue
            except (OSError, DecodeError) as error:
                _log.warning("features of %s are lost: %s; they will be computed again", name, error)
                self._remove(name)
        self._make_room(0, 0.0)

    def _write(self, batch: Mapping[bytes, tuple[bytes | bytearray | memoryview, float]], size: int) -> None:
        if size > self._bytes_max or not self._make_room(size, sum(cost_s for _, cost_s in batch.values())):
            return
        try:
            path, places = write_pack(self._directory, batch)
            self._learn(path.name, places, path.stat().st_size)
        except OSError as error:
            self._tell(
                "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written", error
            )
            return
        self._make_room(0, 0.0)  # for the index, too

    def _make_room(self, n_bytes: int, cost_s: float) -> bool:
        """Whether ``n_bytes`` fit now; packs worth less than that are removed for them."""
        room = self._bytes_max - self._order.n_bytes - n_bytes
        worth = self._order.value_of(n_bytes, cost_s) if n_bytes else float("inf")
        leaving = []
        for name in self._order.least() if room < 0 else ():
            if room >= 0:
                break
            keys = self._keys_of[name]
            if any(key in self._pins for key in keys):
                continue
            if self._order.value(name) > worth:
                break
            leaving.append(name)
            room += self._order.n_bytes_of(name)
        if room < 0 and n_bytes:
            return False
        for name in leaving:
            self._order.let_go(name)
            self._remove(name)
        return True

    def _learn(self, name: str, places: Mapping[bytes, Place], n_bytes: int) -> None:
        self._keys_of[name] = list(places)
        for key, place in places.items():
            self.places.setdefault(key, (name, place))
        self._order.add(name, n_bytes, sum(place.recompute_s for place in places.values()))

    def _use(self, name: str) -> None:
        self._order.use(name)
        now = self._clock()
        if now - self._touched_at.get(name, -_TOUCH_S) >= _TOUCH_S:
            self._touched_at[name] = now
            try:
                os.utime(self._directory / name)
            except OSError:
                return  # gone, or not ours: its age is all that is lost

    def _remove(self, name: str) -> None:
        self._forget(name)
        try:
            (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            self._tell("cannot be written", error)

    def _forget(self, name: str) -> None:
        for key in self._keys_of.pop(name, ()):
            if self.places.get(key, ("",))[0] == name:
                del self.places[key]
        self._order.drop(name)
        self._touched_at.pop(name, None)

    def _sweep(self) -> None:
        """Remove what processes left that died while writing."""
        for partial in self._directory.glob(".*.partial"):
            try:
                if time.time() - partial.stat().st_mtime > _PARTIAL_AGE_S:
                    partial.unlink()
            except OSError:
                continue  # another process was faster

    def _tell(self, what: str, error: OSError) -> None:
        """Once: a full disk would say it at every block."""
        if not self._is_told:
            self._is_told = True
            _log.warning(
                "%s %s (%s): features are kept in memory only", self._directory, what, error.strerror
            )
