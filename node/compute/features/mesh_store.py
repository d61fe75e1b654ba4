"""A store whose third tier is the mesh: memory, then disk, then what the node reads of its peers.

    store.prefetch(keys)            # begins; returns at once
    while store.waiting(keys): ...  # others get their turn, or store.wait(keys, 0.01)
    entries = store.get(keys)       # what is here or has come; the rest is a miss

``get`` never asks anybody by itself: whether fetching is worth it is decided by who asks, see
``node.compute.features.choice``. What came goes to this process's memory only; the disk holds what this node
owns or has made (``node.cache``).

Not for several threads, like the store beneath.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from mesh.errors import DecodeError
from node.compute.features.choice import FetchOrCompute
from node.compute.features.entry import Encoded
from node.compute.features.link import KEYS_MAX, Asking, Fetch, MeshLink, Tally, Tier
from node.compute.features.store import Catalogue, Entry, Found, LocalStore

__all__ = ["FETCH_WITHIN_S", "MeshStore"]

_log = logging.getLogger(__name__)

FETCH_WITHIN_S = 10.0
"""What has not come then is a miss."""
# The node answers from memory, but on a busy machine it may have to wait for its turn.
_ANSWER_S = 2.0
_TELL_S = 0.5


class MeshStore:
    """See ``node.compute.features.store.FeatureStore``. ``link`` ``None``: everything elsewhere is a miss.

    ``choice`` knows what it takes to compute a row here, of about ``n_layers`` layers: what came from others
    does not say how long it took them, and that is worth nothing here.
    """

    def __init__(
        self,
        local: LocalStore,
        link: MeshLink | None,
        choice: FetchOrCompute | None = None,
        n_layers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.local = local
        self.mesh_found = Found()
        self._link = link
        self._choice = choice
        self._n_layers = n_layers
        self._clock = clock
        self._n_computed, self._computing_s = 0, 0.0
        self._told, self._told_at = Tally(), float("-inf")
        self._under_way: dict[bytes, tuple[Fetch, int]] = {}
        """Which request brings a key, and at which place of it."""

    # ── as any store ────────────────────────────────────────────────────────────────────────────────

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What is here, or has come. Waits for nothing; a key that is under way is a miss, and stays so."""
        found = self.local.get(keys)
        missing = [key for key, entry in zip(keys, found, strict=True) if entry is None]
        come = self._take(missing) if self._under_way else {}
        if come:
            self.local.remember(come)
        return [entry if entry is not None else come.get(key) for key, entry in zip(keys, found, strict=True)]

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        self._n_computed += len(entries)
        self._computing_s += sum(entry.recompute_s for entry in entries.values())
        self.local.put(entries)

    def catalogue(self) -> Catalogue:
        return self.local.catalogue()

    @contextmanager
    def pinned(self, keys: Iterable[bytes]) -> Iterator[None]:
        with self.local.pinned(keys):
            yield
        self.tell(is_last=not self.local.has_pins)

    # ── the mesh ────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_linked(self) -> bool:
        return self._link is not None and self._link.is_up

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those that are neither here nor under way, each once."""

        def missing() -> list[bytes]:
            return [
                key for key in dict.fromkeys(keys) if key not in self._under_way and not self.local.has(key)
            ]

        if not missing():
            return []
        self.local.look()
        return missing()

    def ask(self, keys: Sequence[bytes], n_bytes: int) -> Asking | None:
        """Which of at most ``KEYS_MAX`` keys peers say to have; ``None``: there is nobody to ask."""
        if self._link is None or not self.is_linked:
            return None
        return self._link.ask(keys, n_bytes, within_s=_ANSWER_S)

    def prefetch(self, keys: Sequence[bytes], within_s: float = FETCH_WITHIN_S) -> None:
        """Have those that are not here read from peers, in this order; returns at once."""
        if self._link is None or not self.is_linked:
            return
        wanted = self.missing(keys)
        for at in range(0, len(wanted), KEYS_MAX):
            part = wanted[at : at + KEYS_MAX]
            fetch = self._link.want(part, within_s)
            self._under_way |= {key: (fetch, place + 1) for place, key in enumerate(part)}

    def waiting(self, keys: Iterable[bytes] | None = None) -> bool:
        """Whether any of ``keys`` (``None``: any at all) may still come."""
        return not self.wait(self._under_way if keys is None else keys, 0.0)

    def wait(self, keys: Iterable[bytes], timeout_s: float) -> bool:
        """Whether each of ``keys`` has come or is known not to, after waiting at most so long."""
        last: dict[int, tuple[Fetch, int]] = {}
        for key in keys:
            if key in self._under_way:
                fetch, place = self._under_way[key]
                if place > last.get(id(fetch), (fetch, 0))[1]:
                    last[id(fetch)] = (fetch, place)
        return all(fetch.wait(place, timeout_s) for fetch, place in last.values())

    def changed_at(self, keys: Iterable[bytes]) -> float | None:
        """When the newest of ``keys`` came that are under way, or when it was known that they do not."""
        return max(
            (self._under_way[key][0].changed_at for key in keys if key in self._under_way), default=None
        )

    def give_up(self, keys: Iterable[bytes]) -> None:
        """Whoever wanted these does not any more."""
        fetches = {}
        for key in keys:
            fetch, _ = self._under_way.pop(key, (None, 0))
            if fetch is not None:
                fetches[id(fetch)] = fetch
        self._close(fetches.values())

    # ── telling ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def tally(self) -> Tally:
        choice = self._choice
        verdict = choice.verdict if choice is not None else None
        return Tally(
            memory=_tier(self.local.memory_found),
            disk=_tier(self.local.disk_found),
            mesh=_tier(self.mesh_found),
            computed=self._n_computed,
            computing_s=self._computing_s,
            fetches=choice.n_fetches if choice is not None else 0,
            computes=choice.n_computes if choice is not None else 0,
            fetch_s=verdict.fetch_s if verdict is not None else None,
            compute_s=verdict.compute_s if verdict is not None else None,
        )

    def tell(self, *, is_last: bool = False) -> None:
        """Let the node know what the tiers did; at most every half second, unless nothing follows."""
        now = self._clock()
        if self._link is None or not (is_last or now - self._told_at >= _TELL_S):
            return
        if (tally := self.tally) != self._told:
            self._link.tell(tally)
            self._told, self._told_at = tally, now

    def _take(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        by_fetch: dict[int, tuple[Fetch, list[bytes]]] = {}
        for key in keys:
            if key in self._under_way:
                fetch, _ = self._under_way.pop(key)
                by_fetch.setdefault(id(fetch), (fetch, []))[1].append(key)
        come = {}
        for fetch, wanted in by_fetch.values():
            for key, payload in fetch.take(wanted).items():
                try:
                    encoded = Encoded.read(bytes(payload))  # a copy: the batch it came in is let go of
                except DecodeError as error:
                    _log.warning("features of a peer are no features (%s); computing them", error)
                    continue
                row_s = self._choice.compute_s(1, self._n_layers) if self._choice is not None else 0.0
                come[key] = Entry(encoded, encoded.n * row_s)
                self.mesh_found.count(come[key])
        self._close(fetch for fetch, _ in by_fetch.values())
        return come

    def _close(self, fetches: Iterable[Fetch]) -> None:
        """Those of which no key is wanted any more."""
        used = {id(fetch) for fetch, _ in self._under_way.values()}
        for fetch in fetches:
            if id(fetch) not in used:
                fetch.close()


def _tier(found: Found) -> Tier:
    return Tier(hits=found.hits, n_bytes=found.n_bytes, saved_s=found.saved_s)
