"""Membership core: who is in the mesh, by what each node says and by how long it says nothing.

::

                 silent for 3 s, or its last will            suspicion over
       ALIVE ─────────────────────────────────────▶ SUSPECT ────────────────▶ DEAD
         ▲ │                                          │ │                      │
         │ └── goodbye ──▶ LEFT ◀──── goodbye ────────┼─┘                      │
         │                  │                         │                        │
         └── new life ──────┴── heard again, refuted ─┴── report, new life ────┘

Each node owns its *incarnation*: it grows with every start and with every rumour of its own death that
the node refutes, and it is durable before anybody hears it. What anybody says about a lower incarnation
is old and changes nothing, so a last will that arrives late cannot kill a newer session. Two lives of one
incarnation (a copied disk) are told apart by their boot: ``(incarnation, boot)`` orders all lives.

Silence counts only while this node listens. While its link is down, or while the process stood still,
nobody is judged, and afterwards every clock of silence starts over.

Words and states: Das, Gupta and Motivala, "SWIM", DSN 2002, and hashicorp/memberlist. The doubt in
oneself: Dadgar, Phillips and Currey, "Lifeguard", 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Notify, Save
from mesh.facts import (
    HostRefused,
    Leaving,
    LinkDown,
    LinkUp,
    MemberChanged,
    MemberRefused,
    OwnInfo,
    OwnReport,
    OwnStanding,
    Superseded,
)
from mesh.ids import Boot, NodeId
from mesh.messages import NodeForgotten, NodeInfo, NodeReport, NodeStanding, NodeState

__all__ = [
    "INCARNATION_KEY",
    "Member",
    "Membership",
    "MembershipConfig",
    "Standing",
    "due_at",
    "suspicion_s",
]

INCARNATION_KEY = "incarnation"

# An incarnation grows once per start or refutation. More than this is no count; refuting it would
# overflow the 2**53 that the wire allows.
INCARNATION_MAX = 2**48

UNKNOWN_BOOT = Boot("")
"""Of a node heard only by its reports so far; lower than every real boot."""


class Standing(StrEnum):
    """What we hold of a node. *Left* is a goodbye, *dead* is a verdict."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """Lengths of time in seconds on this node's clock.

    Raises:
        ValueError: A length is not a positive, finite number, or the table has no room.
    """

    silence_s: float = 3.0
    """Three reports missed, at one a second: a lost one and a late one are no reason to doubt."""
    suspicion_s: float = 2.0
    """From doubt to verdict. With ``silence_s``: a node cut off is dead to the others after 5 s."""
    will_suspicion_s: float = 1.0
    """The same after a last will, which says more than silence: time for a reconnect to refute it."""
    rejoin_s: float = 1.0
    """More time for a node that went missing with its broker: it must find the new one first."""
    forget_after_s: float = 600.0
    """How long people can see that a node died or left."""
    stall_s: float = 1.0
    """A timer later than this means this process stood still, and heard nobody meanwhile."""
    members_max: int = 4096
    """At about 3 KiB each 12 MiB; four times the largest mesh we simulate."""

    def __post_init__(self) -> None:
        lengths = (
            self.silence_s, self.suspicion_s, self.will_suspicion_s, self.rejoin_s, self.forget_after_s,
            self.stall_s,
        )  # fmt: skip
        if not all(0 < length < FOREVER for length in lengths):
            raise ValueError("every length of time must be a positive, finite number of seconds")
        if self.members_max < 1:
            raise ValueError(f"members_max must be at least 1, this node itself; got {self.members_max}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node, as this node knows it. Times are on this node's clock."""

    node: NodeId
    standing: Standing
    state: NodeStanding
    """What the node, or its last will, said last."""
    incarnation: int
    boot: Boot
    """Empty until the node's state was heard."""
    info: NodeInfo | None
    report: NodeReport | None
    heard_at: float
    """Last sign of life."""
    since: float
    """When the standing began."""
    by_will: bool = False
    """Suspected because of a last will, not of silence."""

    @property
    def life(self) -> tuple[int, Boot]:
        return (self.incarnation, self.boot)


def suspicion_s(by_will: bool, n_silent: int, n_others: int, config: MembershipConfig) -> float:
    """How long a suspect may take to show that it lives.

    When more than half of at least three others are silent at one time, it is likelier that this node
    hears badly than that so many died together: it doubts itself and waits twice as long, once.
    """
    if by_will:
        return config.will_suspicion_s
    doubts_itself = n_others >= 3 and 2 * n_silent > n_others
    return config.suspicion_s * (2 if doubts_itself else 1)


