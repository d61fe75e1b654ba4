"""What the commands ask of the mesh's memory: who shares it, what lies where, and to let go of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from mesh.cache.ring import REPLICAS, RingSpec, RingView
from mesh.cache.straws import N_ARCS
from mesh.errors import UnreachableError
from mesh.facts import LinkDown, LinkUp
from mesh.ids import NodeId
from mesh.messages import CacheReport, ClearShare, NodeInfo, NodeState, RingRecord
from mesh.topics import CACHE, INFO, RING, STATE
from mesh.transport.bus import Heard
from node.client import MeshClient, connected
from node.settings import Settings
from node.state import StateDir

__all__ = ["CacheRow", "CacheView", "cache_snapshot", "cache_watch", "clear_shares"]

LISTEN_S = 2.5
LINK_S = 20.0
CLEAR_S = 15.0
ASK_EVERY_S = 1.0
_DRAWN_MAX = 64
"""Members up to which the ring is drawn to tell their shares (a second); beyond, quotas tell them well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """One node. Hits, misses and seconds count since it started."""

    node: NodeId
    state: str
    """``online``, ``draining``, ``offline`` or ``left``."""
    share: float
    """Of all blocks' places; 0 = it only reads."""
    report: CacheReport | None
    """``None``: it has not said anything; an older version, perhaps."""

    @property
    def n_asked(self) -> int:
        """Blocks that this node needed."""
        report = self.report
        if report is None:
            return 0
        return report.memory.hits + report.disk.hits + report.peers.hits + report.misses

    @property
    def saved_s(self) -> float:
        report = self.report
        return report.memory.saved_s + report.disk.saved_s + report.peers.saved_s if report else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheView:
    """The mesh's memory as the nodes tell it."""

    epoch: str | None
    """``None``: no ring; nobody gives anything, or nobody coordinates."""
    replicas: int
    rows: tuple[CacheRow, ...]


@dataclass(slots=True)
class _Heard:
    """Everything said so far."""

    ring: RingSpec | None = None
    shares: dict[NodeId, float] = field(default_factory=dict)
    states: dict[NodeId, str] = field(default_factory=dict)
    quotas: dict[NodeId, int] = field(default_factory=dict)
    reports: dict[NodeId, CacheReport] = field(default_factory=dict)

    def feed(self, event: object) -> None:
        match event:
            case Heard(message=RingRecord() as record):
                spec = RingSpec.read(record)
                if self.ring is None or spec.rank > self.ring.rank:
                    self.ring, self.shares = spec, {}
            case Heard(message=NodeState(node=node, state=state)):
                self.states[node] = state
            case Heard(message=NodeInfo(node=node, cache_bytes=n_bytes)):
                self.quotas[node] = n_bytes
            case Heard(message=CacheReport() as report):
                self.reports[report.node] = report
            case _:
                pass

    @property
    def online(self) -> list[NodeId]:
        return sorted(node for node, state in self.states.items() if state in ("online", "draining"))

    @property
    def is_complete(self) -> bool:
        givers = {node for node in self.online if self.quotas.get(node)}
        members = set(dict(self.ring.quotas)) if self.ring else set()
        return bool(self.online) and all(node in self.reports for node in self.online) and givers <= members

    async def view(self) -> CacheView:
        if self.ring is not None and not self.shares:
            self.shares = await asyncio.to_thread(_shares, self.ring)
        named = {*self.online, *self.shares}
        rows = tuple(
            CacheRow(
                node=node,
                state=self.states.get(node, "offline"),
                share=self.shares.get(node, 0.0),
                report=self.reports.get(node),
            )
            for node in sorted(named)
        )
        return CacheView(
            epoch=str(self.ring.epoch) if self.ring and self.ring.quotas else None,
            replicas=min(REPLICAS, len(self.shares)),
            rows=rows,
        )


async def cache_snapshot(settings: Settings, state: StateDir) -> CacheView:
    """As soon as every node that is online has spoken, at the latest after ``LISTEN_S``.

    Raises:
        ConfigError, WrongKeyError, UnreachableError: As ``node.client.find_broker``.
    """
    async with connected(settings, state, (STATE, INFO, RING, CACHE)) as client:
        heard = _Heard()
        await _listen(client, heard)
        return await heard.view()


async def cache_watch(
    settings: Settings, state: StateDir, every_s: float = 1.0
) -> AsyncGenerator[CacheView, None]:
    """A picture every ``every_s`` seconds, until the caller stops.

    Raises:
        ConfigError, WrongKeyError, UnreachableError: As ``node.client.find_broker``.
    """
    async with connected(settings, state, (STATE, INFO, RING, CACHE)) as client:
        heard = _Heard()
        await _listen(client, heard)
        while True:
            yield await heard.view()
            until = time.monotonic() + every_s
            while (left_s := until - time.monotonic()) > 0:
                heard.feed(await client.next(left_s))


async def clear_shares(settings: Settings, state: StateDir) -> list[CacheReport]:
    """Every node that is online lets go of what it holds; what each says it holds then.

    Raises:
        UnreachableError: A node does not answer.
        ConfigError, WrongKeyError: As ``node.client.find_broker``.
    """
    async with connected(settings, state, (STATE, INFO, RING, CACHE)) as client:
        heard = _Heard()
        await _listen(client, heard)
        before = {node: heard.reports[node].clears for node in heard.online if node in heard.reports}
        if not before:
            raise UnreachableError("no node tells what it holds: `edgemesh nodes` shows who is there")
        until, asked_at = time.monotonic() + CLEAR_S, 0.0
        waiting = set(before)
        while waiting and time.monotonic() < until:
            if time.monotonic() - asked_at >= ASK_EVERY_S:
                for node in waiting:
                    client.publish(ClearShare(), to=node)
                asked_at = time.monotonic()
            heard.feed(await client.next(ASK_EVERY_S / 4))
            # One that was started anew meanwhile counts from 0, and has kept what it held: it is asked again.
            waiting = {node for node in waiting if heard.reports[node].clears <= before[node]}
        if waiting:
            raise UnreachableError(
                f"no answer from {', '.join(sorted(waiting))}: `edgemesh nodes` shows who is there"
            )
        return [heard.reports[node] for node in sorted(before)]


async def _listen(client: MeshClient, heard: _Heard) -> None:
    """Until all have spoken, or long enough."""
    until = time.monotonic() + LINK_S
    is_linked = False
    while (left_s := until - time.monotonic()) > 0:
        match event := await client.next(left_s):
            case LinkUp():
                is_linked, until = True, time.monotonic() + LISTEN_S
            case LinkDown():
                is_linked = False
            case _:
                heard.feed(event)
        if is_linked and heard.is_complete:
            return
    if not is_linked:
        raise UnreachableError(f"no link to the broker: {client.trouble or 'it does not answer'}")


def _shares(spec: RingSpec) -> dict[NodeId, float]:
    if len(spec.quotas) <= _DRAWN_MAX:
        view = RingView(spec)
        n_places = min(REPLICAS, len(spec.quotas)) * N_ARCS
        return {node: view.arcs_of(node) / n_places for node, _ in spec.quotas}
    total = sum(quota for _, quota in spec.quotas)
    return {node: quota / total for node, quota in spec.quotas}
