"""What the cache does all the time, whoever reads: says what is held, draws views, fetches catalogues, moves.

    share ── what is held ──▶ HeldChanged ──▶ core ──▶ DrawView, FetchCatalogue, RingChanged ──▶ here
                                                                                             │
    other nodes ◀── parcels ── Moves ◀── new blocks, new ring, every so often: all of them ──┘

Blocks that the compute process has made are offered to their owners at once (what came from a peer, that peer
offers to the others); a change of the ring, and every ``sweep_s``, looks at all of them. What fails is tried
again by a later sweep.

Catalogues claim up to one key in a hundred wrongly, and nobody would send a block to an owner that seems to
have it. So the owners that claim a block are asked whether they have it (``_prove``): 32 bytes a block, once
after it was written or the ring has changed, and every ``PROVE_EVERY_S``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from mesh.cache.facts import (
    CatalogueFetched,
    CatalogueRefused,
    DrawView,
    FetchCatalogue,
    HeldChanged,
    RingChanged,
    ViewDrawn,
)
from mesh.cache.moves import Block as Known
from mesh.cache.moves import Moves, MovesConfig, Parcel, is_surplus
from mesh.cache.ring import SPARE_WORTH, RingSpec, RingView
from mesh.core import Fact
from mesh.errors import DecodeError
from mesh.ids import NodeId
from mesh.messages import CatalogueWhole
from mesh.transport.bulk.blobs import BATCH_BYTES_MAX, Block, Holder, PutVerdict
from mesh.transport.bulk.client import BulkClient, PutRefusal
from mesh.wire import MESH
from node.cache.mesh_cache import Knowledge
from node.cache.share import LOOK_S, Share
from node.logs import say

__all__ = ["Rounds"]

log = logging.getLogger(__name__)

HELD_PIECE = 1000
"""Keys in one fact: 10 ms of the core's time."""
SURPLUS_WORTH = 0.01
"""Of a copy that only this node's own readers need: both owners have one."""
PROVE_S = 1.0
"""From one lot of keys to the next."""
PROVE_IDLE_S = 3.0
"""And while owners have yet to take what they are to have, or do not answer."""
PROVE_EVERY_S = 600.0
PROVE_LOT = 4096
LEAST_S = 0.01
IDLE_S = 1.0
"""How soon at the latest it is looked for something to move."""


