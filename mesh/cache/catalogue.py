"""The catalogue: what each node says it holds, so that asking for what nobody has costs nothing.

::

     holder                                            every other node
     CatalogueWriter ──Whole──▶ (life, version, bits) ─▶ Catalogues ── claims(node, key)?
        add, drop    ──Delta──▶ (bits that changed)   ─▶            └─ no: do not ask
                                                                       yes: ask; ``answered`` says how it went

A delta fits one version only; who has missed one asks for the whole (``Outcome.NEEDS_WHOLE``). A node's
versions go up within a life, and its lives go up, so what comes late or twice changes nothing.

What an answer costs, if it is a miss:

* *Absent everywhere*: no catalogue claims it, nobody is asked; but one in a hundred does claim it wrongly.
* *Stale*: the holder has let go of it. It is asked once; that key is then known to be missing there until
  that node says something new, and what it says then shows that it was honest.
* *A lie*: a catalogue with more bits set than its keys need is refused. One whose claims fail more often
  than false positives explain is distrusted: nobody asks it for ``distrust_s``, twice as long each next time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from mesh.cache.bloom import BITS_MAX, BITS_MIN, FALSE_POSITIVES_MAX, FILL_MAX, capacity, contains, probes
from mesh.ids import NodeId
from mesh.messages import CatalogueDelta, CatalogueWhole
from mesh.messages.cache import POSITION_BYTES

__all__ = ["CatalogueConfig", "CatalogueDelta", "CatalogueWhole", "CatalogueWriter", "Catalogues", "Outcome"]


class CatalogueWriter:
    """This node's own. Counts how many keys set each bit, so that keys can leave again.

    Memory: a byte per bit, and the keys themselves (the store's own, shared). Adding to a full filter
    doubles it, which takes 2 µs per key; at ``BITS_MAX`` further keys are not listed (``n_unlisted``), and
    peers do not ask for them: a miss, never a lie.
    """

    def __init__(self, life: int, salt: int) -> None:
        """``salt``: drawn at random, so that two nodes' filters are not wrong about the same keys."""
        self._life = life
        self._salt = salt
        self._keys: set[bytes] = set()
        self._counts = bytearray(BITS_MIN)
        self._flips: set[int] | None = None  # since the last version; ``None``: only a whole one will do
        self._told = CatalogueWhole(life=life, version=0, salt=salt, n_keys=0, bits=bytes(BITS_MIN // 8))
        self.n_unlisted = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    @property
    def n_keys(self) -> int:
        return len(self._keys)

    def add(self, key: bytes) -> bool:
        """The store holds it now; whether it is listed. Adding twice is adding once."""
        if key in self._keys:
            return True
        if len(self._keys) >= capacity(len(self._counts)):
            if len(self._counts) >= BITS_MAX:
                self.n_unlisted += 1
                return False
            self._rebuild(2 * len(self._counts), self._salt)
        self._keys.add(key)
        self._count(key)
        return True

    def drop(self, key: bytes) -> None:
        """The store has let go of it. Bits that other keys need stay."""
        if key not in self._keys:
            return
        self._keys.remove(key)
        for position in probes(key, len(self._counts), self._salt):
            if self._counts[position] == 0xFF:
                continue  # full: how many keys share it is not known, so it stays until the next rebuild
            self._counts[position] -= 1
            if self._counts[position] == 0:
                self._flip(position)

    def rewrite(self, salt: int) -> None:
        """With another salt, and no larger than needed: now other keys are claimed wrongly.

        Once in a while, so that no block goes without its second copy for ever because the node that should
        have it seems to.
        """
        n_bits = BITS_MIN
        while capacity(n_bits) < len(self._keys):
            n_bits *= 2
        self._rebuild(n_bits, salt)

    def next_version(self) -> CatalogueWhole | CatalogueDelta | None:
        """What to tell all peers now; ``None`` if nothing has changed."""
        if self._flips is not None and not self._flips:
            return None
        flips, self._flips = self._flips, set()
        version = self._told.version + 1
        if flips is None:
            bits = bytearray(len(self._counts) // 8)
            for position, count in enumerate(self._counts):
                if count:
                    bits[position >> 3] |= 1 << (position & 7)
        else:
            bits = bytearray(self._told.bits)
            for position in flips:
                bits[position >> 3] ^= 1 << (position & 7)
        self._told = CatalogueWhole(
            life=self._life, version=version, salt=self._salt, n_keys=self.n_keys, bits=bytes(bits)
        )
        if flips is None or len(flips) * POSITION_BYTES > len(bits) // 2:
            return self._told
        packed = b"".join(position.to_bytes(POSITION_BYTES, "little") for position in sorted(flips))
        return CatalogueDelta(life=self._life, version=version, n_keys=self.n_keys, flips=packed)

    def whole(self) -> CatalogueWhole:
        """For a peer that has none, or has missed something: the last version told."""
        return self._told

    def _count(self, key: bytes) -> None:
        for position in probes(key, len(self._counts), self._salt):
            count = self._counts[position]
            if count == 0:
                self._flip(position)
            if count < 0xFF:
                self._counts[position] = count + 1

    def _flip(self, position: int) -> None:
        if self._flips is not None:
            self._flips ^= {position}  # there and back is nothing

    def _rebuild(self, n_bits: int, salt: int) -> None:
        self._counts = bytearray(n_bits)
        self._salt = salt
        self._flips = None
        for key in self._keys:
            self._count(key)


class Outcome(Enum):
    """What became of a catalogue that came in."""

    TAKEN = "taken"
    OLD = "old"
    NEEDS_WHOLE = "needs whole"
    """A delta of a version this node has not got: ask that node for the whole."""
    REFUSED = "refused"
    """It claims more than it may, or there is no room for one more node; worth a line in the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueConfig:
    """How much to keep of others, and how long to be wary of one.

    Raises:
        ValueError: A number is not positive and finite.
    """

    nodes_max: int = 1024
    """256 MiB at 256 KiB each, 16 at the usual 16 KiB; the catalogues of further nodes are refused."""
    misses_max: int = 4096
    """Keys remembered per node as missing there though claimed: 400 KiB at most."""
    distrust_s: float = 5.0
    """After one miss too many; doubles with each next one up to ``distrust_s_max``."""
    distrust_s_max: float = 300.0
    half_life_s: float = 60.0
    """How fast old claims and misses lose weight."""

    def __post_init__(self) -> None:
        if not (self.nodes_max >= 1 and self.misses_max >= 1):
            raise ValueError("nodes_max and misses_max must be at least 1")
        lengths = (self.distrust_s, self.distrust_s_max, self.half_life_s)
        if not all(0 < length < math.inf for length in lengths):
            raise ValueError("distrust_s, distrust_s_max and half_life_s must be positive and finite")


class _Peer:
    """One node's catalogue, and how far its claims have held."""

    def __init__(self) -> None:
        self.life = self.version = -1
        self.salt = 0
        self.n_bits = 0
        self.bits = bytearray()
        self.missing: set[bytes] = set()  # at this version; bound: misses_max
        self.n_looked = 0.0  # keys looked up here, and misses, both fading
        self.n_missed = 0.0
        self.faded_at = 0.0
        self.distrusted_until = -math.inf
        self.n_distrusted = 0

    def has(self, key: bytes) -> bool:
        return contains(self.bits, key, self.salt)

    def forget_distrust(self) -> None:
        self.n_looked = self.n_missed = 0.0
        self.n_distrusted = 0
        self.distrusted_until = -math.inf


def misses_allowed(n_looked: float) -> float:
    """How many misses false positives explain among so many lookups: their mean and three deviations.

    None in fewer than a hundred lookups. A node known for longer may waste that many: its lies cost as many
    round trips before it is distrusted, 4 after a hundred lookups, 20 after a thousand.
    """
    mean = FALSE_POSITIVES_MAX * n_looked
    return mean + 3 * math.sqrt(mean) if n_looked >= 1 / FALSE_POSITIVES_MAX else 0.0


class Catalogues:
    """All other nodes' catalogues, as this node knows them. ``now``: seconds on this node's own clock."""

    def __init__(self, config: CatalogueConfig | None = None) -> None:
        self.config = config or CatalogueConfig()
        self._peers: dict[NodeId, _Peer] = {}  # bound: nodes_max

    @property
    def nodes(self) -> Collection[NodeId]:
        return self._peers.keys()

    def version(self, node: NodeId) -> tuple[int, int]:
        """Life and version of a node's catalogue, as it is here; below every real one if there is none."""
        peer = self._peers.get(node)
        return (peer.life, peer.version) if peer is not None else (-1, -1)

    def take(self, node: NodeId, message: CatalogueWhole | CatalogueDelta, now: float) -> Outcome:
        """A catalogue that ``node`` itself has sent."""
        peer = self._peers.get(node)
        if peer is None:
            if len(self._peers) >= self.config.nodes_max:
                return Outcome.REFUSED
            peer = self._peers[node] = _Peer()
            peer.faded_at = now
        if (message.life, message.version) <= (peer.life, peer.version):
            return Outcome.OLD
        if isinstance(message, CatalogueWhole):
            bits = bytearray(message.bits)
        elif (message.life, message.version) != (peer.life, peer.version + 1):
            return Outcome.NEEDS_WHOLE
        else:
            bits = bytearray(peer.bits)
            for at in range(0, len(message.flips), POSITION_BYTES):
                position = int.from_bytes(message.flips[at : at + POSITION_BYTES], "little")
                if position >= peer.n_bits:
                    return self._refuse(peer, now)
                bits[position >> 3] ^= 1 << (position & 7)
        if int.from_bytes(bits, "little").bit_count() > FILL_MAX * 8 * len(bits):
            return self._refuse(peer, now)
        if message.life > peer.life:
            peer.forget_distrust()  # another process: perhaps another program
        if isinstance(message, CatalogueWhole):
            peer.salt = message.salt
        peer.life, peer.version = message.life, message.version
        peer.bits, peer.n_bits = bits, 8 * len(bits)
        if peer.missing and 2 * sum(peer.has(key) for key in peer.missing) <= len(peer.missing):
            peer.forget_distrust()  # it was behind, no more: it claims them no longer
        peer.missing.clear()
        return Outcome.TAKEN

    def forget(self, node: NodeId) -> None:
        """It has left the mesh."""
        self._peers.pop(node, None)

    def claims(self, node: NodeId, key: bytes) -> bool:
        """Whether its catalogue says so; trust does not matter. For repair: who is said to have a copy."""
        peer = self._peers.get(node)
        return peer is not None and peer.version >= 0 and key not in peer.missing and peer.has(key)

    def is_trusted(self, node: NodeId, now: float) -> bool:
        peer = self._peers.get(node)
        return peer is None or peer.distrusted_until <= now

    def holders(self, key: bytes, sources: Iterable[NodeId], now: float) -> list[NodeId]:
        """Whom to ask: those that claim the key, ``sources`` (the ring's) first, in order, then any other.

        Empty: nobody has it; that cost no message. Cost: 3 µs for each node known.
        """
        found = []
        for node in dict.fromkeys((*sources, *self._peers)):
            peer = self._peers.get(node)
            if peer is None or peer.version < 0 or peer.distrusted_until > now:
                continue
            peer.n_looked += 1
            if key not in peer.missing and peer.has(key):
                found.append(node)
        return found

    def answered(self, node: NodeId, n_found: int, missing: Sequence[bytes], now: float) -> bool:
        """It was asked for keys that it claimed and had all but ``missing``; whether it is trusted now.

        A node that does not answer is no matter of the catalogue: it is slow or dead.
        """
        peer = self._peers.get(node)
        if peer is None:
            return True
        faded = 0.5 ** (max(0.0, now - peer.faded_at) / self.config.half_life_s)
        peer.n_looked *= faded
        peer.n_missed *= faded
        peer.faded_at = now
        for key in missing[: self.config.misses_max - len(peer.missing)]:
            peer.missing.add(key)
        peer.n_missed += len(missing)
        if missing and peer.n_missed > misses_allowed(peer.n_looked):
            self._distrust(peer, now)
        elif n_found and not missing:
            peer.n_distrusted = max(0, peer.n_distrusted - 1)
        return peer.distrusted_until <= now

    def lacks(self, node: NodeId, keys: Iterable[bytes]) -> None:
        """It was asked whether it has these, which its filter claims, and has not: one in a hundred is so.

        That is no lie, and known until that node says something new.
        """
        peer = self._peers.get(node)
        if peer is not None:
            peer.missing.update(list(keys)[: self.config.misses_max - len(peer.missing)])

    def _refuse(self, peer: _Peer, now: float) -> Outcome:
        self._distrust(peer, now)
        return Outcome.REFUSED

    def _distrust(self, peer: _Peer, now: float) -> None:
        length_s = min(self.config.distrust_s * 2.0**peer.n_distrusted, self.config.distrust_s_max)
        peer.n_distrusted = min(peer.n_distrusted + 1, 63)
        peer.distrusted_until = max(peer.distrusted_until, now + length_s)
        # It begins anew afterwards, with nothing to its credit.
        peer.n_looked = peer.n_missed = 0.0
