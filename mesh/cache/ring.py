"""The ring: which nodes own a key, by views that are numbered and never change.

A ``RingSpec`` is what travels: an epoch, and the members with their quotas. A ``RingView`` is that with its
table of arcs drawn (``mesh.cache.straws``): the same spec gives the same view on every node. The coordinator
makes specs (``RingKeeper``); every node keeps the newest it has heard of (``Ring``), and a few before it,
where blocks still lie that have not moved yet.

Specs are totally ordered, by epoch and then by what they say, and a node only ever goes up: whatever the
order in which they arrive, and however often, all nodes end with the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

from mesh.cache.straws import ARC_BITS, NOBODY, deal
from mesh.core import FOREVER
from mesh.ids import Epoch, NodeId, is_id
from mesh.messages.cache import QUOTA_BYTES_MAX, RING_MEMBERS_MAX, RingRecord

__all__ = [
    "KEY_BYTES",
    "REPLICAS",
    "SPARE_WORTH",
    "Ring",
    "RingConfig",
    "RingEpoch",
    "RingKeeper",
    "RingSpec",
    "RingView",
    "arc_of",
]

KEY_BYTES = 32
REPLICAS = 2
"""Copies of a block, on different nodes: one node may die without anything being lost."""

SPARE_WORTH = 0.1
"""What a copy on the second owner is worth to its store, against the same on the first: it saves the
computing only if the first is lost. So where there is room for everything twice, everything is there twice;
where there is not, second copies go before anything that is there once."""

_EARLIER_MAX = 3
"""Views kept besides the newest. Each costs 1 MiB; a block that four changes have not moved is repaired
by what the catalogues say, not by where it used to belong."""


@dataclass(frozen=True, slots=True, order=True)
class RingEpoch:
    """Which change of the ring, by which coordinator. Every request for blocks carries it."""

    claim: Epoch
    """The election's epoch of the coordinator that made the change."""
    change: int
    """Counts up over all coordinators, as far as each knew."""

    def __post_init__(self) -> None:
        if not 0 <= self.change < 2**53:
            raise ValueError(f"change must be from 0 to 2**53 - 1, got {self.change}")

    def __str__(self) -> str:
        return f"{self.claim}/{self.change}"


@dataclass(frozen=True, slots=True)
class RingSpec:
    """A view as it travels.

    Raises:
        ValueError: Members are not in order, twice there, too many, or have no quota.
    """

    epoch: RingEpoch
    quotas: tuple[tuple[NodeId, int], ...]
    """Every member and how many bytes it gives, sorted by name. A node without quota is no member."""

    def __post_init__(self) -> None:
        names = [node for node, _ in self.quotas]
        if len(names) > RING_MEMBERS_MAX or any(a >= b for a, b in pairwise(names)):
            raise ValueError(f"members must be in order, each once, at most {RING_MEMBERS_MAX}")
        for node, quota in self.quotas:
            if not is_id(node) or not 1 <= quota <= QUOTA_BYTES_MAX:
                raise ValueError(
                    f"a member is a node id with a quota of bytes, got {node[:80]!r} with {quota}"
                )

    @classmethod
    def of(cls, epoch: RingEpoch, quotas: Mapping[NodeId, int]) -> RingSpec:
        """Of these nodes; those that give nothing are left out."""
        return cls(epoch, tuple(sorted((node, quota) for node, quota in quotas.items() if quota > 0)))

    @classmethod
    def read(cls, record: RingRecord) -> RingSpec:
        """As it came. The record has checked itself, so this does not raise."""
        return cls.of(RingEpoch(record.epoch, record.change), record.quotas)

    def record(self) -> RingRecord:
        """As it goes."""
        return RingRecord(epoch=self.epoch.claim, change=self.epoch.change, quotas=dict(self.quotas))

    @property
    def rank(self) -> tuple[RingEpoch, bytes]:
        """Puts any two specs in order, also two that one epoch should never have had."""
        return self.epoch, hashlib.blake2b(repr(self.quotas).encode(), digest_size=16).digest()


class RingView:
    """Who owns what, for good: a spec with its table drawn."""

    __slots__ = ("_first", "_names", "_second", "quotas", "spec")

    def __init__(self, spec: RingSpec) -> None:
        self.spec = spec
        self.quotas: Mapping[NodeId, int] = dict(spec.quotas)
        self._names = tuple(self.quotas)
        table = deal(self._names, tuple(self.quotas.values()))
        # Plain arrays: reading one number of them is three times as fast as of numpy's.
        self._first, self._second = (array("H", kind.tobytes()) for kind in table)

    def __repr__(self) -> str:
        return f"<RingView {self.epoch} of {len(self._names)}>"

    @property
    def epoch(self) -> RingEpoch:
        return self.spec.epoch

    @property
    def members(self) -> tuple[NodeId, ...]:
        return self._names

    def renumbered(self, spec: RingSpec) -> RingView:
        """The view of ``spec``, which has the same quotas: nothing is drawn.

        Raises:
            ValueError: It has others.
        """
        if spec.quotas != self.spec.quotas:
            raise ValueError(f"the quotas of {spec.epoch} are not those of {self.epoch}")
        view = copy(self)
        view.spec = spec
        return view

    def owners(self, key: bytes) -> tuple[NodeId, ...]:
        """The nodes that should hold a key, the one to ask first in front: two, or all if there are fewer."""
        return self.owners_of_arc(arc_of(key))

    def owners_of_arc(self, arc: int) -> tuple[NodeId, ...]:
        second = self._second[arc]
        if second == NOBODY:
            return self._names[:1]
        return self._names[self._first[arc]], self._names[second]

    def arcs_of(self, node: NodeId) -> int:
        """How many arc places a node has, of ``REPLICAS * N_ARCS`` in all."""
        if node not in self.quotas:
            return 0
        index = self._names.index(node)
        return self._first.count(index) + self._second.count(index)


