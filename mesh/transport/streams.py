"""The data plane: HTTPS between nodes, both ends proven by the mesh's certificates.

``PeerServer`` answers ``GET /hello``: who this node is and which broker it uses. ``PeerClient`` asks it, and
``probe`` finds out which of a peer's many addresses leads there. Bulk bytes travel here too (``routes`` of
``mesh.transport.bulk.server``); they never pass through the broker.

aiohttp bounds what one request may be. What it leaves open is bounded here: how many connections there
are, also while they still shake hands, and how long one may say nothing useful (slow loris). No body is
ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from mesh.errors import ConfigError, DecodeError, EdgemeshError, UnreachableError, WrongKeyError
from mesh.ids import NodeId
from mesh.messages import PeerHello
from mesh.messages.node import ADDRESSES_MAX
from mesh.transport.identity import peer_name, wrong_key
from mesh.wire import decode_json, encode_json

__all__ = ["DEFAULT_PORT", "PeerClient", "PeerServer", "RouteDef"]

RouteDef = web.RouteDef

log = logging.getLogger(__name__)

DEFAULT_PORT = 8470
"""Taken by the first node of a machine, so that ``--seed HOST`` may leave the port out."""

# A mesh of 100 nodes keeps about one connection from each; the rest is room for clients and gateways.
CONNECTIONS_MAX = 256
# One address may be a whole machine of nodes, or one attacker: neither gets all the room.
CONNECTIONS_PER_ADDRESS_MAX = 96
HANDSHAKE_TIMEOUT_S = 5.0  # a Pi needs 30 ms; a bad link a few round trips
IDLE_TIMEOUT_S = 20.0  # also the time to send one request's header, byte by byte or not at all
HEADER_BYTES_MAX = 4096  # per line; /hello needs about 200 in all
BODY_BYTES_MAX = 64 * 1024  # of a request that is read as a whole; puts of blocks are read in pieces
# 256 peers of about 90 bytes, 32 addresses, and room for fields of later versions.
HELLO_BYTES_MAX = 64 * 1024
SHUTDOWN_TIMEOUT_S = 1.0

CLIENT_CONNECTIONS_MAX = 64
CLIENT_KEEPALIVE_S = 15.0  # shorter than the server's patience, so that a request never meets a closed door
PROBE_STEP_S = 0.05  # head start of each address over the next (RFC 8305 says 0.25 s; ours are one LAN)


class PeerServer:
    """Listens while entered. ``hello`` is called for every request and must be cheap.

    ``hosts=None`` listens on all addresses, also on those that come later. The ``port`` is tried first; if
    another node of this machine has it, the system chooses a free one (``self.port`` tells which). Handlers
    of further ``routes`` are reached by members only, and bound their own time.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        hello: Callable[[], PeerHello],
        *,
        hosts: Sequence[str] | None = None,
        port: int = DEFAULT_PORT,
        routes: Iterable[web.RouteDef] = (),
    ) -> None:
        self._context = context
        self._hello = hello
        self._more_routes = tuple(routes)
        self._hosts = hosts
        self._wanted_port = port
        self.port = 0
        self._listeners: list[socket.socket] = []
        self._runner: web.AppRunner | None = None
        self._group = asyncio.TaskGroup()
        self._accepting: list[asyncio.Task[None]] = []
        self._handshaking: set[asyncio.Task[None]] = set()
        self._n_by_address: dict[str, int] = {}
        self._guards: dict[object, _Guard] = {}
        self._refused_said_at = float("-inf")

    def _routes(self) -> list[web.RouteDef]:
        return [web.get("/hello", self._on_hello), *self._more_routes]

    async def __aenter__(self) -> Self:
        """Raises: ConfigError: none of the hosts is an address of this machine."""
        self._listeners = _listen(self._hosts, self._wanted_port)
        self.port = self._listeners[0].getsockname()[1]
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self._mark_busy])
        app.add_routes(self._routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            lingering_time=1.0,
            auto_decompress=False,  # a small body that unpacks to gigabytes is the sender's joke
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
        await self._runner.setup()
        await self._group.__aenter__()
        self._accepting = [
            self._group.create_task(self._accept(listener), name="streams.accept")
            for listener in self._listeners
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (*self._accepting, *self._handshaking):
            task.cancel()
        is_cancelled = isinstance(error, asyncio.CancelledError)  # maybe by our own group: it must see it
        try:
            await self._group.__aexit__(*((kind, error, trace) if is_cancelled else (None, None, None)))
        finally:
            for listener in self._listeners:
                listener.close()
            if self._runner is not None:
                await self._runner.cleanup()

    @property
    def n_connections(self) -> int:
        """Accepted and not yet closed, those in their handshake included."""
        return sum(self._n_by_address.values())

    # ── connections ─────────────────────────────────────────────────────────────────────────────────

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, where = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, or a connection that ended in the queue
                log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            address = str(where[0])
            n_here = self._n_by_address.get(address, 0)
            if self.n_connections >= CONNECTIONS_MAX or n_here >= CONNECTIONS_PER_ADDRESS_MAX:
                connection.close()
                continue
            self._n_by_address[address] = n_here + 1
            task = self._group.create_task(self._shake_hands(connection, address), name="streams.handshake")
            self._handshaking.add(task)
            task.add_done_callback(self._handshaking.discard)

    async def _shake_hands(self, connection: socket.socket, address: str) -> None:
        assert self._runner is not None and self._runner.server is not None
        guard = _Guard(self._runner.server(), self._guards, lambda: self._forget(address))
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: guard,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            self._say_refused(address, error)
        finally:
            if not guard.was_open:  # else its end is counted when it ends
                self._forget(address)

    def _forget(self, address: str) -> None:
        self._n_by_address[address] -= 1
        if not self._n_by_address[address]:
            del self._n_by_address[address]

    def _say_refused(self, address: str, error: BaseException) -> None:
        """A wrong join code is worth a line in the log, once a minute; broken connections are not."""
        refusal = wrong_key(error, address)
        if refusal is None or time.monotonic() - self._refused_said_at < 60:
            log.debug("no handshake with %s: %s", address, error)
            return
        self._refused_said_at = time.monotonic()
        log.warning("refused a connection: %s", refusal)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────

    @web.middleware
    async def _mark_busy(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        transport = request.transport
        if peer_name(transport.get_extra_info("ssl_object") if transport is not None else None) is None:
            raise web.HTTPForbidden(text="the data plane is for nodes; clients speak MQTT\n")
        guard = self._guards.get(request.protocol)
        if guard is None:
            return await handler(request)
        with guard.busy():
            return await handler(request)

    async def _on_hello(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=encode_json(self._hello()), content_type="application/json")


class _Guard(asyncio.Protocol):
    """Between a connection and aiohttp's protocol: counts it, and ends it when it idles too long.

    aiohttp's own clock starts at the first answer in some versions we accept (3.11.18 is one), so a client
    that never completes a request would stay for ever.
    """

    def __init__(
        self, inner: web.RequestHandler, guards: dict[object, _Guard], on_end: Callable[[], None]
    ) -> None:
        self._inner = inner
        self._guards = guards
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.was_open = False

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While a request is being answered the idle clock stands still; handlers bound their own time."""
        self._stop_clock()
        try:
            yield
        finally:
            self._start_clock()

    def _start_clock(self) -> None:
        self._stop_clock()
        if self._transport is not None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_TIMEOUT_S, self._transport.abort)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.was_open = True
        self._transport = transport
        self._guards[self._inner] = self
        self._start_clock()
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._transport = None
        self._guards.pop(self._inner, None)
        self._on_end()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        self._inner.eof_received()
        return None

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _listen(hosts: Sequence[str] | None, wanted_port: int) -> list[socket.socket]:
    """One listener per host, all on one port: the wanted one if it is free, else any."""
    for port in (wanted_port, *([0] * 8)):
        try:
            return _listen_on(hosts, port)
        except OSError as error:
            # With port 0 the first host's free port may be taken on the second: draw again.
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError(
                    f"cannot listen on {', '.join(hosts or ['any address'])}: {error}"
                ) from error
    raise ConfigError("no port is free for the data plane on all chosen addresses: choose fewer interfaces")


def _listen_on(hosts: Sequence[str] | None, port: int) -> list[socket.socket]:
    if hosts is None:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # IPv6 is compiled in and switched off; or the port is taken
                both = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
                return [_non_blocking(both)]
        return [_non_blocking(socket.create_server(("", port)))]
    listeners: list[socket.socket] = []
    try:
        for host in dict.fromkeys(hosts):
            family, _, _, _, where = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            try:
                listener = socket.create_server(where, family=family)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                log.warning("cannot listen on %s: it is not an address of this machine (now)", host)
                continue
            listeners.append(_non_blocking(listener))
            port = listener.getsockname()[1]
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    if not listeners:
        raise OSError(errno.EADDRNOTAVAIL, "none of them is an address of this machine; see `ip -br address`")
    return listeners


def _non_blocking(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    return listener


class _PeerResponse(aiohttp.ClientResponse):
    """Remembers whose certificate answered; aiohttp may give the connection away before we can look."""

    peer: NodeId | None = None

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        transport = connection.transport
        self.peer = peer_name(transport.get_extra_info("ssl_object") if transport is not None else None)
        return await super().start(connection)


class PeerClient:
    """Asks other nodes' servers. One pool of connections for the process; open it with ``async with``."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=self._context, limit=CLIENT_CONNECTIONS_MAX, keepalive_timeout=CLIENT_KEEPALIVE_S
            ),
            response_class=_PeerResponse,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy for the internet leads to no neighbour
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def hello(self, address: str, port: int, timeout_s: float) -> PeerHello:
        """Ask the node at this address who it is. ``address`` may be a name, or IPv6 with a scope.

        Raises:
            WrongKeyError: It belongs to another mesh.
            UnreachableError: Nobody answered in time, or not as a node does.
            DecodeError: It proved membership and then said nonsense, or spoke in another's name.
        """
        assert self._session is not None, "a PeerClient is used inside `async with`"
        where = _host_port(address, port)
        try:
            async with self._session.get(
                f"https://{where}/hello",
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                if response.status != 200:
                    raise UnreachableError(f"{where} answered with HTTP status {response.status}")
                payload = await _read_bounded(response.content, HELLO_BYTES_MAX)
                assert isinstance(response, _PeerResponse)
                signer = response.peer
        except TimeoutError:
            raise UnreachableError(f"{where} did not answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: an address no URL can hold
            raise wrong_key(error, where) or UnreachableError(f"{where}: {_reason(error)}") from error
        hello = decode_json(payload, PeerHello)
        if hello.node != signer:
            raise DecodeError(f"{where} has the certificate of {signer} and says it is {hello.node}")
        return hello

    async def probe(
        self, addresses: Iterable[str], port: int, expect: NodeId | None = None, *, timeout_s: float
    ) -> tuple[PeerHello, str]:
        """Ask at all these addresses; the first good answer and the address that gave it.

        Each address gets 50 ms head start over the next, so the likeliest is used when several work.
        ``timeout_s`` bounds the whole. ``expect`` rejects answers of any other node: addresses such as
        192.168.1.5 mean somebody else on another network.

        Raises:
            WrongKeyError: Nobody answered well, and somebody of another mesh did.
            DecodeError: Nobody answered well, and a member said nonsense.
            UnreachableError: Nobody answered.
        """
        tries = list(dict.fromkeys(addresses))[:ADDRESSES_MAX]
        if not tries:
            raise UnreachableError("no address to ask at")
        waiting = {
            asyncio.create_task(
                self._probe_one(address, port, expect, step * PROBE_STEP_S, timeout_s),
                name=f"streams.probe-{address}",
            )
            for step, address in enumerate(tries)
        }
        failures: list[EdgemeshError] = []
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                answers = [task.result() for task in done]
                good = [answer for answer in answers if isinstance(answer, tuple)]
                if good:
                    return min(good, key=lambda answer: tries.index(answer[1]))
                failures += [answer for answer in answers if isinstance(answer, EdgemeshError)]
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for kind in (WrongKeyError, DecodeError):
            for failure in failures:
                if isinstance(failure, kind):
                    raise failure
        raise UnreachableError("; ".join(str(failure) for failure in failures))

    async def _probe_one(
        self, address: str, port: int, expect: NodeId | None, wait_s: float, timeout_s: float
    ) -> tuple[PeerHello, str] | EdgemeshError:
        """Failures are values here: several may come at once, and only together they mean something."""
        try:
            await asyncio.sleep(wait_s)
            hello = await self.hello(address, port, max(timeout_s - wait_s, 0.05))
        except (UnreachableError, WrongKeyError, DecodeError) as error:
            return error
        if expect is not None and hello.node != expect:
            return UnreachableError(f"{_host_port(address, port)} is {hello.node}, not {expect}")
        return hello, address


async def _read_bounded(content: aiohttp.StreamReader, bytes_max: int) -> bytes:
    payload = bytearray()
    async for piece in content.iter_any():
        payload += piece
        if len(payload) > bytes_max:
            raise DecodeError(f"an answer of more than {bytes_max} bytes")
    return bytes(payload)


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.InvalidURL):
        return "not an address"
    if isinstance(error, aiohttp.ClientConnectorError):
        inner = error.os_error
        if isinstance(inner, socket.gaierror) or inner.errno is None:
            return str(error.strerror)
        return os.strerror(inner.errno)
    return str(error) or type(error).__name__
