"""The core that shares out the mesh's memory: which ring holds, and what everybody says it has.

::

                        coordinator                                every node
     MemberChanged ─▶ RingKeeper ─▶ spec ──RingRecord, retained──▶ newer than mine? ─▶ Save ─▶ DrawView
     NodeInfo                        ▲                                                            │ shell
                                     └── the number is mine: (epoch of my election, count)        ▼
                                                                     RingChanged ◀── Ring ◀── ViewDrawn

Whoever is elected numbers the ring anew, even where nothing has changed: its claim is the highest, so all
nodes meet on its spec, whatever they heard from coordinators before it. A record of an older claim never
replaces a newer one, here as everywhere: the ranks of specs are totally ordered, and the newest is on disk
before it counts. To take a record is to obey its coordinator, so it raises the ``Fence``: a coordinator
with a lower claim hears of it and claims above.

If all disks and brokers have forgotten the ring, the next coordinator makes one from who is there. Owners
follow from members and quotas alone, so blocks are then mostly where they belong, and the rest is found by
what the catalogues say (``mesh.cache.exchange``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

from mesh.agreement.fence import Fence
from mesh.cache.catalogue import CatalogueConfig, Catalogues
from mesh.cache.exchange import Exchange, ExchangeConfig
from mesh.cache.facts import CatalogueFetched, DrawView, HeldChanged, RingChanged, ViewDrawn
from mesh.cache.ring import Ring, RingConfig, RingEpoch, RingKeeper, RingSpec
from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Notify, Save
from mesh.facts import Deposed, Elected, Leaving, LinkDown, LinkUp, MemberChanged, OwnInfo
from mesh.ids import Epoch, NodeId
from mesh.messages import CatalogueDelta, CatalogueVersion, CatalogueWhole, NodeInfo, RingRecord

__all__ = ["RING_KEY", "Sharding", "ShardingConfig"]

RING_KEY = "ring"

# Terms and changes grow by one at a time: more than this is no count, and counting on would overflow.
_COUNT_MAX = 2**48
_NODES_MAX = 4096  # as in membership
_AGAIN_S = 1.0  # an older record was published: how soon the coordinator says the newest again

# Most of what passes is about tasks.
_HEARD = frozenset({NodeInfo, RingRecord, CatalogueDelta, CatalogueVersion, CatalogueWhole})
_LEARNED = frozenset(
    {
        *(HeldChanged, CatalogueFetched, ViewDrawn, MemberChanged, OwnInfo, Elected, Deposed, Leaving),
        *(LinkUp, LinkDown),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingConfig:
    """How its parts are set."""

    ring: RingConfig = field(default_factory=RingConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    catalogues: CatalogueConfig = field(default_factory=CatalogueConfig)


@dataclass(frozen=True, slots=True)
class _Giver:
    """What is known of one node."""

    standing: str = "unknown"
    """As membership says."""
    incarnation: int = -1
    info_incarnation: int = -1
    quota_bytes: int | None = None
    """``None``: its ``NodeInfo`` has not come yet."""

    @property
    def is_present(self) -> bool:
        """A suspect is counted until it is declared dead."""
        return self.standing in ("alive", "suspect")

    @property
    def is_gone(self) -> bool:
        return self.standing in ("dead", "left")


class Sharding:
    """One node's part. Shells and the scheduler read ``ring``, ``catalogues``, ``holders`` and ``whole``."""

    def __init__(
        self,
        *,
        me: NodeId,
        info: NodeInfo,
        life: int,
        fence: Fence,
        records: Mapping[str, Message],
        rng: Random,
        now: float,
        config: ShardingConfig | None = None,
    ) -> None:
        """``life``: this process's first incarnation. ``records``: the journal's, by key."""
        self.config = config or ShardingConfig()
        self._me = me
        self._fence = fence
        self._exchange = Exchange(
            me=me,
            life=life,
            rng=rng,
            config=self.config.exchange,
            catalogues=self.config.catalogues,
        )
        self._keeper = RingKeeper(self.config.ring)
        self._ring = Ring()
        kept = records.get(RING_KEY)
        self._spec = RingSpec.read(kept) if isinstance(kept, RingRecord) else None
        self._givers: dict[NodeId, _Giver] = {me: _Giver("alive", quota_bytes=info.cache_bytes)}
        self._claim: Epoch | None = None  # while this node coordinates
        self._is_linked = False
        self._review_at = FOREVER
        self._say_again_at = FOREVER
        self._draw_at = now if self._spec else FOREVER  # what the disk knew
        self._wake_at = self._draw_at

    # ── to be read ──────────────────────────────────────────────────────────────────────────────────

    @property
    def ring(self) -> Ring:
        """Its views are drawn; the newest spec may be one ahead of them (``spec``)."""
        return self._ring

    @property
    def spec(self) -> RingSpec | None:
        """The newest this node has heard of, or made."""
        return self._spec

    @property
    def epoch(self) -> RingEpoch | None:
        """Of the view in force; every request for blocks carries it."""
        return self._ring.view.epoch if self._ring.view else None

    @property
    def catalogues(self) -> Catalogues:
        return self._exchange.catalogues

    @property
    def wake_at(self) -> float:
        return self._wake_at

    def whole(self) -> CatalogueWhole:
        """This node's own catalogue, for whoever asks its data plane: the last version told."""
        return self._exchange.whole()

    def claims(self, node: NodeId, key: bytes) -> bool:
        """Whether ``node``, which may be this one, says that it has the key."""
        if node == self._me:
            return key in self._exchange.writer
        return self.catalogues.claims(node, key)

    def holders(self, key: bytes, now: float) -> list[NodeId]:
        """Whom to ask for a key: those who say they have it, owners first; last, those in doubt.

        Empty: nobody has it, and finding that out cost no message. Cost: 3 µs for each node known.
        """
        found = self.catalogues.holders(key, self._ring.sources(key) if self._ring.view else (), now)
        here = [node for node in found if node != self._me]
        return sorted(here, key=lambda node: self._giver(node).standing != "alive")

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        if type(message) not in _HEARD:
            return []
        match message:
            case RingRecord(epoch=epoch, change=change):
                if sender != epoch.node or max(epoch.term, change) > _COUNT_MAX:
                    return []
                return self._done(self._on_record(message, now))
            case NodeInfo(node=node):
                return self._done(self._on_info(message, now)) if sender == node else []
            case CatalogueDelta() | CatalogueWhole() | CatalogueVersion():
                if sender == self._me:
                    self._exchange.on_echo(message, now)
                    return self._done([])
                if self._giver(sender).is_gone:
                    return []  # the broker's memory of it; if it comes back, it is asked
                return self._done(self._exchange.on_said(sender, message, now))
            case _:
                return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        if type(fact) not in _LEARNED:
            return []
        match fact:
            case HeldChanged():
                return self._done(self._exchange.on_held(fact, now))
            case CatalogueFetched():
                return self._done(self._exchange.on_fetched(fact, now))
            case ViewDrawn(view=view):
                is_news = self._ring.take(view)
                return [Notify(RingChanged(view))] if is_news else []
            case MemberChanged():
                return self._done(self._on_member(fact, now))
            case OwnInfo(info=info) if info.node == self._me:
                own = replace(self._giver(self._me), quota_bytes=info.cache_bytes)
                return self._done(self._put(self._me, own, now))
            case Elected(epoch=epoch):
                self._claim = epoch
                self._keeper = RingKeeper(self.config.ring)  # who came and went in others' terms is no matter
                return self._done(self._review(now))
            case Deposed() | Leaving():
                self._claim = None
                self._review_at = self._say_again_at = FOREVER
                return self._done([])
            case LinkUp():
                self._is_linked = True
                effects = self._exchange.on_link(True, now)
                if self._spec is not None and self._claim == self._spec.epoch.claim:
                    effects.append(Broadcast(self._spec.record()))
                return self._done([*effects, *self._review(now)])
            case LinkDown():
                self._is_linked = False
                self._review_at = self._say_again_at = FOREVER
                return self._done(self._exchange.on_link(False, now))
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        if now < self._wake_at:
            return []
        effects = self._exchange.tick(now)
        if now >= self._draw_at:
            self._draw_at = FOREVER
            effects += self._draw()
        if now >= self._review_at:
            effects += self._review(now)
        if now >= self._say_again_at:
            self._say_again_at = FOREVER
            assert self._spec is not None, "it was newer than what was said"
            effects.append(Broadcast(self._spec.record()))
        return self._done(effects)

    # ── who is here ─────────────────────────────────────────────────────────────────────────────────

    def _on_member(self, fact: MemberChanged, now: float) -> list[Effect]:
        before = self._giver(fact.node)
        if fact.node == self._me or fact.incarnation < before.incarnation:
            return []
        giver = replace(before, standing=fact.standing, incarnation=fact.incarnation)
        effects = self._put(fact.node, giver, now)
        if giver.is_gone:
            self._exchange.forget(fact.node)
        elif before.is_gone:  # perhaps from a silence that only this node took for its end
            effects += self._exchange.want(fact.node, now)
        return effects

    def _on_info(self, info: NodeInfo, now: float) -> list[Effect]:
        giver = self._giver(info.node)
        if info.node == self._me or info.incarnation < giver.info_incarnation:
            return []
        told = replace(giver, quota_bytes=info.cache_bytes, info_incarnation=info.incarnation)
        return self._put(info.node, told, now)

    def _put(self, node: NodeId, giver: _Giver, now: float) -> list[Effect]:
        before = self._givers.get(node)
        if before is None and len(self._givers) >= _NODES_MAX:
            gone = next((one for one, known in self._givers.items() if not known.is_present), None)
            if gone is None:
                return []
            del self._givers[gone]
        self._givers[node] = giver
        if before is not None and (before.standing, before.quota_bytes) == (
            giver.standing,
            giver.quota_bytes,
        ):
            return []
        return self._review(now)

    def _giver(self, node: NodeId) -> _Giver:
        return self._givers.get(node) or _UNKNOWN

    # ── the ring ────────────────────────────────────────────────────────────────────────────────────

    def _review(self, now: float) -> list[Effect]:
        """While coordinating: make the next spec, if it is time."""
        claim = self._claim
        if claim is None or not self._is_linked or not self._fence.admits(claim):
            self._review_at = FOREVER
            return []
        members = dict(self._spec.quotas) if self._spec else {}
        present: dict[NodeId, int] = {}
        gone: set[NodeId] = set()
        for node, giver in self._givers.items():
            if giver.is_present:
                # Of whom nothing is known yet, what was known before holds.
                present[node] = members.get(node, 0) if giver.quota_bytes is None else giver.quota_bytes
            elif giver.standing == "left":
                gone.add(node)
        spec = self._keeper.next_spec(self._spec, present, gone, claim, now)
        self._review_at = self._keeper.wake_at
        spec = spec or self._renumbered(claim)
        return [] if spec is None else [*self._take(spec), Broadcast(spec.record())]

    def _renumbered(self, claim: Epoch) -> RingSpec | None:
        """The ring as it is, under the number of a new coordinator: so all meet on it."""
        if self._spec is None or self._spec.epoch.claim >= claim:
            return None
        return RingSpec(RingEpoch(claim, self._spec.epoch.change + 1), self._spec.quotas)

    def _on_record(self, record: RingRecord, now: float) -> list[Effect]:
        spec = RingSpec.read(record)
        if self._spec is None or spec.rank > self._spec.rank:
            return [*self._fence.raise_to(record.epoch), *self._take(spec), *self._review(now)]
        if spec == self._spec:
            self._say_again_at = FOREVER
        elif self._claim == self._spec.epoch.claim and self._is_linked:
            # The topic keeps an older one now: of a coordinator that does not know yet, or sent again.
            self._say_again_at = min(self._say_again_at, now + _AGAIN_S)
        return []

    def _take(self, spec: RingSpec) -> list[Effect]:
        """The only place where the spec changes."""
        assert self._spec is None or spec.rank > self._spec.rank, "a ring never goes back"
        self._spec = spec
        self._draw_at = self._say_again_at = FOREVER
        return [Save(RING_KEY, spec.record()), *self._draw()]

    def _draw(self) -> list[Effect]:
        assert self._spec is not None, "only what is known is drawn"
        view = self._ring.view
        if view is None or view.spec.quotas != self._spec.quotas:
            return [Notify(DrawView(self._spec))]
        view = view.renumbered(self._spec)
        return [Notify(RingChanged(view))] if self._ring.take(view) else []

    def _done(self, effects: list[Effect]) -> list[Effect]:
        self._wake_at = min(self._review_at, self._say_again_at, self._draw_at, self._exchange.wake_at)
        return effects


_UNKNOWN = _Giver()
