"""Reads blocks of other nodes: whom to ask is known from catalogues, so what nobody has costs nothing.

    keys ─▶ holders of each, by ring and catalogues ─▶ windows ─▶ batches by holder, at once ─▶ in order
                                                                     │ late, or lacks some
                                                                     └─▶ the other holder

The keys of one window are asked of all their holders at once; the next window is under way while one is used.
Windows grow, so the first blocks come soon and many cost few requests. What comes to an owner that lacked it
is put into its share: that is the pull-through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.cache.catalogue import Catalogues
from mesh.cache.ring import Ring
from mesh.ids import NodeId
from mesh.transport.bulk.blobs import KEYS_MAX, Block, Holder
from mesh.transport.bulk.client import BulkClient
from mesh.units import MIB
from node.cache.pace import Pace
from node.cache.share import Share
from node.cache.stats import CacheStats, TierCount

__all__ = ["Knowledge", "MeshCache"]

log = logging.getLogger(__name__)

READ_WITHIN_S = 10.0
BATCH_BYTES = MIB
WINDOW_BYTES = 512 << 10
"""Of the first window; each next one is twice as large, up to ``WINDOW_BYTES_MAX``."""
WINDOW_BYTES_MAX = 8 * MIB
AHEAD = 1
"""Windows under way beside the one that is used: 16 MiB in memory for each reader."""
BLOCK_BYTES = 64 << 10
"""Of a block, before one has been seen: 64 tokens of int8 features at d = 576 are 39 KB."""
ASKED_MAX = 3
"""Holders of a key that are asked, one after the other: its owners, and one more."""
PULLS_MAX = 4
"""Pull-throughs at once; what comes beyond is left to the next sweep."""


class Knowledge(Protocol):
    """What the core knows (``mesh.cache.sharding.Sharding``)."""

    @property
    def ring(self) -> Ring: ...
    @property
    def catalogues(self) -> Catalogues: ...
    def holders(self, key: bytes, now: float) -> list[NodeId]: ...


@dataclass(frozen=True, slots=True)
class _Window:
    """Keys that are asked for together. ``groups``: positions in it, by who is said to have the key."""

    keys: Sequence[bytes]
    groups: dict[tuple[NodeId, ...], list[int]]


class MeshCache:
    """What all readers of this node use. Nothing is raised: what did not come is a miss.

    Args:
        where: A holder with the address at which it was proven, or ``None`` if it is not known yet.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        knowledge: Callable[[], Knowledge],
        client: BulkClient,
        share: Share,
        where: Callable[[NodeId], Holder | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._knowledge = knowledge
        self._client = client
        self._share = share
        self._where = where
        self._clock = clock
        self._pace = Pace()
        self._block_bytes = float(BLOCK_BYTES)
        self._peers = TierCount()
        self._child = (TierCount(), TierCount(), 0)
        self._n_reading = 0
        self._reading_since = 0.0
        self._n_bytes_read = 0
        self._pulls: set[asyncio.Task[None]] = set()

    @property
    def stats(self) -> CacheStats:
        memory, disk, misses = self._child
        return CacheStats(memory=memory, disk=disk, peers=self._peers, misses=misses)

    def claimed(self, keys: Sequence[bytes]) -> list[bool]:
        """Of each key, whether another node says that it has it. Costs no message; 3 µs per key and node."""
        knowledge, now = self._knowledge(), self._clock()
        return [bool(knowledge.holders(key, now)) for key in keys]

    def expected_s(self, n_bytes: int) -> float:
        """How long reading so many bytes would take, as recent reads went."""
        return self._pace.expected_s(n_bytes)

    async def read(
        self, keys: Sequence[bytes], *, within_s: float = READ_WITHIN_S
    ) -> AsyncGenerator[list[Block | None], None]:
        """One answer for each key, in the order asked, in lists as they arrive; ``None`` is a miss.

        The lists together are as long as ``keys``. Payloads are views of the batch they came in: who keeps
        one for long copies it. Their digests have been checked.
        """
        until = self._clock() + within_s
        under_way: deque[asyncio.Task[list[Block | None]]] = deque()
        at, n_bytes = 0, WINDOW_BYTES
        try:
            while at < len(keys) or under_way:
                while at < len(keys) and len(under_way) <= AHEAD:
                    window = self._window(keys, at, n_bytes)
                    under_way.append(asyncio.create_task(self._fetch(window, until), name="cache.window"))
                    at += len(window.keys)
                    n_bytes = min(2 * n_bytes, WINDOW_BYTES_MAX)
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def child_told(self, *, memory: TierCount, disk: TierCount, misses: int) -> None:
        """What the compute process has found in its own tiers, and nowhere, since that process started."""
        self._child = (memory, disk, misses)

    # ── one window ──────────────────────────────────────────────────────────────────────────────────

    def _window(self, keys: Sequence[bytes], at: int, n_bytes: int) -> _Window:
        """As many keys from ``at`` on as make ``n_bytes``; those that nobody has make none."""
        knowledge, now = self._knowledge(), self._clock()
        groups: dict[tuple[NodeId, ...], list[int]] = {}
        stop, n_left = at, n_bytes / self._block_bytes
        while stop < len(keys) and stop - at < 4 * KEYS_MAX and n_left > 0:
            holders = tuple(knowledge.holders(keys[stop], now)[:ASKED_MAX])
            if holders:
                groups.setdefault(holders, []).append(stop - at)
                n_left -= 1
            stop += 1
        return _Window(keys[at:stop], groups)

    async def _fetch(self, window: _Window, until: float) -> list[Block | None]:
        answers: list[Block | None] = [None] * len(window.keys)
        within_s = until - self._clock()
        if not window.groups or within_s <= 0:
            return answers
        lot = max(1, min(KEYS_MAX, int(BATCH_BYTES / self._block_bytes)))
        batches = [
            (holders, positions[start : start + lot])
            for holders, positions in window.groups.items()
            for start in range(0, len(positions), lot)
        ]
        self._begin()
        found: dict[bytes, Block] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for holders, positions in batches:
                    wanted = [window.keys[position] for position in positions]
                    group.create_task(self._ask(holders, wanted, within_s, found), name="cache.batch")
        finally:
            self._end(sum(len(block.payload) for block in found.values()))
        if found:
            mean = sum(len(block.payload) for block in found.values()) / len(found)
            self._block_bytes = max(1.0, 0.8 * self._block_bytes + 0.2 * mean)
            self._count(found)
            self._pull_through(list(found.values()))
        for positions in window.groups.values():
            for position in positions:
                answers[position] = found.get(window.keys[position])
        return answers

    async def _ask(
        self, nodes: Sequence[NodeId], keys: Sequence[bytes], within_s: float, found: dict[bytes, Block]
    ) -> None:
        holders = [holder for node in nodes if (holder := self._where(node)) is not None]
        if holders:
            found |= await self._client.read_blocks(
                keys, holders, within_s=within_s, bytes_max=BATCH_BYTES, answered=self._answered
            )

    def _answered(self, node: NodeId, n_found: int, missing: Sequence[bytes]) -> None:
        catalogues, now = self._knowledge().catalogues, self._clock()
        was_trusted = catalogues.is_trusted(node, now)
        if not catalogues.answered(node, n_found, missing, now) and was_trusted:
            log.warning("cache_distrust node=%s why=it lacks more than its catalogue explains", node)

    # ── what follows from it ────────────────────────────────────────────────────────────────────────

    def _count(self, found: dict[bytes, Block]) -> None:
        saved_s = sum(self._share.cost_s(block) for block in found.values())
        n_bytes = sum(len(block.payload) for block in found.values())
        self._peers = self._peers.plus(len(found), n_bytes, saved_s)

    def _pull_through(self, blocks: Sequence[Block]) -> None:
        view = self._knowledge().ring.view
        if view is None or not self._share.quota_bytes or len(self._pulls) >= PULLS_MAX:
            return
        own = [block for block in blocks if self._me in view.owners(block.key)]
        if own:
            task = asyncio.create_task(self._keep(own), name="cache.pull-through")
            self._pulls.add(task)
            task.add_done_callback(self._pulls.discard)

    async def _keep(self, blocks: Sequence[Block]) -> None:
        await self._share.put(blocks)

    def _begin(self) -> None:
        if not self._n_reading:
            self._reading_since, self._n_bytes_read = self._clock(), 0
        self._n_reading += 1

    def _end(self, n_bytes: int) -> None:
        """What comes side by side shares the link, so it is counted as one read."""
        self._n_reading -= 1
        self._n_bytes_read += n_bytes
        if not self._n_reading:
            self._pace.read(self._n_bytes_read, self._clock() - self._reading_since)
