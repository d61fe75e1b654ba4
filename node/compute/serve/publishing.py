"""Which prefixes other nodes may find, and how they get to the disk without any token waiting for it.

What is worth it: SmolLM2's states are 2.9 MB per block of 64 tokens and save 0.1 to 0.2 s of work, twenty
times less per byte than feature maps. So only these are published:

* what a second sequence has begun with (system prompts, conversations that go on): at once;
* prompts and conversations of ``_LONG_TOKENS`` and more, seen once: while less than half of the allowance
  is used up.

The allowance is bytes over time; who reads all the time writes about a tenth of it down. What lies on
disk then competes by saved seconds per byte with everything else there (``gdsf``), and leaves first.

A step makes entries for about a millisecond while others wait, and longer when nobody does. Blocks go in
their order, each with all its layers, so that what there was no time for is the end of a prefix.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from node.compute.features.codec import CODECS
from node.compute.features.key import BLOCK_TOKENS
from node.compute.features.kv import packed_states
from node.compute.features.store import Entry
from node.compute.serve.prefix_disk import PrefixDisk
from node.compute.serve.prefix_keys import CODEC, Part, PrefixKeys
from node.compute.serve.prefixes import Reading

__all__ = ["Publisher"]

log = logging.getLogger(__name__)

_LONG_TOKENS = 256
# Two blocks: what a chat template and one sentence fill is nobody's system prompt.
_REPEATED_TOKENS = 128
# 3 blocks of SmolLM2 a second; it reads 10 to 20. A prompt of 3,000 tokens may come at once.
_BYTES_PER_S, _BURST_BYTES = 8e6, 128e6
# Prefixes whose states are kept alive until they are written.
_WAITING_MAX = 4
_PACK_BYTES = 8 << 20
_PUBLISHED_MAX = 1 << 16
_BUSY_S, _IDLE_S = 1e-3, 20e-3


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    reading: Reading
    parts: list[Part]
    row_s: float


class Publisher:
    """``now``: monotonic seconds."""

    def __init__(self, keys: PrefixKeys, disk: PrefixDisk, now: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._disk, self._now = keys, disk, now
        self._jobs: deque[_Job] = deque()
        self._running: Iterator[None] | None = None
        self._published: dict[bytes, None] = {}
        self._allowance, self._allowed_at = _BURST_BYTES, now()
        self._pack: dict[bytes, Entry] = {}
        self._n_pack_bytes = 0
        self.n_blocks, self.n_bytes = 0, 0
        """Parts that were given to be written."""

    @property
    def has_work(self) -> bool:
        return bool(self._jobs) or self._running is not None

    def offer(self, reading: Reading, ids: Sequence[int], cuts: Sequence[int], row_s: float) -> None:
        """``ids`` have been read. ``cuts``: where entering rows are of use; ``row_s``: what a token took."""
        if not reading.is_whole or len(self._jobs) >= _WAITING_MAX:
            return
        self._refill()
        n = min(len(ids), reading.states.length)
        if n < _LONG_TOKENS or self._allowance < _BURST_BYTES / 2:
            n = min(n, reading.n_reused) if reading.n_reused >= _REPEATED_TOKENS else 0
        n = n // BLOCK_TOKENS * BLOCK_TOKENS
        parts = self._parts(reading, ids[:n], cuts) if n else []
        n_bytes = sum(self._keys.bytes_of(part) for part in parts)
        if not parts or n_bytes > self._allowance:
            return
        self._allowance -= n_bytes
        self.know(part.key for part in parts)
        self._jobs.append(_Job(reading, parts, row_s))

    def know(self, keys: Iterator[bytes]) -> None:
        """These need not be published: they are, or came from where others find them, too."""
        self._published.update(dict.fromkeys(keys))
        while len(self._published) > _PUBLISHED_MAX:
            del self._published[next(iter(self._published))]

    def step(self, *, is_busy: bool) -> None:
        """A little of what there is to do."""
        until = time.perf_counter() + (_BUSY_S if is_busy else _IDLE_S)
        while self.has_work and time.perf_counter() < until:
            if self._running is None:
                self._running = self._run(self._jobs.popleft())
            if next(self._running, self) is self:
                self._running = None

    def _parts(self, reading: Reading, ids: Sequence[int], cuts: Sequence[int]) -> list[Part]:
        keys = self._keys
        adapter = reading.adapter
        cut = keys.n_layers if adapter is None else min(adapter.first_layer, keys.n_layers)
        level = keys.level(min(cut, reading.top))
        parts = [part for group in keys.below(level) for part in keys.parts(group, ids)]
        for at in {keys.level(cut) for cut in cuts} - {0, keys.n_layers}:
            if at <= level and reading.n_kept(at) >= len(ids):
                parts += keys.parts(at, ids)
        return sorted(
            (part for part in parts if part.key not in self._published), key=lambda part: part.block
        )

    def _run(self, job: _Job) -> Iterator[None]:
        for part in job.parts:
            layers, cut = part.group, part.cut
            if layers is not None:
                rows = packed_states(job.reading.states, layers, part.start)
            else:
                rows = torch.cat(job.reading.rows(cut, part.start, part.start + BLOCK_TOKENS)).float().cpu()
            share = (len(layers) if layers is not None else cut) / self._keys.n_layers
            try:
                encoded = CODECS[CODEC].encode(rows)
            except ValueError as error:
                log.warning("prefix_not_published error=%s", error)
                return
            self._pack[part.key] = Entry(encoded, job.row_s * BLOCK_TOKENS * share)
            self._n_pack_bytes += encoded.n_bytes
            if self._n_pack_bytes >= _PACK_BYTES:
                self._flush()
            yield
        self._flush()

    def _flush(self) -> None:
        if self._pack and self._disk.put(self._pack):
            self.n_blocks += len(self._pack)
            self.n_bytes += self._n_pack_bytes
        self._pack, self._n_pack_bytes = {}, 0

    def _refill(self) -> None:
        now = self._now()
        self._allowance = min(_BURST_BYTES, self._allowance + (now - self._allowed_at) * _BYTES_PER_S)
        self._allowed_at = now
