"""Serves a ``BlobStore`` to peers: routes of the ``PeerServer``, whose certificates and limits hold here too.

    GET  /blob/<64 hex>                 a range of at most 16 MiB (``Range: bytes=a-b``), ETag = digest
    POST /blocks/get?bytes_max=1048576  keys in, framed blocks out (``frames``)
    POST /blocks/put                    framed blocks in, a verdict on each out
    GET  /catalogue                     which blocks this node says it holds

A request that finds no room in the ``Budget`` is told 503, and asks another holder. What is sent is read
piece by piece as fast as the reader takes it; one that takes less than a piece in ``PIECE_TIMEOUT_S`` is cut
off. Every answer says the newest ring view this node knows: who asked with an older one learns so. Reads
are answered all the same, since what has a digest is right in every view; puts of an old view are refused.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from mesh.cache.ring import RingEpoch
from mesh.digests import Buffer, digest_of
from mesh.errors import DecodeError
from mesh.ids import NodeId
from mesh.transport.bulk.allocator import keep_freed_memory
from mesh.transport.bulk.blobs import (
    BATCH_BYTES_MAX,
    CATALOGUE_BYTES_MAX,
    KEY_BYTES,
    KEYS_MAX,
    PIECE_BYTES,
    RANGE_BYTES_MAX,
    VIEW_HEADER,
    Block,
    PutVerdict,
    parse_view,
)
from mesh.transport.bulk.budget import Budget
from mesh.transport.bulk.frames import (
    COUNT_BYTES,
    OFFER_BYTES,
    BlockStatus,
    Offer,
    Row,
    decode_count,
    decode_keys,
    decode_offers,
    encode_rows,
)
from mesh.transport.bulk.store import BlobStore
from mesh.transport.identity import peer_name
from mesh.units import MIB

__all__ = ["BulkServer"]

log = logging.getLogger(__name__)

PIECE_TIMEOUT_S = 20.0
"""For a piece that leaves: 13 KB/s, less than the poorest link that is of any use."""
_UPLOAD_TIMEOUT_S_PER_MIB = 20.0
_READ_BYTES = 4 * PIECE_BYTES
"""Of a blob: a change of thread for each costs more than a piece does."""
_SENDING_BYTES = 3 * PIECE_BYTES
"""Beside what is read: a piece encrypted, and what is left of the one before (512 KiB wake the sender)."""
_JOINED_BYTES_MAX = PIECE_BYTES * 5 // 4
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")
_HEX = re.compile(r"[0-9a-f]{64}")

_Handler = Callable[[web.Request, NodeId], Awaitable[web.StreamResponse]]


class BulkServer:
    """``view`` is this node's newest ring view; ``on_view`` hears of those that peers name."""

    def __init__(
        self,
        store: BlobStore,
        view: Callable[[], RingEpoch],
        *,
        on_view: Callable[[RingEpoch, NodeId], None] = lambda view, peer: None,
        catalogue: Callable[[], bytes] = bytes,
        budget: Budget | None = None,
    ) -> None:
        """``catalogue``: what peers take it from, see ``mesh.cache.exchange``; empty = there is none."""
        self._store = store
        self._catalogue = catalogue
        self._view = view
        self._on_view = on_view
        self.budget = budget or Budget()
        keep_freed_memory()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/blob/{digest}", self._served(self._on_get_range), allow_head=False),
            web.post("/blocks/get", self._served(self._on_get_blocks)),
            web.post("/blocks/put", self._served(self._on_put_blocks)),
            web.get("/catalogue", self._served(self._on_catalogue), allow_head=False),
        ]

    def _served(self, handler: _Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def serve(request: web.Request) -> web.StreamResponse:
            transport = request.transport
            peer = peer_name(transport.get_extra_info("ssl_object") if transport is not None else None)
            if peer is None:
                return self._refusal(403, "blobs are for nodes of this mesh")
            try:
                self._on_view(parse_view(request.headers.get(VIEW_HEADER, "")), peer)
                return await handler(request, peer)
            except DecodeError as error:
                return self._refusal(400, str(error), closes=True)
            except (TimeoutError, OSError, asyncio.IncompleteReadError, web.RequestPayloadError) as error:
                # It began to answer, or the asker is gone: an answer cut short is a miss over there.
                log.info("bulk_cut peer=%s path=%s why=%s", peer, request.path[:24], error or "too slow")
                if request.transport is not None:
                    request.transport.abort()
                return self._refusal(503, "cut off", closes=True)

        return serve

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────

    async def _on_get_range(self, request: web.Request, peer: NodeId) -> web.StreamResponse:
        name = request.match_info["digest"]
        if _HEX.fullmatch(name) is None:
            raise DecodeError("a blob is named by 64 hex digits")
        async with self.budget.hold(peer, _READ_BYTES + _SENDING_BYTES) as has_room:
            if not has_room:
                return self._refusal(503, "busy: ask another holder")
            reader = await self._store.open(bytes.fromhex(name))
            if reader is None:
                return self._refusal(404, "not here")
            try:
                wanted = _wanted_range(request.headers.get("Range"), reader.size)
                if wanted is None:
                    reason = f"ask for a range of 1 to {RANGE_BYTES_MAX} bytes inside the {reader.size}"
                    refusal = self._refusal(416, reason)
                    refusal.headers["Content-Range"] = f"bytes */{reader.size}"
                    return refusal
                start, stop = wanted
                response = self._response(206 if "Range" in request.headers else 200)
                response.headers["ETag"] = f'"{name}"'
                response.content_length = stop - start
                if stop > start:
                    response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{reader.size}"
                await response.prepare(request)
                while start < stop:
                    piece = await reader.read(start, min(_READ_BYTES, stop - start))
                    if not piece:
                        raise OSError(f"the blob ends at {start}")
                    await _send(response, piece)
                    start += len(piece)
                return response
            finally:
                reader.close()

    async def _on_get_blocks(self, request: web.Request, peer: NodeId) -> web.StreamResponse:
        bytes_max = _bytes_max(request.query.get("bytes_max", ""))
        if not 0 < _length(request) <= KEYS_MAX * KEY_BYTES:
            raise DecodeError(f"a batch has 1 to {KEYS_MAX} keys")
        async with asyncio.timeout(PIECE_TIMEOUT_S):
            keys = decode_keys(await request.content.readexactly(_length(request)))
        async with self.budget.hold(peer, bytes_max + _SENDING_BYTES) as has_room:
            if not has_room:
                return self._refusal(503, "busy: ask another holder")
            found = await self._store.get_many(keys, bytes_max)
            rows, payloads = [], []
            for entry in found:
                if isinstance(entry, Block):
                    rows.append(Row(BlockStatus.FOUND, len(entry.payload), entry.digest))
                    payloads.append(entry.payload)
                elif entry is None:
                    rows.append(Row(BlockStatus.MISSING))
                else:
                    rows.append(Row(BlockStatus.LEFT, entry))
            n_bytes = sum(map(len, payloads))
            assert len(rows) == len(keys) and n_bytes <= bytes_max, "a store keeps to what it was asked"
            table = encode_rows(rows)
            response = self._response(200)
            response.content_length = len(table) + n_bytes
            await response.prepare(request)
            await _send_together(response, [table, *payloads])
            return response

    async def _on_catalogue(self, request: web.Request, peer: NodeId) -> web.StreamResponse:
        async with self.budget.hold(peer, CATALOGUE_BYTES_MAX + _SENDING_BYTES) as has_room:
            if not has_room:
                return self._refusal(503, "busy: ask again later")
            body = self._catalogue()
            assert len(body) <= CATALOGUE_BYTES_MAX, "its reader would refuse it"
            return self._body(200, body) if body else self._refusal(404, "no catalogue")

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────

    async def _on_put_blocks(self, request: web.Request, peer: NodeId) -> web.StreamResponse:
        length = _length(request)
        if not 0 < length <= COUNT_BYTES + KEYS_MAX * OFFER_BYTES + BATCH_BYTES_MAX:
            return self._refusal(413, f"a batch has at most {BATCH_BYTES_MAX} bytes", closes=True)
        current = self._view()
        if parse_view(request.headers.get(VIEW_HEADER, "")) < current:
            return self._refusal(409, f"the ring has changed since: it is at {current}", closes=True)
        if not self._store.has_room(length):
            return self._refusal(507, "no room", closes=True)
        async with self.budget.hold(peer, length) as has_room:
            if not has_room:
                return self._refusal(503, "busy: put it later", closes=True)
            async with asyncio.timeout(PIECE_TIMEOUT_S + _UPLOAD_TIMEOUT_S_PER_MIB * length / MIB):
                offers, payloads = await _receive_batch(request, length)
            are_right = await asyncio.to_thread(_are_right, offers, payloads)
            good = [
                Block(offer.key, offer.digest, payload)
                for offer, payload, is_right in zip(offers, payloads, are_right, strict=True)
                if is_right
            ]
            if len(good) < len(offers):
                log.warning("bulk_wrong_digest peer=%s blocks=%d", peer, len(offers) - len(good))
            stored = iter(await self._store.put(good))
            verdicts = [next(stored) if is_right else PutVerdict.WRONG_DIGEST for is_right in are_right]
            return self._body(200, bytes(verdicts))

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────

    def _response(self, status: int) -> web.StreamResponse:
        headers = {VIEW_HEADER: str(self._view()), "Content-Type": "application/octet-stream"}
        return web.StreamResponse(status=status, headers=headers)

    def _body(self, status: int, body: bytes) -> web.Response:
        return web.Response(status=status, body=body, headers={VIEW_HEADER: str(self._view())})

    def _refusal(self, status: int, reason: str, *, closes: bool = False) -> web.Response:
        """``closes``: what is still to come of the request is not read."""
        response = self._body(status, f"{reason}\n".encode())
        if closes:
            response.force_close()
        return response


def _wanted_range(text: str | None, size: int) -> tuple[int, int] | None:
    """``[start, stop)``; ``None`` if it is not one range inside the blob and the bound."""
    if text is None:
        return (0, size) if size <= RANGE_BYTES_MAX else None
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    start, stop = int(match[1]), int(match[2]) + 1
    return (start, stop) if start < stop <= size and stop - start <= RANGE_BYTES_MAX else None


def _bytes_max(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= BATCH_BYTES_MAX):
        raise DecodeError(f"bytes_max is from 1 to {BATCH_BYTES_MAX}")
    return int(text)


def _length(request: web.Request) -> int:
    if request.content_length is None:
        raise DecodeError("a body without its length")
    return request.content_length


async def _receive_batch(request: web.Request, length: int) -> tuple[list[Offer], list[bytes]]:
    read = request.content.readexactly
    count = decode_count(await read(COUNT_BYTES))
    n_before = COUNT_BYTES + count * OFFER_BYTES
    if n_before > length:
        raise DecodeError("a batch shorter than its table")
    offers = decode_offers(await read(count * OFFER_BYTES), length - n_before)
    return offers, [await read(offer.size) for offer in offers]


async def _send(response: web.StreamResponse, content: Buffer) -> None:
    view = memoryview(content)
    step = PIECE_BYTES if len(view) > _JOINED_BYTES_MAX else _JOINED_BYTES_MAX
    for start in range(0, len(view), step):
        async with asyncio.timeout(PIECE_TIMEOUT_S):
            await response.write(view[start : start + step])


async def _send_together(response: web.StreamResponse, payloads: list[Buffer]) -> None:
    """Small payloads leave joined: one encryption and one system call for many of them, and the table."""
    joined: list[Buffer] = []
    n_joined = 0
    for payload in payloads:
        if n_joined + len(payload) > _JOINED_BYTES_MAX:
            await _send(response, b"".join(joined))
            joined, n_joined = [], 0
        if len(payload) > PIECE_BYTES:
            await _send(response, payload)
        else:
            joined.append(payload)
            n_joined += len(payload)
    await _send(response, b"".join(joined))


def _are_right(offers: list[Offer], payloads: list[bytes]) -> list[bool]:
    return [digest_of(payload) == offer.digest for offer, payload in zip(offers, payloads, strict=True)]
