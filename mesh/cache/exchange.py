"""How catalogues get about: this node's own is told when it changes, the others' are taken, or fetched.

::

    HeldChanged ──▶ CatalogueWriter ──at most every tell_s──▶ delta, small whole, or "version n" (retained)
                                                                      │
    Catalogues ◀── delta fits, or whole ──────────────────────────────┤
        ▲                                                             │ it does not fit, or n is news
        └─ CatalogueFetched ◀─ shell: GET /catalogue ◀─ FetchCatalogue ┘ at most every fetch_s for one node

What a node said last is retained, so whoever was away sees by it what it has missed. A node at rest says
nothing. On a new link it says its version: the broker may be new.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from mesh.cache.bloom import SALT_MAX
from mesh.cache.catalogue import CatalogueConfig, Catalogues, CatalogueWriter, Outcome
from mesh.cache.facts import CatalogueFetched, CatalogueRefused, FetchCatalogue, HeldChanged
from mesh.core import FOREVER, Broadcast, Effect, Notify
from mesh.ids import NodeId
from mesh.messages import CatalogueDelta, CatalogueVersion, CatalogueWhole

__all__ = ["Exchange", "ExchangeConfig"]

Version = tuple[int, int]  # life and version: goes up only


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig:
    """How often to speak and to ask.

    Raises:
        ValueError: A bound is not positive.
    """

    tell_s: float = 0.5
    """From one version to the next: a second of writing is two messages, not a thousand."""
    told_bytes: int = 16 << 10
    """What goes by the bus at most, to everybody: 13,000 keys whole. Who wants more fetches it."""
    again_s: float = 1.0
    """The broker may keep an older one: how long to wait whether the last one still comes back."""
    rewrite_s: float = 3600.0
    """With the first change after that long, the whole is made anew with another salt: no block may go
    without its second copy for ever because a filter claims wrongly that it is there."""
    fetch_s: float = 1.0
    """From one fetch from a node to the next; twice as long each time it brought nothing new."""
    fetch_s_max: float = 60.0
    fetches: int = 4
    """At once: a node that joins sixty others asks for a megabyte in turns."""
    patience_s: float = 30.0
    """A fetch that the shell has not told the end of by then is over."""

    def __post_init__(self) -> None:
        bounds = (
            self.tell_s, self.told_bytes, self.again_s, self.rewrite_s, self.fetch_s, self.fetch_s_max,
            self.fetches, self.patience_s,
        )  # fmt: skip
        if not all(0 < bound < math.inf for bound in bounds):
            raise ValueError("every bound of an exchange must be positive and finite")


@dataclass(slots=True)
class _Behind:
    """A node whose catalogue must be fetched."""

    version: Version
    """The least that will do."""
    due_at: float
    wait_s: float
    until: float | None = None
    """While it is being fetched: when to give that up."""


class Exchange:
    """Both sides for one node. ``now``: seconds on its own clock."""

    def __init__(
        self,
        *,
        me: NodeId,
        life: int,
        rng: Random,
        config: ExchangeConfig | None = None,
        catalogues: CatalogueConfig | None = None,
    ) -> None:
        """``life``: the incarnation this process began with."""
        self.config = config or ExchangeConfig()
        self.catalogues = Catalogues(catalogues)
        self.writer = CatalogueWriter(life, rng.randint(0, SALT_MAX))
        self._me = me
        self._rng = rng
        self._is_linked = False
        self._has_news = False
        self._told_at = -math.inf
        self._say_again_at = FOREVER
        self._written_at: float | None = None
        self._behind: dict[NodeId, _Behind] = {}  # bound: catalogues.nodes_max
        self._asked_at: dict[NodeId, float] = {}  # bound: as above
        self._is_refused: set[NodeId] = set()  # bound: as above

    @property
    def wake_at(self) -> float:
        at = self._told_at + self.config.tell_s if self._has_news and self._is_linked else FOREVER
        at = min(at, self._say_again_at)
        if not self._behind:
            return at
        asked = [one.until for one in self._behind.values() if one.until is not None]
        if len(asked) >= self.config.fetches:
            return min(at, *asked)
        return min([at, *asked, *(one.due_at for one in self._behind.values() if one.until is None)])

    def whole(self) -> CatalogueWhole:
        """This node's own, as told last."""
        return self.writer.whole()

    # ── this node's own ─────────────────────────────────────────────────────────────────────────────

    def on_held(self, fact: HeldChanged, now: float) -> list[Effect]:
        """The store has changed. Cost: 10 µs a key, more where the filter must grow."""
        for key in fact.added:
            self.writer.add(key)
        for key in fact.dropped:
            self.writer.drop(key)
        self._has_news = True
        return self.tick(now)

    def on_link(self, is_up: bool, now: float) -> list[Effect]:
        self._is_linked = is_up
        self._say_again_at = FOREVER
        if not is_up:
            return []
        return self._tell(now) if self._has_news else self._say_version()

    def on_echo(self, said: CatalogueDelta | CatalogueWhole | CatalogueVersion, now: float) -> None:
        """The broker keeps what this node said. Is it the last, or was an older one sent again after it?"""
        told = self.whole()
        if (said.life, said.version) == (told.life, told.version):
            self._say_again_at = FOREVER
        elif (said.life, said.version) < (told.life, told.version):
            self._say_again_at = min(self._say_again_at, now + self.config.again_s)

    def _say_version(self) -> list[Effect]:
        told = self.whole()
        return [Broadcast(CatalogueVersion(life=told.life, version=told.version))] if told.version else []

    def _tell(self, now: float) -> list[Effect]:
        if self._written_at is None:
            self._written_at = now
        elif now - self._written_at >= self.config.rewrite_s:
            self._written_at = now
            self.writer.rewrite(self._rng.randint(0, SALT_MAX))
        self._has_news = False
        said = self.writer.next_version()
        if said is None:
            return []
        self._told_at = now
        n_bytes = len(said.bits if isinstance(said, CatalogueWhole) else said.flips)
        if n_bytes > self.config.told_bytes:
            return [Broadcast(CatalogueVersion(life=self.whole().life, version=said.version))]
        return [Broadcast(said)]

    # ── the others' ─────────────────────────────────────────────────────────────────────────────────

    def on_said(
        self, node: NodeId, said: CatalogueDelta | CatalogueWhole | CatalogueVersion, now: float
    ) -> list[Effect]:
        """What a node says of itself. Late and repeated words change nothing."""
        version = (said.life, said.version)
        if isinstance(said, CatalogueVersion):
            is_news = version > self.catalogues.version(node)
            return self.want(node, now, version) if is_news else []
        match self.catalogues.take(node, said, now):
            case Outcome.NEEDS_WHOLE:
                return self.want(node, now, version)
            case Outcome.REFUSED:
                return self._refuse(node)
            case Outcome.TAKEN:
                self._caught_up(node)
        return []

    def on_fetched(self, fact: CatalogueFetched, now: float) -> list[Effect]:
        """The end of a fetch, whatever it brought."""
        effects: list[Effect] = []
        if (behind := self._behind.get(fact.node)) is None:
            return []  # it has left, or told meanwhile
        behind.until = None
        outcome = Outcome.OLD if fact.whole is None else self.catalogues.take(fact.node, fact.whole, now)
        if outcome is Outcome.REFUSED:
            effects = self._refuse(fact.node)
        if outcome is Outcome.TAKEN:
            behind.wait_s = self.config.fetch_s
        self._caught_up(fact.node)
        return [*effects, *self._fetch(now)]

    def want(self, node: NodeId, now: float, version: Version = (0, 0)) -> list[Effect]:
        """Fetch the catalogue of a node; at least ``version`` of it."""
        behind = self._behind.get(node)
        if behind is not None:
            behind.version = max(behind.version, version)
            return []
        if node == self._me or len(self._behind) >= self.catalogues.config.nodes_max:
            return []
        due_at = max(now, self._asked_at.get(node, -math.inf) + self.config.fetch_s)
        self._behind[node] = _Behind(version, due_at=due_at, wait_s=self.config.fetch_s)
        return self._fetch(now)

    def forget(self, node: NodeId) -> None:
        """It is gone: nobody will ask it."""
        self.catalogues.forget(node)
        self._behind.pop(node, None)
        self._asked_at.pop(node, None)
        self._is_refused.discard(node)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._has_news and self._is_linked and now >= self._told_at + self.config.tell_s:
            effects += self._tell(now)
        if now >= self._say_again_at:
            self._say_again_at = FOREVER
            effects += self._say_version()
        return [*effects, *self._fetch(now)]

    def _fetch(self, now: float) -> list[Effect]:
        """Ask those that are due, the longest waiting first, as many as may be asked at once."""
        n_free = self.config.fetches
        due = []
        for node, one in self._behind.items():
            if one.until is not None and one.until <= now:
                one.until = None
            if one.until is not None:
                n_free -= 1
            elif one.due_at <= now:
                due.append(node)
        effects: list[Effect] = []
        for node in sorted(due, key=lambda node: (self._behind[node].due_at, node))[: max(0, n_free)]:
            one = self._behind[node]
            one.until = now + self.config.patience_s
            one.due_at = now + one.wait_s
            one.wait_s = min(2 * one.wait_s, self.config.fetch_s_max)
            self._asked_at[node] = now
            effects.append(Notify(FetchCatalogue(node)))
        return effects

    def _caught_up(self, node: NodeId) -> None:
        behind = self._behind.get(node)
        if behind is not None and self.catalogues.version(node) >= behind.version:
            del self._behind[node]
        self._is_refused.discard(node)

    def _refuse(self, node: NodeId) -> list[Effect]:
        """Told once until it says something that can be taken."""
        if node in self._is_refused or len(self._is_refused) >= self.catalogues.config.nodes_max:
            return []
        self._is_refused.add(node)
        return [Notify(CatalogueRefused(node))]
