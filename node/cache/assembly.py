"""The cache of one node, put together: what ``node.agent`` starts, tells facts, and passes to its readers."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from coordinator.stack import Cores
from mesh.agreement.membership import Standing
from mesh.cache.moves import MovesConfig
from mesh.cache.ring import RingEpoch
from mesh.cache.sharding import Sharding
from mesh.core import Fact, Message
from mesh.facts import LinkUp
from mesh.ids import EPOCH_ZERO, NodeId
from mesh.messages import CacheReport, ClearShare, NodeInfo
from mesh.messages.cache import CacheTier
from mesh.transport.bulk.blobs import Holder
from mesh.transport.bulk.client import BulkClient
from mesh.transport.bulk.server import BulkServer
from mesh.transport.bus import Heard
from mesh.transport.identity import Identity
from mesh.wire import MESH
from node.cache.link import LinkServer
from node.cache.mesh_cache import MeshCache
from node.cache.rounds import Rounds
from node.cache.share import Share
from node.cache.stats import TierCount
from node.compute.features.link import Tally, Tier
from node.files.blobs import FileBlobs, WithFiles
from node.peers import Peers

__all__ = ["NodeCache"]

log = logging.getLogger(__name__)

REPORT_EVERY_S = 2.0
AGAIN_S = 5.0
NO_RING = RingEpoch(EPOCH_ZERO, 0)
"""What a node says that has not heard of any."""


class NodeCache:
    """Open it with ``async with`` around ``run``; its ``server`` has the routes for the data plane.

    Args:
        directory: Of this node's packs.
        cores, peers: Asked when needed: they are made after the data plane.
        info: What this node says of itself now.
        files: What it gives to peers beside its packs.
        learn: Takes facts for the cores. ``publish``: sends a message to everybody.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        identity: Identity,
        directory: Path,
        quota_bytes: int,
        cores: Callable[[], Cores],
        peers: Callable[[], Peers],
        info: Callable[[], NodeInfo],
        learn: Callable[[Fact], None],
        publish: Callable[[Message], None] = lambda message: None,
        files: FileBlobs | None = None,
        moves: MovesConfig | None = None,
    ) -> None:
        def sharding() -> Sharding:
            return cores().sharding

        self._me = me
        self._cores = cores
        self._peers = peers
        self._info = info
        self._publish = publish
        self._said: CacheReport | None = None  # on this broker
        self._n_clears = 0
        self._clearing: asyncio.Task[None] | None = None
        self.share = Share(directory, quota_bytes, pace=self._tokens_per_s)
        self.client = BulkClient(identity.client_context(), self._epoch)
        store = self.share if files is None else WithFiles(self.share, files)
        self.server = BulkServer(store, self._epoch, catalogue=lambda: MESH.encode(sharding().whole()))
        self.reads = MeshCache(
            me=me, knowledge=sharding, client=self.client, share=self.share, where=self.where
        )
        self.rounds = Rounds(
            me=me,
            knowledge=sharding,
            client=self.client,
            share=self.share,
            where=self.where,
            learn=learn,
            moves=moves,
        )
        self.share.worth = self.rounds.worth
        self._link = LinkServer(self.reads, profiles=self._profiles, on_tally=self._on_tally)

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.__aexit__(kind, error, trace)
        await self.share.close()

    async def run(self) -> None:
        """Until cancelled. A fault in here does not end a node that computes, coordinates or hosts."""
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.rounds.run(), name="cache.rounds")
                    group.create_task(self._report(), name="cache.report")
            except* Exception:
                log.exception("cache_failed; going on in %g s", AGAIN_S)
            await asyncio.sleep(AGAIN_S)

    def on_fact(self, fact: Fact) -> None:
        if isinstance(fact, LinkUp):
            self._said = None  # the broker may be new
        self.rounds.on_fact(fact)

    def on_heard(self, heard: Heard) -> None:
        if isinstance(heard.message, ClearShare) and (self._clearing is None or self._clearing.done()):
            log.warning("cache_cleared by=%s", heard.sender)
            self._clearing = asyncio.create_task(self._clear(), name="cache.clear")

    @property
    def report(self) -> CacheReport:
        """What this node holds, and what the cache has done for it."""
        stats, info = self.reads.stats, self._info()
        return CacheReport(
            node=info.node,
            incarnation=info.incarnation,
            quota_bytes=self.share.quota_bytes,
            held_bytes=self.share.n_bytes,
            blocks=self.share.n_blocks,
            memory=_told(stats.memory),
            disk=_told(stats.disk),
            peers=_told(stats.peers),
            misses=stats.misses,
            given_bytes=self.rounds.moves.n_bytes_sent,
            clears=self._n_clears,
        )

    async def _report(self) -> None:
        while True:
            report = self.report
            if report != self._said:
                self._said = report
                self._publish(report)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _clear(self) -> None:
        await self.share.clear()
        self._n_clears += 1
        self._publish(self.report)

    async def serve_link(self, sock: socket.socket) -> None:
        """The compute process's reads, until it closes its end."""
        await self._link.serve(sock)

    def where(self, node: NodeId) -> Holder | None:
        """Where a node has answered for itself."""
        place = self._peers().place(node)
        return Holder(node, *place) if place is not None else None

    def _epoch(self) -> RingEpoch:
        return self._cores().sharding.epoch or NO_RING

    def _profiles(self) -> list[str]:
        """How the other nodes that are here compute features."""
        members = self._cores().membership.members
        return [
            member.info.features_profile
            for node, member in members.items()
            if node != self._me and member.standing is Standing.ALIVE
            if member.info is not None and member.info.features_profile
        ]

    def _on_tally(self, tally: Tally) -> None:
        self.reads.child_told(memory=_count(tally.memory), disk=_count(tally.disk), misses=tally.computed)

    def _tokens_per_s(self) -> float | None:
        rates = self._info().rates
        return rates.features_tokens_per_s if rates is not None else None


def _count(tier: Tier) -> TierCount:
    return TierCount(hits=tier.hits, n_bytes=tier.n_bytes, saved_s=tier.saved_s)


def _told(tier: TierCount) -> CacheTier:
    return CacheTier(hits=tier.hits, bytes=tier.n_bytes, saved_s=round(tier.saved_s, 3))
