"""What this node keeps for the mesh: the packs of its directory, served to peers, and room for theirs.

    compute process ── packs ──▶ directory ◀── packs ── gathered ◀── put ── peers
                                     │                      │
                                     └────── get_many ◀─────┘──▶ held: what the catalogue says

Blocks that come one by one are gathered for a moment, so that packs do not become tiny; they are served
meanwhile, and lost if the process dies then: whoever sent them sees that the catalogue does not list them,
and sends them again. First and second copies lie in packs of their own, since second ones go first.

Every failure is a miss and a line in the log: a full disk, a damaged pack, one that another process removed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from mesh.cache.intake import Intake
from mesh.cache.moves import Block as Known
from mesh.errors import DecodeError
from mesh.transport.bulk.blobs import BLOCK_BYTES_MAX, Block, PutVerdict
from mesh.transport.bulk.store import BlobReader
from mesh.units import MIB, bytes_text
from node.compute.features.disk import PackDirectory
from node.compute.features.entry import Header
from node.compute.features.key import BLOCK_TOKENS
from node.compute.features.packs import Place, read_unchecked, write_pack

__all__ = ["Share"]

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How soon what the compute process wrote, or removed, is known: one ``stat`` when nothing has changed."""
GATHER_S = 1.0
"""How long a block waits for others to share its pack."""
GATHERED_MAX = 1024
"""Blocks in one pack: tiny ones do not wait for the last byte of a large pack."""
FREE_BYTES_LEFT = 64 * MIB
"""Never the last of a disk: journals of the same machine must still be written."""
ENTRY_BYTES = 72
"""What a pack's index takes for each."""
PACE_TOKENS_PER_S = 300.0
"""Of a device that has not measured itself: what a Pi computes of a model with 135 million weights."""
_THREADS = 4

T = TypeVar("T")

Worth = Callable[[bytes], float]
"""What a copy here is worth, against the only one there is: 1, ``SPARE_WORTH``, or next to nothing."""


@dataclass(slots=True)
class _Gathered:
    """Blocks that will be a pack."""

    blocks: dict[bytes, tuple[Block, float]] = field(default_factory=dict)
    """With the seconds that each takes to compute."""
    n_bytes: int = 0
    since: float = 0.0


