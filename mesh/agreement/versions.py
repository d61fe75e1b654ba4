"""Which version of each adapter is the newest, and who has it: what all nodes come to agree on.

Every node says what it has (``FilesHeld``) and what it knows to be removed. Of one name the entry of the
highest *rank* counts: higher version first, a removal over what it removes, then the higher digest. Two
nodes that make version 4 at once are thus decided the same way everywhere, and a version made later than a
removal comes back while one made earlier does not. The newest is a maximum: in whatever order, and however
often, the same words are heard, the same stays; nobody is asked.

What the newest was is remembered while its holders are away, so that a number is not given twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Notify
from mesh.facts import LinkDown, LinkUp, MemberChanged
from mesh.ids import NodeId
from mesh.messages import NodeForgotten
from mesh.messages.files import (
    AdapterHeld,
    FilesHeld,
    ModelHeld,
    PullAdapter,
    RemoveAdapter,
)

__all__ = ["FilesChanged", "Newest", "OwnFiles", "Rank", "Versions", "rank_of"]

NAMES_MAX = 4096  # as many as a node's shelf lists
NODES_MAX = 4096
ENTRIES_MAX = 65_536  # of all nodes together: 40 MB; more is somebody's mistake

Rank = tuple[int, bool, str]
"""Version, whether it is a removal, digest: entries of one name in their order."""


def rank_of(version: int, digest: str | None) -> Rank:
    """``digest=None``: a removal of the versions up to ``version``."""
    return (version, digest is None, digest or "")


@dataclass(frozen=True, slots=True)
class Newest:
    """What a name stands for: a version, or nothing any more."""

    version: int
    held: AdapterHeld | None
    """As one of its holders describes it; ``None``: removed."""
    left_s: float = 0.0
    """Of a removal: how long it is remembered, from when it was heard."""

    @property
    def rank(self) -> Rank:
        return rank_of(self.version, self.held.digest if self.held is not None else None)


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """Shell to core: what this node has and knows to be removed."""

    held: FilesHeld


@dataclass(frozen=True, slots=True)
class FilesChanged:
    """Core to shell: look at ``Versions`` again."""


class Versions:
    """One node's view of everybody's files, its own included."""

    wake_at = FOREVER

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._by_node: dict[NodeId, FilesHeld] = {}
        self._newest: dict[str, Newest] = {}
        self._gone: set[NodeId] = set()
        self._n_entries = 0
        self._is_linked = False

    # ── what is known ───────────────────────────────────────────────────────────────────────────────

    @property
    def newest(self) -> Mapping[str, Newest]:
        return MappingProxyType(self._newest)

    def of(self, node: NodeId) -> FilesHeld | None:
        """What a node last said, whether it is here or not."""
        return self._by_node.get(node)

    def holders(self, digest: str) -> list[NodeId]:
        """Other nodes here that have this version, in the order of their ids."""
        return sorted(
            node for node, files in self._others() if any(held.digest == digest for held in files.adapters)
        )

    def held(self, digest: str) -> AdapterHeld | None:
        """A version by the digest of its manifest, as one of its holders here describes it."""
        for _, files in self._others():
            for held in files.adapters:
                if held.digest == digest:
                    return held
        return None

    def models(self) -> Iterator[tuple[NodeId, ModelHeld]]:
        """The backbones that other nodes here can give."""
        for node, files in self._others():
            if files.model is not None:
                yield node, files.model

    def _others(self) -> Iterable[tuple[NodeId, FilesHeld]]:
        return (
            (node, files)
            for node, files in sorted(self._by_node.items())
            if node != self._me and node not in self._gone
        )

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case FilesHeld(node=node) if node == sender and node != self._me:
                return [Notify(FilesChanged())] if self._take_in(message) else []
            case NodeForgotten(node=node) if node != self._me:
                files = self._by_node.pop(node, None)
                self._gone.discard(node)
                if files is not None:
                    self._n_entries -= _n_entries(files)
                    return [Notify(FilesChanged())]
                return []
            case PullAdapter() | RemoveAdapter():
                return [Notify(message)]
            case _:
                return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        match fact:
            case OwnFiles(held=held) if held.node == self._me:
                self._take_in(held)
                return [Broadcast(held)] if self._is_linked else []
            case LinkUp():
                self._is_linked = True
                own = self._by_node.get(self._me)
                return [Broadcast(own)] if own is not None else []
            case LinkDown():
                self._is_linked = False
                return []
            case MemberChanged(node=node, standing=standing):
                was_gone = node in self._gone
                is_gone = standing in ("dead", "left")
                if is_gone and len(self._gone) < NODES_MAX:
                    self._gone.add(node)
                elif not is_gone:
                    self._gone.discard(node)
                is_news = was_gone != is_gone and node in self._by_node
                return [Notify(FilesChanged())] if is_news else []
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        return []

    # ── the maximum ─────────────────────────────────────────────────────────────────────────────────

    def _take_in(self, files: FilesHeld) -> bool:
        """Whether anything is new."""
        before = self._by_node.get(files.node)
        if before is not None and files.incarnation < before.incarnation:
            return False
        n_entries = self._n_entries + _n_entries(files) - (_n_entries(before) if before else 0)
        if n_entries > ENTRIES_MAX or (before is None and len(self._by_node) >= NODES_MAX):
            return False
        self._by_node[files.node] = files
        self._n_entries = n_entries
        if len(self._newest) >= NAMES_MAX:
            self._forget_unheld()
        for held in files.adapters:
            self._join(held.name, Newest(held.version, held))
        for removed in files.removed:
            self._join(removed.name, Newest(removed.version, None, removed.left_s))
        return before is None or _lasting(before) != _lasting(files)

    def _forget_unheld(self) -> None:
        """Names that nobody has or speaks of make room for new ones."""
        said = {
            name
            for files in self._by_node.values()
            for name in (*(one.name for one in files.adapters), *(one.name for one in files.removed))
        }
        self._newest = {name: newest for name, newest in self._newest.items() if name in said}

    def _join(self, name: str, entry: Newest) -> None:
        known = self._newest.get(name)
        if known is None:
            if len(self._newest) < NAMES_MAX:
                self._newest[name] = entry
        elif entry.rank > known.rank:
            self._newest[name] = entry
        elif entry.rank == known.rank and entry.held is None:
            # Who repeats a removal must not make it live for ever.
            self._newest[name] = replace(known, left_s=min(known.left_s, entry.left_s))


def _lasting(files: FilesHeld) -> FilesHeld:
    """Without what changes by time alone."""
    removed = [replace(one, left_s=0.0) for one in files.removed]
    return replace(files, removed=removed, pulls=[], incarnation=0)


def _n_entries(files: FilesHeld) -> int:
    return len(files.adapters) + len(files.removed)
