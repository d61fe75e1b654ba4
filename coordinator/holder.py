"""The second disk: keeps records for whoever coordinates, and tells a new coordinator what is on it.

``Save`` comes before ``Held``, so what is said to be held is. Commands of an epoch that is over are
answered with ``StaleCommand``. Whatever the store knows better than the coordinator (an outcome it has
not heard of, or one that came first) goes back with the answer, so both end with the same record.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.store import RecordStore
from coordinator.task import is_same
from mesh.agreement.fence import Fence
from mesh.core import Effect, Fact, Message, Send
from mesh.ids import NodeId
from mesh.messages import AttemptEnded, AttemptId, Held, Hold, Inventory, Recall, StaleCommand, TaskRecord

__all__ = ["Holder"]

# One part of an inventory, well under the 256 KiB of a control message. A record is measured by its
# texts; the rest of it is less than 1 KiB.
_PART_BYTES_MAX = 96 * 1024
_ENTRY_BYTES = 1024


class Holder:
    """One per node."""

    def __init__(self, *, me: NodeId, fence: Fence, store: RecordStore) -> None:
        self._me = me
        self._fence = fence
        self._store = store

    @property
    def wake_at(self) -> float:
        return self._store.bury_at

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        match message:
            case Hold() | Recall() if not self._fence.admits(message.epoch):
                return [Send(sender, StaleCommand(seen=self._fence.seen))]
            case Hold():
                return [*self._fence.raise_to(message.epoch), *self._hold(message, sender, now)]
            case Recall():
                return [*self._fence.raise_to(message.epoch), *self._recall(message, sender, now)]
            case _:
                return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        return []

    def tick(self, now: float) -> list[Effect]:
        return self._store.bury_due(now)

    def _hold(self, hold: Hold, sender: NodeId, now: float) -> list[Effect]:
        effects = self._store.put(hold.record, now)
        kept = self._store.get(hold.record.task, now)
        if kept is None:
            return []  # no room: without Held the coordinator asks another node
        if kept.outcome is None or (hold.record.outcome and is_same(kept.outcome, hold.record.outcome)):
            held = Held(epoch=hold.epoch, task=kept.task, settled=kept.outcome is not None)
            return [*effects, Send(sender, held)]
        # Not Held: what was sent is not what is kept. The coordinator repeats Hold until both agree.
        news = Inventory(epoch=hold.epoch, records=[kept], running=[], ended=[], is_last=False, round=-1)
        return [*effects, Send(sender, news)]

    def _recall(self, recall: Recall, sender: NodeId, now: float) -> list[Effect]:
        if sender == self._me:
            return []  # the scheduler reads the same store
        parts = list(self._parts(now))
        return [
            Send(
                sender,
                Inventory(
                    epoch=recall.epoch,
                    records=records,
                    running=running,
                    ended=ended,
                    is_last=number == len(parts) - 1,
                    round=recall.round,
                    part=number,
                ),
            )
            for number, (records, running, ended) in enumerate(parts)
        ]

    def _parts(self, now: float) -> Iterator[tuple[list[TaskRecord], list[AttemptId], list[AttemptEnded]]]:
        """Running attempts first: a coordinator in a hurry learns soonest what not to start again."""
        records: list[TaskRecord] = []
        running: list[AttemptId] = list(self._store.running.values())
        ended: list[AttemptEnded] = []
        n_bytes = len(running) * _ENTRY_BYTES // 8
        entries: list[AttemptEnded | TaskRecord] = [*self._store.ended.values(), *self._store.records(now)]
        for entry in entries:
            size = _bytes_of(entry)
            if n_bytes + size > _PART_BYTES_MAX and n_bytes:
                yield records, running, ended
                records, running, ended, n_bytes = [], [], [], 0
            n_bytes += size
            if isinstance(entry, TaskRecord):
                records.append(entry)
            else:
                ended.append(entry)
        yield records, running, ended


def _bytes_of(entry: TaskRecord | AttemptEnded) -> int:
    n_bytes = _ENTRY_BYTES + (entry.outcome.n_bytes if entry.outcome else 0)
    if isinstance(entry, TaskRecord):
        n_bytes += entry.submit.n_text_bytes
        n_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in entry.submit.stop)
    return n_bytes
