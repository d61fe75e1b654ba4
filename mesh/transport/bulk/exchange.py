"""Single requests to one holder: a range, a batch of blocks, a put. What comes back is checked here.

Every method raises ``Missed`` with the fault for whatever goes wrong, so that the callers (``client`` and
``gather``) decide only whom to ask next.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mesh.cache.ring import RingEpoch
from mesh.digests import Buffer, digest_of
from mesh.errors import DecodeError, UnreachableError
from mesh.ids import NodeId
from mesh.transport.bulk.answers import Answer, Room
from mesh.transport.bulk.blobs import (
    CATALOGUE_BYTES_MAX,
    KEYS_MAX,
    VIEW_HEADER,
    BlobRef,
    Block,
    Holder,
    PutVerdict,
    parse_view,
)
from mesh.transport.bulk.connection import Connection, Pool
from mesh.transport.bulk.frames import (
    ROW_BYTES,
    BlockStatus,
    Row,
    decode_rows,
    decode_verdicts,
    encode_keys,
    encode_offers,
)
from mesh.transport.bulk.ranges import Fault
from mesh.units import MIB

__all__ = ["Batch", "Exchanges", "Missed"]

REASON_BYTES_MAX = 4096
PACE_WINDOW_S = 2.0
PACE_BYTES = 16 * 1024
"""In each window, once an answer has begun. A holder of 16 KB/s always brings it (bytes are counted in steps
of 32 KiB, see ``connection``); one of less than 8 KB/s is as good as dead."""
CHECKED_HERE_BYTES_MAX = MIB + MIB // 4
"""Checking so little takes a fraction of decrypting it, and less than a change of thread and back."""
SILENCE_S = 8.0
"""From the question to the first byte, where nobody hedges: a disk that wakes up, a loaded small device."""


class Missed(Exception):
    """A holder did not bring what it was asked for. ``n_bytes`` of it came and are as good as it is."""

    def __init__(self, fault: Fault, reason: str, *, n_bytes: int = 0, status: int | None = None) -> None:
        super().__init__(reason)
        self.fault = fault
        self.n_bytes = n_bytes
        self.status = status


@dataclass(frozen=True, slots=True)
class Batch:
    """What one request for blocks brought."""

    found: Mapping[bytes, Block]
    missing: frozenset[bytes]
    left: Mapping[bytes, int]
    """Held, but did not fit: their sizes."""
    n_bytes: int


class Exchanges:
    """``view`` goes into each request; ``on_view`` hears of what holders know."""

    def __init__(
        self,
        context: ssl.SSLContext,
        view: Callable[[], RingEpoch],
        on_view: Callable[[RingEpoch, NodeId], None],
    ) -> None:
        self.pool = Pool(context)
        self._view = view
        self._on_view = on_view

    async def get_range(self, holder: Holder, blob: BlobRef, start: int, into: memoryview) -> None:
        """Fills ``into`` with the blob's bytes from ``start`` on.

        Raises:
            Missed: Then ``n_bytes`` from the beginning are filled.
        """
        stop = start + len(into)

        def room(answer: Answer) -> memoryview:
            expected = f"bytes {start}-{stop - 1}/{blob.size}"
            if answer.fields.get("content-range") != expected or answer.length != len(into):
                raise DecodeError(f"{answer.fields.get('content-range')!r} instead of {expected!r}")
            if answer.fields.get("etag") != f'"{blob.digest.hex()}"':
                raise DecodeError("another blob")
            return into

        request = self._head(
            "GET", f"/blob/{blob.digest.hex()}", holder, 0, f"Range: bytes={start}-{stop - 1}\r\n"
        )
        await self._exchange(holder, request, (), room, 206)

    async def get_blocks(
        self,
        holder: Holder,
        keys: Sequence[bytes],
        bytes_max: int,
        on_begun: Callable[[Answer], None] = lambda answer: None,
    ) -> Batch:
        """Up to ``KEYS_MAX`` keys in one request. Digests are checked.

        Raises:
            Missed: Nothing usable came.
        """
        assert 0 < len(keys) <= KEYS_MAX
        content = bytearray()

        def room(answer: Answer) -> memoryview:
            nonlocal content
            if not 0 <= answer.length - len(keys) * ROW_BYTES <= bytes_max:
                raise DecodeError(f"{answer.length} bytes for {len(keys)} keys and {bytes_max} bytes")
            content = bytearray(answer.length)
            return memoryview(content)

        body = encode_keys(keys)
        request = self._head("POST", f"/blocks/get?bytes_max={bytes_max}", holder, len(body))
        await self._exchange(holder, request, (body,), room, 200, on_begun)
        n_table = len(keys) * ROW_BYTES
        payloads = memoryview(content)[n_table:]
        try:
            rows = decode_rows(memoryview(content)[:n_table], len(keys), len(payloads))
        except DecodeError as error:
            raise Missed(Fault.LIED, str(error)) from error
        if len(payloads) <= CHECKED_HERE_BYTES_MAX:
            found, wrong = _checked(keys, rows, payloads)
        else:
            found, wrong = await asyncio.to_thread(_checked, keys, rows, payloads)
        if wrong:
            raise Missed(
                Fault.LIED, f"wrong digest of {len(wrong)} blocks, the first is {wrong[0].hex()[:12]}"
            )
        by_status = {
            status: [key for key, row in zip(keys, rows, strict=True) if row.status is status]
            for status in BlockStatus
        }
        sizes = dict(zip(keys, (row.size for row in rows), strict=True))
        left = {key: sizes[key] for key in by_status[BlockStatus.LEFT]}
        return Batch(found, frozenset(by_status[BlockStatus.MISSING]), left, len(content))

    async def put_blocks(self, holder: Holder, blocks: Sequence[Block]) -> list[PutVerdict]:
        """One batch.

        Raises:
            Missed: The batch was refused as a whole, with the reason, or did not arrive.
        """
        verdicts = bytearray()

        def room(answer: Answer) -> memoryview:
            nonlocal verdicts
            if answer.length != len(blocks):
                raise DecodeError(f"{answer.length} verdicts on {len(blocks)} blocks")
            verdicts = bytearray(answer.length)
            return memoryview(verdicts)

        table = encode_offers(blocks)
        payloads = [block.payload for block in blocks]
        request = self._head("POST", "/blocks/put", holder, len(table) + sum(map(len, payloads)))
        await self._exchange(holder, request, (table, *payloads), room, 200)
        try:
            return decode_verdicts(verdicts, len(blocks))
        except DecodeError as error:
            raise Missed(Fault.LIED, str(error)) from error

    async def get_catalogue(self, holder: Holder) -> bytes:
        """What the holder says it has, as it says it.

        Raises:
            Missed: It did not come.
        """
        content = bytearray()

        def room(answer: Answer) -> memoryview:
            nonlocal content
            if answer.length > CATALOGUE_BYTES_MAX:
                raise DecodeError(f"a catalogue of {answer.length} bytes")
            content = bytearray(answer.length)
            return memoryview(content)

        await self._exchange(holder, self._head("GET", "/catalogue", holder, 0), (), room, 200)
        return bytes(content)

    # ── one exchange ────────────────────────────────────────────────────────────────────────────────

    def _head(self, method: str, path: str, holder: Holder, n_body: int, more: str = "") -> bytes:
        length = f"Content-Length: {n_body}\r\n" if method == "POST" else ""
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {holder.node}\r\n"
            f"{VIEW_HEADER}: {self._view()}\r\n{length}{more}\r\n"
        ).encode()

    async def _exchange(
        self,
        holder: Holder,
        head: bytes,
        body: Sequence[Buffer],
        room: Room,
        good_status: int,
        on_begun: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """``room`` is asked about answers of ``good_status`` only; others hold a reason in words."""
        reason = bytearray()

        def any_room(answer: Answer) -> memoryview:
            nonlocal reason
            if answer.status == good_status:
                return room(answer)
            if answer.length > REASON_BYTES_MAX:
                raise DecodeError(f"a refusal of {answer.length} bytes")
            reason = bytearray(answer.length)
            return memoryview(reason)

        for is_last in (False, True):
            n_body, was_used = 0, False
            try:
                async with self.pool.connection(holder, fresh=is_last) as connection:
                    was_used = connection.n_answers > 0
                    try:
                        answer = await _paced(connection, head, body, any_room, on_begun)
                    finally:
                        n_body = connection.n_body
                self._on_view(parse_view(answer.fields.get(VIEW_HEADER.lower(), "")), holder.node)
                break
            except UnreachableError as error:
                if was_used and not n_body and not is_last:
                    continue  # it was closed over there just before we asked: that says nothing
                raise Missed(Fault.CUT, str(error), n_bytes=n_body) from error
            except TimeoutError:
                raise Missed(Fault.SLOW, "too slow to be of use", n_bytes=n_body) from None
            except DecodeError as error:
                raise Missed(Fault.LIED, str(error)) from error
        if answer.status != good_status:
            words = reason.decode("ascii", "replace").strip()[:200]
            fault = Fault.CUT if answer.status == 503 else Fault.LIED
            raise Missed(fault, f"{answer.status} {words}", status=answer.status)


async def _paced(
    connection: Connection,
    head: bytes,
    body: Sequence[Buffer],
    room: Room,
    on_begun: Callable[[Answer], None],
) -> Answer:
    """Raises: TimeoutError: Silent for too long, or dripping."""
    loop = asyncio.get_running_loop()
    asking = loop.create_task(connection.ask(head, body, room, on_begun), name="bulk.ask")
    # An upload is given the time that the server gives it for reading; then the answer is awaited.
    silent_until = loop.time() + SILENCE_S + sum(map(len, body)) / (PACE_BYTES / PACE_WINDOW_S)
    n_before = 0
    try:
        while not asking.done():
            await asyncio.wait([asking], timeout=PACE_WINDOW_S)
            n_body = connection.n_body
            is_slow = (
                n_body - n_before < PACE_BYTES if n_before else not n_body and loop.time() >= silent_until
            )
            if not asking.done() and is_slow:
                raise TimeoutError
            n_before = n_body
        return asking.result()
    finally:
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def _checked(
    keys: Sequence[bytes], rows: Sequence[Row], payloads: memoryview
) -> tuple[dict[bytes, Block], list[bytes]]:
    """The blocks that are what they say, and the keys of those that are not."""
    found: dict[bytes, Block] = {}
    wrong: list[bytes] = []
    start = 0
    for key, row in zip(keys, rows, strict=True):
        if row.status is BlockStatus.FOUND:
            payload = payloads[start : start + row.size]
            start += row.size
            if digest_of(payload) == row.digest:
                found[key] = Block(key, row.digest, payload)
            else:
                wrong.append(key)
    return found, wrong
