"""The contract between rules and the world: message in, list of effects out.

A *core* holds rules and nothing else: no I/O, no clock, no randomness of its own (``now`` and ``rng``
come in as arguments). Two shells host the same cores: ``mesh.driver`` (asyncio) in production, and
``tests.sim`` (deterministic, by seed).

The promises a shell makes:

* Effects are carried out **in order**. A ``Save`` is durable before the next effect starts: a vote is
  on disk before it is sent.
* ``tick(now)`` is called at or after ``wake_at``, and always **before** ``receive`` when ``wake_at`` has
  passed: a process that was stopped for ten seconds learns first that its lease is over.
* ``now`` is monotonic seconds on this node's own clock; it means nothing to another node.
* A failed ``Send`` or ``Broadcast`` is silent. Cores repeat what matters.

The promises a core makes: it never raises because of a remote message (unknown, stale and repeated
messages give ``[]``), every collection in it has a bound, and ties are broken by a rule.

``Stack`` makes several cores one core: a fact that one notifies is offered to all the others at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.ids import NodeId

__all__ = ["FOREVER", "Broadcast", "Core", "Effect", "Fact", "Message", "Notify", "Save", "Send", "Stack"]

FOREVER = float("inf")
"""A ``wake_at`` that never comes: the core waits for a message."""

Message = Any
"""One of the frozen dataclasses in ``mesh.messages``."""

Fact = Any
"""A frozen dataclass that says something happened; stays inside the process."""


@dataclass(frozen=True, slots=True)
class Send:
    """To one node, through its inbox topic. A core may send to its own node."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Broadcast:
    """To the topic that ``mesh.topics`` gives this kind of message; own subscribers hear it too."""

    message: Message


@dataclass(frozen=True, slots=True)
class Save:
    """Durable under ``key`` before the next effect starts; ``record=None`` erases the key."""

    key: str
    record: Message | None


@dataclass(frozen=True, slots=True)
class Notify:
    """A fact for the other cores of this process and for its shell."""

    fact: Fact


Effect = Send | Broadcast | Save | Notify


class Core(Protocol):
    """What both shells host."""

    @property
    def wake_at(self) -> float:
        """When ``tick`` is due, on the caller's clock."""

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        """Take one message. ``sender`` is the node whose topic it came by, or a client's name."""

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        """Take one fact from a neighbouring core or from the shell."""

    def tick(self, now: float) -> list[Effect]:
        """Do what time alone makes due."""


# A fact may lead to facts. Real chains are three long (link up -> elected -> recall); more than this
# many rounds for one input is two cores answering each other for ever.
_FACT_ROUNDS_MAX = 32


class Stack:
    """Several cores as one; facts notified by one are learned by all others before the call returns.

    The effects come back in the order they were made, each ``Notify`` in its place, so a shell sees
    facts too (the worker's shell starts an attempt on ``StartAttempt``).
    """

    def __init__(self, cores: Sequence[Core]) -> None:
        self._cores = tuple(cores)

    @property
    def wake_at(self) -> float:
        return min((core.wake_at for core in self._cores), default=FOREVER)

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for core in self._cores:
            effects += self._spread(core, core.receive(message, sender, now), now)
        return effects

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        return self._spread(None, [Notify(fact)], now)[1:]

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for core in self._cores:
            if core.wake_at <= now:
                effects += self._spread(core, core.tick(now), now)
        return effects

    def _spread(self, source: Core | None, effects: list[Effect], now: float) -> list[Effect]:
        """Offer each fact among ``effects`` to every core but its source; depth first, in order."""
        return self._spread_rounds(source, effects, now, 0)

    def _spread_rounds(
        self, source: Core | None, effects: list[Effect], now: float, depth: int
    ) -> list[Effect]:
        assert depth < _FACT_ROUNDS_MAX, f"cores answer each other for ever: {effects}"
        spread: list[Effect] = []
        for effect in effects:
            spread.append(effect)
            if isinstance(effect, Notify):
                for core in self._cores:
                    if core is not source:
                        spread += self._spread_rounds(core, core.learn(effect.fact, now), now, depth + 1)
        return spread
