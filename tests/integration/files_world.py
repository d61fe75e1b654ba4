"""Nodes that keep their files in step: real directories, real TLS servers, and a broker of ten lines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from mesh.agreement.versions import FilesChanged, OwnFiles, Versions
from mesh.core import Broadcast, Effect, Fact, Notify
from mesh.facts import LinkUp, MemberChanged
from mesh.ids import NodeId
from mesh.messages import FilesHeld, PullAdapter, RemoveAdapter
from mesh.transport.bulk.blobs import Holder
from mesh.transport.bulk.client import BulkClient
from node.files.blobs import FileBlobs, WithFiles
from node.files.distribution import Distribution, Replicas
from node.files.library import Holdings, Library
from tests.integration.bulk_world import VIEW, BulkWorld
from tests.unit.adapters_made import put_adapter

__all__ = ["BASE", "FilesNode", "FilesWorld", "until"]

BASE = "b" * 64
SOON_S = 15.0


class FilesNode:
    """What a node has of its files; ``join`` puts it on the bus."""

    def __init__(self, world: FilesWorld, name: str, quota_bytes: int) -> None:
        self.id = NodeId(name)
        self.shelf = world.directory / f"{name}-adapters"
        self.library = Library(self.shelf, quota_bytes=quota_bytes)
        self.versions = Versions(self.id)
        self.blobs = FileBlobs()
        self.distribution: Distribution | None = None

    def put(self, name: str, weights: bytes) -> None:
        put_adapter(self.shelf, name, weights=weights)

    def weights(self, name: str) -> bytes | None:
        """Of what is served under the name now."""
        try:
            return (self.shelf / name / "adapter_model.safetensors").read_bytes()
        except FileNotFoundError:
            return None

    def look(self) -> Holdings:
        return self.library.look(dict(self.versions.newest), BASE)


class FilesWorld:
    """The mesh: keeps what each node said last, as a broker keeps retained messages."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bulk = BulkWorld(directory)
        self.retained: dict[NodeId, FilesHeld] = {}
        self.holders: dict[NodeId, Holder] = {}
        self.here: dict[NodeId, FilesNode] = {}

    def node(self, name: str, *, quota_bytes: int = 10**9) -> FilesNode:
        return FilesNode(self, name, quota_bytes)

    @contextlib.asynccontextmanager
    async def joined(self, node: FilesNode, *, replicas: Replicas = "auto") -> AsyncIterator[FilesNode]:
        """The node runs until the block ends; then the others see it leave."""
        store = WithFiles(self.bulk.store(f"{node.id}-blocks"), node.blobs)
        context = self.bulk.identity(node.id).client_context()
        async with self.bulk.serving(node.id, store) as holder, BulkClient(context, lambda: VIEW) as bulk:
            node.distribution = Distribution(
                me=node.id, incarnation=lambda: 1, library=node.library, versions=node.versions,
                blobs=node.blobs, bulk=bulk, holder=self.holders.get, base=lambda: BASE, replicas=replicas,
                learn=lambda fact: self._learn(node, fact),
            )  # fmt: skip
            self.holders[node.id], self.here[node.id] = holder, node
            for held in self.retained.values():
                self._carry_out(node, node.versions.receive(held, held.node, 0.0))
            self._learn(node, LinkUp(1, None))
            self._tell_all(MemberChanged(node.id, "alive", 1))
            running = asyncio.create_task(node.distribution.run())
            try:
                yield node
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                del self.holders[node.id], self.here[node.id]
                self._tell_all(MemberChanged(node.id, "dead", 1))

    def ask(self, node: FilesNode, message: PullAdapter | RemoveAdapter) -> None:
        self._carry_out(node, node.versions.receive(message, NodeId("client"), 0.0))

    def _learn(self, node: FilesNode, fact: Fact) -> None:
        self._carry_out(node, node.versions.learn(fact, 0.0))

    def _tell_all(self, fact: MemberChanged) -> None:
        for node in list(self.here.values()):
            if node.id != fact.node:
                self._learn(node, fact)

    def _carry_out(self, node: FilesNode, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Broadcast(message=FilesHeld() as held):
                    self.retained[held.node] = held
                    for other in list(self.here.values()):
                        self._carry_out(other, other.versions.receive(held, held.node, 0.0))
                case Notify(fact=FilesChanged()) if node.distribution is not None:
                    node.distribution.changed()
                case Notify(fact=(PullAdapter() | RemoveAdapter()) as message):
                    assert node.distribution is not None
                    node.distribution.asked(message)
                case Notify(fact=OwnFiles()) | _:
                    pass


async def until(is_so: Callable[[], bool]) -> None:
    """Looks again and again; more often than a person would notice."""
    async with asyncio.timeout(SOON_S):
        while not is_so():  # noqa: ASYNC110 - what is looked at lies on a disk
            await asyncio.sleep(0.02)
