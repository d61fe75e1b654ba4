"""Who keeps which part of the mesh's memory, and what each node says it holds.

``RingRecord`` is how a ``mesh.cache.ring.RingSpec`` travels. The catalogue messages are what
``mesh.cache.catalogue`` writes and reads; whose they are stands in their topic: no node speaks for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.cache.bloom import BITS_MAX, BITS_MIN, SALT_MAX, capacity
from mesh.ids import Epoch, NodeId
from mesh.messages.checks import check_count, check_id, check_seconds

__all__ = [
    "POSITION_BYTES",
    "QUOTA_BYTES_MAX",
    "RING_MEMBERS_MAX",
    "CacheReport",
    "CacheTier",
    "CatalogueDelta",
    "CatalogueVersion",
    "CatalogueWhole",
    "ClearShare",
    "RingRecord",
]

RING_MEMBERS_MAX = 4096  # as in membership; 280 KiB of names and quotas
QUOTA_BYTES_MAX = 2**53 - 1

POSITION_BYTES = 3  # of a bit in a delta; BITS_MAX is 2**21
_LIFE_MAX = 2**48  # as an incarnation
_VERSION_MAX = 2**53 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRecord:
    """Retained: the nodes that share the mesh's memory, and how many bytes each gives.

    From it every node computes the same owners for every block. Of two records the later counts: that of the
    higher ``epoch`` (the election's, of the coordinator that made it), then of the higher ``change``.
    """

    epoch: Epoch
    change: int
    """Counts up over all coordinators, as far as each knew."""
    quotas: dict[NodeId, int]
    """Bytes by node. A node that gives nothing is not in it."""

    def __post_init__(self) -> None:
        if self.epoch.term < 1:
            raise ValueError("a ring has the epoch of the coordinator that made it, of term 1 or more")
        check_count("change", self.change)
        if len(self.quotas) > RING_MEMBERS_MAX:
            raise ValueError(f"a ring has at most {RING_MEMBERS_MAX} members, got {len(self.quotas)}")
        for node, quota in self.quotas.items():
            check_id("quotas", node)
            check_count("quotas", quota, QUOTA_BYTES_MAX, least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueWhole:
    """All a node holds. At most 256 KiB: it goes by the data plane, or by the bus while it is small.

    Raises:
        ValueError: A number is out of range, or the bits are not as many as they should be.
    """

    life: int
    """The node's incarnation: a later one holds what it holds, whatever the earlier said."""
    version: int
    salt: int
    n_keys: int
    bits: bytes

    def __post_init__(self) -> None:
        n_bits = 8 * len(self.bits)
        if not BITS_MIN <= n_bits <= BITS_MAX or n_bits & (n_bits - 1):
            raise ValueError(f"bits must be a power of two from {BITS_MIN} to {BITS_MAX}, got {n_bits}")
        _check_version(self.life, self.version)
        if not 0 <= self.salt <= SALT_MAX or not 0 <= self.n_keys <= capacity(n_bits):
            raise ValueError(f"salt or n_keys is out of range: {self.salt}, {self.n_keys} keys")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueDelta:
    """What turns version ``version - 1`` into ``version``: three bytes for each bit that is to be flipped.

    Raises:
        ValueError: A number is out of range, or there are more bits than a whole one would take.
    """

    life: int
    version: int
    n_keys: int
    flips: bytes

    def __post_init__(self) -> None:
        _check_version(self.life, self.version, least=1)
        if len(self.flips) % POSITION_BYTES or len(self.flips) > BITS_MAX // 8:
            raise ValueError(
                f"flips must be whole positions and less than a whole, got {len(self.flips)} bytes"
            )
        if not 0 <= self.n_keys <= capacity(BITS_MAX):
            raise ValueError(f"n_keys must be from 0 to {capacity(BITS_MAX)}, got {self.n_keys}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueVersion:
    """What a node's catalogue is at, for whoever may have missed it: too large to send, or a new broker.

    Raises:
        ValueError: A number is out of range.
    """

    life: int
    version: int

    def __post_init__(self) -> None:
        _check_version(self.life, self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTier:
    """What one tier has given to a node since the node started: a part of ``CacheReport``."""

    hits: int = 0
    """Blocks."""
    bytes: int = 0
    saved_s: float = 0.0
    """Seconds that this node would have computed for them."""

    def __post_init__(self) -> None:
        check_count("hits", self.hits)
        check_count("bytes", self.bytes)
        check_seconds("saved_s", self.saved_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """Retained: what a node holds of the mesh's memory, and what that has done for it."""

    node: NodeId
    incarnation: int
    quota_bytes: int = 0
    held_bytes: int = 0
    """On its disk for the mesh; at most the quota."""
    blocks: int = 0
    memory: CacheTier = CacheTier()
    disk: CacheTier = CacheTier()
    peers: CacheTier = CacheTier()
    misses: int = 0
    """Blocks that no tier had: they were computed."""
    given_bytes: int = 0
    """Sent to other owners, so that every block lies twice."""
    clears: int = 0
    """How often it was told to let go of all it holds."""

    def __post_init__(self) -> None:
        check_id("node", self.node)
        for name in ("incarnation", "quota_bytes", "held_bytes", "blocks", "misses", "given_bytes", "clears"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearShare:
    """To one node: let go of all that you hold of the mesh's memory. ``CacheReport.clears`` answers."""


def _check_version(life: int, version: int, least: int = 0) -> None:
    if not 0 <= life <= _LIFE_MAX or not least <= version <= _VERSION_MAX:
        raise ValueError(f"life and version must be counts, got {life} and {version}")
