"""Where other nodes may be found, and what they say when asked.

An mDNS record, a seed or another peer's word only names an address. Each is asked over mutual TLS who it
is before anything believes it; the answers go to ``mesh.hosting`` as facts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mesh.core import Fact
from mesh.errors import DecodeError, UnreachableError, WrongKeyError
from mesh.facts import PeerHeard, PeerSilent
from mesh.ids import NodeId, is_id
from mesh.messages import PeerHello
from mesh.streams import PeerClient
from node.logs import say

__all__ = ["PROBE_TIMEOUT_S", "Peers"]

log = logging.getLogger(__name__)

ADDRESSES_KNOWN_MAX = 4096  # as many as members
PROBES_AT_ONCE_MAX = 8  # a TLS handshake costs about 3 ms of one small core
PROBE_TIMEOUT_S = 1.5
SEED_EVERY_S = 1.0
SEED_REST_S = 15.0  # a seed that answers is a peer like others from then on


@dataclass(frozen=True, slots=True)
class _Place:
    addresses: tuple[str, ...]
    port: int


class Peers:
    """The address book and its probes. ``learn`` receives ``PeerHeard`` and ``PeerSilent``."""

    def __init__(
        self,
        *,
        me: NodeId,
        client: PeerClient,
        seeds: Iterable[tuple[str, int]],
        learn: Callable[[Fact], None],
    ) -> None:
        self._me = me
        self._client = client
        self._seeds = tuple(seeds)
        self._learn = learn
        self._book: dict[NodeId, _Place] = {}
        self._asking: set[NodeId] = set()
        self._wanted: asyncio.Queue[NodeId] = asyncio.Queue()  # bounded by _asking: each node once
        self._refused: set[str] = set()

    @property
    def vouched(self) -> dict[str, str]:
        """Up to 256 peers for ``PeerHello.peers``: what a newcomer with one seed needs to find the rest."""
        places = sorted(self._book.items())[:256]
        return {node: _host_port(place.addresses[0], place.port) for node, place in places}

    def sighted(self, node: NodeId, addresses: Iterable[str], port: int) -> None:
        """Somebody says ``node`` may be at one of these addresses: ask there."""
        place = _Place(tuple(addresses), port)
        if node == self._me or not place.addresses or not 0 < port < 65536:
            return
        if node not in self._book and len(self._book) >= ADDRESSES_KNOWN_MAX:
            return
        self._book[node] = place
        self.ask([node])

    def gone(self, node: NodeId) -> None:
        """Somebody said goodbye in its name, which anybody on the network can: ask it."""
        self.ask([node])

    def ask(self, nodes: Iterable[NodeId]) -> None:
        """Probe these soon; one probe per node at a time."""
        for node in nodes:
            if node in self._book and node not in self._asking:
                self._asking.add(node)
                self._wanted.put_nowait(node)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for k in range(PROBES_AT_ONCE_MAX):
                group.create_task(self._probe_wanted(), name=f"peers.probe-{k}")
            for host, port in self._seeds:
                group.create_task(self._ask_seed(host, port), name=f"peers.seed-{host}")

    async def _probe_wanted(self) -> None:
        while True:
            node = await self._wanted.get()
            place = self._book.get(node)
            try:
                if place is not None:
                    hello, address = await self._client.probe(
                        place.addresses, place.port, expect=node, timeout_s=PROBE_TIMEOUT_S
                    )
                    self._heard(hello, address)
            except WrongKeyError as error:
                self._refuse(str(node), error)
            except (UnreachableError, DecodeError):
                self._learn(PeerSilent(node))
            finally:
                self._asking.discard(node)

    async def _ask_seed(self, host: str, port: int) -> None:
        """Until it answers, every second; then now and then, since it may be replaced."""
        while True:
            wait_s = SEED_EVERY_S
            try:
                hello, address = await self._client.probe(
                    (host,), port, expect=None, timeout_s=PROBE_TIMEOUT_S
                )
                if hello.node != self._me:
                    self._book.setdefault(hello.node, _Place((address, *hello.addresses), hello.port))
                    self._heard(hello, address)
                wait_s = SEED_REST_S
            except WrongKeyError as error:
                self._refuse(_host_port(host, port), error)
            except (UnreachableError, DecodeError) as error:
                log.debug("seed %s:%s: %s", host, port, error)
            await asyncio.sleep(wait_s)

    def _heard(self, hello: PeerHello, address: str) -> None:
        self._learn(PeerHeard(hello, address))
        for node, where in hello.peers.items():
            host, _, port = where.rpartition(":")
            if is_id(node) and NodeId(node) not in self._book and port.isdigit():
                self.sighted(NodeId(node), (host.strip("[]"),), int(port))

    def _refuse(self, who: str, error: WrongKeyError) -> None:
        """Say it once per peer, loudly: it is the first thing to look at when a mesh does not form."""
        if who not in self._refused and len(self._refused) < ADDRESSES_KNOWN_MAX:
            self._refused.add(who)
            say(log, "wrong_key", f"{who} was refused: {error}", logging.WARNING, peer=who)


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
