"""Reads blocks of other nodes: whom to ask is known from catalogues, so what nobody has costs nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from mesh.transport.bulk.blobs import Block
from node.cache.stats import CacheStats, TierCount

__all__ = ["MeshCache"]

READ_WITHIN_S = 10.0


class MeshCache:
    """What all readers of this node use. Nothing is raised: what did not come is a miss."""

    def __init__(self) -> None:
        self._stats = CacheStats()

    @property
    def stats(self) -> CacheStats:
        return self._stats

    def claimed(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether another node says that it has it. Costs no message."""
        return [False] * len(keys)

    def expected_s(self, n_bytes: int) -> float:
        """How long reading so many bytes would take, as recent reads went."""
        return float("inf")

    async def read(
        self, keys: Sequence[bytes], *, within_s: float = READ_WITHIN_S
    ) -> AsyncGenerator[list[Block | None], None]:
        """One answer for each key, in the order asked, in lists as they arrive; ``None`` is a miss.

        The lists together are as long as ``keys``. Payloads are views of the batch they came in: who keeps
        one for long copies it. Their digests have been checked.
        """
        yield [None] * len(keys)

    def child_told(self, *, memory: TierCount, disk: TierCount, misses: int) -> None:
        """What the compute process has found in its own tiers, and nowhere, since that process started."""
