"""Gets blobs and blocks from peers, and stores blocks there. Nothing is raised: what did not come is a miss.

    fetch           one blob, in ranges from all its holders at once; into memory or a file
    read_blocks     some blocks, from the owner; when it is late or lacks some, from the replica
    read_in_order   many blocks, batch after batch, the next ones under way while one is used
    put_blocks      blocks to one peer, which may refuse
    catalogue       what one peer says it holds
    lacking         which of some keys one peer has not got, whatever its catalogue says

Each miss is a line in the log that names the holder and the reason, at most one per holder every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mesh.cache.ring import RingEpoch
from mesh.ids import NodeId
from mesh.transport.bulk.allocator import keep_freed_memory
from mesh.transport.bulk.answers import Answer
from mesh.transport.bulk.blobs import (
    BATCH_BYTES_MAX,
    BLOCK_BYTES_MAX,
    KEYS_MAX,
    BlobRef,
    Block,
    Holder,
    PutVerdict,
)
from mesh.transport.bulk.exchange import Exchanges, Missed
from mesh.transport.bulk.gather import GATHER_RANGE_BYTES, Gatherer
from mesh.transport.bulk.ranges import Fault, Spans
from mesh.transport.bulk.store import BlobSink
from mesh.transport.bulk.waits import Waits
from mesh.units import MIB

__all__ = ["Answered", "BulkClient", "PutRefusal"]

Answered = Callable[[NodeId, int, Sequence[bytes]], None]
"""Hears of each holder's answer how many of the keys it had, and which it lacked (or was wrong about)."""

log = logging.getLogger(__name__)

HOLDERS_MAX = 16
"""Asked for one blob. If one of them lies, each may be asked for all of it once more: a bound on that."""
READ_BYTES = 1 * MIB
"""Of one batch, unless the caller knows better."""
READ_WITHIN_S = 3.0
PUT_WITHIN_S = 30.0
CATALOGUE_WITHIN_S = 10.0
_SAY_EVERY_S = 5.0
_SAID_MAX = 256


@dataclass(frozen=True, slots=True)
class PutRefusal:
    """A batch refused as a whole. ``status`` is HTTP's: 409 = old view, 507 = no room, 503 = busy."""

    reason: str
    status: int | None


