"""Finding nodes on the local network by mDNS (RFC 6762, RFC 6763), and being found.

Every node registers one service instance of ``_edgemesh._tcp.local.`` named by its node id. The TXT record
(below 400 bytes) says which mesh, which life of the node, and which broker it uses; nothing in it is
secret and nothing in it is believed before the node itself was asked (``mesh.transport.streams``).

mDNS finds, it is not the heartbeat: a node that was killed stays in other caches for up to 75 minutes, a
``Gone`` can be forged by anybody, and Wi-Fi access points drop multicast. So:

* Added and updated records are one thing, a ``Sighting``; what is true comes from asking.
* All records are asked for again every minute, because an announcement may have been lost; a sighting may
  therefore come again unchanged.
* Who sees a newcomer announces itself again. Questions alone take up to 1.2 s: what was multicast is not
  multicast again within a second (RFC 6762 6), and an answer sent to one of several nodes on one machine
  reaches any of them, since they share port 5353. A greeting takes 0.1 s.
* Interfaces come and go: cables, Wi-Fi, DHCP. They are looked at every two seconds.
* Where mDNS cannot run at all, ``Discovery`` says why and finds nobody. Seeds still work.

Names are unique by construction, so we register as *cooperating responders*: no probing, and peers see
us after 2 ms instead of 1.2 s (zeroconf 0.154, 24 of 24). Two live nodes with one id (a cloned SD card) then
overwrite each other's record; each sees the other as a sighting of its own id with a foreign ``boot``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from zeroconf import DNSQuestionType, IPVersion, NotRunningException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from mesh.ids import Boot, NodeId, is_id
from mesh.transport.adverts import TXT_READ_BYTES_MAX, Advert, Gone, Sighting, read_txt, txt_of
from mesh.transport.interfaces import LOOPBACK, chosen_interfaces, local_addresses, missing_names

__all__ = ["SERVICE_TYPE", "Advert", "Discovery", "Gone", "Sighting", "local_addresses", "scan"]

log = logging.getLogger(__name__)

SERVICE_TYPE = "_edgemesh._tcp.local."

# Forged announcements cost the sender a packet each. These bound what they make us hold or do; a real
# LAN has tens of nodes. Names seen valid before keep their turn when the list is full.
NAMES_PENDING_MAX = 1024
NAMES_KNOWN_MAX = 4096  # as many as members
SIGHTINGS_READY_MAX = 1024
ASKING_MAX = 8  # queries we send because a record came without its address; one announcement has it all
ASK_TIMEOUT_S = 3.0

LOOK_EVERY_S = 2.0  # one getifaddrs call, 0.4 ms: 0.02 % of a core
RECONCILE_EVERY_S = 10.0  # retries sockets that did not open (an IPv6 address is tentative for 1-2 s)
RETRY_EVERY_S = 60.0  # when mDNS failed altogether; zeroconf logs every failure, so not more often
BROWSE_EVERY_S = 60.0  # four queries a minute; also drops what forged names left in the browser's schedule
COMPLAIN_EVERY_S = 60.0
GREET_SPREAD_S = 0.05  # so that a hundred nodes do not greet a newcomer in the same millisecond
GREET_REST_S = 0.25  # bounds what forged newcomers make us send: 4 packets of 0.5 KB a second
# Answers to a shared question are spread over 20-120 ms (RFC 6762 6); twice that, and room for a slow Pi.
SCAN_SETTLE_S = 0.4


def _service_of(advert: Advert) -> AsyncServiceInfo:
    # A record cannot carry a scope: each receiver adds the one by which it hears us.
    addresses = dict.fromkeys(address.partition("%")[0] for address in advert.addresses)
    name = f"{advert.node}.{SERVICE_TYPE}"
    return AsyncServiceInfo(
        SERVICE_TYPE,
        name,
        port=advert.port,
        properties=txt_of(advert),
        server=name,  # not the host's own .local name: several nodes on one machine would overwrite it
        parsed_addresses=list(addresses),
    )


@dataclass(slots=True)
class _Complaints:
    """Says how often something happened, at most once a minute: a flood must not fill the log."""

    text: str
    _count: int = 0
    _last_at: float = float("-inf")

    def add(self, example: str) -> None:
        self._count += 1
        now = time.monotonic()
        if now - self._last_at >= COMPLAIN_EVERY_S:
            log.warning("%s (%d times since last said; latest: %.80r)", self.text, self._count, example)
            self._last_at, self._count = now, 0


class Discovery:
    """Announces one node and watches for others while it is entered (``async with``).

    ``advert=None`` only listens. ``interfaces`` are names or addresses to speak on; ``None`` takes all
    real ones, and loopback if there is none. With ``("lo",)`` nothing leaves this machine.
    """

    def __init__(self, advert: Advert | None, interfaces: tuple[str, ...] | None = None) -> None:
        self._advert = advert
        self._interfaces = interfaces
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._announced: Advert | None = None
        self._speaking_on: tuple[str | int, ...] = ()
        self._wanted: tuple[str | int, ...] = ()
        self._addresses: tuple[str, ...] = ()
        self._failing = ""
        self._announcing: asyncio.Future[None] | None = None
        self._announce_turn = asyncio.Lock()
        self._group = asyncio.TaskGroup()
        self._watching: list[asyncio.Task[None]] = []
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, Boot] = {}
        self._pending: dict[str, None] = {}
        self._any_pending = asyncio.Event()
        self._ready: dict[str, Sighting | Gone] = {}
        self._any_ready = asyncio.Event()
        self._any_newcomer = asyncio.Event()
        self._malformed = _Complaints("ignored mDNS announcements that are not edgemesh's")
        self._overflown = _Complaints("dropped mDNS announcements: more names than any real network has")

    async def __aenter__(self) -> Self:
        missing = missing_names(self._interfaces)
        if missing:
            log.warning("no interface is called %s (yet); `ip -br address` lists them", ", ".join(missing))
        self._wanted, self._addresses = _sockets_for(self._interfaces), local_addresses(self._interfaces)
        await self._open()
        await self._group.__aenter__()
        self._watching = [
            self._group.create_task(self._resolve_pending(), name="discovery.resolve"),
            self._group.create_task(self._watch_interfaces(), name="discovery.interfaces"),
            self._group.create_task(self._browse_again(), name="discovery.browse"),
            self._group.create_task(self._greet_newcomers(), name="discovery.greet"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (*self._watching, *self._asking.values()):
            task.cancel()
        # The group cancels us if one of its tasks breaks; it must see that again. Other errors of the
        # caller's are none of its business: it would wrap them.
        is_cancelled = isinstance(error, asyncio.CancelledError)
        try:
            await self._group.__aexit__(*((kind, error, trace) if is_cancelled else (None, None, None)))
        finally:
            await self._close()

    async def update(self, advert: Advert) -> None:
        """Announce this from now on (the same node; say, another broker). Peers see it in milliseconds."""
        assert self._advert is not None and advert.node == self._advert.node, "a Discovery announces one node"
        self._advert = advert
        await self._announce()

    async def sightings(self) -> AsyncIterator[Sighting | Gone]:
        """Everybody else's announcements, other meshes' too, until cancelled. For one reader.

        A slow reader gets the latest of each node, not every step.
        """
        while True:
            yield await self._next()

    async def _next(self) -> Sighting | Gone:
        while not self._ready:
            self._any_ready.clear()
            await self._any_ready.wait()
        return self._ready.pop(next(iter(self._ready)))

    # ── sockets ─────────────────────────────────────────────────────────────────────────────────────

    async def _open(self) -> None:
        """Start mDNS on the chosen interfaces, else on loopback, else not at all."""
        failures: list[str] = []
        for choice in dict.fromkeys((self._wanted, (LOOPBACK,))):
            try:
                self._zeroconf = AsyncZeroconf(interfaces=list(choice), ip_version=_ip_version(choice))
                await self._zeroconf.zeroconf.async_wait_for_start()
            except (OSError, RuntimeError, NotRunningException) as error:
                await self._close()
                failures.append(f"{_words(choice)} ({error})")
                continue
            self._complain(failures, "only nodes on this machine are found, and those by --seed HOST:PORT")
            self._speaking_on = choice
            await self._browse()
            await self._announce()
            return
        self._complain(failures, "other nodes are found by --seed HOST:PORT only")

    async def _close(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            with contextlib.suppress(OSError, NotRunningException):  # the network is gone: nobody to tell
                await self._zeroconf.async_close()
        self._zeroconf = self._browser = self._announced = self._announcing = None

    async def _watch_interfaces(self) -> None:
        since_s = 0.0
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            since_s += LOOK_EVERY_S
            try:
                wanted = _sockets_for(self._interfaces)
                self._addresses = local_addresses(self._interfaces)
            except OSError as error:  # looking takes a file descriptor, and there may be none left
                log.warning("cannot look at the network interfaces: %s", error)
                continue
            if wanted != self._wanted or since_s >= (RETRY_EVERY_S if self._failing else RECONCILE_EVERY_S):
                since_s = 0.0
                self._wanted = wanted
                await self._speak_on(wanted)

    async def _speak_on(self, wanted: tuple[str | int, ...]) -> None:
        if self._zeroconf is None:
            await self._open()
            return
        try:
            await self._announce()  # first, so that the new network never hears of our old addresses
            await self._zeroconf.async_update_interfaces(list(wanted), _ip_version(wanted))
        except (OSError, RuntimeError, NotRunningException) as error:
            self._complain([f"{_words(wanted)} ({error})"], "trying again every minute")
            return
        self._complain([], "")
        if wanted != self._speaking_on:
            log.info("mDNS now speaks on %s", _words(wanted))
            self._speaking_on = wanted
            await self._browse()  # those who are on the new network announced themselves long ago: ask

    def _complain(self, failures: list[str], so: str) -> None:
        """Say what fails when it begins to fail or fails differently; no failures end the matter."""
        failing = f"cannot use mDNS on {', '.join(failures)}: {so}" if failures else ""
        if failing and failing != self._failing:
            log.warning("%s", failing)
        self._failing = failing

    # ── being found ─────────────────────────────────────────────────────────────────────────────────

    async def _greet_newcomers(self) -> None:
        while True:
            await self._any_newcomer.wait()
            await asyncio.sleep(random.uniform(0, GREET_SPREAD_S))
            self._any_newcomer.clear()
            await self._announce(again=True)
            await asyncio.sleep(GREET_REST_S)

    async def _announce(self, *, again: bool = False) -> None:
        """Bring what the network knows in line with the advert and the addresses of now."""
        async with self._announce_turn:
            if self._zeroconf is None or self._advert is None:
                return
            advert = self._advert
            if not advert.addresses:
                advert = replace(advert, addresses=self._addresses)
            if advert == self._announced and not again:
                return
            if self._announcing is not None:
                self._announcing.cancel()  # it repeats an older advert
            service = _service_of(advert)
            try:
                if self._announced is None:
                    sent = await self._zeroconf.async_register_service(service, cooperating_responders=True)
                else:
                    sent = await self._zeroconf.async_update_service(service)
            except (OSError, NotRunningException) as error:
                log.warning("cannot announce this node by mDNS: %s", error)
                return
            self._announced = advert
            # Sent three times over 0.45 s. Nobody waits for the repetitions, but a failure must be seen.
            self._announcing = asyncio.ensure_future(sent)
            self._announcing.add_done_callback(self._on_announced)

    def _on_announced(self, sent: asyncio.Future[None]) -> None:
        if not sent.cancelled() and (error := sent.exception()) is not None:
            log.warning("cannot announce this node by mDNS: %s", error)

    # ── finding ─────────────────────────────────────────────────────────────────────────────────────

    async def _browse(self) -> None:
        """Ask the network who is there (at once, and after 1, 5 and 14 s); cached answers come first."""
        assert self._zeroconf is not None
        if self._browser is not None:
            await self._browser.async_cancel()
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf,
            SERVICE_TYPE,
            handlers=[self._on_change],
            # By multicast: a unicast answer may reach another process that shares our port 5353.
            question_type=DNSQuestionType.QM,
        )

    async def _browse_again(self) -> None:
        while True:
            await asyncio.sleep(BROWSE_EVERY_S)
            if self._zeroconf is not None:
                await self._browse()

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Called by zeroconf for every record, so it must stay cheap: thousands a second may be forged."""
        node = name.removesuffix(f".{SERVICE_TYPE}").lower()
        if not is_id(node):
            self._malformed.add(name)
        elif state_change is ServiceStateChange.Removed:
            self._pending.pop(node, None)
            if node in self._known and not self._is_me(node):
                del self._known[node]
                self._offer(node, Gone(NodeId(node)))
        elif node in self._pending:
            return
        elif len(self._pending) >= NAMES_PENDING_MAX and node not in self._known:
            self._overflown.add(node)
        else:
            self._pending[node] = None
            self._any_pending.set()

    async def _resolve_pending(self) -> None:
        while True:
            while self._pending and self._zeroconf is not None:
                node = next(iter(self._pending))
                del self._pending[node]
                service = AsyncServiceInfo(SERVICE_TYPE, f"{node}.{SERVICE_TYPE}")
                if service.load_from_cache(self._zeroconf.zeroconf):
                    self._take(node, service)
                elif node not in self._asking and len(self._asking) < ASKING_MAX:
                    self._asking[node] = self._group.create_task(
                        self._ask(node, service), name="discovery.ask"
                    )
                await asyncio.sleep(0)  # a flood must not hold the loop
            self._any_pending.clear()
            await self._any_pending.wait()

    async def _ask(self, node: str, service: AsyncServiceInfo) -> None:
        try:
            zeroconf = self._zeroconf
            if zeroconf is not None and await service.async_request(zeroconf.zeroconf, ASK_TIMEOUT_S * 1000):
                self._take(node, service)
        except (OSError, NotRunningException) as error:
            log.debug("asking for %s: %s", node, error)
        finally:
            self._asking.pop(node, None)

    def _take(self, node: str, service: AsyncServiceInfo) -> None:
        sighting = None
        if len(service.text or b"") <= TXT_READ_BYTES_MAX:
            addresses = service.parsed_scoped_addresses()
            sighting = read_txt(node, service.port, addresses, service.decoded_properties)
        if sighting is None:
            self._malformed.add(node)
        elif not (self._is_me(node) and self._advert and sighting.advert.boot == self._advert.boot):
            if self._known.get(node) != sighting.advert.boot:
                self._any_newcomer.set()
            if len(self._known) < NAMES_KNOWN_MAX or node in self._known:
                self._known[node] = sighting.advert.boot
            self._offer(node, sighting)

    def _is_me(self, node: str) -> bool:
        return self._advert is not None and node == self._advert.node

    def _offer(self, node: str, news: Sighting | Gone) -> None:
        if node not in self._ready and len(self._ready) >= SIGHTINGS_READY_MAX:
            self._overflown.add(node)
            return
        self._ready[node] = news
        self._any_ready.set()


