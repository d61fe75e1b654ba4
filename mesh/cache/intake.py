"""What this node takes of what others send it: never more than it has room for, whoever sends at once.

An offer is answered with the blocks that are wanted, and the bytes for those are set aside until they have
arrived, failed, or their time is over. What is held and what is set aside together never exceed the quota.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mesh.cache.moves import Block
from mesh.cache.ring import KEY_BYTES
from mesh.digests import DIGEST_BYTES

__all__ = ["Intake", "IntakeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeConfig:
    """What a node expects at most.

    Raises:
        ValueError: A bound is not positive.
    """

    block_bytes_max: int = 64 << 20
    """The largest block anybody may send: keys and values of 64 tokens of a model with 70 billion weights,
    four times over."""
    expected_max: int = 4096
    """Blocks on their way at once, from all senders."""
    patience_s: float = 30.0
    """A block offered and not there by then is no longer expected: its sender is slow, or dead."""

    def __post_init__(self) -> None:
        if min(self.block_bytes_max, self.expected_max, self.patience_s) <= 0:
            raise ValueError("every bound of an intake must be positive")


class Intake:
    """The door of one node's store. ``now``: seconds on this node's clock."""

    def __init__(self, config: IntakeConfig | None = None) -> None:
        self.config = config or IntakeConfig()
        self._expected: dict[bytes, tuple[Block, float]] = {}  # and until when
        self._n_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """Set aside for blocks on their way; the store counts it as used."""
        return self._n_bytes

    def offered(
        self, blocks: Iterable[Block], has: Callable[[bytes], bool], free_bytes: int, now: float
    ) -> list[Block]:
        """Those of the blocks that are wanted; room for them is set aside.

        Args:
            has: Whether the store holds a key.
            free_bytes: What the store has room for, with nothing set aside: its quota less what it holds,
                more by what it would let go of for these.
        """
        self._let_go_of_late(now)
        wanted = []
        for block in blocks:
            if not _is_sound(block) or block.n_bytes > self.config.block_bytes_max:
                continue
            if has(block.key) or block.key in self._expected:
                continue
            if len(self._expected) >= self.config.expected_max:
                break
            if self._n_bytes + block.n_bytes > free_bytes:
                continue  # a smaller one may still fit
            self._expected[block.key] = (block, now + self.config.patience_s)
            self._n_bytes += block.n_bytes
            wanted.append(block)
        return wanted

    def arrived(self, key: bytes, digest: bytes, n_bytes: int, now: float) -> bool:
        """A payload is here, and this is its digest; whether the store should keep it.

        Not what was announced, by its digest or its size, nor what was not: a miss, and worth a line in the
        log.
        """
        self._let_go_of_late(now)
        expected = self._expected.get(key)
        if expected is None:
            return False
        block, _ = expected
        self.failed(key)
        return block.digest == digest and block.n_bytes == n_bytes

    def failed(self, key: bytes) -> None:
        """It will not come: its room is free again."""
        expected = self._expected.pop(key, None)
        if expected is not None:
            self._n_bytes -= expected[0].n_bytes

    def _let_go_of_late(self, now: float) -> None:
        while self._expected:
            key, (_, until) = next(iter(self._expected.items()))  # the earliest: all wait equally long
            if until > now:
                return
            self.failed(key)


def _is_sound(block: Block) -> bool:
    return len(block.key) == KEY_BYTES and len(block.digest) == DIGEST_BYTES and block.n_bytes >= 0