def arc_of(key: bytes) -> int:
    """The arc of a key. Keys are digests: their first bits are as good as drawn at random."""
    return int.from_bytes(key[:4], "big") >> (32 - ARC_BITS)


class Ring:
    """The newest view a node knows, and where blocks may lie that have not moved to it yet."""

    def __init__(self) -> None:
        self._views: list[RingView] = []  # the newest first

    @property
    def view(self) -> RingView | None:
        return self._views[0] if self._views else None

    @property
    def earlier(self) -> tuple[RingView, ...]:
        return tuple(self._views[1:])

    def is_newer(self, spec: RingSpec) -> bool:
        """Whether a spec is worth drawing."""
        return not self._views or spec.rank > self._views[0].spec.rank

    def take(self, view: RingView) -> bool:
        """Go over to a view if it is newer; whether it was. Stale and repeated ones change nothing."""
        if not self.is_newer(view.spec):
            return False
        # Only another number: nothing moves, so no view before it need make room.
        is_same = bool(self._views) and self._views[0].quotas == view.quotas
        self._views = [view, *self._views[1 if is_same else 0 :][:_EARLIER_MAX]]
        return True

    def settle(self) -> None:
        """All that should move has moved, as far as this node knows: forget the views before."""
        del self._views[1:]

    def sources(self, key: bytes) -> list[NodeId]:
        """Whom to ask for a key, in order: its owners, then those before that are still members.

        This is the pull-through: a new owner that has not got a block yet asks the one that had it.
        """
        found: dict[NodeId, None] = {}
        for view in self._views:
            for node in view.owners(key):
                if node in self._views[0].quotas:
                    found[node] = None
        return list(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    """When the coordinator changes the ring.

    Raises:
        ValueError: A time or the change of quota is negative or no number.
    """

    settle_s: float = 2.0
    """A node is here this long before it is given arcs, or another is that came before it: those that start
    together join together."""
    grace_s: float = 5.0
    """A node is dead this long before its arcs go to others. It is dead after 5 s of silence, so the copying
    of a gigabyte begins 10 s after a death: a node that restarts comes back with all that it held."""
    quota_change: float = 0.1
    """A quota must change by this part of itself to be worth moving blocks for."""

    def __post_init__(self) -> None:
        if not all(0 <= value < FOREVER for value in (self.settle_s, self.grace_s, self.quota_change)):
            raise ValueError("settle_s, grace_s and quota_change must be finite and not negative")


class RingKeeper:
    """On the coordinator: makes the next spec when nodes have come or gone for good."""

    def __init__(self, config: RingConfig | None = None) -> None:
        self.config = config or RingConfig()
        self._present_since: dict[NodeId, float] = {}  # bound: who is present, or a member
        self._absent_since: dict[NodeId, float] = {}  # bound: members
        self._wake_at = FOREVER

    @property
    def wake_at(self) -> float:
        """When ``next_spec`` may say something new though nobody came or went."""
        return self._wake_at

    def next_spec(
        self,
        current: RingSpec | None,
        present: Mapping[NodeId, int],
        gone: Collection[NodeId],
        claim: Epoch,
        now: float,
    ) -> RingSpec | None:
        """What to publish now, or ``None``.

        Args:
            current: The newest spec known here.
            present: The nodes alive, with the bytes each gives.
            gone: Nodes that said goodbye: they do not come back with what they held.
            claim: This coordinator's epoch. One that has been outranked publishes nothing.
        """
        members = dict(current.quotas) if current else {}
        willing = {node: quota for node, quota in sorted(present.items()) if quota > 0}
        self._present_since = {node: self._present_since.get(node, now) for node in willing}
        self._absent_since = {
            node: self._absent_since.get(node, now) for node in members if node not in present
        }
        self._wake_at = FOREVER
        if current is not None and claim < current.epoch.claim:
            return None
        after = dict(members)
        for node, since in self._absent_since.items():
            if node in gone or self._is_due(since + self.config.grace_s, now):
                del after[node]
        for node in members:
            if node in present and node not in willing:
                del after[node]  # alive, and gives nothing any more
        newcomers = [node for node in willing if node not in members]
        # Who came meanwhile joins with the first that is due: one change instead of several.
        settled = [self._is_due(self._present_since[node] + self.config.settle_s, now) for node in newcomers]
        if any(settled):
            for node in newcomers[: max(0, RING_MEMBERS_MAX - len(after))]:
                after[node] = willing[node]
        for node in members.keys() & willing.keys():
            if abs(willing[node] - members[node]) > self.config.quota_change * members[node]:
                after[node] = willing[node]
        if after == members:
            return None
        change = current.epoch.change + 1 if current else 1
        return RingSpec.of(RingEpoch(claim, change), after)

    def _is_due(self, at: float, now: float) -> bool:
        if at <= now:
            return True
        self._wake_at = min(self._wake_at, at)
        return False
