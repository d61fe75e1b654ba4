"""Where other nodes may be found, and what they say when asked.

An mDNS record, a seed or another peer's word only names an address. Each is asked over mutual TLS who it
is before anything believes it; the answers go to ``mesh.agreement.hosting`` as facts.

Anybody on the network can announce anything. So a rumour never takes the place of an address where the node
has answered before, is never passed on, and waits behind the nodes that are known.
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
from mesh.transport.streams import PeerClient
from node.logs import say

__all__ = ["PROBE_TIMEOUT_S", "Peers"]

log = logging.getLogger(__name__)

ADDRESSES_KNOWN_MAX = 4096  # as many as members
# A node that is there is proven within milliseconds. Forged ones that black-hole us keep a real newcomer
# waiting for at most 512 / 8 probes of 1.5 s, a minute and a half; seeds never wait.
RUMOURS_MAX = 512
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
        self._proven: dict[NodeId, _Place] = {}
        self._address: dict[NodeId, str] = {}  # which of a proven node's answered last
        self._rumoured: dict[NodeId, _Place] = {}  # the newest of each; the oldest make room
        self._asking: set[NodeId] = set()
        # Bounded by _asking, each node once. Known nodes first, then rumours in the order of asking.
        self._wanted: asyncio.PriorityQueue[tuple[bool, int, NodeId]] = asyncio.PriorityQueue()
        self._n_asked = 0
        self._refused: set[str] = set()

    @property
    def vouched(self) -> dict[str, str]:
        """Up to 256 peers for ``PeerHello.peers``: what a newcomer with one seed needs to find the rest."""
        places = sorted(self._proven.items())[:256]
        return {node: _host_port(place.addresses[0], place.port) for node, place in places}

    def place(self, node: NodeId) -> tuple[str, int] | None:
        """The address and port where it has answered for itself."""
        place = self._proven.get(node)
        return None if place is None else (self._address.get(node, place.addresses[0]), place.port)

    def sighted(self, node: NodeId, addresses: Iterable[str], port: int) -> None:
        """Somebody says ``node`` may be at one of these addresses: ask there."""
        place = _Place(tuple(addresses), port)
        if node == self._me or not place.addresses or not 0 < port < 65536:
            return
        self._rumoured.pop(node, None)
        if place != self._proven.get(node):
            self._rumoured[node] = place
            if len(self._rumoured) > RUMOURS_MAX:
                del self._rumoured[next(iter(self._rumoured))]
        self.ask([node])

    def gone(self, node: NodeId) -> None:
        """Somebody said goodbye in its name, which anybody on the network can: ask it."""
        self.ask([node])

    def ask(self, nodes: Iterable[NodeId]) -> None:
        """Probe these soon; one probe per node at a time."""
        for node in nodes:
            is_known = node in self._proven
            has_room = is_known or (node in self._rumoured and len(self._asking) < 2 * ADDRESSES_KNOWN_MAX)
            if has_room and node not in self._asking:
                self._asking.add(node)
                self._n_asked += 1
                self._wanted.put_nowait((not is_known, self._n_asked, node))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for k in range(PROBES_AT_ONCE_MAX):
                group.create_task(self._probe_wanted(), name=f"peers.probe-{k}")
            for host, port in self._seeds:
                group.create_task(self._ask_seed(host, port), name=f"peers.seed-{host}")

    async def _probe_wanted(self) -> None:
        while True:
            _, _, node = await self._wanted.get()
            try:
                if node not in self._proven and node not in self._rumoured:
                    continue  # newer rumours took its room
                # Where it answered before, while it does; else where it is said to be now.
                for book in (self._proven, self._rumoured):
                    if (place := book.get(node)) is not None and await self._probe(node, place):
                        break
                else:
                    self._learn(PeerSilent(node))
            except WrongKeyError as error:
                self._refuse(str(node), error)
            finally:
                self._asking.discard(node)

    async def _probe(self, node: NodeId, place: _Place) -> bool:
        """Whether ``node`` answers there.

        Raises:
            WrongKeyError: Somebody of another mesh does, and we have no better address.
        """
        try:
            hello, address = await self._client.probe(
                place.addresses, place.port, expect=node, timeout_s=PROBE_TIMEOUT_S
            )
        except (UnreachableError, DecodeError):
            return False
        except WrongKeyError:
            if node in self._proven and node in self._rumoured:
                return False
            raise
        self._rumoured.pop(node, None)
        self._prove(node, place)
        if node in self._proven:
            self._address[node] = address
        self._heard(hello, address)
        return True

    def _prove(self, node: NodeId, place: _Place) -> None:
        if node in self._proven or len(self._proven) < ADDRESSES_KNOWN_MAX:
            self._proven[node] = place

    async def _ask_seed(self, host: str, port: int) -> None:
        """Until it answers, every second; then now and then, since it may be replaced."""
        while True:
            wait_s = SEED_EVERY_S
            try:
                hello, address = await self._client.probe(
                    (host,), port, expect=None, timeout_s=PROBE_TIMEOUT_S
                )
                if hello.node != self._me:
                    if hello.node not in self._proven:
                        self._prove(hello.node, _Place((address, *hello.addresses), hello.port))
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
            if is_id(node) and NodeId(node) not in self._proven and port.isdigit():
                self.sighted(NodeId(node), (host.strip("[]"),), int(port))

    def _refuse(self, who: str, error: WrongKeyError) -> None:
        """Say it once per peer, loudly: it is the first thing to look at when a mesh does not form."""
        if who not in self._refused and len(self._refused) < ADDRESSES_KNOWN_MAX:
            self._refused.add(who)
            say(log, "wrong_key", f"{who} was refused: {error}", logging.WARNING, peer=who)


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
