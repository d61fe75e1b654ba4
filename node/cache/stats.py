"""What the cache has done for this node since it started, by the tier that answered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

__all__ = ["CacheStats", "TierCount"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCount:
    """Blocks that one tier had, their bytes, and the seconds of computing that this spared."""

    hits: int = 0
    n_bytes: int = 0
    saved_s: float = 0.0

    def plus(self, hits: int, n_bytes: int, saved_s: float) -> TierCount:
        return replace(
            self, hits=self.hits + hits, n_bytes=self.n_bytes + n_bytes, saved_s=self.saved_s + saved_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Counts up from the start of the process. A block that no tier had is a miss, and was computed."""

    memory: TierCount = field(default_factory=TierCount)
    disk: TierCount = field(default_factory=TierCount)
    peers: TierCount = field(default_factory=TierCount)
    misses: int = 0

    @property
    def saved_s(self) -> float:
        return self.memory.saved_s + self.disk.saved_s + self.peers.saved_s
