"""What the commands ask of the mesh's files: who has what, and to pull, spread or remove an adapter."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mesh.agreement.versions import Newest, Versions
from mesh.cache.ring import RingEpoch
from mesh.errors import ConfigError, TaskError, UnreachableError
from mesh.facts import LinkDown, LinkUp, MemberChanged
from mesh.ids import EPOCH_ZERO, NodeId
from mesh.messages import FilesHeld, NodeInfo, NodeState, PullAdapter, RemoveAdapter
from mesh.messages.files import AdapterHeld, AdapterPull
from mesh.topics import FILES, INFO, STATE
from mesh.transport.bulk.blobs import BlobRef, Holder
from mesh.transport.bulk.client import BulkClient
from mesh.transport.bulk.store import MemorySink
from mesh.transport.bus import Heard
from node.client import CLIENT_NAME, MeshClient, connected
from node.files.file_list import ADAPTER_FILES, FileList
from node.joining import known_key
from node.settings import Settings
from node.state import StateDir

__all__ = ["MeshFiles", "adapter_details", "mesh_files", "pull_adapter", "remove_adapter", "spread_adapter"]

LISTEN_S = 2.5
QUIET_S = 0.25
"""What is retained comes in one go: nothing for so long after all who are known have spoken is all of it."""
LINK_S = 20.0
ASK_EVERY_S = 1.0
TROUBLE_AFTER_S = 4.0
"""What a node said of an earlier pull is still its word until then."""
SILENCE_S = 20.0
CARD_BYTES_MAX = 4_000_000
_NO_VIEW = RingEpoch(EPOCH_ZERO, 0)

OnPull = Callable[[NodeId, AdapterPull], None]


@dataclass(slots=True)
class MeshFiles:
    """What the nodes say of themselves; ``feed`` takes in what is heard."""

    versions: Versions = field(default_factory=lambda: Versions(NodeId(CLIENT_NAME)))
    infos: dict[NodeId, NodeInfo] = field(default_factory=dict)
    online: set[NodeId] = field(default_factory=set)

    def feed(self, event: object) -> None:
        match event:
            case Heard(message=NodeState(node=node, state=state, incarnation=incarnation)):
                is_online = state in ("online", "draining")
                (self.online.add if is_online else self.online.discard)(node)
                standing = "alive" if is_online else "left"
                self.versions.learn(MemberChanged(node, standing, incarnation), 0.0)
            case Heard(message=NodeInfo() as info):
                self.infos[info.node] = info
            case Heard(message=message, sender=sender):
                self.versions.receive(message, sender, 0.0)
            case _:
                pass

    @property
    def is_complete(self) -> bool:
        return bool(self.online) and all(self.versions.of(node) is not None for node in self.online)

    @property
    def newest(self) -> Mapping[str, Newest]:
        return self.versions.newest

    def find(self, name: str, version: int | None = None) -> AdapterHeld:
        """A version that a node which is here has; the newest unless one is named.

        Raises:
            ConfigError: There is none; the text says what there is.
        """
        one = self.newest.get(name)
        if version is None:
            if one is None:
                names = ", ".join(sorted(n for n, known in self.newest.items() if known.held is not None))
                raise ConfigError(f"no adapter of the mesh is called {name!r}; there are: {names or 'none'}")
            if one.held is None:
                raise ConfigError(
                    f"adapter {name!r} was removed from the mesh; `edgemesh tune` makes it anew"
                )
            return one.held
        there = self.all_versions(name)
        for held in there:
            if held.version == version:
                return held
        listed = ", ".join(str(held.version) for held in there)
        raise ConfigError(
            f"no node that is here has version {version} of {name!r}; there are: {listed or 'none'}"
        )

    def all_versions(self, name: str) -> list[AdapterHeld]:
        """Those that nodes which are here have, the newest first."""
        found = {
            held.digest: held
            for node in sorted(self.online)
            if (files := self.versions.of(node)) is not None
            for held in files.adapters
            if held.name == name
        }
        return sorted(found.values(), key=lambda held: (held.version, held.digest), reverse=True)

    def holders(self, digest: str) -> list[NodeId]:
        return [node for node in self.versions.holders(digest) if node in self.online]

    def could_serve(self, held: AdapterHeld) -> list[NodeId]:
        """Nodes here that serve the backbone it is for."""
        return sorted(
            node
            for node in self.online
            if (files := self.versions.of(node)) is not None
            and files.base is not None
            and held.base in (None, files.base)
        )


async def mesh_files(settings: Settings, state: StateDir) -> MeshFiles:
    """As soon as every node that is online has said what it has, at the latest after some seconds.

    Raises:
        ConfigError, WrongKeyError, UnreachableError: As ``node.client.find_broker``.
    """
    async with _listening(settings, state) as (_, files):
        return files


async def pull_adapter(
    settings: Settings, state: StateDir, node: NodeId, held: AdapterHeld, save_as: str | None, on_pull: OnPull
) -> None:
    """Have ``node`` pull a version; returns when it is served there.

    Raises:
        TaskError: It could not; the text says why.
        ConfigError, WrongKeyError, UnreachableError: As ``mesh_files``.
    """
    message = PullAdapter(name=held.name, digest=held.digest, save_as=save_as)
    async with _listening(settings, state) as (client, files):
        await _pulled(client, files, {node: message}, on_pull)


async def spread_adapter(
    settings: Settings, state: StateDir, name: str, digest: str, on_pull: OnPull
) -> tuple[AdapterHeld, list[NodeId]]:
    """Have every node that could serve a version pull it; the version, and who has it in the end.

    Raises:
        TaskError: A node could not pull it.
        UnreachableError: No node of this machine has noticed it, or one does not answer.
    """
    async with _listening(settings, state) as (client, files):
        until = time.monotonic() + SILENCE_S
        while (held := files.versions.held(digest)) is None:
            if time.monotonic() > until:
                raise UnreachableError(
                    f"no node of mesh '{settings.mesh}' on this machine has noticed {name!r}: "
                    "`edgemesh nodes` shows whether one runs here with this --state-dir"
                )
            files.feed(await client.next(until - time.monotonic()))
        lacking = [node for node in files.could_serve(held) if node not in files.holders(digest)]
        message = PullAdapter(name=held.name, digest=digest)
        await _pulled(client, files, dict.fromkeys(lacking, message), on_pull)
        return held, files.holders(digest)


async def remove_adapter(
    settings: Settings, state: StateDir, name: str, here: Sequence[NodeId]
) -> tuple[int, list[NodeId]]:
    """Remove an adapter from the whole mesh: the version up to which it is gone, and who has not confirmed.

    Raises:
        ConfigError: There is none of this name.
        UnreachableError: No node takes the order.
    """
    async with _listening(settings, state) as (client, files):
        version = files.find(name).version
        able = [node for node in sorted(files.online) if files.versions.of(node) is not None]
        told = next((node for node in (*here, *able) if node in able), None)
        if told is None:
            raise UnreachableError("no node of the mesh is online: start one with `edgemesh join`")
        until, asked_at = time.monotonic() + SILENCE_S, 0.0
        while _still_have(files, name, version) and time.monotonic() < until:
            if time.monotonic() >= asked_at and not _knows_removal(files, told, name, version):
                client.publish(RemoveAdapter(name=name, version=version), to=told)
                asked_at = time.monotonic() + ASK_EVERY_S
            files.feed(await client.next(ASK_EVERY_S))
        if not _knows_removal(files, told, name, version):
            raise UnreachableError(f"{told} did not take the order: it may run an older version of edgemesh")
        return version, _still_have(files, name, version)


async def adapter_details(
    settings: Settings, state: StateDir, files: MeshFiles, held: AdapterHeld
) -> tuple[FileList | None, bytes | None]:
    """An adapter's list of files and its card, from a node that has it; ``None`` for what did not come."""
    key = known_key(settings, state)
    context = state.client_identity(key, CLIENT_NAME).client_context()

    async with BulkClient(context, lambda: _NO_VIEW) as bulk:
        content = await _fetched(bulk, files, held, BlobRef(bytes.fromhex(held.digest), held.manifest_bytes))
        if content is None:
            return None, None
        listed = FileList.parse(content, ADAPTER_FILES.__contains__)
        card = next((file for file in listed.files if file.name == "edgemesh.json"), None)
        if card is None or card.size > CARD_BYTES_MAX:
            return listed, None
        return listed, await _fetched(bulk, files, held, card.blob)


