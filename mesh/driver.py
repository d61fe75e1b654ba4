"""The asyncio shell around a node's cores: one queue, one timer, no opinions.

Everything that happens to the cores (a message, a fact from the shell, time) passes through one queue
and is taken in turns. A turn takes whatever is waiting, so many small messages share one write to disk:
all ``Save``s of a turn are durable before its first ``Send`` leaves, which keeps the order promised in
``mesh.core`` (an earlier save is never a broken promise).

While the disk takes no records (it is full, or failing) nothing leaves this node: the cores believe that
what they saved is durable, so every word would be a promise we cannot keep. To the others it looks dead,
and they carry on; when there is room again the staged records are written and the node speaks again.

An exception in a core ends the process: a broken core must not serve.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from mesh.core import Broadcast, Core, Effect, Fact, Message, Notify, Save, Send
from mesh.journal import JournalError
from mesh.transport.bus import Bus, Heard

__all__ = ["Driver", "Records"]

log = logging.getLogger(__name__)

# One turn's share: enough to group a burst into one fsync, small enough that a beat never waits long.
TURN_INPUTS_MAX = 64
# A disk that commits faster than this is waited for on the loop: the way to a thread and back costs as
# much. A slower one (an SD card takes 5 to 50 ms) must not hold up the reading of the bus.
COMMIT_HERE_S = 0.003
# Inputs waiting for a turn, and how many of them may come from the bus; beyond, the broker holds the rest.
# Whoever floods the mesh while a disk is slow must not take the room of this process's own facts.
QUEUE_MAX = 4096
HEARD_MAX = QUEUE_MAX // 2


class Records(Protocol):
    """What the driver needs of ``mesh.journal.Journal``."""

    def save(self, key: str, record: Message | None) -> None:
        """Stage one record; ``None`` erases the key."""

    def commit(self) -> None:
        """Make all staged records durable, or raise ``JournalError`` and keep them staged.

        Blocks for the disk; called off the event loop unless the disk has shown to be fast.
        """


class Driver:
    """Hosts one ``Core`` (usually a ``Stack``) on a bus and a journal until cancelled.

    Args:
        on_fact: Called for every fact the cores notify, on the event loop; must not block.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        core: Core,
        bus: Bus,
        journal: Records,
        on_fact: Callable[[Fact], None],
        on_heard: Callable[[Heard], None] = lambda heard: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._bus = bus
        self._journal = journal
        self._on_fact = on_fact
        self._on_heard = on_heard
        self._now = now
        self._is_mute = False
        self._commit_s = 2 * COMMIT_HERE_S  # unknown yet: the first few tell, from the thread
        self._inputs: asyncio.Queue[Heard | Fact] = asyncio.Queue(QUEUE_MAX)
        self._room = asyncio.Semaphore(HEARD_MAX)

    def learn(self, fact: Fact) -> None:
        """Tell the cores something happened. Returns at once; the cores take it in turn.

        Raises:
            asyncio.QueueFull: The cores are stuck; the process should not go on.
        """
        self._inputs.put_nowait(fact)

    async def settled(self) -> None:
        """Wait until the cores have taken everything learned so far, and its effects are carried out."""
        await self._inputs.join()

    async def run(self) -> None:
        """Run until cancelled, or until a core or the bus raises."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="driver.listen")
            group.create_task(self._take_turns(), name="driver.turns")

    async def _listen(self) -> None:
        while True:
            event = await self._bus.next()
            if isinstance(event, Heard):
                await self._room.acquire()
            await self._inputs.put(event)

    async def _take_turns(self) -> None:
        while True:
            inputs = await self._next_inputs()
            await self._carry_out(self._step(inputs))
            for one in inputs:
                self._inputs.task_done()
                if isinstance(one, Heard):
                    self._room.release()

    async def _next_inputs(self) -> list[Heard | Fact]:
        """Wait for the first input or for the cores' own time, then take all that is there."""
        inputs: list[Heard | Fact] = []
        wait_s = self._core.wake_at - self._now()
        if wait_s > 0 and self._inputs.empty():
            try:
                async with asyncio.timeout(wait_s if wait_s != float("inf") else None):
                    inputs.append(await self._inputs.get())
            except TimeoutError:
                pass
        while len(inputs) < TURN_INPUTS_MAX and not self._inputs.empty():
            inputs.append(self._inputs.get_nowait())
        return inputs

    def _step(self, inputs: list[Heard | Fact]) -> list[Effect]:
        effects: list[Effect] = []
        for one in inputs:
            effects += self._tick_if_due()
            if isinstance(one, Heard):
                self._on_heard(one)
                effects += self._core.receive(one.message, one.sender, self._now())
            else:
                # The shell sees facts it brought in too, so that one place logs them all.
                self._on_fact(one)
                effects += self._core.learn(one, self._now())
        return effects + self._tick_if_due()

    def _tick_if_due(self) -> list[Effect]:
        now = self._now()
        return self._core.tick(now) if self._core.wake_at <= now else []

    async def _carry_out(self, effects: list[Effect]) -> None:
        saves = [effect for effect in effects if isinstance(effect, Save)]
        for save in saves:
            self._journal.save(save.key, save.record)
        if saves or self._is_mute:
            await self._commit()
        for effect in effects:
            match effect:
                case Send(to=to, message=message) if not self._is_mute:
                    self._bus.publish(message, to=to)
                case Broadcast(message=message) if not self._is_mute:
                    self._bus.publish(message)
                case Notify(fact=fact):
                    self._on_fact(fact)
                case _:
                    pass  # a save, durable above; or a message of a node that must be silent

    async def _commit(self) -> None:
        started_at = time.perf_counter()
        try:
            if self._commit_s < COMMIT_HERE_S:
                self._journal.commit()
            else:
                await asyncio.to_thread(self._journal.commit)
        except JournalError as error:  # it stays staged; the next turn tries again
            if not self._is_mute:
                log.error("%s; this node is silent until its disk takes records again", error)
            self._is_mute = True
        else:
            if self._is_mute:
                log.warning("the disk takes records again; this node speaks again")
            self._is_mute = False
        # One slow commit (an SD card that tidies up) sends the next few to the thread again.
        self._commit_s = max(time.perf_counter() - started_at, 0.9 * self._commit_s)
