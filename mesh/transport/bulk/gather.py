"""Fetches one blob from several holders at once into a sink, by the rules of ``ranges``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mesh.transport.bulk.blobs import BlobRef, Holder
from mesh.transport.bulk.exchange import Exchanges, Missed
from mesh.transport.bulk.ranges import Fault, Flight, Gathering, Spans
from mesh.transport.bulk.store import BlobSink
from mesh.transport.bulk.waits import Waits
from mesh.units import MIB

__all__ = ["FLIGHTS_PER_HOLDER", "GATHER_RANGE_BYTES", "Gatherer"]

GATHER_RANGE_BYTES = 4 * MIB
"""What one request asks for, and what is held of it in memory: small enough that holders share a blob of tens
of MiB fairly, large enough that the question costs nothing."""
FLIGHTS_PER_HOLDER = 2
"""One arrives while the other is written and asked for."""
FLIGHTS_MAX = 8
"""In one gathering: 32 MiB of memory, also with many holders."""
BUSY_REST_S = 0.2


class Gatherer:
    """One attempt at one blob; ``run`` it once."""

    def __init__(
        self,
        exchanges: Exchanges,
        waits: Waits,
        blob: BlobRef,
        holders: Sequence[Holder],
        sink: BlobSink,
        say: Callable[[Holder, str, str], None],
        range_bytes: int = GATHER_RANGE_BYTES,
        had: Spans | None = None,
    ) -> None:
        self._exchanges = exchanges
        self._waits = waits
        self._blob = blob
        self._holders = {holder.node: holder for holder in holders}
        self._sink = sink
        self._say = say
        self._gathering = Gathering(blob.size, self._holders, range_bytes, had)
        self._asking: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._room = asyncio.Semaphore(FLIGHTS_MAX)
        self.is_full = False
        """Whether the sink ended it."""

    async def run(self) -> bool:
        """Whether every byte is written. Says nothing yet about the digest."""
        async with asyncio.TaskGroup() as group:
            for holder in self._holders.values():
                for k in range(FLIGHTS_PER_HOLDER):
                    group.create_task(self._fly(holder), name=f"bulk.gather-{holder}-{k}")
        return self._gathering.is_complete

    @property
    def sources(self) -> list[Holder]:
        """Those who brought bytes of it."""
        return [self._holders[node] for node in self._gathering.sources]

    @property
    def _is_over(self) -> bool:
        return self.is_full or self._gathering.is_complete

    async def _fly(self, holder: Holder) -> None:
        loop = asyncio.get_running_loop()
        gathering = self._gathering
        n_bytes = FLIGHTS_PER_HOLDER * min(GATHER_RANGE_BYTES, self._blob.size)
        while not self._is_over and gathering.may_ask(holder.node):
            patience_s = self._waits.first_after_s + self._waits.rest_after_s(n_bytes)
            async with self._room:
                flight = gathering.begin(holder.node, loop.time(), patience_s)
                if flight is not None:
                    await self._bring(holder, flight)
                    continue
            self._changed.clear()
            try:  # until a flight ends, or one is late
                async with asyncio.timeout(patience_s / 2):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _bring(self, holder: Holder, flight: Flight) -> None:
        loop = asyncio.get_running_loop()
        content = memoryview(bytearray(flight.n_left))
        began_at = loop.time()
        # As a task of its own, so that another holder's success ends it while nothing of it is being
        # written: a write may not be abandoned half-way, see FileSink.
        asking = loop.create_task(
            self._exchanges.get_range(holder, self._blob, flight.start, content), name="bulk.range"
        )
        self._asking.add(asking)
        n_bytes, fault = 0, None
        try:
            await asyncio.wait([asking])
            if asking.cancelled():
                fault = Fault.CUT
            elif isinstance(missed := asking.exception(), Missed):
                n_bytes, fault = missed.n_bytes, missed.fault
                self._say(holder, f"blob {self._blob}", str(missed))
                if missed.status == 503:
                    await asyncio.sleep(BUSY_REST_S)
            else:
                asking.result()
                n_bytes = len(content)
                self._waits.ended(loop.time() - began_at, n_bytes)
            for start, stop in self._gathering.news(flight, n_bytes):
                if not await self._sink.write(start, content[start - flight.start : stop - flight.start]):
                    self.is_full = True
                    n_bytes = 0
                    break
            self._gathering.arrived(flight, n_bytes)
        finally:
            self._asking.discard(asking)
            asking.cancel()
            self._gathering.ended(flight, fault)
            self._changed.set()
            if self._is_over:
                for task in self._asking:
                    task.cancel()
