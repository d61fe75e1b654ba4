"""The packs of one directory, within a budget of bytes: which key lies where, which pack to let go of.

Several processes may use the directory. Each bounds what it sees there, so together they exceed the budget by
at most one pack each, until the next one is written. One process's use of a pack is seen by the others as the
pack's time, so what one of them reads often, none lets go of lightly.

    get, put                       for a process with one thread: the one that computes
    places, could_free, make_room, for one that reads and writes files in threads, and keeps this
    learn, use, forget, remove     object behind a lock: the node's share
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mesh.errors import DecodeError
from node.compute.features.entry import Encoded
from node.compute.features.gdsf import Gdsf
from node.compute.features.packs import ENTRIES_MAX, SUFFIX, Place, read_entries, read_index, write_pack

__all__ = ["PACK_BYTES", "PackDirectory", "Payload"]

_log = logging.getLogger(__name__)

Payload = bytes | bytearray | memoryview

PACK_BYTES = 8 << 20
"""A pack is let go of as a whole, so it should not be a large part of a small budget; nor should there be
more files than a directory is comfortable with: 64 GB in packs of this size are 8,000."""

# Nobody writes a pack for longer: what is older was left by a process that died.
_PARTIAL_AGE_S = 600.0
# How often a use is noted in the file system, where other processes see it (as the pack's time).
_TOUCH_S = 60.0
# How often to look whether other processes have left packs: only a miss asks.
_LOOK_S = 1.0

Weigh = Callable[[Mapping[bytes, Place]], float]
"""What the entries of a pack cost to make again, in seconds, as far as losing them here matters."""


def all_of_it(places: Mapping[bytes, Place]) -> float:
    return sum(place.recompute_s for place in places.values())


class PackDirectory:
    """Not safe for several threads at once. ``clock``: monotonic seconds.

    Args:
        pins: Keys that running work needs, counted: their packs are not let go of.
        look_s: How often a miss, or ``look``, asks the file system for what others have done.
        weigh: What a pack is worth; ``reweigh`` asks again.
        touched: Hears of the keys of every pack that comes or goes.
    """

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        pins: Mapping[bytes, int],
        clock: Callable[[], float] = time.monotonic,
        *,
        look_s: float = _LOOK_S,
        weigh: Weigh = all_of_it,
        touched: Callable[[Iterable[bytes]], None] = lambda keys: None,
    ) -> None:
        self.directory = directory
        self.bytes_max = bytes_max
        self._pins = pins
        self._clock = clock
        self._look_s = look_s
        self._weigh = weigh
        self._touched = touched
        self.places: dict[bytes, tuple[str, Place]] = {}
        self._packs: dict[str, Mapping[bytes, Place]] = {}
        self._order: Gdsf[str] = Gdsf()
        self._touched_at: dict[str, float] = {}
        self._times_ns: dict[str, int] = {}
        self._looked_at = -look_s
        self._seen_ns = (-1, -1)
        self._is_told = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            self.tell("cannot be written", error)

    @property
    def n_bytes(self) -> int:
        return self._order.n_bytes

    @property
    def pack_bytes(self) -> int:
        """How large a pack should become."""
        return max(1, min(PACK_BYTES, self.bytes_max // 8))

    @property
    def packs(self) -> Mapping[str, Mapping[bytes, Place]]:
        """What lies in each pack, by its file's name."""
        return self._packs

    def get(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, Encoded, float]]:
        """The entries that are here, in no order, checked, with the seconds each took to make."""
        if any(key not in self.places for key in keys):
            self.look()
        for name, wanted in self.by_pack(keys).items():
            places = [self.places[key][1] for key in wanted]
            try:
                payloads = read_entries(self.directory / name, places)
                for key, place, payload in zip(wanted, places, payloads, strict=True):
                    yield key, Encoded.read(payload), place.recompute_s
                self.use(name)
            except FileNotFoundError:
                self.forget(name)  # another process needed the room
            except (OSError, DecodeError) as error:
                _log.warning("features of %s are lost: %s; they will be computed again", name, error)
                self.remove(name)

    def by_pack(self, keys: Sequence[bytes]) -> dict[str, list[bytes]]:
        """Those of the keys that are here, by the pack they lie in, in the order of the file."""
        found: dict[str, list[bytes]] = {}
        for key in keys:
            if key in self.places:
                found.setdefault(self.places[key][0], []).append(key)
        for wanted in found.values():
            wanted.sort(key=lambda key: self.places[key][1].start)
        return found

    def put(self, entries: Mapping[bytes, tuple[Payload, float]]) -> None:
        """Keep these as far as there is room for them: payload, and seconds it took to make."""
        self.look()
        batch: dict[bytes, tuple[Payload, float]] = {}
        size = 0
        for key, entry in entries.items():
            if key in self.places:
                continue
            batch[key] = entry
            size += len(memoryview(entry[0]))
            if size >= self.pack_bytes or len(batch) == ENTRIES_MAX:
                self._write(batch, size)
                batch, size = {}, 0
        if batch:
            self._write(batch, size)

    def look(self) -> None:
        """Learn of packs that are new, gone or used by others. Cheap if asked often."""
        now = self._clock()
        if now - self._looked_at < self._look_s:
            return
        self._looked_at = now
        try:
            # A directory's time changes with what is in it. One look more than it says: clocks of file
            # systems are coarse, and another pack may come within the tick in which the last one was seen.
            seen_ns = (self._seen_ns[1], self.directory.stat().st_mtime_ns)
            if self._seen_ns == seen_ns and seen_ns[0] == seen_ns[1]:
                return
            self._seen_ns = seen_ns
            with os.scandir(self.directory) as listing:
                there = {item.name: item.stat() for item in listing if item.name.endswith(SUFFIX)}
        except OSError as error:
            self.tell("cannot be read", error)
            return
        for name in [name for name in self._order if name not in there]:
            self.forget(name)
        for name in self._order:
            if there[name].st_mtime_ns > self._times_ns.get(name, 0):
                self._times_ns[name] = there[name].st_mtime_ns
                self._order.use(name)
        new = [name for name in there if name not in self._order]
        for name in sorted(new, key=lambda name: (there[name].st_mtime_ns, name)):
            try:
                self.learn(name, read_index(self.directory / name), there[name].st_size)
                self._times_ns[name] = there[name].st_mtime_ns
            except FileNotFoundError:
                continue
            except (OSError, DecodeError) as error:
                _log.warning("features of %s are lost: %s; they will be computed again", name, error)
                self.remove(name)
        self.make_room(0, 0.0)

    def could_free(self, n_bytes: int, cost_s: float) -> int:
        """How many of ``n_bytes``, or more, there would be room for if they cost so much to make again."""
        room = self.bytes_max - self._order.n_bytes
        worth = self._order.value_of(n_bytes, cost_s)
        for name in self._order.least() if room < n_bytes else ():
            if room >= n_bytes or self._order.value(name) > worth:
                break
            if not self._is_pinned(name):
                room += self._order.n_bytes_of(name)
        return room

    def make_room(self, n_bytes: int, cost_s: float) -> bool:
        """Whether ``n_bytes`` fit now; packs worth less than that are removed for them."""
        room = self.bytes_max - self._order.n_bytes - n_bytes
        worth = self._order.value_of(n_bytes, cost_s) if n_bytes else float("inf")
        leaving = []
        for name in self._order.least() if room < 0 else ():
            if room >= 0:
                break
            if self._is_pinned(name):
                continue
            if self._order.value(name) > worth:
                break
            leaving.append(name)
            room += self._order.n_bytes_of(name)
        if room < 0 and n_bytes:
            return False
        for name in leaving:
            self._order.let_go(name)
            self.remove(name)
        return True

    def learn(self, name: str, places: Mapping[bytes, Place], n_bytes: int) -> None:
        """A pack is here."""
        self._touched(places)
        self._packs[name] = places
        for key, place in places.items():
            self.places.setdefault(key, (name, place))
        self._order.add(name, n_bytes, self._weigh(places))

    def reweigh(self, name: str) -> None:
        """What the pack is worth may have changed. One that is gone changes nothing."""
        if name in self._packs:
            self._order.reprice(name, self._weigh(self._packs[name]))

    def use(self, name: str) -> None:
        """Something of it was read. One that is gone changes nothing."""
        if name not in self._order:
            return
        self._order.use(name)
        now = self._clock()
        if now - self._touched_at.get(name, -_TOUCH_S) >= _TOUCH_S:
            self._touched_at[name] = now
            try:
                os.utime(self.directory / name)
            except OSError:
                return  # gone, or not ours: its age is all that is lost

    def remove(self, name: str) -> None:
        """The pack leaves, and its file with it."""
        self.forget(name)
        try:
            (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            self.tell("cannot be written", error)

    def forget(self, name: str) -> None:
        """Its file is gone already."""
        places = self._packs.pop(name, {})
        self._touched(places)
        for key in places:
            if self.places.get(key, ("",))[0] == name:
                del self.places[key]
        self._order.drop(name)
        self._touched_at.pop(name, None)
        self._times_ns.pop(name, None)

    def tell(self, what: str, error: OSError) -> None:
        """Once: a full disk would say it at every block."""
        if not self._is_told:
            self._is_told = True
            what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else what
            _log.warning("%s %s (%s): features are kept in memory only", self.directory, what, error.strerror)

    def _write(self, batch: Mapping[bytes, tuple[Payload, float]], size: int) -> None:
        if size > self.bytes_max or not self.make_room(size, sum(cost_s for _, cost_s in batch.values())):
            return
        try:
            path, places = write_pack(self.directory, batch)
            self.learn(path.name, places, path.stat().st_size)
        except OSError as error:
            self.tell("cannot be written", error)
            return
        self.make_room(0, 0.0)  # for the index, too

    def _is_pinned(self, name: str) -> bool:
        return bool(self._pins) and any(key in self._pins for key in self._packs[name])

    def _sweep(self) -> None:
        """Remove what processes left that died while writing."""
        for partial in self.directory.glob(".*.partial"):
            try:
                if time.time() - partial.stat().st_mtime > _PARTIAL_AGE_S:
                    partial.unlink()
            except OSError:
                continue  # another process was faster