class Rounds:
    """``run`` until cancelled; ``on_fact`` hears what the core says. ``learn`` takes what is told to it."""

    def __init__(
        self,
        *,
        me: NodeId,
        knowledge: Callable[[], Knowledge],
        client: BulkClient,
        share: Share,
        where: Callable[[NodeId], Holder | None],
        learn: Callable[[Fact], None],
        moves: MovesConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._knowledge = knowledge
        self._client = client
        self._share = share
        self._where = where
        self._learn = learn
        self._clock = clock
        self.moves = Moves(me, moves)
        self._held: dict[bytes, Known] = {}  # as last told
        self._fresh: dict[bytes, Known] = {}  # new here, and not yet offered to their owners
        self._unproven: dict[bytes, None] = {}  # held, and not known to lie with all owners
        self._offered: set[bytes] = set()  # of these, since the last whole sweep; bound: held
        self._must_sweep = False
        self._sweep_at = clock()
        self._quotas: Mapping[NodeId, int] = {}
        self._wanted_spec: RingSpec | None = None
        self._has_spec = asyncio.Event()
        self._wake = asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()  # bound: fetches, and parcels in flight

    def worth(self, key: bytes) -> float:
        """Of a copy here, against the only one there is; see ``mesh.cache.ring.SPARE_WORTH``."""
        knowledge = self._knowledge()
        view = knowledge.ring.view
        if view is None:
            return 1.0
        owners = view.owners(key)
        if self._me in owners:
            return 1.0 if self._me == owners[0] else SPARE_WORTH
        surplus = is_surplus(key, self._me, knowledge.ring, knowledge.catalogues.claims)
        return SURPLUS_WORTH if surplus else 1.0

    def on_fact(self, fact: Fact) -> None:
        match fact:
            case DrawView(spec=spec):
                self._wanted_spec = spec
                self._has_spec.set()
            case RingChanged(view=view):
                self._on_ring(view)
            case FetchCatalogue(node=node):
                self._start(self._fetch(node), f"cache.catalogue-{node}")
            case CatalogueRefused(node=node):
                log.warning("cache_catalogue_refused node=%s why=it claims more than its keys need", node)
            case _:
                pass

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell_held(), name="cache.held")
                group.create_task(self._draw(), name="cache.draw")
                group.create_task(self._move(), name="cache.moves")
                group.create_task(self._prove(), name="cache.proof")
        finally:
            for job in self._jobs:
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)

    # ── what is held ────────────────────────────────────────────────────────────────────────────────

    async def _tell_held(self) -> None:
        self._learn(HeldChanged())  # this life holds nothing yet, whatever the one before did
        while True:
            news = await self._share.news()
            if news:
                await self._tell(news)
            await asyncio.sleep(LOOK_S)

    async def _tell(self, news: Mapping[bytes, Known | None]) -> None:
        added = [key for key, known in news.items() if known is not None and key not in self._held]
        dropped = [key for key, known in news.items() if known is None and key in self._held]
        for key in dropped:
            del self._held[key]
            self._fresh.pop(key, None)
            self._unproven.pop(key, None)
            self._offered.discard(key)
        self._held |= {key: known for key, known in news.items() if known is not None}
        self._unproven |= dict.fromkeys(added)
        received = self._share.take_received()
        self._fresh |= {key: self._held[key] for key in added if key not in received}
        if added:
            self._wake.set()
        # What is gone is said first: peers ask for it in vain.
        for start in range(0, len(dropped), HELD_PIECE):
            self._learn(HeldChanged(dropped=tuple(dropped[start : start + HELD_PIECE])))
            await asyncio.sleep(0)
        for start in range(0, len(added), HELD_PIECE):
            self._learn(HeldChanged(added=tuple(added[start : start + HELD_PIECE])))
            await asyncio.sleep(0)

    # ── ring and catalogues ─────────────────────────────────────────────────────────────────────────

    async def _draw(self) -> None:
        while True:
            await self._has_spec.wait()
            self._has_spec.clear()
            assert self._wanted_spec is not None
            view = await asyncio.to_thread(RingView, self._wanted_spec)
            if not self._has_spec.is_set():  # else a newer one is wanted by now
                self._learn(ViewDrawn(view))

    def _on_ring(self, view: RingView) -> None:
        if view.quotas == self._quotas:
            return  # another number for the same
        self._quotas = view.quotas
        n = len(view.members)
        text = f"the mesh's memory is shared by {n} node{'s' if n != 1 else ''}"
        say(log, "cache_ring", text, epoch=str(view.epoch), members=list(view.members))
        self._must_sweep = True
        self._unproven = dict.fromkeys(self._held)
        self._wake.set()

    async def _fetch(self, node: NodeId) -> None:
        whole: CatalogueWhole | None = None
        try:
            holder = self._where(node)
            content = await self._client.catalogue(holder) if holder is not None else None
            if content is not None:
                message = MESH.decode(content)
                whole = message if isinstance(message, CatalogueWhole) else None
        except DecodeError as error:
            log.warning("cache_catalogue_refused node=%s why=%s", node, error)
        finally:
            self._learn(CatalogueFetched(node, whole))

    # ── moves ───────────────────────────────────────────────────────────────────────────────────────

    async def _move(self) -> None:
        moves = self.moves
        while True:
            knowledge, now = self._knowledge(), self._clock()
            ring, claims = knowledge.ring, knowledge.catalogues.claims
            if not self._is_alone:
                if self._must_sweep or moves.wants_sweep(now) or (moves.is_idle and now >= self._sweep_at):
                    self._begin_sweep(self._held.values(), now)
                    self._offered.clear()
                    self._sweep_at = now + moves.config.sweep_s
                    self._start(self._share.reweigh(), "cache.reweigh")
                elif self._fresh and moves.is_idle:
                    self._begin_sweep(self._fresh.values(), now)
                for parcel in moves.tick(ring, claims, now):
                    self._start(self._send(parcel), f"cache.parcel-{parcel.number}")
            wait_s = IDLE_S if self._is_alone else min(max(moves.wake_at - self._clock(), LEAST_S), IDLE_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    @property
    def _is_alone(self) -> bool:
        view = self._knowledge().ring.view
        return view is None or not set(view.members) - {self._me}

    def _begin_sweep(self, blocks: Iterable[Known], now: float) -> None:
        knowledge = self._knowledge()
        self.moves.start(tuple(blocks), knowledge.ring, knowledge.catalogues.claims, now)
        self._fresh.clear()
        self._must_sweep = False

    async def _send(self, parcel: Parcel) -> None:
        n_bytes: int | None = None
        try:
            n_bytes = await self._offer(parcel)
        finally:
            if n_bytes is not None:
                self.moves.done(parcel.number, n_bytes, self._clock())
            else:
                self.moves.failed(parcel.number, self._clock())
            self._wake.set()

    async def _offer(self, parcel: Parcel) -> int | None:
        """How many bytes the receiver took, which takes what it lacks and has room for; ``None``: it failed.

        What is gone here meanwhile is left out.
        """
        holder = self._where(parcel.to)
        if holder is None:
            return None  # its address is not known yet
        n_bytes = 0
        keys = [block.key for block in parcel.blocks]
        while keys:
            found = await self._share.get_many(keys, BATCH_BYTES_MAX)
            blocks = [block for block in found if isinstance(block, Block)]
            keys = [key for key, block in zip(keys, found, strict=True) if isinstance(block, int)]
            if not blocks:
                break
            verdicts = await self._client.put_blocks(blocks, holder)
            if isinstance(verdicts, PutRefusal):
                return None
            n_bytes += sum(
                len(block.payload)
                for block, verdict in zip(blocks, verdicts, strict=True)
                if verdict is PutVerdict.STORED
            )
        return n_bytes

    # ── proof ───────────────────────────────────────────────────────────────────────────────────────

    async def _prove(self) -> None:
        again_at = self._clock() + PROVE_EVERY_S
        wait_s = PROVE_S
        while True:
            await asyncio.sleep(wait_s)
            if self._clock() >= again_at:
                again_at = self._clock() + PROVE_EVERY_S
                self._unproven = dict.fromkeys(self._held)
            if self._is_alone or not self._unproven:
                continue
            wait_s = PROVE_S if await self._prove_lot() else PROVE_IDLE_S

    async def _prove_lot(self) -> bool:
        """Whether anything came of it."""
        knowledge = self._knowledge()
        view, claims = knowledge.ring.view, knowledge.catalogues.claims
        assert view is not None, "there is a ring of several"
        lot = list(self._unproven)[:PROVE_LOT]
        asked: dict[NodeId, list[bytes]] = {}
        waiting: set[bytes] = set()
        offered: dict[bytes, Known] = {}
        for key in lot:
            for owner in view.owners(key):
                if owner == self._me:
                    continue
                if claims(owner, key):
                    asked.setdefault(owner, []).append(key)
                else:
                    waiting.add(key)
                    if key not in self._offered:  # it was not sent while its owner seemed to have it
                        self._offered.add(key)
                        offered[key] = self._held[key]
        self._fresh |= offered
        n_lacking = 0
        for owner, keys in asked.items():
            holder = self._where(owner)
            lacking = await self._client.lacking(keys, holder) if holder is not None else None
            if lacking is None:
                waiting.update(keys)
                continue
            knowledge.catalogues.lacks(owner, lacking)
            waiting.update(lacking)
            n_lacking += len(lacking)
            self._fresh |= {key: self._held[key] for key in lacking if key in self._held}
        for key in lot:
            if self._unproven.pop(key, key) is None and key in waiting and key in self._held:
                self._unproven[key] = None  # its turn comes after all others'
        if n_lacking or offered:
            log.debug("cache_proof lacking=%d of=%d", n_lacking, len(lot))
            self._wake.set()
        return len(waiting) < len(lot) or n_lacking > 0

    def _start(self, job: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(job, name=name)
        self._jobs.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cache: %s failed", task.get_name(), exc_info=error)