class BulkClient:
    """One per process; open it with ``async with``. ``clock`` is monotonic, in seconds."""

    def __init__(
        self,
        context: ssl.SSLContext,
        view: Callable[[], RingEpoch],
        *,
        on_view: Callable[[RingEpoch, NodeId], None] = lambda view, peer: None,
        waits: Waits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exchanges = Exchanges(context, view, on_view)
        self.waits = waits or Waits()
        self._clock = clock
        self._said_at: dict[NodeId, float] = {}
        keep_freed_memory()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exchanges.pool.aclose()

    # ── blobs ───────────────────────────────────────────────────────────────────────────────────────

    async def fetch(
        self,
        blob: BlobRef,
        holders: Sequence[Holder],
        sink: BlobSink,
        *,
        within_s: float | None = None,
        range_bytes: int = GATHER_RANGE_BYTES,
        had: Spans | None = None,
    ) -> bool:
        """Whether ``sink`` now has the whole blob, its digest checked.

        ``had`` is what the sink has of it from an earlier, broken fetch; it grows, and the next may go on.

        Cost: the size of the blob once; when its digest was wrong, once more per holder at most.
        """
        holders = list(dict.fromkeys(holders))[:HOLDERS_MAX]
        try:
            async with asyncio.timeout(within_s):
                return await self._fetch(blob, holders, sink, range_bytes, had)
        except TimeoutError:
            log.warning("bulk_miss blob=%s why=not whole within %g s", blob, within_s)
            return False

    async def _fetch(
        self,
        blob: BlobRef,
        holders: Sequence[Holder],
        sink: BlobSink,
        range_bytes: int,
        had: Spans | None,
    ) -> bool:
        together = self._gatherer(blob, holders, sink, range_bytes, had)
        if not await together.run():
            log.warning("bulk_miss blob=%s why=%s", blob, "no room" if together.is_full else "no holder")
            return False
        if await sink.is_right():
            return True
        if had is not None:
            had.remove(0, blob.size)
        # One of those who brought bytes lied, and only a whole blob from one alone tells who.
        suspects = together.sources
        if len(suspects) == 1:
            self._say(suspects[0], f"blob {blob}", "wrong digest")
            holders = [holder for holder in holders if holder != suspects[0]]
        for holder in holders:
            if not await self._gatherer(blob, [holder], sink, range_bytes).run():
                continue
            if await sink.is_right():
                return True
            self._say(holder, f"blob {blob}", "wrong digest")
        log.warning("bulk_miss blob=%s why=wrong digest", blob)
        return False

    def _gatherer(
        self,
        blob: BlobRef,
        holders: Sequence[Holder],
        sink: BlobSink,
        range_bytes: int,
        had: Spans | None = None,
    ) -> Gatherer:
        return Gatherer(self._exchanges, self.waits, blob, holders, sink, self._say, range_bytes, had)

    # ── blocks ──────────────────────────────────────────────────────────────────────────────────────

    async def read_blocks(
        self,
        keys: Sequence[bytes],
        owners: Sequence[Holder],
        *,
        within_s: float = READ_WITHIN_S,
        bytes_max: int = READ_BYTES,
        expect: Mapping[bytes, bytes] | None = None,
        answered: Answered = lambda node, n_found, missing: None,
    ) -> dict[bytes, Block]:
        """The blocks that came in time; each key that is not in the result is a miss.

        The first owner is asked. The next is asked, for what is still wanted, as soon as it failed, lacked
        some, or is later than usual (``Waits``). ``expect`` names digests that are known from elsewhere.

        Payloads are views of the batch they came in: who keeps one small block for long copies it.
        """
        asks: dict[asyncio.Task[None], _Ask] = {}
        found: dict[bytes, Block] = {}
        wanted = list(dict.fromkeys(keys))
        bytes_max = min(bytes_max, BATCH_BYTES_MAX)
        left = deque(owners)
        until = self._clock() + within_s
        should_ask = True
        try:
            while len(found) < len(wanted) and (asks or left):
                now = self._clock()
                if now >= until:
                    break
                if should_ask and left:
                    ask = _Ask(self._exchanges, left.popleft(), self.waits, self._clock, answered)
                    rest = [key for key in wanted if key not in found]
                    task = asyncio.create_task(ask.run(rest, bytes_max, found, expect), name="bulk.blocks")
                    asks[task] = ask
                should_ask = False
                newest_due = max((ask.due_at for ask in asks.values()), default=now)
                pause_s = until - now if not left else min(until, newest_due) - now
                done, _ = await asyncio.wait(
                    asks, timeout=max(pause_s, 0.0), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    ask = asks.pop(task)
                    task.result()
                    if ask.missed is not None:
                        self._say(ask.holder, "blocks", str(ask.missed))
                    should_ask = True
                if not done:
                    should_ask = all(ask.due_at <= self._clock() for ask in asks.values())
        finally:
            for task, ask in asks.items():
                ask.give_up()
                task.cancel()
                if len(found) < len(wanted):
                    self._say(ask.holder, "blocks", f"not all within {within_s:g} s")
            await asyncio.gather(*asks, return_exceptions=True)
        if len(found) < len(wanted):
            log.debug("bulk_miss blocks=%d of=%d", len(wanted) - len(found), len(wanted))
        return found

    async def read_in_order(
        self,
        batches: Sequence[Sequence[bytes]],
        owners: Sequence[Holder],
        *,
        ahead: int = 2,
        within_s: float = READ_WITHIN_S,
        bytes_max: int = READ_BYTES,
    ) -> AsyncGenerator[list[Block | None], None]:
        """One list per batch, in order; ``None`` for a miss.

        ``ahead`` batches are under way beside the one in use. Nothing more is asked for while the caller does
        not take what came: at most ``1 + ahead`` batches are held.
        """
        under_way: deque[asyncio.Task[dict[bytes, Block]]] = deque()
        waiting = deque(batches)
        try:
            for batch in batches:
                while waiting and len(under_way) <= ahead:
                    read = self.read_blocks(waiting.popleft(), owners, within_s=within_s, bytes_max=bytes_max)
                    under_way.append(asyncio.create_task(read, name="bulk.in-order"))
                found = await under_way.popleft()
                yield [found.get(key) for key in batch]
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def put_blocks(
        self, blocks: Sequence[Block], holder: Holder, *, within_s: float = PUT_WITHIN_S
    ) -> list[PutVerdict] | PutRefusal:
        """What became of each block; or why none was looked at. One batch: the caller cuts.

        Raises:
            ValueError: More than one batch may hold.
        """
        if not 0 < len(blocks) <= KEYS_MAX or sum(len(block.payload) for block in blocks) > BATCH_BYTES_MAX:
            raise ValueError(f"a batch has 1 to {KEYS_MAX} blocks and at most {BATCH_BYTES_MAX} bytes")
        try:
            async with asyncio.timeout(within_s):
                return await self._exchanges.put_blocks(holder, blocks)
        except Missed as missed:
            self._say(holder, "put", str(missed))
            return PutRefusal(str(missed), missed.status)
        except TimeoutError:
            self._say(holder, "put", f"not done within {within_s:g} s")
            return PutRefusal(f"not done within {within_s:g} s", None)

    async def catalogue(self, holder: Holder, *, within_s: float = CATALOGUE_WITHIN_S) -> bytes | None:
        """As the holder says it: the reader decodes it, and believes it or not."""
        try:
            async with asyncio.timeout(within_s):
                return await self._exchanges.get_catalogue(holder)
        except Missed as missed:
            self._say(holder, "catalogue", str(missed))
        except TimeoutError:
            self._say(holder, "catalogue", f"not whole within {within_s:g} s")
        return None

    async def lacking(
        self, keys: Sequence[bytes], holder: Holder, *, within_s: float = CATALOGUE_WITHIN_S
    ) -> list[bytes] | None:
        """Those of the keys that the holder has not got; ``None``: it did not answer. No payload travels."""
        missing: list[bytes] = []
        try:
            async with asyncio.timeout(within_s):
                for start in range(0, len(keys), KEYS_MAX):
                    batch = await self._exchanges.get_blocks(holder, keys[start : start + KEYS_MAX], 1)
                    missing += batch.missing
            return missing
        except Missed as missed:
            self._say(holder, "keys", str(missed))
        except TimeoutError:
            self._say(holder, "keys", f"no answer within {within_s:g} s")
        return None

    def _say(self, holder: Holder, what: str, why: str) -> None:
        now = self._clock()
        is_due = now - self._said_at.get(holder.node, float("-inf")) >= _SAY_EVERY_S
        level = logging.WARNING if is_due else logging.DEBUG
        log.log(level, "bulk_miss holder=%s what=%s why=%s", holder, what, why)
        if is_due:
            self._said_at.pop(holder.node, None)
            self._said_at[holder.node] = now
        if len(self._said_at) > _SAID_MAX:
            del self._said_at[next(iter(self._said_at))]


class _Ask:
    """One holder, asked for some blocks until it has said of each whether it has it."""

    def __init__(
        self,
        exchanges: Exchanges,
        holder: Holder,
        waits: Waits,
        clock: Callable[[], float],
        answered: Answered,
    ) -> None:
        self._exchanges = exchanges
        self._answered = answered
        self.holder = holder
        self._waits = waits
        self._clock = clock
        self._asked_at = clock()
        self._begun_at: float | None = None
        self._length = 0
        self.missed: Missed | None = None

    @property
    def due_at(self) -> float:
        """When it is late."""
        if self._begun_at is None:
            return self._asked_at + self._waits.first_after_s
        return self._begun_at + self._waits.rest_after_s(self._length)

    async def run(
        self,
        keys: Sequence[bytes],
        bytes_max: int,
        found: dict[bytes, Block],
        expect: Mapping[bytes, bytes] | None,
    ) -> None:
        """Puts what it brings into ``found``."""
        wanted = list(keys)
        part: list[bytes] = []
        try:
            while wanted:
                part = wanted[:KEYS_MAX]
                self._asked_at, self._begun_at = self._clock(), None
                batch = await self._exchanges.get_blocks(self.holder, part, bytes_max, self._begin)
                self._end(batch.n_bytes)
                self._answered(self.holder.node, len(batch.found), [k for k in part if k in batch.missing])
                for key, block in batch.found.items():
                    if expect is None or expect.get(key, block.digest) == block.digest:
                        found.setdefault(key, block)
                    else:
                        raise Missed(Fault.LIED, f"another payload than expected for {key.hex()[:12]}")
                wanted = [*(key for key in part if key in batch.left), *wanted[KEYS_MAX:]]
                if batch.left and not batch.found and not batch.missing:
                    if bytes_max >= BLOCK_BYTES_MAX:
                        raise Missed(Fault.LIED, "nothing fits into the largest batch")
                    bytes_max = min(max(2 * bytes_max, *batch.left.values()), BLOCK_BYTES_MAX)
        except Missed as missed:
            self.missed = missed
            if missed.fault is Fault.LIED:
                self._answered(self.holder.node, 0, part)

    def give_up(self) -> None:
        """What was waited in vain counts, or a mesh where everything is slow would always ask twice."""
        now = self._clock()
        if now < self.due_at:
            return
        if self._begun_at is None:
            self._waits.began(now - self._asked_at)
        else:
            self._waits.ended(now - self._begun_at, self._length)

    def _begin(self, answer: Answer) -> None:
        self._begun_at, self._length = self._clock(), answer.length
        self._waits.began(self._begun_at - self._asked_at)

    def _end(self, n_bytes: int) -> None:
        if self._begun_at is not None:
            self._waits.ended(self._clock() - self._begun_at, n_bytes)