async def _fetched(bulk: BulkClient, files: MeshFiles, held: AdapterHeld, blob: BlobRef) -> bytes | None:
    for node in files.holders(held.digest):
        info = files.infos.get(node)
        for address in info.addresses if info is not None else ():
            sink = MemorySink(blob)
            assert info is not None
            if await bulk.fetch(blob, [Holder(node, address, info.port)], sink, within_s=LISTEN_S):
                return bytes(sink.content)
    return None


@asynccontextmanager
async def _listening(settings: Settings, state: StateDir) -> AsyncIterator[tuple[MeshClient, MeshFiles]]:
    """A client that knows what every node has, as far as they say so in time."""
    files = MeshFiles()
    async with connected(settings, state, (FILES, INFO, STATE)) as client:
        until = time.monotonic() + LINK_S
        is_linked = False
        while (now := time.monotonic()) < until:
            is_complete = is_linked and files.is_complete
            event = await client.next(min(until - now, QUIET_S) if is_complete else until - now)
            if event is None and is_complete:
                break
            if isinstance(event, LinkUp):
                is_linked = True
                until = time.monotonic() + LISTEN_S
            elif isinstance(event, LinkDown):
                is_linked = False
            files.feed(event)
        if not is_linked:
            raise UnreachableError(f"no link to the broker: {client.trouble or 'it does not answer'}")
        yield client, files