async def scan(mesh: str | None, seconds: float, interfaces: tuple[str, ...] | None = None) -> list[Sighting]:
    """Who announces itself now, for commands that are no node; sorted by node id.

    Returns as soon as somebody of ``mesh`` (``None``: of any mesh) was found and nobody new came for
    ``SCAN_SETTLE_S``, or when ``seconds`` are over. Meshes with the same name and another fingerprint are
    in the list: compare before you knock.
    """
    found: dict[NodeId, Sighting] = {}
    async with Discovery(None, interfaces) as discovery:
        over_at = asyncio.get_running_loop().time() + seconds
        done_at = over_at
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout_at(done_at):
                    news = await discovery._next()
                if isinstance(news, Gone):
                    found.pop(news.node, None)
                elif mesh is None or news.advert.mesh == mesh:
                    if news.advert.node not in found:
                        done_at = min(over_at, asyncio.get_running_loop().time() + SCAN_SETTLE_S)
                    found[news.advert.node] = news
    return [found[node] for node in sorted(found)]


def _sockets_for(interfaces: tuple[str, ...] | None) -> tuple[str | int, ...]:
    """In zeroconf's words: IPv4 addresses, and interface numbers for IPv6."""
    choice: list[str | int] = []
    for interface in chosen_interfaces(interfaces):
        choice += interface.ipv4
        if interface.ipv6 and interface.index is not None:
            choice.append(interface.index)
    return tuple(choice) or (LOOPBACK,)


def _ip_version(choice: tuple[str | int, ...]) -> IPVersion:
    has_v4 = any(isinstance(one, str) for one in choice)
    has_v6 = any(isinstance(one, int) for one in choice)
    return IPVersion.All if has_v4 and has_v6 else IPVersion.V6Only if has_v6 else IPVersion.V4Only


def _words(choice: tuple[str | int, ...]) -> str:
    return ", ".join(one if isinstance(one, str) else f"IPv6 interface {one}" for one in choice)
