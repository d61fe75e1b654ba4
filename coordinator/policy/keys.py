"""Small numbers for hashable keys, so that what depends on a key can be a row of an array."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Keys"]

K = TypeVar("K", bound=Hashable)


class Keys(Generic[K]):
    """Numbers keys from 0, counts their uses, and gives a number free again to the next new key."""

    def __init__(self) -> None:
        self._number: dict[K, int] = {}
        self._keys: list[K | None] = []
        self._uses: list[int] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """Numbers ever used at once: the length an array over keys needs."""
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._number

    def take(self, key: K) -> tuple[int, bool]:
        """The key's number, and whether it is new (its row must be filled)."""
        number = self._number.get(key)
        if number is not None:
            self._uses[number] += 1
            return number, False
        if self._free:
            number = self._free.pop()
            self._keys[number], self._uses[number] = key, 1
        else:
            number = len(self._keys)
            self._keys.append(key)
            self._uses.append(1)
        self._number[key] = number
        return number, True

    def release(self, number: int) -> None:
        self._uses[number] -= 1
        if self._uses[number] == 0:
            key = self._keys[number]
            assert key is not None, "a number in use has a key"
            del self._number[key]
            self._keys[number] = None
            self._free.append(number)

    def items(self) -> list[tuple[K, int]]:
        """Keys in use with their numbers."""
        return list(self._number.items())

    def get(self, key: K) -> int | None:
        return self._number.get(key)
