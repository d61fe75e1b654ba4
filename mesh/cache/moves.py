"""What this node sends to whom so that every block lies with its owners: after a join, a leave, a death.

One rule (``errands``), which every node applies to what it holds: *the first of a block's sources that is
said to hold it sends it to every owner that is not*. Sources are the owners in the newest view, then those
in the views before, without nodes that are gone; so after a join an old owner sends to the new one, and
after a death the survivor sends to the heir. All see the same views and catalogues, or will; until then two
may send the same, and the receiver refuses the second (``mesh.cache.intake``), or none does, and the next
sweep finds it.

A *sweep* applies the rule to all blocks, those with one living copy first. It goes on only as fast as bytes
may leave (``bytes_per_s``), so nothing is queued but one parcel for each receiver, and what changes
meanwhile counts. Nothing waits for a sweep: a reader finds a block where it still lies (``Ring.sources``).

::

    start ──▶ tick ──Parcel──▶ shell ──▶ the other node
                ▲ wake_at        │
                └──── done, failed ◀─┘
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from mesh.cache.ring import Ring, RingEpoch
from mesh.core import FOREVER
from mesh.ids import NodeId

__all__ = ["Block", "Claims", "Moves", "MovesConfig", "Parcel", "errands", "is_surplus"]

Claims = Callable[[NodeId, bytes], bool]
"""``Catalogues.claims``: whether a node says that it holds a key."""


@dataclass(frozen=True, slots=True)
class Block:
    """What is known of a block wherever it lies."""

    key: bytes
    digest: bytes
    """``mesh.digests`` of the payload; the receiver checks it."""
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Parcel:
    """Blocks to offer to one node in one request; it takes those it has not got and has room for."""

    number: int
    to: NodeId
    epoch: RingEpoch
    blocks: tuple[Block, ...]

    @property
    def n_bytes(self) -> int:
        return sum(block.n_bytes for block in self.blocks)


def errands(key: bytes, me: NodeId, ring: Ring, claims: Claims) -> list[NodeId]:
    """The nodes that ``me``, who holds ``key``, should send it to now."""
    view = ring.view
    if view is None:
        return []
    for source in ring.sources(key):
        if source == me:
            break
        if claims(source, key):
            return []  # it sends
    # None before me holds it. If I am no source at all, a read has left it here, and that saves it.
    return [owner for owner in view.owners(key) if owner != me and not claims(owner, key)]


def is_surplus(key: bytes, me: NodeId, ring: Ring, claims: Claims) -> bool:
    """Whether ``me`` holds it only for itself: all owners say they have it, so it may go first."""
    owners = ring.view.owners(key) if ring.view else ()
    return me not in owners and bool(owners) and all(claims(owner, key) for owner in owners)


@dataclass(frozen=True, slots=True, kw_only=True)
class MovesConfig:
    """How fast blocks move while nobody waits for them.

    Raises:
        ValueError: A bound is not positive and finite.
    """

    bytes_per_s: float = 40e6
    """A third of a gigabit link: readers keep the rest. A node with 1 GB dies among four: each of the other
    three sends a third of it, 8 s."""
    parcel_bytes: int = 1 << 20
    """At 40 MB/s a request each 26 ms; smaller ones cost time, larger ones memory at both ends."""
    parcel_blocks: int = 1024
    """32 KiB of keys in an offer."""
    in_flight: int = 4
    """Parcels on their way at once, each to another node."""
    scan_blocks: int = 2000
    """Blocks looked at in one tick: about 20 ms."""
    sweep_s: float = 60.0
    """From the end of a sweep to the next: what catalogues claimed wrongly, or nobody sent, is found then."""
    retry_s: float = 2.0
    """How long a node that failed is left alone; twice as long each next time, up to ``sweep_s``."""
    remembered: int = 1 << 16
    """Blocks sent of which the receiver's catalogue need not tell yet: 8 MiB."""

    def __post_init__(self) -> None:
        bounds = (
            self.bytes_per_s, self.parcel_bytes, self.parcel_blocks, self.in_flight, self.scan_blocks,
            self.sweep_s, self.retry_s, self.remembered,
        )  # fmt: skip
        if not all(0 < bound < FOREVER for bound in bounds):
            raise ValueError("every bound of moves must be positive and finite")


