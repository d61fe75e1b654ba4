"""Which of many things to let go of: the one that saves fewest seconds per byte (GDSF, Cherkasova 1998).

    value = age of the cache when last used + uses × seconds to make again / bytes

Whatever is let go sets the age to its value, so that what was precious once but is used no more sinks
below what comes in later.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Gdsf"]

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Item:
    n_bytes: int
    cost_s: float
    uses: int
    value: float
    turn: int


class Gdsf(Generic[K]):
    """Keeps the order; the things themselves are the owner's."""

    def __init__(self) -> None:
        self._items: dict[K, _Item] = {}
        # Entries whose item has been used or dropped since are skipped; ``_shrink`` bounds their number.
        self._heap: list[tuple[float, int, K]] = []
        self._age = 0.0
        self._turn = 0
        self.n_bytes = 0

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, key: K, n_bytes: int, cost_s: float) -> None:
        """New, or with another size or cost than before; the uses so far are kept."""
        uses = self._items[key].uses if key in self._items else 0
        self.drop(key)
        self.n_bytes += n_bytes
        self._items[key] = _Item(n_bytes, cost_s, uses, 0.0, 0)
        self.use(key)

    def use(self, key: K) -> None:
        item = self._items[key]
        self._turn += 1
        item.uses += 1
        item.turn = self._turn
        item.value = self._age + item.uses * item.cost_s / max(item.n_bytes, 1)
        heapq.heappush(self._heap, (item.value, item.turn, key))
        self._shrink()

    def reprice(self, key: K, cost_s: float) -> None:
        """To make it again costs more or less than was said; that is no use of it."""
        item = self._items[key]
        if item.cost_s == cost_s:
            return
        self._turn += 1
        item.turn = self._turn
        item.value += item.uses * (cost_s - item.cost_s) / max(item.n_bytes, 1)
        item.cost_s = cost_s
        heapq.heappush(self._heap, (item.value, item.turn, key))
        self._shrink()

    def drop(self, key: K) -> None:
        """It is gone already, for another reason."""
        item = self._items.pop(key, None)
        if item is not None:
            self.n_bytes -= item.n_bytes

    def least(self) -> Iterator[K]:
        """From the one to let go of first; the owner calls ``let_go`` on those it lets go of."""
        kept = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                _, turn, key = entry
                item = self._items.get(key)
                if item is None or item.turn != turn:
                    continue
                kept.append(entry)
                yield key
        finally:
            for entry in kept:
                if entry[2] in self._items:
                    heapq.heappush(self._heap, entry)

    def let_go(self, key: K) -> None:
        self._age = max(self._age, self._items[key].value)
        self.drop(key)

    def value_of(self, n_bytes: int, cost_s: float) -> float:
        """What something new would be worth."""
        return self._age + cost_s / max(n_bytes, 1)

    def value(self, key: K) -> float:
        return self._items[key].value

    def n_bytes_of(self, key: K) -> int:
        return self._items[key].n_bytes

    def _shrink(self) -> None:
        if len(self._heap) > 2 * len(self._items) + 64:
            self._heap = [(item.value, item.turn, key) for key, item in self._items.items()]
            heapq.heapify(self._heap)
