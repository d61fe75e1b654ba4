"""Prefixes on this node's disk, read and written by a thread of its own, so that no step waits for a disk.

What is put here the node process sees, announces to the mesh and gives to peers. What peers have put here, or
this node before it was restarted, is read from here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import SimpleQueue

from node.compute.features.link import Asked
from node.compute.features.store import Entry, FeatureStore

__all__ = ["PrefixDisk"]

log = logging.getLogger(__name__)

# Given to be written and not written yet: what one long prompt leaves.
_WAITING_BYTES_MAX = 64 << 20
# Read at once: the first layers of a prompt may go on while the next ones are read.
_READ_KEYS = 8
# A page cache gives a multiple and the card of an old Pi a tenth; both are wrong for the first reading only.
_BYTES_PER_S = 4e8
_LEARNING = 0.3


class _Asking:
    """See ``node.compute.serve.arrivals.Asking``."""

    def __init__(self) -> None:
        self._is_answered = threading.Event()
        self.answer: tuple[list[bool], Asked] | None = None

    def wait(self, timeout_s: float) -> bool:
        return self._is_answered.wait(timeout_s)

    def say(self, there: list[bool], expected_s: float) -> None:
        self.answer = there, Asked(request=0, expected_s=expected_s if any(there) else None)
        self._is_answered.set()


class _Coming:
    """See ``node.compute.serve.arrivals.Coming``."""

    def __init__(self, n_keys: int, until: float, clock: Callable[[], float]) -> None:
        self._n_keys = n_keys
        self._until, self._clock = until, clock
        self._changed = threading.Condition()
        self._found: dict[bytes, memoryview] = {}
        self._n_settled = 0
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        return self._is_closed or self._clock() >= self._until

    @property
    def n_settled(self) -> int:
        with self._changed:
            return self._n_keys if self.is_over else self._n_settled

    def wait(self, n_keys: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.is_over or self._n_settled >= n_keys, timeout_s)

    def take(self, keys: Iterable[bytes]) -> dict[bytes, memoryview]:
        with self._changed:
            return {key: self._found.pop(key) for key in keys if key in self._found}

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._found.clear()

    def settle(self, found: Mapping[bytes, memoryview], n_keys: int) -> None:
        with self._changed:
            if not self._is_closed:
                self._found.update(found)
            self._n_settled += n_keys
            self._changed.notify_all()


class PrefixDisk:
    """``store`` belongs to the thread from here on, and should keep little in memory."""

    def __init__(self, store: FeatureStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._bytes_per_s = _BYTES_PER_S
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._n_waiting_bytes = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="prefixes.disk", daemon=True)
        self._thread.start()

    def ask(self, keys: Sequence[bytes], n_bytes: int, within_s: float = 0.5) -> _Asking:
        asking = _Asking()

        def answer() -> None:
            known = self._store.catalogue().keys
            there = [key in known for key in keys]
            asking.say(there, n_bytes * sum(there) / max(len(keys), 1) / self._bytes_per_s)

        self._work.put(answer)
        return asking

    def want(self, keys: Sequence[bytes], within_s: float) -> _Coming:
        coming = _Coming(len(keys), self._clock() + within_s, self._clock)
        for at in range(0, len(keys), _READ_KEYS):
            self._work.put(lambda lot=keys[at : at + _READ_KEYS]: self._read(lot, coming))  # type: ignore[misc]
        return coming

    def put(self, entries: Mapping[bytes, Entry]) -> bool:
        """Have these written; ``False`` if too much is waiting to be."""
        n_bytes = sum(entry.encoded.n_bytes for entry in entries.values())
        with self._lock:
            if self._n_waiting_bytes + n_bytes > _WAITING_BYTES_MAX:
                return False
            self._n_waiting_bytes += n_bytes
        self._work.put(lambda: self._write(entries, n_bytes))
        return True

    def close(self) -> None:
        """Once all that was given is written."""
        self._work.put(None)
        self._thread.join()

    # ── by the thread ───────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _read(self, keys: Sequence[bytes], coming: _Coming) -> None:
        if coming.is_over:
            return
        began = self._clock()
        found = {
            key: memoryview(entry.encoded.payload)
            for key, entry in zip(keys, self._store.get(keys), strict=True)
            if entry is not None
        }
        took_s, n_bytes = self._clock() - began, sum(map(len, found.values()))
        if took_s > 0 and n_bytes:
            self._bytes_per_s += _LEARNING * (n_bytes / took_s - self._bytes_per_s)
        coming.settle(found, len(keys))

    def _write(self, entries: Mapping[bytes, Entry], n_bytes: int) -> None:
        try:
            self._store.put(entries)
        finally:
            with self._lock:
                self._n_waiting_bytes -= n_bytes
