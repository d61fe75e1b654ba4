"""Election core: the first claim of a term, in the broker's order, gets the lease.

::

                        deadline passed                   own claim heard first
        ┌── FOLLOWER ─────────────────▶ CANDIDATE ──────────────────────────▶ COORDINATOR
        │       ▲                        │   │  ▲                              │   │
        └───────┘                        │   └──┘ echo overdue: next term      │   │
     another epoch                       │      ▲                              │   │
                ├────────────────────────┘      └── hint of a higher epoch ────┘   │
                │  another's claim heard first                                     │
                └──────────────────────────────────────────────────────────────────┘
                   no echo for ttl - margin, a higher epoch, or resigned

Everybody, the sender included, reads one topic, and the broker gives it one order. So all readers agree
which claim of a term came first without counting votes, and a mesh of two survives the loss of one.

Why at most one node acts for an epoch: an epoch names its claimant, and a claimant saves the promise
"I have used this term" before it sends the claim, so no epoch is granted twice, over crashes too.
Why an old coordinator does no harm: it holds the lease only until ``ttl - margin`` after it *sent* the
last beat whose echo it has heard, on its own clock, and it learns that in ``tick``, before it reads
anything; what it sent earlier and arrives late is refused by the receivers' ``Fence``. On a split
network each side has a coordinator (that needs no quorum, see ``docs/adr/0005``); their epochs differ,
and after healing the higher one stays.

Sources: Gray and Cheriton, "Leases", SOSP 1989 (a lease on the holder's own clock); Kleppmann, "How to
do distributed locking", 2016 (fencing at the receiver).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random

from mesh.agreement.fence import Fence
from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Notify, Send
from mesh.facts import Deposed, Elected, Followed, Leaving, LinkDown, LinkUp, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId
from mesh.messages import EpochHint, LeaseKind, LeaseRecord, StaleCommand

__all__ = ["Election", "ElectionConfig", "Role", "promise_of"]

# A claim every millisecond for 8,900 years. Beyond it a term is an attempt to use up the numbers.
TERM_MAX = 2**48

# Longest lease obeyed, whatever the record says: a peer cannot keep us waiting for ever.
TTL_MAX_S = 30.0

# Ranks beyond it wait alike (plus chance): at 1,000 nodes the last may not wait for minutes.
RANK_MAX = 8

# Only ids for ranking; as many as ``mesh.agreement.membership`` keeps.
RANKED_MAX = 4096

# Unheard beats that may still come back. Older ones are over anyway: ttl / beat_every is about four.
BEATS_IN_FLIGHT_MAX = 16


class Role(Enum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True, kw_only=True)
class ElectionConfig:
    """Lengths of time in seconds, each on the clock of the node that waits.

    Raises:
        ValueError: The lengths do not fit one another.
    """

    beat_every_s: float = 0.7
    """Two beats may be lost. 120 bytes to each node: at 1,000 nodes 170 KB/s leave the broker."""
    ttl_s: float = 2.5
    """How long a frozen coordinator is missed. One that crashes is missed sooner, by its last will."""
    margin_s: float = 0.3
    """The coordinator stops this much before the others may start: delivery time, timers, clock rates."""
    first_wait_s: float = 0.6
    """Silence after connecting that means nobody coordinates yet; a retained lease comes within it."""
    reconnect_wait_s: float = 1.0
    """The same after a broken link: the coordinator publishes again once it is back, and may be later."""
    claim_wait_s: float = 1.0
    """A claim not heard back by then is lost: claim the next term."""
    rank_step_s: float = 0.1
    """Between the claims of two neighbouring ranks, so that usually one node claims."""
    stall_s: float = 0.5
    """A timer later than this means this process stood still: read what has queued before judging."""
    hint_every_s: float = 1.0
    """At most one hint in this time."""

    def __post_init__(self) -> None:
        if not 0 < 2 * self.beat_every_s <= self.ttl_s - self.margin_s:
            raise ValueError("a lease must survive a lost beat: 0 < 2 * beat_every_s <= ttl_s - margin_s")
        if not (self.margin_s > 0 and self.ttl_s <= TTL_MAX_S):
            raise ValueError(f"margin_s must be more than 0 and ttl_s at most {TTL_MAX_S}")
        waits = (self.first_wait_s, self.reconnect_wait_s, self.claim_wait_s, self.rank_step_s, self.stall_s)
        if not all(0 < wait < FOREVER for wait in (*waits, self.hint_every_s)):
            raise ValueError("every wait must be a positive, finite number of seconds")


def promise_of(term: int) -> Epoch:
    """The lowest epoch of ``term``: what a claimant saves before it claims.

    It must not save its own epoch yet. If another's claim of the same term is heard first, that one
    is the coordinator and must be obeyed even when its name sorts lower. No id sorts before ``0``.
    """
    return Epoch(term, NodeId("0"))


class Election:
    """Who coordinates, as one node sees it. See the module's text for the rule and its argument.

    Hosts must offer ``LeaseRecord`` messages in the broker's order, those of this node included.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        fence: Fence,
        rng: Random,
        now: float,
        config: ElectionConfig | None = None,
        may_coordinate: bool = True,
    ) -> None:
        self.me = me
        self.config = config or ElectionConfig()
        self._fence = fence
        self._rng = rng
        self._may_coordinate = may_coordinate
        self._role = Role.FOLLOWER
        self._epoch = EPOCH_ZERO  # the grant recognised last; a candidate's: the one it claims
        self._coordinator: NodeId | None = None
        self._is_linked = False
        self._deadline = FOREVER  # follower: claim then; candidate: the echo is overdue
        self._ranked: set[NodeId] = {me}
        # follower
        self._heard_at = now
        self._beat_heard = -1
        self._hinted_at = -FOREVER
        # candidate and coordinator
        self._beat = 0
        self._sent_at: dict[int, float] = {}
        self._held_until = -FOREVER
        self._beat_at = FOREVER
        self._term_hinted = 0

    @property
    def role(self) -> Role:
        return self._role

    @property
    def coordinator(self) -> NodeId | None:
        """Who holds the lease as far as this node knows; ``None`` while nobody does."""
        return self._coordinator

    @property
    def epoch(self) -> Epoch:
        """The grant recognised last; of a candidate, the one it asks for."""
        return self._epoch

    @property
    def wake_at(self) -> float:
        if self._role is Role.COORDINATOR:
            return min(self._held_until, self._beat_at)
        return self._deadline

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case LeaseRecord(epoch=epoch) if epoch.term > TERM_MAX:
                return []
            case LeaseRecord(epoch=epoch) if epoch.node == self.me:
                return self._on_own_record(message, now)
            case LeaseRecord(kind="claim"):
                return self._on_claim(message, now)
            case LeaseRecord(kind="lease"):
                return self._on_lease(message, now)
            case LeaseRecord(kind="resigned"):
                return self._on_resigned(message, now)
            case EpochHint(seen=seen) | StaleCommand(seen=seen):
                return self._on_hint(seen, now)
            case _:
                return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        match fact:
            case LinkUp():
                return self._on_link_up(now)
            case LinkDown():
                return self._on_link_down(now)
            case MemberChanged(node=node, standing=standing):
                return self._on_member(node, standing, now)
            case Leaving():
                return self._on_leaving(now)
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        if self._role is Role.COORDINATOR:
            if now >= self._held_until or self._fence.seen > self._epoch:
                return self._rest(now, self.config.ttl_s)
            return self._publish(now) if now >= self._beat_at else []
        if now < self._deadline:
            return []
        if not self._may_coordinate:
            self._coordinator = None
            self._deadline = FOREVER
            return []
        if now - self._deadline > self.config.stall_s:
            self._deadline = now + self.config.reconnect_wait_s + self._backoff_s()
            return []
        return self._claim(now)

    # ── what the topic says ─────────────────────────────────────────────────────────────────────────

    def _on_own_record(self, record: LeaseRecord, now: float) -> list[Effect]:
        """Our echo; or a trace of what we were before a restart or a broken link."""
        if record.epoch == self._epoch and self._role is Role.CANDIDATE and record.kind == "claim":
            return self._win(now)
        if record.epoch == self._epoch and self._role is Role.COORDINATOR:
            sent_at = self._sent_at.get(record.beat)
            if sent_at is not None:
                self._held_until = max(self._held_until, sent_at + self.config.ttl_s - self.config.margin_s)
                self._sent_at = {beat: at for beat, at in self._sent_at.items() if beat > record.beat}
            return []
        if (
            self._role is not Role.FOLLOWER
            or self._coordinator is not None
            or record.epoch < self._fence.seen
        ):
            return []
        # The others may take us for the coordinator, and we are not: nobody need wait for the ttl.
        self._hurry(now + self._backoff_s())
        return self._fence.raise_to(promise_of(record.epoch.term))  # not the epoch: it may not be granted

    def _on_claim(self, record: LeaseRecord, now: float) -> list[Effect]:
        seen = self._fence.seen
        if record.epoch < seen:
            return self._hint(record.node, now)
        is_first_of_term = record.epoch.term > seen.term or seen == promise_of(seen.term)
        if not is_first_of_term:
            return []  # a repetition, or the second claim of a term that has its coordinator
        return self._follow(record, now)

    def _on_lease(self, record: LeaseRecord, now: float) -> list[Effect]:
        if record.epoch < self._fence.seen:
            return self._hint(record.node, now)
        if record.epoch == self._epoch and record.beat <= self._beat_heard:
            return []  # a repetition says nothing about now
        return self._follow(record, now)

    def _on_resigned(self, record: LeaseRecord, now: float) -> list[Effect]:
        if record.epoch < self._fence.seen or (
            record.epoch == self._epoch and record.beat <= self._beat_heard
        ):
            return []
        effects = self._become(Role.FOLLOWER, record.epoch, now)
        self._coordinator = None
        self._beat_heard = record.beat
        self._hurry(now + self._backoff_s())
        return effects

    def _on_hint(self, seen: Epoch, now: float) -> list[Effect]:
        """Somebody obeyed more than we claim: our commands are refused there until we claim above it."""
        if seen.term > TERM_MAX or seen <= self._epoch or self._role is Role.FOLLOWER:
            return []
        self._term_hinted = max(self._term_hinted, seen.term)
        return self._claim(now) if self._role is Role.COORDINATOR and self._is_linked else []

    # ── what this process knows ─────────────────────────────────────────────────────────────────────

    def _on_link_up(self, now: float) -> list[Effect]:
        self._is_linked = True
        if self._role is Role.COORDINATOR:
            return self._publish(now)
        is_first = self._coordinator is None
        wait_s = self.config.first_wait_s if is_first else self.config.reconnect_wait_s
        self._deadline = now + wait_s + self._backoff_s()
        return []

    def _on_link_down(self, now: float) -> list[Effect]:
        self._is_linked = False
        if self._role is Role.COORDINATOR:
            self._beat_at = FOREVER  # the lease lasts as long as the echoes allow
            return []
        # A candidate gives up: a claim sent before the break may come back as the retained record,
        # and then it no longer shows whose claim came first.
        effects = self._become(Role.FOLLOWER, None, now) if self._role is Role.CANDIDATE else []
        self._deadline = FOREVER
        return effects

    def _on_member(self, node: NodeId, standing: str, now: float) -> list[Effect]:
        if standing in ("alive", "suspect") and len(self._ranked) < RANKED_MAX:
            self._ranked.add(node)
        elif standing in ("dead", "left") and node != self.me:
            self._ranked.discard(node)
        if node == self._coordinator and node != self.me and self._is_linked:
            if standing in ("dead", "left"):
                self._hurry(now + self._backoff_s())
            elif standing == "suspect":
                # One more beat settles it: heard, the deadline moves on.
                due_at = self._heard_at + self.config.beat_every_s + self.config.margin_s
                self._hurry(max(now, due_at) + self._backoff_s())
        return []

    def _on_leaving(self, now: float) -> list[Effect]:
        self._may_coordinate = False
        if self._role is Role.FOLLOWER:
            return []
        resigned = self._record("resigned")
        return [*self._rest(now, self.config.ttl_s), Broadcast(resigned)]

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────

    def _claim(self, now: float) -> list[Effect]:
        """Ask for the lowest unused term; the promise is on disk before anybody hears of it."""
        term = max(self._fence.seen.term, self._term_hinted) + 1
        if term > TERM_MAX:
            self._deadline = FOREVER
            return []
        effects = self._become(Role.CANDIDATE, Epoch(term, self.me), now)
        self._deadline = now + self.config.claim_wait_s + self._backoff_s()
        return [*effects, Broadcast(self._record("claim"))]

    def _win(self, now: float) -> list[Effect]:
        held_until = self._sent_at[0] + self.config.ttl_s - self.config.margin_s
        if now >= held_until or self._fence.seen > self._epoch:
            return self._claim(now)  # granted, and over before we heard of it
        effects = self._become(Role.COORDINATOR, self._epoch, now)
        self._held_until = held_until
        return [*effects, *self._publish(now)]

    def _publish(self, now: float) -> list[Effect]:
        assert self._role is Role.COORDINATOR, "only the coordinator renews a lease"
        self._beat += 1
        self._sent_at[self._beat] = now
        while len(self._sent_at) > BEATS_IN_FLIGHT_MAX:
            del self._sent_at[min(self._sent_at)]
        self._beat_at = now + self.config.beat_every_s if self._is_linked else FOREVER
        return [Broadcast(self._record("lease"))]

    def _follow(self, record: LeaseRecord, now: float) -> list[Effect]:
        is_new = record.epoch != self._epoch or self._coordinator is None
        effects = self._become(Role.FOLLOWER, record.epoch, now) if is_new else []
        self._coordinator = record.node
        self._heard_at = now
        self._beat_heard = record.beat
        self._deadline = now + min(record.ttl_s, TTL_MAX_S) + self._backoff_s()
        return [*effects, Notify(Followed(record.epoch))] if is_new else effects

    def _rest(self, now: float, wait_s: float) -> list[Effect]:
        """Be a follower of nobody for a while."""
        effects = self._become(Role.FOLLOWER, None, now)
        self._deadline = now + wait_s + self._backoff_s() if self._is_linked else FOREVER
        return effects

    def _become(self, role: Role, epoch: Epoch | None, now: float) -> list[Effect]:
        """The only place where the role, the epoch and the coordinator of record change."""
        was, ended = self._role, self._epoch
        assert epoch is None or epoch >= self._fence.seen, "an epoch never goes back"
        assert role is not Role.COORDINATOR or (was is Role.CANDIDATE and epoch == ended), "claim first"
        assert role is Role.FOLLOWER or (epoch is not None and epoch.node == self.me), "claims are one's own"
        assert role is Role.FOLLOWER or self._may_coordinate, "this node never coordinates"
        effects: list[Effect] = []
        if was is Role.COORDINATOR:
            effects.append(Notify(Deposed(ended)))
        self._role = role
        self._coordinator = None
        if role is Role.FOLLOWER:
            self._beat_at = FOREVER
            if epoch is not None:
                self._epoch = epoch
                self._beat_heard = -1
                effects += self._fence.raise_to(epoch)
        elif role is Role.CANDIDATE:
            assert epoch is not None and epoch.term > self._fence.seen.term, "a term is claimed once"
            self._epoch = epoch
            self._beat = 0
            self._sent_at = {0: now}
            self._beat_at = FOREVER
            effects += self._fence.raise_to(promise_of(epoch.term))
        else:
            assert epoch is not None
            self._coordinator = self.me
            effects += [*self._fence.raise_to(epoch), Notify(Elected(epoch))]
        return effects

    # ── small things ────────────────────────────────────────────────────────────────────────────────

    def _record(self, kind: LeaseKind) -> LeaseRecord:
        beat = self._beat + 1 if kind == "resigned" else self._beat
        return LeaseRecord(kind=kind, epoch=self._epoch, ttl_s=self.config.ttl_s, beat=beat)

    def _hint(self, to: NodeId, now: float) -> list[Effect]:
        """Tell a stale claimant, unless it hears the coordinator we follow on the very same topic."""
        knows_better = self._coordinator is not None and self._epoch >= self._fence.seen
        if knows_better or self._role is Role.CANDIDATE or now < self._hinted_at + self.config.hint_every_s:
            return []
        self._hinted_at = now
        return [Send(to, EpochHint(seen=self._fence.seen))]

    def _hurry(self, at: float) -> None:
        if self._role is Role.FOLLOWER and self._is_linked:
            self._deadline = min(self._deadline, at)

    def _backoff_s(self) -> float:
        """Lower ids first, and a random part for nodes that do not know one another yet."""
        rank = sum(1 for node in self._ranked if node < self.me and node != self._coordinator)
        return (min(rank, RANK_MAX) + self._rng.random()) * self.config.rank_step_s