def due_at(member: Member, listening_since: float, suspicion: float, config: MembershipConfig) -> float:
    """When time alone changes this member: suspect it, declare it dead, or forget it.

    ``listening_since`` is when this node's own hearing began; silence before it says nothing.
    """
    match member.standing:
        case Standing.ALIVE:
            return max(member.heard_at, listening_since) + config.silence_s
        case Standing.SUSPECT if listening_since > member.since and member.by_will:
            # Doubted for a reason other than silence; it may still have to find the new broker.
            return listening_since + config.rejoin_s + suspicion
        case Standing.SUSPECT if listening_since > member.since:
            return listening_since + config.silence_s + suspicion
        case Standing.SUSPECT:
            return member.since + suspicion
        case Standing.DEAD | Standing.LEFT:
            return member.since + config.forget_after_s


class Membership:
    """The members as one node sees them, itself included. See the module's text for the rules."""

    def __init__(
        self, *, me: NodeState, info: NodeInfo, now: float, config: MembershipConfig | None = None
    ) -> None:
        """``me`` is this process's first state; its incarnation is durable and higher than any before."""
        self.config = config or MembershipConfig()
        self._me = me.node
        self._members: dict[NodeId, Member] = {
            me.node: Member(
                node=me.node,
                standing=Standing.ALIVE,
                state=me.state,
                incarnation=me.incarnation,
                boot=me.boot,
                info=replace(info, incarnation=me.incarnation),
                report=None,
                heard_at=now,
                since=now,
            )
        }
        self._early_info: dict[NodeId, NodeInfo] = {}  # heard before the node's state; bound: members_max
        self._is_linked = False
        self._is_over = False  # said goodbye, or another process is this node now
        self._was_linked = False
        self._refuses = False
        self._listening_since = now
        self._wake_at = FOREVER  # never later than the first thing due; may be earlier

    @property
    def members(self) -> Mapping[NodeId, Member]:
        return MappingProxyType(self._members)

    @property
    def alive(self) -> list[NodeId]:
        """The ids of the nodes not in doubt, this one included, in order."""
        return sorted(node for node, member in self._members.items() if member.standing is Standing.ALIVE)

    @property
    def state(self) -> NodeState:
        """This node's own, as it is published; the shell makes the last will from it."""
        own = self._members[self._me]
        return NodeState(node=self._me, state=own.state, incarnation=own.incarnation, boot=own.boot)

    @property
    def wake_at(self) -> float:
        return self._wake_at

    # ── inputs ──────────────────────────────────────────────────────────────────────────────────────

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        if self._is_over:
            return []
        match message:
            case NodeState(node=node, incarnation=incarnation):
                if sender != node or incarnation > INCARNATION_MAX:
                    return []
                return self._on_own_state(message, now) if node == self._me else self._on_state(message, now)
            case NodeInfo(node=node, incarnation=incarnation):
                if sender != node or incarnation > INCARNATION_MAX:
                    return []
                return self._on_own_echo(message) if node == self._me else self._on_info(message)
            case NodeReport(node=node, incarnation=incarnation):
                if sender != node or node == self._me or incarnation > INCARNATION_MAX:
                    return []
                return self._on_report(message, now)
            case NodeForgotten(node=node):
                return self._on_forgotten(node) if sender == node else []
            case _:
                return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        if self._is_over:
            return []
        match fact:
            case LinkUp():
                return self._on_link_up(now)
            case LinkDown():
                self._is_linked = False
                self._wake_at = FOREVER
                return []
            case HostRefused(node=node):
                return self._on_host_refused(node, now)
            case OwnInfo(info=info):
                return self._on_own_info(info)
            case OwnReport(report=report):
                return self._on_own_report(report, now)
            case OwnStanding(state=state):
                return self._on_own_standing(state, now)
            case Leaving():
                return self._on_own_standing("left", now)
            case _:
                return []

    def tick(self, now: float) -> list[Effect]:
        if now < self._wake_at:
            return []
        if now - self._wake_at > self.config.stall_s:
            self._listening_since = now
        effects: list[Effect] = []
        # Two rounds: verdicts count the silent, so all new doubts come first.
        for standings in ((Standing.ALIVE,), (Standing.SUSPECT, Standing.DEAD, Standing.LEFT)):
            silence = self._silence()
            for member in [m for m in self._members.values() if m.standing in standings]:
                if member.node != self._me and self._due_at(member, silence) <= now:
                    effects += self._on_due(member, now)
        silence = self._silence()
        others = (m for m in self._members.values() if m.node != self._me)
        self._wake_at = min((self._due_at(member, silence) for member in others), default=FOREVER)
        return effects

    # ── what other nodes say ────────────────────────────────────────────────────────────────────────

    def _on_state(self, message: NodeState, now: float) -> list[Effect]:
        known = self._members.get(message.node)
        life = (message.incarnation, message.boot)
        if known is not None and (known.life > life or (known.life == life and known.state == "left")):
            return []
        is_new_life = known is None or known.life < life
        heard = Member(
            node=message.node,
            standing=known.standing if known else Standing.DEAD,
            state=message.state,
            incarnation=message.incarnation,
            boot=message.boot,
            info=known.info if known else self._early_info.get(message.node),
            report=known.report if known and known.incarnation == message.incarnation else None,
            heard_at=known.heard_at if known else now,
            since=known.since if known else now,
            by_will=known.by_will if known else False,
        )
        match message.state:
            case "left":
                return self._set(replace(heard, standing=Standing.LEFT, since=now), now)
            case "offline":
                if known is not None and (known.standing is Standing.ALIVE or self._is_silent(known)):
                    return self._set(replace(heard, standing=Standing.SUSPECT, since=now, by_will=True), now)
                # Of a node unknown so far: dead before we came, told so that people can see it.
                return self._set(heard, now) if is_new_life else []
            case "online" | "draining":
                if not is_new_life and heard.standing is Standing.DEAD:
                    return []  # perhaps only the broker's memory of it; a report will show
                if known == heard and heard.standing is Standing.ALIVE:
                    return []
                return self._set(self._revived(heard, now), now)

    def _on_info(self, message: NodeInfo) -> list[Effect]:
        """Not a sign of life: the broker keeps it for nodes long gone."""
        known = self._members.get(message.node)
        if known is None:
            early = self._early_info.get(message.node)
            is_older = early is not None and early.incarnation > message.incarnation
            if not is_older and (early is not None or len(self._early_info) < self.config.members_max):
                self._early_info[message.node] = message
            return []
        if known.info is None or known.info.incarnation <= message.incarnation:
            self._members[message.node] = replace(known, info=message)
        return []

    def _on_report(self, message: NodeReport, now: float) -> list[Effect]:
        """The one sign of life that no broker repeats for the dead."""
        known = self._members.get(message.node)
        if known is None or known.incarnation < message.incarnation:
            member = Member(
                node=message.node,
                standing=Standing.ALIVE,
                state="online",
                incarnation=message.incarnation,
                boot=UNKNOWN_BOOT,
                info=known.info if known else self._early_info.get(message.node),
                report=message,
                heard_at=now,
                since=now,
            )
            return self._set(member, now)
        if known.incarnation > message.incarnation or known.standing is Standing.LEFT:
            return []
        heard = replace(known, report=message, heard_at=now)
        if known.standing is Standing.ALIVE:
            self._members[message.node] = heard  # the common case: nothing changed, nothing is due sooner
            return []
        state: NodeStanding = "online" if known.state == "offline" else known.state
        return self._set(self._revived(replace(heard, state=state), now), now)

    def _on_forgotten(self, node: NodeId) -> list[Effect]:
        known = self._members.get(node)
        if known is not None and known.standing in (Standing.DEAD, Standing.LEFT) and node != self._me:
            self._forget(node)
        return []

    # ── what is said about this node ────────────────────────────────────────────────────────────────

    def _on_own_state(self, message: NodeState, now: float) -> list[Effect]:
        own = self._members[self._me]
        life = (message.incarnation, message.boot)
        if message.state in ("offline", "left"):
            if message.incarnation >= own.incarnation:
                return self._refute(message.incarnation, now)
        elif message.boot == own.boot and message.state == own.state:
            return []  # our own echo
        elif message.boot != own.boot and life > own.life:
            self._is_over = True
            self._wake_at = FOREVER
            return [Notify(Superseded(message.boot))]
        # An old record is in our retained topic now, or an older clone listens: both need the truth.
        return self._announce()

    def _on_own_echo(self, message: NodeInfo) -> list[Effect]:
        """What the broker keeps of us is an older version: somewhere it was sent again, or overtook."""
        own = self._members[self._me]
        if message == own.info or message.incarnation > own.incarnation:
            return []
        return self._announce()

    def _refute(self, incarnation: int, now: float) -> list[Effect]:
        own = replace(self._members[self._me], incarnation=incarnation + 1, heard_at=now)
        assert own.info is not None, "a node knows what it is"
        own = replace(own, info=replace(own.info, incarnation=own.incarnation))
        self._members[self._me] = own
        changed = MemberChanged(self._me, own.standing.value, own.incarnation)
        return [Save(INCARNATION_KEY, self.state), *self._announce(), Notify(changed)]

    # ── what this process knows ─────────────────────────────────────────────────────────────────────

    def _on_link_up(self, now: float) -> list[Effect]:
        self._is_linked = True
        self._listening_since = now
        # The earliest verdict there can be: of a node that was doubted before the link came up.
        self._wake_at = now + min(self.config.silence_s, self.config.rejoin_s + self.config.will_suspicion_s)
        effects = self._announce()
        if not self._was_linked:
            self._was_linked = True
            own = self._members[self._me]
            effects.append(Notify(MemberChanged(self._me, own.standing.value, own.incarnation)))
        return effects

    def _on_host_refused(self, node: NodeId, now: float) -> list[Effect]:
        """As good as a last will: the broker that would have sent it died with the node."""
        known = self._members.get(node)
        if known is None or known.standing is not Standing.ALIVE or node == self._me:
            return []
        return self._set(replace(known, standing=Standing.SUSPECT, since=now, by_will=True), now)

    def _on_own_info(self, info: NodeInfo) -> list[Effect]:
        if info.node != self._me:
            return []
        own = self._members[self._me]
        info = replace(info, incarnation=own.incarnation)
        self._members[self._me] = replace(own, info=info)
        return [Broadcast(info)] if self._is_linked else []

    def _on_own_report(self, report: NodeReport, now: float) -> list[Effect]:
        if report.node != self._me:
            return []
        own = self._members[self._me]
        report = replace(report, incarnation=own.incarnation)
        self._members[self._me] = replace(own, report=report, heard_at=now)
        return [Broadcast(report)] if self._is_linked else []

    def _on_own_standing(self, state: NodeStanding, now: float) -> list[Effect]:
        own = self._members[self._me]
        if state == own.state:
            return []
        if state == "left":
            self._members[self._me] = replace(own, state=state, standing=Standing.LEFT, since=now)
            self._is_over = True
            self._wake_at = FOREVER
        else:
            self._members[self._me] = replace(own, state=state)
        changed = MemberChanged(self._me, self._members[self._me].standing.value, own.incarnation)
        said: list[Effect] = [Broadcast(self.state)] if self._is_linked else []
        return [*said, Notify(changed)]

    def _announce(self) -> list[Effect]:
        info = self._members[self._me].info
        assert info is not None, "a node knows what it is"
        return [Broadcast(self.state), Broadcast(info)] if self._is_linked else []

    # ── verdicts ────────────────────────────────────────────────────────────────────────────────────

    def _on_due(self, member: Member, now: float) -> list[Effect]:
        match member.standing:
            case Standing.ALIVE:
                return self._set(replace(member, standing=Standing.SUSPECT, since=now, by_will=False), now)
            case Standing.SUSPECT:
                return self._set(replace(member, standing=Standing.DEAD, since=now), now)
            case Standing.DEAD | Standing.LEFT:
                self._forget(member.node)
                return []

    def _silence(self) -> tuple[int, int]:
        """How many others are suspected for silence alone, and of how many that are not gone."""
        others = [m for m in self._members.values() if m.node != self._me]
        n_silent = sum(1 for m in others if self._is_silent(m))
        return n_silent, sum(1 for m in others if m.standing in (Standing.ALIVE, Standing.SUSPECT))

    def _due_at(self, member: Member, silence: tuple[int, int]) -> float:
        suspicion = suspicion_s(member.by_will, *silence, self.config)
        return due_at(member, self._listening_since, suspicion, self.config)

    # ── the table ───────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _is_silent(member: Member) -> bool:
        return member.standing is Standing.SUSPECT and not member.by_will

    @staticmethod
    def _revived(member: Member, now: float) -> Member:
        since = member.since if member.standing is Standing.ALIVE else now
        return replace(member, standing=Standing.ALIVE, since=since, heard_at=now, by_will=False)

    def _set(self, member: Member, now: float) -> list[Effect]:
        """The only place where a member comes in or its standing changes."""
        assert member.node != self._me, "others do not decide about this node"
        was = self._members.get(member.node)
        if was is None:
            if len(self._members) >= self.config.members_max:
                is_first = not self._refuses
                self._refuses = True
                return [Notify(MemberRefused(member.node))] if is_first else []
            self._early_info.pop(member.node, None)
        self._members[member.node] = member
        if self._is_linked:
            # One silent member alone is never due later than among many: no need to count here.
            suspicion = suspicion_s(member.by_will, 0, 0, self.config)
            due = due_at(member, self._listening_since, suspicion, self.config)
            self._wake_at = min(self._wake_at, max(due, now))
        is_told = was is not None and (was.standing, was.incarnation, was.state) == (
            member.standing,
            member.incarnation,
            member.state,
        )
        if is_told:
            return []
        return [Notify(MemberChanged(member.node, member.standing.value, member.incarnation))]

    def _forget(self, node: NodeId) -> None:
        del self._members[node]
        self._refuses = False
