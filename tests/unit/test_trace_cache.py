"""The benchmark's stand-in for our store lets go of what the store lets go of."""

from __future__ import annotations

from node.compute.features.entry import EXACT, Encoded
from node.compute.features.store import Entry, LocalStore
from tests.benchmarks.trace_cache import GdsfCache, LruCache, belady, equal_cost_s, made_up, replay

BLOCK_BYTES = 100


class Store:
    """The real one, in memory only."""

    def __init__(self, n_blocks: int) -> None:
        self._store = LocalStore(None, n_blocks * BLOCK_BYTES, 0)
        self._entry = Entry(Encoded("raw", 1, 1, EXACT, bytes(BLOCK_BYTES)), 1.0)

    def has(self, key: int) -> bool:
        return key.to_bytes(32, "big") in self._store.catalogue().keys

    def use(self, key: int, position: int) -> None:
        name = key.to_bytes(32, "big")
        if self._store.get([name]) == [None]:
            self._store.put({name: self._entry})


def test_the_stand_in_hits_what_the_store_hits() -> None:
    requests = made_up(seed=1, n_requests=40)
    for n_blocks in (20, 100):
        assert replay(requests, GdsfCache(n_blocks, equal_cost_s)) == replay(requests, Store(n_blocks))


def test_nobody_hits_more_often_than_who_knows_the_future() -> None:
    requests = made_up(seed=2, n_requests=300)
    for n_blocks in (50, 400):
        best = belady(requests, n_blocks)
        for cache in (GdsfCache(n_blocks, equal_cost_s), LruCache(n_blocks)):
            hits, in_a_row, _ = replay(requests, cache)
            assert in_a_row <= hits <= best
