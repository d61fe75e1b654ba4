"""The caches of several nodes in one process: real shares, cores, TLS and moves; only the bus is played."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Self

import pytest

from mesh.agreement.fence import Fence
from mesh.cache.exchange import ExchangeConfig
from mesh.cache.facts import HeldChanged
from mesh.cache.moves import MovesConfig
from mesh.cache.ring import RingConfig
from mesh.cache.sharding import Sharding, ShardingConfig
from mesh.core import Broadcast, Effect, Fact, Message, Notify
from mesh.facts import Elected, LinkUp, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId
from mesh.messages import CatalogueDelta, CatalogueVersion, CatalogueWhole, NodeInfo
from mesh.transport.bulk.blobs import Block, Holder
from mesh.transport.identity import Identity, issue
from mesh.transport.streams import PeerServer
from node.cache import rounds, share
from node.cache.assembly import NodeCache
from node.compute.features.packs import write_pack
from tests.integration.bulk_world import KEY, block_of, hello_of

__all__ = ["BLOCK_BYTES", "CacheMesh", "CacheNode", "some_blocks", "soon"]

BLOCK_BYTES = 2000


def some_blocks(first: int, n: int, n_bytes: int = BLOCK_BYTES) -> list[Block]:
    return [block_of(number, n_bytes) for number in range(first, first + n)]


class CacheNode:
    """One node: its cache and the core behind it. ``life`` counts up when it comes back."""

    def __init__(self, mesh: CacheMesh, name: str, quota_bytes: int, life: int = 1) -> None:
        self.name = NodeId(name)
        self.life = life
        self._mesh = mesh
        self.directory = mesh.directory / name
        self.directory.mkdir(exist_ok=True)
        self.info = NodeInfo(
            node=self.name, incarnation=life, hostname=name, version="1", protocol_min=1, protocol_max=1,
            addresses=["127.0.0.1"], port=1, system="Linux", device="none", n_cpus=1, memory_bytes=1,
            model=None, adapters=[], slots=0, cache_bytes=quota_bytes,
        )  # fmt: skip
        self.core = Sharding(
            me=self.name, info=self.info, life=life, fence=Fence(EPOCH_ZERO), records={}, rng=Random(name),
            now=time.monotonic(), config=mesh.config,
        )  # fmt: skip
        identity: Identity = issue(KEY, name, self.directory)
        stand_in: Any = SimpleNamespace(sharding=self.core, membership=SimpleNamespace(members={}))
        peers: Any = SimpleNamespace(place=mesh.place)
        self.cache = NodeCache(
            me=self.name, identity=identity, directory=self.directory / "features", quota_bytes=quota_bytes,
            cores=lambda: stand_in, peers=lambda: peers, info=lambda: self.info, learn=self.learn,
            moves=mesh.moves,
        )  # fmt: skip
        self._server = PeerServer(
            identity.server_context(), lambda: hello_of(name), hosts=("127.0.0.1",), port=0,
            routes=self.cache.server.routes(),
        )  # fmt: skip
        self._open = contextlib.AsyncExitStack()
        self.last_word: Message | None = None  # of its catalogue: the broker retains it
        self._tasks: list[asyncio.Task[None]] = []

    # ── what tests do with it ───────────────────────────────────────────────────────────────────────

    def write(self, blocks: Sequence[Block], recompute_s: float = 1.0) -> None:
        """As the compute process does: a pack in the directory."""
        write_pack(self.directory / "features", {block.key: (block.payload, recompute_s) for block in blocks})

    async def read(self, blocks: Sequence[Block], within_s: float = 60.0) -> list[Block | None]:
        """What the mesh has of these; what comes is what it should be."""
        answers: list[Block | None] = []
        async for part in self.cache.reads.read([block.key for block in blocks], within_s=within_s):
            answers += part
        assert len(answers) == len(blocks)
        for answer, block in zip(answers, blocks, strict=True):
            assert answer is None or (answer.key, bytes(answer.payload)) == (block.key, bytes(block.payload))
        return answers

    def holds(self, blocks: Iterable[Block]) -> set[bytes]:
        return {block.key for block in blocks if self.cache.share.holds(block.key)}

    def claims(self, blocks: Iterable[Block]) -> None:
        """It says that it holds these, whatever it holds."""
        self.learn(HeldChanged(added=tuple(block.key for block in blocks)))

    # ── its life ────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        await self._open.enter_async_context(self._server)
        await self._open.enter_async_context(self.cache)
        self._mesh.places[self.name] = Holder(self.name, "127.0.0.1", self._server.port)
        self._tasks = [
            asyncio.create_task(self.cache.run(), name=f"{self.name}.run"),
            asyncio.create_task(self._tick(), name=f"{self.name}.tick"),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        await self._open.aclose()

    def learn(self, fact: Fact) -> None:
        self.carry_out(self.core.learn(fact, time.monotonic()))

    def receive(self, message: Message, sender: NodeId) -> None:
        self.carry_out(self.core.receive(message, sender, time.monotonic()))

    def carry_out(self, effects: list[Effect]) -> None:
        loop = asyncio.get_running_loop()
        for effect in effects:
            match effect:
                case Broadcast(message=message):
                    if isinstance(message, CatalogueWhole | CatalogueDelta | CatalogueVersion):
                        self.last_word = message
                    for other in self._mesh.others(self):
                        loop.call_soon(other.receive, message, self.name)
                case Notify(fact=fact):
                    self.cache.on_fact(fact)
                case _:
                    pass

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            self.carry_out(self.core.tick(time.monotonic()))


class CacheMesh:
    """Nodes that know one another; the first one coordinates. A context manager."""

    def __init__(self, directory: Path, quotas: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rounds, "LOOK_S", 0.05)
        monkeypatch.setattr(share, "LOOK_S", 0.05)
        monkeypatch.setattr(share, "GATHER_S", 0.05)
        monkeypatch.setattr(share, "FREE_BYTES_LEFT", 0)
        self.directory = directory
        self.config = ShardingConfig(
            ring=RingConfig(settle_s=0.05, grace_s=0.05), exchange=ExchangeConfig(tell_s=0.05, fetch_s=0.1)
        )
        self.moves = MovesConfig(retry_s=0.1, sweep_s=1.0)
        self.nodes: dict[str, CacheNode] = {}
        self.places: dict[NodeId, Holder] = {}
        self._quotas = quotas

    def __getitem__(self, name: str) -> CacheNode:
        return self.nodes[name]

    async def __aenter__(self) -> Self:
        for name, quota_bytes in self._quotas.items():
            await self.join(name, quota_bytes)
        await self.agreed()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes.values()))

    def place(self, node: NodeId) -> tuple[str, int] | None:
        place = self.places.get(node)
        return (place.address, place.port) if place is not None else None

    def others(self, node: CacheNode) -> list[CacheNode]:
        return [other for other in self.nodes.values() if other is not node]

    async def join(self, name: str, quota_bytes: int, life: int = 1) -> CacheNode:
        node = CacheNode(self, name, quota_bytes, life)
        await node.start()
        node.learn(LinkUp(1, None))
        self.nodes[name] = node
        for other in self.others(node):
            for one, two in ((node, other), (other, node)):
                one.learn(MemberChanged(two.name, "alive", two.life))
                one.receive(two.info, two.name)
                if two.last_word is not None:
                    one.receive(two.last_word, two.name)
        if len(self.nodes) == 1:
            node.learn(Elected(Epoch(1, node.name)))
        elif (spec := next(iter(self.nodes.values())).core.spec) is not None:
            node.receive(spec.record(), spec.epoch.claim.node)
        return node

    async def kill(self, name: str) -> None:
        """Gone from one moment to the next; the others declare it dead."""
        node = self.nodes.pop(name)
        await node.stop()
        for other in self.nodes.values():
            other.learn(MemberChanged(node.name, "dead", node.life))

    async def agreed(self) -> None:
        """All have the ring of all who give something."""
        givers = {node.name for node in self.nodes.values() if node.info.cache_bytes}
        await soon(
            lambda: all(
                node.core.ring.view is not None and set(node.core.ring.view.members) == givers
                for node in self.nodes.values()
            ),
            "one ring",
        )

    def copies(self, blocks: Iterable[Block]) -> dict[bytes, int]:
        """How many nodes hold each."""
        blocks = list(blocks)
        held = [node.holds(blocks) for node in self.nodes.values()]
        return {block.key: sum(block.key in keys for keys in held) for block in blocks}

    async def twice(self, blocks: Iterable[Block], timeout_s: float = 60.0) -> None:
        """Every block lies with both its owners, and everybody has heard of it."""
        blocks = list(blocks)

        def is_so() -> bool:
            held = {node.name: node.holds(blocks) for node in self.nodes.values()}
            for node in self.nodes.values():
                view = node.core.ring.view
                assert view is not None
                for block in blocks:
                    for owner in view.owners(block.key):
                        if block.key not in held.get(owner, ()):
                            return False
                        if owner != node.name and not node.core.catalogues.claims(owner, block.key):
                            return False
            return True

        await soon(is_so, "two copies of every block", timeout_s)


async def soon(is_so: Any, what: str, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < until, f"no {what} within {timeout_s:g} s"
        await asyncio.sleep(0.02)
