"""Asking every node what it knows, at an election and whenever a node comes back.

A ``Recall`` is answered in numbered parts. It is repeated until one answer is whole, so that neither a
lost question nor a lost part hides a task. The coordinator waits for all nodes only ``recall_timeout_s``;
who answers later is merged later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mesh.core import FOREVER, Effect, Send
from mesh.ids import Epoch, NodeId
from mesh.messages import Inventory, Recall

__all__ = ["Recalls"]


@dataclass(slots=True)
class _Asked:
    round: int
    again_at: float
    every_s: float
    parts: set[int] = field(default_factory=set)
    n_parts: int | None = None


# The first repetition comes within the recovery's second; a node that stays silent (overloaded, or about
# to be declared dead) is asked ever more rarely.
_EVERY_S = 0.4
_EVERY_MAX_S = 5.0


class Recalls:
    """Which nodes still owe an answer. One entry per member, so as bounded as the membership."""

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._round = 0
        self._asked: dict[NodeId, _Asked] = {}

    @property
    def is_complete(self) -> bool:
        return not self._asked

    @property
    def wake_at(self) -> float:
        return min((asked.again_at for asked in self._asked.values()), default=FOREVER)

    def ask(self, nodes: Iterable[NodeId], now: float) -> list[Effect]:
        effects: list[Effect] = []
        for node in nodes:
            effects.append(self._send(node, _EVERY_S, now))
        return effects

    def forget(self, node: NodeId) -> None:
        """It is gone; when it comes back it is asked anew."""
        self._asked.pop(node, None)

    def tick(self, now: float) -> list[Effect]:
        due = [(node, asked) for node, asked in self._asked.items() if asked.again_at <= now]
        return [self._send(node, min(asked.every_s * 1.5, _EVERY_MAX_S), now) for node, asked in due]

    def answered(self, node: NodeId, inventory: Inventory) -> None:
        """Note one part; a part of another round is still news, but completes nothing."""
        asked = self._asked.get(node)
        if asked is None or inventory.round != asked.round or inventory.part > 100_000:
            return
        asked.parts.add(inventory.part)
        if inventory.is_last:
            asked.n_parts = inventory.part + 1
        if asked.n_parts is not None and len(asked.parts) >= asked.n_parts:
            del self._asked[node]

    def _send(self, node: NodeId, every_s: float, now: float) -> Effect:
        self._round += 1
        self._asked[node] = _Asked(self._round, now + every_s, every_s)
        return Send(node, Recall(epoch=self._epoch, round=self._round))
