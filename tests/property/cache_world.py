"""A mesh of caches on virtual time: rings, catalogues, moves and intakes, with a network that delays and
loses.

Payloads are not there: a block is its key, digest and size. Nodes are born, killed, restarted with what they
held, and leave; the nodes' own cores are the real ones, and the store keeps the order our stores keep.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from random import Random
from typing import Any

from mesh.cache.catalogue import Catalogues, CatalogueWriter, Outcome
from mesh.cache.intake import Intake
from mesh.cache.moves import Block, Moves, MovesConfig, Parcel, is_surplus
from mesh.cache.ring import SPARE_WORTH, Ring, RingConfig, RingKeeper, RingSpec, RingView
from mesh.ids import Epoch, NodeId
from node.compute.features.gdsf import Gdsf

STEP_S = 0.1
VERDICT_S = 5.0  # from a death to everybody's verdict, as membership takes
ANSWER_S = 2.0  # how long a sender waits for a receiver

_views: dict[RingSpec, RingView] = {}  # the same spec gives the same view: drawing it once will do


def view_of(spec: RingSpec) -> RingView:
    if spec not in _views:
        if len(_views) >= 64:  # a megabyte each
            _views.clear()
        _views[spec] = RingView(spec)
    return _views[spec]


@dataclass(frozen=True, slots=True)
class Offer:
    """A parcel, or what a node computed itself (``number`` 0: nobody waits for an answer)."""

    number: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    block: Block


@dataclass(frozen=True, slots=True)
class Answer:
    number: int
    n_bytes: int | None
    """``None``: it did not come in time."""


@dataclass(frozen=True, slots=True)
class AskWhole:
    pass


class CacheNode:
    """One node: its disk (``store``) outlives it, its memory does not."""

    def __init__(self, name: NodeId, quota: int, world: CacheWorld) -> None:
        self.name, self.quota, self.world = name, quota, world
        self.store: dict[bytes, Block] = {}
        self.order: Gdsf[bytes] = Gdsf()
        self.life = 0
        self.died_at: float | None = None
        self.has_left = False
        self.start()

    def start(self) -> None:
        self.life += 1
        self.died_at = None
        self.ring, self.keeper = Ring(), RingKeeper(RingConfig())
        self.writer = CatalogueWriter(self.life, self.world.rng.getrandbits(32))
        self.catalogues = Catalogues()
        self.moves = Moves(self.name, self.world.moves_config)
        self.intake = Intake()
        self.planned_for: RingView | None = None
        self.highest: RingSpec | None = None
        for key in self.store:
            self.writer.add(key)

    @property
    def is_alive(self) -> bool:
        return self.died_at is None

    @property
    def used_bytes(self) -> int:
        return self.order.n_bytes + self.intake.reserved_bytes

    def claims(self, node: NodeId, key: bytes) -> bool:
        return self.catalogues.claims(node, key)

    def receive(self, sender: NodeId, message: Any) -> None:
        now, world = self.world.now, self.world
        match message:
            case RingSpec():
                if self.ring.is_newer(message):
                    self.ring.take(view_of(message))
            case AskWhole():
                world.send(self.name, sender, self.writer.whole())
            case Offer(number, blocks):
                wanted = self.intake.offered(blocks, self.store.__contains__, self.room_for(blocks), now)
                self.make_room()
                n_bytes = sum(block.n_bytes for block in wanted)
                for block in wanted:
                    world.send(sender, self.name, Payload(block), later_s=n_bytes / world.link_bytes_per_s)
                if number:
                    world.send(self.name, sender, Answer(number, n_bytes), n_bytes / world.link_bytes_per_s)
            case Payload(block):
                if self.intake.arrived(block.key, block.digest, block.n_bytes, now):
                    self.keep(block)
            case Answer(number, n_bytes):
                if n_bytes is None:
                    self.moves.failed(number, now)
                else:
                    self.moves.done(number, n_bytes, now)
            case _:
                if self.catalogues.take(sender, message, now) is Outcome.NEEDS_WHOLE:
                    world.send(self.name, sender, AskWhole())

    def tick(self) -> None:
        now, world = self.world.now, self.world
        for node in list(self.catalogues.nodes):
            if node not in world.present():
                self.catalogues.forget(node)
        view = self.ring.view
        if view is not self.planned_for or self.moves.wants_sweep(now):
            self.planned_for = view
            self.moves.start(list(self.store.values()), self.ring, self.claims, now)
        if self.moves.wake_at <= now:
            for parcel in self.moves.tick(self.ring, self.claims, now):
                self.ship(parcel)
        if round(now / STEP_S) % 5 == 0:
            message = self.writer.next_version()
            world.broadcast(self.name, message or self.writer.whole())
            if self.ring.view is not None:
                world.broadcast(self.name, self.ring.view.spec)
        if world.coordinator() is self:
            present = {node: world.nodes[node].quota for node in world.present()}
            gone = [node.name for node in world.nodes.values() if node.has_left]
            spec = self.ring.view.spec if self.ring.view else None
            newer = self.keeper.next_spec(spec, present, gone, world.claim(), now)
            if newer is not None:
                self.receive(self.name, newer)
                world.broadcast(self.name, newer)

    def ship(self, parcel: Parcel) -> None:
        held = tuple(block for block in parcel.blocks if block.key in self.store)
        self.world.send(self.name, parcel.to, Offer(parcel.number, held))
        late = Answer(parcel.number, None)
        self.world.send(self.name, self.name, late, ANSWER_S + parcel.n_bytes / self.world.link_bytes_per_s)

    def put(self, block: Block) -> None:
        """Computed here: kept, and offered to its owners."""
        if self.used_bytes + block.n_bytes - self.order.n_bytes <= self.quota:
            self.keep(block)
        owners = self.ring.view.owners(block.key) if self.ring.view else ()
        for owner in owners:
            if owner != self.name:
                self.world.send(self.name, owner, Offer(0, (block,)))

    def finds(self, key: bytes) -> bool:
        """Whether a read of a key succeeds, asking whom the cores say, with every answer learned from."""
        if key in self.store:
            return True
        world = self.world
        for node in self.catalogues.holders(key, self.ring.sources(key), world.now):
            holder = world.nodes[node]
            if holder.is_alive:
                has = key in holder.store
                self.catalogues.answered(node, int(has), [] if has else [key], world.now)
                if has:
                    return True
        return False

    def finds_later(self, key: bytes) -> bool:
        """Whether it does when nobody is distrusted any more: an honest node may have been, for a false
        positive."""
        now = self.world.now + self.catalogues.config.distrust_s_max
        asked = self.catalogues.holders(key, self.ring.sources(key), now)
        return any(key in self.world.nodes[node].store for node in asked if self.world.nodes[node].is_alive)

    # ── the store ───────────────────────────────────────────────────────────────────────────────────

    def room_for(self, blocks: tuple[Block, ...]) -> int:
        """Free, or held by what is worth less than new first copies."""
        worth = self.order.value_of(1, 1.0 / 100_000)
        less = sum(
            block.n_bytes
            for key, block in self.store.items()
            if self.order.value(key) < worth or self.is_spare(key)
        )
        return self.quota - self.order.n_bytes + less

    def is_spare(self, key: bytes) -> bool:
        return is_surplus(key, self.name, self.ring, self.claims)

    def keep(self, block: Block) -> None:
        if block.key in self.store:
            return
        self.store[block.key] = block
        owners = self.ring.view.owners(block.key) if self.ring.view else ()
        is_first = not owners or owners[0] == self.name
        self.order.add(block.key, block.n_bytes, 1.0 if is_first else SPARE_WORTH)
        self.writer.add(block.key)
        self.make_room()

    def make_room(self) -> None:
        if self.used_bytes <= self.quota:
            return
        leaving = []
        for wants_spare in (True, False):
            over = self.used_bytes - self.quota - sum(self.store[key].n_bytes for key in leaving)
            for key in self.order.least() if over > 0 else ():
                if over <= 0:
                    break
                if key not in leaving and self.is_spare(key) == wants_spare:
                    leaving.append(key)
                    over -= self.store[key].n_bytes
        for key in leaving:
            self.order.let_go(key)
            del self.store[key]
            self.writer.drop(key)


class CacheWorld:
    """The mesh. Everything random comes from the seed."""

    def __init__(self, quotas: dict[NodeId, int], seed: int, bytes_per_s: float, loss: float = 0.05) -> None:
        self.rng = Random(f"cache/{seed}")
        self.now = 0.0
        self.loss = loss
        self.link_bytes_per_s = 125e6
        self.moves_config = MovesConfig(bytes_per_s=bytes_per_s, sweep_s=20.0)
        self._mail: list[tuple[float, int, NodeId, int, NodeId, Any]] = []
        self._n_sent = 0
        self._claim = Epoch(0, NodeId(""))
        self.nodes: dict[NodeId, CacheNode] = {}
        for name, quota in quotas.items():
            self.nodes[name] = CacheNode(name, quota, self)

    # ── what the cores' neighbours know ─────────────────────────────────────────────────────────────

    def present(self) -> list[NodeId]:
        """Alive, or not known to be dead yet."""
        return sorted(
            node.name
            for node in self.nodes.values()
            if not node.has_left and (node.died_at is None or self.now - node.died_at < VERDICT_S)
        )

    def coordinator(self) -> CacheNode | None:
        """The first that is present; a new claim whenever that is another one."""
        present = self.present()
        if not present:
            return None
        if self._claim.node != present[0]:
            self._claim = Epoch(self._claim.term + 1, present[0])
        return self.nodes[present[0]]

    def claim(self) -> Epoch:
        return self._claim

    # ── the network ─────────────────────────────────────────────────────────────────────────────────

    def send(self, sender: NodeId, to: NodeId, message: Any, later_s: float = 0.0) -> None:
        delay_s = later_s + (0.0 if sender == to else self.rng.expovariate(1 / 0.05))
        self._n_sent += 1
        heapq.heappush(
            self._mail, (self.now + delay_s, self._n_sent, to, self.nodes[to].life, sender, message)
        )

    def broadcast(self, sender: NodeId, message: Any) -> None:
        for node in sorted(self.nodes):
            if node != sender and self.rng.random() >= self.loss:
                self.send(sender, node, message)

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    def run(self, length_s: float) -> None:
        end = self.now + length_s
        while self.now < end - STEP_S / 2:
            self.now += STEP_S
            while self._mail and self._mail[0][0] <= self.now:
                _, _, to, life, sender, message = heapq.heappop(self._mail)
                node = self.nodes[to]
                if node.is_alive and node.life == life:  # what was sent to an earlier life is lost
                    node.receive(sender, message)
            for node in self.alive():
                node.tick()
            for node in self.alive():
                self.check(node)

    # ── what happens ────────────────────────────────────────────────────────────────────────────────

    def alive(self) -> list[CacheNode]:
        return [self.nodes[name] for name in sorted(self.nodes) if self.nodes[name].is_alive]

    def kill(self, name: NodeId) -> None:
        self.nodes[name].died_at = self.now

    def restart(self, name: NodeId) -> None:
        self.nodes[name].start()

    def leave(self, name: NodeId) -> None:
        self.nodes[name].has_left = True
        self.kill(name)

    def join(self, name: NodeId, quota: int) -> None:
        self.nodes[name] = CacheNode(name, quota, self)

    def put(self, n: int, n_bytes: int = 100_000) -> list[bytes]:
        """New blocks, each computed by some node; their keys."""
        made = []
        for _ in range(n):
            key = hashlib.blake2b(self.rng.randbytes(16), digest_size=32).digest()
            self.rng.choice(self.alive()).put(Block(key, key[::-1], n_bytes))
            made.append(key)
        return made

    # ── what must hold ──────────────────────────────────────────────────────────────────────────────

    def check(self, node: CacheNode) -> None:
        """What no step may break."""
        assert node.used_bytes <= node.quota, f"{node.name} holds {node.used_bytes} of {node.quota}"
        if node.ring.view is not None:
            assert node.highest is None or node.ring.view.spec.rank >= node.highest.rank, "a view went back"
            node.highest = node.ring.view.spec

    def copies(self, key: bytes) -> int:
        return sum(key in node.store for node in self.alive())

    def views(self) -> set[Any]:
        return {node.ring.view and node.ring.view.spec for node in self.alive()}
