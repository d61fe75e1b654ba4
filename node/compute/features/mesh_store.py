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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from mesh.errors import DecodeError
from node.compute.features.entry import Encoded
from node.compute.features.link import KEYS_MAX, Asking, Fetch, MeshLink
from node.compute.features.store import Catalogue, Entry, LocalStore

__all__ = ["FETCH_WITHIN_S", "MeshStore"]

_log = logging.getLogger(__name__)

FETCH_WITHIN_S = 10.0
"""What has not come then is a miss."""


class MeshStore:
    """See ``node.compute.features.store.FeatureStore``. ``link`` ``None``: everything elsewhere is a miss.

    ``token_s``: seconds it takes here to compute what one token's features are, for what came from others.
    """

    def __init__(
        self, local: LocalStore, link: MeshLink | None, token_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.local = local
        self._link = link
        self._token_s = token_s
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
        self.local.put(entries)

    def catalogue(self) -> Catalogue:
        return self.local.catalogue()

    def pinned(self, keys: Iterable[bytes]) -> AbstractContextManager[None]:
        return self.local.pinned(keys)

    # ── the mesh ────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_linked(self) -> bool:
        return self._link is not None and self._link.is_up

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those that are neither here nor under way, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._under_way and not self.local.has(key)]

    def ask(self, keys: Sequence[bytes], n_bytes: int) -> Asking | None:
        """Which of at most ``KEYS_MAX`` keys peers say to have; ``None``: there is nobody to ask."""
        return self._link.ask(keys, n_bytes) if self._link is not None and self.is_linked else None

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
                come[key] = Entry(encoded, encoded.n * self._token_s())
        self._close(fetch for fetch, _ in by_fetch.values())
        return come

    def _close(self, fetches: Iterable[Fetch]) -> None:
        """Those of which no key is wanted any more."""
        used = {id(fetch) for fetch, _ in self._under_way.values()}
        for fetch in fetches:
            if id(fetch) not in used:
                fetch.close()
