"""How much a server holds for others at once, in bytes and in requests, and for one peer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from mesh.ids import NodeId
from mesh.units import MIB

__all__ = ["Budget", "BudgetConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """
    Raises:
        ValueError: A peer's share is larger than the whole, or the whole too small for one request.
    """

    bytes_max: int = 64 * MIB
    """Six full batches, or twenty ranges; a Pi with 1 GB can spare it."""
    peer_bytes_max: int = 24 * MIB
    """One peer's share: most of the room is left when one stands still."""
    requests_max: int = 64
    peer_requests_max: int = 12
    wait_s: float = 0.5
    """How long a request waits for room before it is told to ask somebody else."""

    def __post_init__(self) -> None:
        if not 0 < self.peer_bytes_max <= self.bytes_max or not self.wait_s >= 0:
            raise ValueError("0 < peer_bytes_max <= bytes_max, and wait_s is not negative")
        if not 0 < self.peer_requests_max <= self.requests_max:
            raise ValueError("0 < peer_requests_max <= requests_max")


@dataclass(slots=True)
class _Use:
    n_bytes: int = 0
    n_requests: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    peer: NodeId
    n_bytes: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)


class Budget:
    """First come, first served among those whose share allows it."""

    def __init__(self, config: BudgetConfig | None = None) -> None:
        self._config = config or BudgetConfig()
        self._all = _Use()
        self._by_peer: dict[NodeId, _Use] = {}
        self._waiting: deque[_Waiting] = deque()
        self.bytes_peak = 0

    @property
    def n_bytes(self) -> int:
        return self._all.n_bytes

    @contextlib.asynccontextmanager
    async def hold(self, peer: NodeId, n_bytes: int) -> AsyncIterator[bool]:
        """Whether there is room for ``n_bytes`` while the block runs; waits up to ``wait_s`` for it."""
        if not await self._take(peer, n_bytes):
            yield False
            return
        try:
            yield True
        finally:
            self._give_back(peer, n_bytes)

    async def _take(self, peer: NodeId, n_bytes: int) -> bool:
        if not self._waiting and self._fits(peer, n_bytes):
            self._count(peer, n_bytes, 1)
            return True
        if len(self._waiting) >= self._config.requests_max:
            return False
        waiting = _Waiting(peer, n_bytes)
        self._waiting.append(waiting)
        self._grant()
        try:
            async with asyncio.timeout(self._config.wait_s):
                await waiting.granted.wait()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiting.granted.is_set():
                self._give_back(peer, n_bytes)
            raise
        finally:
            if not waiting.granted.is_set():
                self._waiting.remove(waiting)
        return waiting.granted.is_set()

    def _fits(self, peer: NodeId, n_bytes: int) -> bool:
        config, use = self._config, self._by_peer.get(peer, _Use())
        return (
            self._all.n_bytes + n_bytes <= config.bytes_max
            and self._all.n_requests < config.requests_max
            and use.n_bytes + n_bytes <= config.peer_bytes_max
            and use.n_requests < config.peer_requests_max
        )

    def _count(self, peer: NodeId, n_bytes: int, n_requests: int) -> None:
        for use in (self._all, self._by_peer.setdefault(peer, _Use())):
            use.n_bytes += n_bytes
            use.n_requests += n_requests
            assert use.n_bytes >= 0 and use.n_requests >= 0, "what is given back was taken"
        if not self._by_peer[peer].n_requests:
            del self._by_peer[peer]
        self.bytes_peak = max(self.bytes_peak, self._all.n_bytes)

    def _give_back(self, peer: NodeId, n_bytes: int) -> None:
        self._count(peer, -n_bytes, -1)
        self._grant()

    def _grant(self) -> None:
        for waiting in list(self._waiting):
            if self._fits(waiting.peer, waiting.n_bytes):
                self._waiting.remove(waiting)
                self._count(waiting.peer, waiting.n_bytes, 1)
                waiting.granted.set()
