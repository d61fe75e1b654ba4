"""Planted bugs. Each must turn its checker red within a few seeds, or the checker proves nothing."""

from __future__ import annotations

from coordinator.store import RecordStore, _Stored, task_key
from mesh.agreement.election import Election, Role
from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.cache.ring import RingSpec
from mesh.cache.sharding import RING_KEY, Sharding
from mesh.core import Broadcast, Core, Effect, Fact, Message, Save, Send
from mesh.facts import LinkUp
from mesh.ids import Epoch, NodeId
from mesh.messages import Hold, LeaseRecord, RingRecord, Submit, TaskRecord, TaskStatus

__all__ = [
    "AcksAtOnce",
    "EveryClaimWins",
    "LenientFence",
    "LinksOnce",
    "RingsGoBack",
    "SavesLast",
    "forgets_the_fence",
    "overwrites",
]


def forgets_the_fence(save: Save) -> bool:
    """A disk that loses the one number that must survive (``World.keeps``)."""
    return save.key != FENCE_KEY


class LenientFence(Fence):
    """A receiver that obeys whoever speaks."""

    def admits(self, epoch: Epoch) -> bool:
        return True


class EveryClaimWins(Election):
    """A candidate that does not care whose claim of its term the broker ordered first."""

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        if (
            isinstance(message, LeaseRecord)
            and self.role is Role.CANDIDATE
            and message.epoch.node != self.me
            and message.epoch.term == self.epoch.term
        ):
            return []
        return super().receive(message, sender, now)


class LinksOnce(Election):
    """A node that takes notice of its first connection only."""

    _has_linked = False

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        if isinstance(fact, LinkUp):
            if self._has_linked:
                return []
            self._has_linked = True
        return super().learn(fact, now)


class RingsGoBack(Sharding):
    """A node that takes the ring it heard of last, whoever made it."""

    def _on_record(self, record: RingRecord, now: float) -> list[Effect]:
        spec = RingSpec.read(record)
        if spec == self._spec:
            return []
        self._spec = spec
        return [Save(RING_KEY, record), *self._draw()]


class SavesLast:
    """Any core, with its effects turned round: it speaks before it has written down what it promised."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._cores = getattr(core, "_cores", (core,))

    @property
    def wake_at(self) -> float:
        return self._core.wake_at

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        return _saves_last(self._core.receive(message, sender, now))

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        return _saves_last(self._core.learn(fact, now))

    def tick(self, now: float) -> list[Effect]:
        return _saves_last(self._core.tick(now))


class AcksAtOnce(SavesLast):
    """A node that acknowledges what it asks others to hold, before anybody has it on disk."""

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        effects = self._core.receive(message, sender, now)
        acks: list[Effect] = [
            Broadcast(_acknowledgement(effect.message))
            for effect in effects
            if isinstance(effect, Send) and isinstance(effect.message, Hold) and isinstance(message, Submit)
        ]
        return [*acks, *effects]

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        return self._core.learn(fact, now)

    def tick(self, now: float) -> list[Effect]:
        return self._core.tick(now)


def _acknowledgement(hold: Hold) -> TaskStatus:
    return TaskStatus(
        task=hold.record.task,
        state="queued",
        reason=None,
        node=None,
        attempt=0,
        epoch=hold.epoch,
        durable_on=0,
    )


def overwrites(store: RecordStore, record: TaskRecord, now: float) -> list[Effect]:
    """``RecordStore.put`` without its rule: the last writer wins, even over a settled record."""
    store._open.pop(record.task, None)
    store._settled.pop(record.task, None)
    kept = store._open if record.outcome is None else store._settled
    kept[record.task] = _Stored(record, now)
    return [Save(task_key(record.task), record)]


def _saves_last(effects: list[Effect]) -> list[Effect]:
    return sorted(effects, key=lambda effect: isinstance(effect, Save))
