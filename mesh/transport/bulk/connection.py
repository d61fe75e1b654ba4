"""Connections to the bulk servers of peers: one request at a time on each, answers straight into place.

``Pool`` keeps them open between requests. Both ends are proven by TLS; besides, the peer must have the name
we ask for, or whoever took over an address would be believed to be its former owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

from mesh.digests import Buffer
from mesh.errors import DecodeError, UnreachableError
from mesh.ids import NodeId
from mesh.transport.bulk.answers import Answer, AnswerReader, Room
from mesh.transport.bulk.blobs import PIECE_BYTES, Holder
from mesh.transport.identity import peer_name
from mesh.units import KIB

__all__ = ["Connection", "Pool"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
CONNECTIONS_MAX = 64
CONNECTIONS_PER_HOLDER_MAX = 4
"""Two keep a link full; a holder allows 96 from one address, which may be a machine of many nodes."""
KEEP_S = 15.0  # less than the server's patience
WAKE_BYTES = 32 * KIB
"""While more than this is to come, the system wakes us for no less: a fraction of the wake-ups on slow links.
Not more than a tolerable holder brings in one pace window (``exchange``)."""
# Of TLS, with what it adds: one may have been taken from the socket already, in part.
_RECORD_BYTES = 17 * KIB
_SPARE_BYTES = 4096


class Connection(asyncio.BufferedProtocol):
    """One TLS connection. After any failure it is closed: what would come next is not known."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader: AnswerReader | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._on_begun: Callable[[Answer], None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._spare = memoryview(bytearray(_SPARE_BYTES))
        self.n_body = 0
        """Of the running or last answer: bytes of the body that came."""
        self.n_answers = 0
        self._wake_bytes = 1

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def peer(self) -> NodeId | None:
        assert self._transport is not None
        return peer_name(self._transport.get_extra_info("ssl_object"))

    async def ask(
        self,
        head: bytes,
        body: Sequence[Buffer],
        room: Room,
        on_begun: Callable[[Answer], None] = lambda answer: None,
    ) -> Answer:
        """Send a request, return when its answer is in ``room``'s memory. ``on_begun`` hears of its head.

        Raises:
            UnreachableError: The connection ended before the answer did; ``n_body`` bytes are good.
            DecodeError: It is no answer we accept, or larger than ``room`` allows.
        """
        if not self.is_open:
            raise UnreachableError("the connection is closed")
        assert self._done is None and self._transport is not None, "one request at a time"
        self._done = asyncio.get_running_loop().create_future()
        self._reader, self._on_begun, self.n_body = AnswerReader(room), on_begun, 0
        done = self._done
        try:
            self._transport.write(head)
            for content in body:
                view = memoryview(content)
                for start in range(0, len(view), PIECE_BYTES):
                    await self._may_write.wait()
                    if done.done():  # answered before it was all sent: refused
                        break
                    self._transport.write(view[start : start + PIECE_BYTES])
            answer = await done
            if not answer.keeps_open:
                self._transport.close()
            self.n_answers += 1
            return answer
        except BaseException:
            self.close()
            raise
        finally:
            self._done = self._reader = self._on_begun = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ── asyncio's side ──────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer() if self._reader is not None else self._spare

    def buffer_updated(self, n_bytes: int) -> None:
        if self._reader is None or self._done is None or self._done.done():
            log.warning("bulk_stray peer=%s: bytes that nobody asked for", self.peer)
            self.close()
            return
        was_begun = self._reader.answer is not None
        try:
            self._reader.filled(n_bytes)
        except DecodeError as error:
            self._fail(error)
            return
        self.n_body = self._reader.n_body
        answer = self._reader.answer
        if answer is not None and not was_begun and self._on_begun is not None:
            self._on_begun(answer)
        self._wake_from(answer.length - self.n_body - _RECORD_BYTES if answer is not None else 1)
        if answer is not None and self._reader.is_done:
            self._done.set_result(answer)

    def eof_received(self) -> bool | None:
        self._fail(UnreachableError("the peer hung up"))
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._may_write.set()
        self._fail(UnreachableError(f"the connection broke: {exc or 'closed'}"))

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def _wake_from(self, n_bytes: int) -> None:
        n_bytes = min(max(n_bytes, 1), WAKE_BYTES)
        if n_bytes != self._wake_bytes and self._transport is not None:
            with contextlib.suppress(OSError):  # where it cannot be set, we are woken more often
                self._transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVLOWAT, n_bytes
                )
            self._wake_bytes = n_bytes

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.close()


class Pool:
    """Open connections, by holder. Leave it with ``aclose``."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._room_of: dict[Holder, tuple[asyncio.Semaphore, int]] = {}
        self._idle: dict[Holder, list[tuple[Connection, asyncio.TimerHandle]]] = {}

    @property
    def n_idle(self) -> int:
        return sum(map(len, self._idle.values()))

    async def aclose(self) -> None:
        for holder in list(self._idle):
            while (connection := self._take_idle(holder)) is not None:
                connection.close()

    @contextlib.asynccontextmanager
    async def connection(self, holder: Holder, *, fresh: bool = False) -> AsyncIterator[Connection]:
        """A connection for one request.

        Raises:
            UnreachableError: Nobody answers there, or somebody else does.
        """
        async with self._share(holder), self._room:
            connection = (None if fresh else self._take_idle(holder)) or await self._open(holder)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            if connection.is_open:
                self._keep(holder, connection)

    @contextlib.asynccontextmanager
    async def _share(self, holder: Holder) -> AsyncIterator[None]:
        """Bounded per holder, and remembered only while somebody uses it."""
        room, n_users = self._room_of.get(holder, (asyncio.Semaphore(CONNECTIONS_PER_HOLDER_MAX), 0))
        self._room_of[holder] = room, n_users + 1
        try:
            async with room:
                yield
        finally:
            room, n_users = self._room_of.pop(holder)
            if n_users > 1:
                self._room_of[holder] = room, n_users - 1

    async def _open(self, holder: Holder) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                transport, connection = await asyncio.get_running_loop().create_connection(
                    Connection,
                    holder.address,
                    holder.port,
                    ssl=self._context,
                    server_hostname=str(holder.node),
                )
        except TimeoutError:
            raise UnreachableError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; ValueError: no address at all
            raise UnreachableError(f"no connection: {error}") from error
        if connection.peer != holder.node:
            peer = connection.peer
            transport.abort()
            raise UnreachableError(f"{peer} answers there, not {holder.node}")
        return connection

    def _take_idle(self, holder: Holder) -> Connection | None:
        while idle := self._idle.get(holder):
            connection, timer = idle.pop()
            timer.cancel()
            if not idle:
                del self._idle[holder]
            if connection.is_open:
                return connection
        return None

    def _keep(self, holder: Holder, connection: Connection) -> None:
        def drop() -> None:
            idle = self._idle.get(holder, [])
            idle[:] = [entry for entry in idle if entry[0] is not connection]
            if not idle:
                self._idle.pop(holder, None)
            connection.close()

        if self.n_idle >= CONNECTIONS_MAX:
            connection.close()
            return
        timer = asyncio.get_running_loop().call_later(KEEP_S, drop)
        self._idle.setdefault(holder, []).append((connection, timer))