class Share:
    """Implements ``mesh.transport.bulk.store.BlobStore``. Close it when nothing reads it any more.

    Args:
        directory: Of packs; other processes may write and remove some, too.
        quota_bytes: Most bytes there, with what is on its way; 0 = this node keeps nothing for the mesh.
        pace: Tokens of which this node computes the features in a second, once known.
        worth: Of a copy here; ``reweigh`` asks again.
    """

    def __init__(
        self,
        directory: Path,
        quota_bytes: int,
        *,
        pace: Callable[[], float | None] = lambda: None,
        worth: Worth = lambda key: 1.0,
        clock: Callable[[], float] = time.monotonic,
        free_bytes_left: int | None = None,
    ) -> None:
        assert quota_bytes >= 0
        self.quota_bytes = quota_bytes
        self.worth = worth
        self._directory = directory
        self._pace = pace
        self._clock = clock
        self._free_bytes_left = FREE_BYTES_LEFT if free_bytes_left is None else free_bytes_left
        self._lock = threading.Lock()  # of all that follows; never held over reading or writing of entries
        self._intake = Intake()
        self._gathered: dict[bool, _Gathered] = {False: _Gathered(), True: _Gathered()}  # by: is a spare copy
        self._writing: dict[bytes, Block] = {}
        self._disk: PackDirectory | None = None
        self._is_full_said = False
        self._touched: set[bytes] = set()  # since ``news``; bound: what is held, and what has left since
        self._received: set[bytes] = set()  # bound: what ``held`` may say
        self._writes = threading.Lock()  # one pack at a time: a slow disk holds up those who put
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="share")
        if quota_bytes:
            self._disk = PackDirectory(
                directory,
                quota_bytes,
                {},
                clock,
                look_s=LOOK_S,
                weigh=self._weigh,
                touched=self._touched.update,
            )

    # ── what is here ────────────────────────────────────────────────────────────────────────────────

    @property
    def n_bytes(self) -> int:
        """On disk; at most the quota, but for one pack that another process has just written."""
        return self._disk.n_bytes if self._disk is not None else 0

    @property
    def n_blocks(self) -> int:
        return len(self._disk.places) if self._disk is not None else 0

    def holds(self, key: bytes) -> bool:
        """Whether a peer that asks for it now would get it."""
        with self._lock:
            return self._known(key) is not None

    async def news(self) -> dict[bytes, Known | None]:
        """The blocks that have come since this was asked last, and for those that have gone ``None``.

        It says of a block what is true now, however often it came and went. What is new on disk is found
        here, what has waited is written, and some room is kept free.
        """
        return await self._in_thread(self._news)

    def take_received(self) -> set[bytes]:
        """The keys that came from peers since this was asked last."""
        with self._lock:
            received, self._received = self._received, set()
            return received

    async def reweigh(self) -> None:
        """Ask again what the copies here are worth: the ring, or what others hold, has changed."""
        await self._in_thread(self._reweigh)

    async def flush(self) -> None:
        """Write what is gathered now."""
        for is_spare in (False, True):
            await self._in_thread(partial(self._write, is_spare))

    async def clear(self) -> None:
        """Let go of everything, also of what the compute process wrote."""
        await self._in_thread(self._clear)

    async def close(self) -> None:
        await self.flush()
        self._threads.shutdown(wait=False)

    # ── serving ─────────────────────────────────────────────────────────────────────────────────────

    async def open(self, digest: bytes) -> BlobReader | None:
        return None  # see ``node.files.blobs`` for those

    async def get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        return await self._in_thread(lambda: self._get_many(keys, bytes_max))

    def has_room(self, n_bytes: int) -> bool:
        return self._disk is not None and n_bytes <= self.quota_bytes

    async def put(self, blocks: Sequence[Block]) -> list[PutVerdict]:
        return await self._in_thread(lambda: self._put(blocks))

    # ── in threads ──────────────────────────────────────────────────────────────────────────────────

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _get_many(self, keys: Sequence[bytes], bytes_max: int) -> list[Block | int | None]:
        found: dict[bytes, Block | int] = {}
        with self._lock:
            places: dict[bytes, Place] = {}
            n_left = bytes_max
            for key in dict.fromkeys(keys):
                block = self._in_memory(key)
                place = self._disk.places[key][1] if self._disk and key in self._disk.places else None
                size = len(block.payload) if block else place.n_bytes if place else BLOCK_BYTES_MAX + 1
                if size > BLOCK_BYTES_MAX:
                    continue
                if size > n_left:
                    found[key] = size
                    continue
                n_left -= size
                if block is not None:
                    found[key] = block
                elif place is not None:
                    places[key] = place
            by_pack = self._disk.by_pack(list(places)) if self._disk is not None else {}
        for name, wanted in by_pack.items():
            found |= self._read(name, {key: places[key] for key in wanted})
        # What is asked for twice is sent once: the second answer would pass the bound.
        answers: list[Block | int | None] = []
        given: set[bytes] = set()
        for key in keys:
            answers.append(None if key in given else found.get(key))
            given.add(key)
        return answers

    def _read(self, name: str, places: Mapping[bytes, Place]) -> dict[bytes, Block]:
        assert self._disk is not None
        found: dict[bytes, Block] = {}
        try:
            payloads = read_unchecked(self._directory / name, list(places.values()))
            for (key, place), payload in zip(places.items(), payloads, strict=True):
                found[key] = Block(key, place.digest, payload)
            with self._lock:
                self._disk.use(name)
        except FileNotFoundError:
            with self._lock:
                self._disk.forget(name)  # another process needed the room
        except OSError as error:
            log.warning("cache_miss pack=%s why=%s; it is removed", name, error)
            with self._lock:
                self._disk.remove(name)
        return found

    def _put(self, blocks: Sequence[Block]) -> list[PutVerdict]:
        verdicts: dict[bytes, PutVerdict] = {}
        costs = {block.key: self.cost_s(block) for block in blocks}
        worths = {block.key: self.worth(block.key) for block in blocks}
        is_free = self._is_disk_free(sum(len(block.payload) for block in blocks))
        with self._lock:
            for is_spare in (False, True):
                lot = [block for block in blocks if (worths[block.key] < 1) == is_spare]
                wanted = self._wanted(lot, costs, worths) if is_free else set()
                gathered = self._gathered[is_spare]
                for block in lot:
                    if block.key in wanted:
                        wanted.remove(block.key)
                        if not gathered.blocks:
                            gathered.since = self._clock()
                        # A payload may be a view of a whole batch, which would stay with it.
                        kept = Block(block.key, block.digest, bytes(block.payload))
                        gathered.blocks[block.key] = (kept, costs[block.key])
                        gathered.n_bytes += len(kept.payload) + ENTRY_BYTES
                        self._touched.add(block.key)
                        self._received.add(block.key)
                        verdicts[block.key] = PutVerdict.STORED
                    else:
                        verdicts[block.key] = PutVerdict.HELD if self._has(block.key) else PutVerdict.NO_ROOM
            full = [is_spare for is_spare, gathered in self._gathered.items() if self._is_full(gathered)]
        for is_spare in full:
            self._write(is_spare)
        return [verdicts[block.key] for block in blocks]

    def _wanted(
        self, lot: Sequence[Block], costs: Mapping[bytes, float], worths: Mapping[bytes, float]
    ) -> set[bytes]:
        if self._disk is None or not lot:
            return set()
        n_bytes = sum(len(block.payload) + ENTRY_BYTES for block in lot)
        cost_s = sum(costs[block.key] * worths[block.key] for block in lot)
        # The room for what is set aside already is asked for again, at the worth of these.
        asked = n_bytes + self._intake.reserved_bytes
        free_bytes = self._disk.could_free(asked, cost_s * asked / n_bytes)
        return {
            block.key
            for block in self._intake.offered(map(_as_known, lot), self._has, free_bytes, self._clock())
        }

    def _write(self, is_spare: bool) -> None:
        """What is gathered becomes a pack."""
        assert self._disk is not None or not self._gathered[is_spare].blocks
        with self._writes:
            with self._lock:
                gathered, self._gathered[is_spare] = self._gathered[is_spare], _Gathered()
                if not gathered.blocks or self._disk is None:
                    return
                self._writing |= {key: block for key, (block, _) in gathered.blocks.items()}
                cost_s = sum(cost * self.worth(key) for key, (_, cost) in gathered.blocks.items())
                has_room = self._disk.make_room(gathered.n_bytes, cost_s)
            why = None if has_room else "nothing here is worth less"
            try:
                if has_room:
                    entries = {key: (block.payload, cost) for key, (block, cost) in gathered.blocks.items()}
                    path, places = write_pack(self._directory, entries)
                    n_bytes = path.stat().st_size
            except OSError as error:
                why = error.strerror or str(error)
            with self._lock:
                for block in self._writing.values():
                    self._intake.failed(block.key)  # in either case nothing is on its way any more
                self._touched.update(self._writing)
                self._writing.clear()
                if why is None:
                    self._disk.learn(path.name, places, n_bytes)
        if why is not None:
            log.warning("cache_miss blocks=%d why=cannot be kept: %s", len(gathered.blocks), why)

    def _look(self) -> None:
        if self._disk is None:
            return
        now = self._clock()
        for is_spare, gathered in self._gathered.items():
            if gathered.blocks and now - gathered.since >= GATHER_S:
                self._write(is_spare)
        with self._lock:
            self._disk.look()
            # Room for one more pack, made here, where it is known which copies matter least: the compute
            # process would have to let go of what it knows least of.
            self._disk.make_room(self._disk.pack_bytes, float("inf"))

    def _news(self) -> dict[bytes, Known | None]:
        self._look()
        with self._lock:
            news = {key: self._known(key) for key in self._touched}
            self._touched.clear()
            return news

    def _clear(self) -> None:
        with self._lock:
            for is_spare, gathered in self._gathered.items():
                for key in gathered.blocks:
                    self._intake.failed(key)
                self._touched.update(gathered.blocks)
                self._gathered[is_spare] = _Gathered()
            if self._disk is not None:
                for name in list(self._disk.packs):
                    self._disk.remove(name)

    def _reweigh(self) -> None:
        if self._disk is None or 2 * self._disk.n_bytes < self.quota_bytes:
            return  # there is room for everything
        with self._lock:
            names = list(self._disk.packs)
        for name in names:
            with self._lock:
                self._disk.reweigh(name)

    def _known(self, key: bytes) -> Known | None:
        block = self._in_memory(key)
        if block is not None:
            return _as_known(block)
        place = self._disk.places.get(key) if self._disk is not None else None
        if place is None or place[1].n_bytes > BLOCK_BYTES_MAX:
            return None
        return Known(key, place[1].digest, place[1].n_bytes)

    # ── pieces ──────────────────────────────────────────────────────────────────────────────────────

    def _in_memory(self, key: bytes) -> Block | None:
        for gathered in self._gathered.values():
            if key in gathered.blocks:
                return gathered.blocks[key][0]
        return self._writing.get(key)

    def _has(self, key: bytes) -> bool:
        return (self._disk is not None and key in self._disk.places) or self._in_memory(key) is not None

    def _is_full(self, gathered: _Gathered) -> bool:
        assert self._disk is not None or not gathered.blocks
        return self._disk is not None and (
            gathered.n_bytes >= self._disk.pack_bytes or len(gathered.blocks) >= GATHERED_MAX
        )

    def _weigh(self, places: Mapping[bytes, Place]) -> float:
        return sum(place.recompute_s * self.worth(key) for key, place in places.items())

    def cost_s(self, block: Block) -> float:
        """Who sent it did not say: as many tokens as its header has rows, at this node's pace."""
        try:
            n_tokens = Header.read(block.payload).n
        except DecodeError:
            n_tokens = BLOCK_TOKENS  # another kind of entry; most blocks are whole
        return n_tokens / (self._pace() or PACE_TOKENS_PER_S)

    def _is_disk_free(self, n_bytes: int) -> bool:
        try:
            free_bytes = shutil.disk_usage(self._directory).free
        except OSError as error:
            why = error.strerror or str(error)
        else:
            if free_bytes - n_bytes >= self._free_bytes_left:
                self._is_full_said = False
                return True
            why = f"the disk is full: {bytes_text(free_bytes)} are free"
        if not self._is_full_said:
            log.warning("cache_refused dir=%s why=%s; blocks of peers are refused", self._directory, why)
        self._is_full_said = True
        return False


def _as_known(block: Block) -> Known:
    return Known(block.key, block.digest, len(block.payload))