class Moves:
    """Sweeps, at a bounded rate. ``now``: seconds on this node's clock."""

    def __init__(self, me: NodeId, config: MovesConfig | None = None) -> None:
        self.config = config or MovesConfig()
        self._me = me
        self._scan: Iterator[tuple[Block, bool]] = iter(())
        self._is_scanning = False
        self._held_back: Block | None = None  # the next to pack
        self._is_blocked = False  # the parcel it should go into is full: the sweep waits until one has left
        self._was_cut_short = False
        self._next_sweep_at = FOREVER
        self._waiting: dict[NodeId, list[Block]] = {}  # a parcel each; bound: parcel_bytes, members
        self._full: dict[NodeId, None] = {}  # receivers whose parcel is ready, in that order
        self._in_flight: dict[int, Parcel] = {}
        self._resting_until: dict[NodeId, float] = {}
        self._n_failures: dict[NodeId, int] = {}
        self._sent: dict[tuple[NodeId, bytes], None] = {}  # since the last sweep began
        self._sent_before: dict[tuple[NodeId, bytes], None] = {}
        self._credit = float(self.config.parcel_bytes)
        self._credit_at = 0.0
        self._number = 0
        self.n_bytes_sent = 0

    @property
    def wake_at(self) -> float:
        """When ``tick`` has something to do; ``FOREVER``: not before a parcel is done or has failed."""
        if len(self._in_flight) >= self.config.in_flight:
            return FOREVER
        if self._is_scanning and not self._is_blocked and len(self._full) < self.config.in_flight:
            return self._credit_at
        if any(to not in self._receiving() for to in self._full):
            return self._credit_at + max(0.0, 1.0 - self._credit) / self.config.bytes_per_s
        return FOREVER if self._is_scanning or self._full else self._next_sweep_at

    @property
    def is_idle(self) -> bool:
        """Whether a whole sweep has found nothing left to send, as far as this node knows."""
        return not (self._is_scanning or self._waiting or self._in_flight or self._was_cut_short)

    def start(self, held: Collection[Block], ring: Ring, claims: Claims, now: float) -> None:
        """Begin a sweep of all that this node holds: the view has changed, or ``wants_sweep``.

        ``held`` is a snapshot; a block that is gone when its turn comes is for the shell to leave out. A
        sweep that was under way is replaced: the new one covers what is left of it.
        """
        self._scan = self._ordered(tuple(held), ring, claims)
        self._is_scanning = True
        self._held_back = None
        self._is_blocked = False
        self._was_cut_short = False
        self._next_sweep_at = now + self.config.sweep_s
        self._waiting.clear()
        self._full.clear()
        self._sent_before, self._sent = self._sent, {}
        if ring.view is not None:
            members = ring.view.quotas
            self._resting_until = {node: at for node, at in self._resting_until.items() if node in members}
            self._n_failures = {node: n for node, n in self._n_failures.items() if node in members}

    def wants_sweep(self, now: float) -> bool:
        """Whether it is time to call ``start`` again though the view is the same."""
        return not self._is_scanning and not self._waiting and now >= self._next_sweep_at

    def tick(self, ring: Ring, claims: Claims, now: float) -> list[Parcel]:
        """Parcels to send now, at most ``in_flight`` at a time."""
        self._earn(now)
        self._look(ring, claims, now)
        parcels = []
        for to in list(self._full):
            if self._credit <= 0 or len(self._in_flight) >= self.config.in_flight:
                break
            if to in self._receiving():
                continue
            assert ring.view is not None, "nothing is scanned without a ring"
            del self._full[to]
            self._number += 1
            parcel = Parcel(self._number, to, ring.view.epoch, tuple(self._waiting.pop(to)))
            self._in_flight[parcel.number] = parcel
            self._credit -= parcel.n_bytes
            self._is_blocked = False
            parcels.append(parcel)
        return parcels

    def done(self, number: int, n_bytes: int, now: float) -> None:
        """The receiver has taken what it wanted of a parcel, ``n_bytes`` of it. Unknown numbers change
        nothing."""
        parcel = self._in_flight.pop(number, None)
        if parcel is None:
            return
        self._earn(now)
        self._credit += parcel.n_bytes - n_bytes  # what it had already did not leave
        self._credit = min(self._credit, float(self.config.parcel_bytes))
        self.n_bytes_sent += n_bytes
        self._n_failures.pop(parcel.to, None)
        for block in parcel.blocks:
            if len(self._sent) < self.config.remembered:
                self._sent[parcel.to, block.key] = None

    def failed(self, number: int, now: float) -> None:
        """The receiver did not answer, or not properly: it is left alone a while, and a later sweep tries
        again."""
        parcel = self._in_flight.pop(number, None)
        if parcel is None:
            return
        n_failures = self._n_failures[parcel.to] = min(self._n_failures.get(parcel.to, 0) + 1, 32)
        rest_s = min(self.config.retry_s * 2.0 ** (n_failures - 1), self.config.sweep_s)
        self._resting_until[parcel.to] = now + rest_s
        self._waiting.pop(parcel.to, None)
        self._full.pop(parcel.to, None)
        self._is_blocked = False
        self._cut_short(now + rest_s)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────

    def _ordered(self, held: Sequence[Block], ring: Ring, claims: Claims) -> Iterator[tuple[Block, bool]]:
        """Each block twice, and whether it is its turn: first those that no other source is said to hold."""
        for is_urgent_turn in (True, False):
            for block in held:
                is_alone = not any(
                    claims(node, block.key) for node in ring.sources(block.key) if node != self._me
                )
                yield block, is_alone == is_urgent_turn

    def _look(self, ring: Ring, claims: Claims, now: float) -> None:
        """Go on with the sweep until a parcel is in the way, or for as long as one tick may take."""
        for _ in range(self.config.scan_blocks):
            if not self._is_scanning or self._is_blocked or len(self._full) >= self.config.in_flight:
                return
            if self._held_back is not None:
                turn = (self._held_back, True)
                self._held_back = None
            elif (ahead := next(self._scan, None)) is not None:
                turn = ahead
            else:
                self._is_scanning = False
                self._full |= dict.fromkeys(self._waiting)  # the last ones go half full
                return
            block, is_turn = turn
            receivers = self._receivers(block, ring, claims, now) if is_turn else []
            if any(to in self._full for to in receivers):
                self._held_back = block
                self._is_blocked = True
                return
            for to in receivers:
                self._pack(to, block)

    def _receivers(self, block: Block, ring: Ring, claims: Claims, now: float) -> list[NodeId]:
        receivers = []
        for to in errands(block.key, self._me, ring, claims):
            if (to, block.key) in self._sent or (to, block.key) in self._sent_before:
                continue
            resting_until = self._resting_until.get(to, now)
            if resting_until > now:
                self._cut_short(resting_until)
            else:
                receivers.append(to)
        return receivers

    def _pack(self, to: NodeId, block: Block) -> None:
        parcel = self._waiting.setdefault(to, [])
        parcel.append(block)
        is_full = sum(part.n_bytes for part in parcel) >= self.config.parcel_bytes
        if is_full or len(parcel) >= self.config.parcel_blocks:
            self._full[to] = None

    def _receiving(self) -> set[NodeId]:
        return {parcel.to for parcel in self._in_flight.values()}

    def _cut_short(self, at: float) -> None:
        self._was_cut_short = True
        self._next_sweep_at = min(self._next_sweep_at, at)

    def _earn(self, now: float) -> None:
        """Credit for the time since the last; no more than a parcel is saved up while there is nothing to
        send."""
        earned = max(0.0, now - self._credit_at) * self.config.bytes_per_s
        self._credit = min(self._credit + earned, float(self.config.parcel_bytes))
        self._credit_at = now
