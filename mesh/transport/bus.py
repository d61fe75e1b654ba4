"""The bus: small messages through one broker. The interface, and the bounded queue its kinds share.

``mesh.transport.mqtt.MqttBus`` is the real one, ``mesh.transport.memory_bus.MemoryBus`` its twin inside one
process. Both make topics and payloads by ``mesh.packets`` and promise the same:

* ``publish`` never blocks. Without a link, and beyond the bounds, a message is dropped and counted;
  cores repeat what matters.
* What one node publishes under one topic arrives in the order published.
* ``LinkUp`` comes only after every subscription is granted, and before any message of that link;
  after ``LinkDown`` no message of that link comes any more.
* ``LinkDown`` may come twice for one loss: at once, and again with ``host_is_dead`` when the broker's host
  turns out to refuse connections.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mesh.core import Message
from mesh.facts import BrokerRef, LinkDown, LinkUp
from mesh.ids import NodeId

__all__ = ["BoundedQueue", "Bus", "Heard", "Traffic"]


@dataclass(frozen=True, slots=True)
class Heard:
    """One message and who sent it: the node whose topic it came by, or ``mesh.packets.CLIENT``."""

    message: Message
    sender: NodeId


@dataclass(slots=True)
class Traffic:
    """Counts since the start, for the log, the terminal view and tests."""

    sent: int = 0
    heard: int = 0
    dropped_unlinked: int = 0
    """Published while there was no link."""
    dropped_out: int = 0
    """Refused by the full queue towards the broker, larger than a frame, or lost with the connection."""
    dropped_in: int = 0
    """Refused by the full queue towards the cores."""
    undecodable: int = 0
    links: int = 0
    """How often a link came up."""


class Bus(Protocol):
    """What ``mesh.driver`` needs of a bus."""

    def publish(self, message: Message, to: NodeId | None = None) -> None:
        """Send by the topic that the table gives this message; ``to`` one node's inbox where it is one."""

    def use(self, broker: BrokerRef | None) -> None:
        """Connect to this broker, move to it, or with ``None`` disconnect. Returns at once."""

    async def next(self) -> Heard | LinkUp | LinkDown:
        """Wait for the next message or change of the link."""

    async def run(self) -> None:
        """Keep the link up until ``close``, or until cancelled."""

    async def close(self, farewell: Sequence[Message] = (), timeout_s: float = 2.0) -> None:
        """Publish ``farewell``, wait until all is sent, and disconnect without a last will."""


_T = TypeVar("_T")


class BoundedQueue(Generic[_T]):
    """First in, first out, within a number of items and of bytes.

    What may be lost (QoS 0) is refused at half of either bound already: reports and token pieces cannot
    push out a task or a lease. Items put with ``always`` ignore the bounds (there are few: link changes).
    """

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._bytes = 0
        self._items: deque[tuple[_T, int]] = deque()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: _T, n_bytes: int = 0, *, may_be_lost: bool = False, always: bool = False) -> bool:
        """Whether there was room for ``item``."""
        share = 2 if may_be_lost else 1
        full = (
            len(self._items) >= self._items_max // share or self._bytes + n_bytes > self._bytes_max // share
        )
        if full and not always:
            return False
        self._items.append((item, n_bytes))
        self._bytes += n_bytes
        self._filled.set()
        return True

    async def get(self) -> _T:
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        item, n_bytes = self._items.popleft()
        self._bytes -= n_bytes
        return item

    def clear(self) -> int:
        """Forget everything; how many items that were."""
        n_items = len(self._items)
        self._items.clear()
        self._bytes = 0
        return n_items