async def _pulled(
    client: MeshClient, files: MeshFiles, wanted: Mapping[NodeId, PullAdapter], on_pull: OnPull
) -> None:
    """Returns when each node has what it was told to pull."""
    open_, asked_at = dict(wanted), 0.0
    began_at = heard_at = time.monotonic()
    while open_:
        now = time.monotonic()
        if now - heard_at > SILENCE_S:
            who = ", ".join(sorted(open_))
            raise UnreachableError(f"no answer from {who}: `edgemesh nodes` shows who is there")
        if now >= asked_at:
            for node, message in open_.items():
                if not _is_pulling(files, node, message):
                    client.publish(message, to=node)
            asked_at = now + ASK_EVERY_S
        event = await client.next(ASK_EVERY_S / 2)
        files.feed(event)
        for node, message in list(open_.items()):
            pull = _pull_of(files, node, message)
            if _has(files, node, message):
                del open_[node]
            elif pull is not None and pull.trouble is None:
                on_pull(node, pull)
            elif pull is not None and now - began_at > TROUBLE_AFTER_S:
                raise TaskError(f"{node} could not pull {message.name!r}: {pull.trouble}")
        if isinstance(event, Heard) and isinstance(event.message, FilesHeld):
            heard_at = time.monotonic()


def _has(files: MeshFiles, node: NodeId, message: PullAdapter) -> bool:
    said = files.versions.of(node)
    name = message.save_as or message.name
    return said is not None and any(
        held.digest == message.digest and held.name == name for held in said.adapters
    )


def _pull_of(files: MeshFiles, node: NodeId, message: PullAdapter) -> AdapterPull | None:
    said = files.versions.of(node)
    name = message.save_as or message.name
    pulls = said.pulls if said is not None else []
    return next((pull for pull in pulls if (pull.name, pull.digest) == (name, message.digest)), None)


def _is_pulling(files: MeshFiles, node: NodeId, message: PullAdapter) -> bool:
    pull = _pull_of(files, node, message)
    return pull is not None and pull.trouble is None


def _still_have(files: MeshFiles, name: str, version: int) -> list[NodeId]:
    return [
        node
        for node in sorted(files.online)
        if (said := files.versions.of(node)) is not None
        and any(held.name == name and held.version <= version for held in said.adapters)
    ]


def _knows_removal(files: MeshFiles, node: NodeId, name: str, version: int) -> bool:
    said = files.versions.of(node)
    return said is not None and any(
        removed.name == name and removed.version >= version for removed in said.removed
    )
