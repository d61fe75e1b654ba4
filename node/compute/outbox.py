"""What the compute process says, joined to pieces worth a message.

Tokens of an answer are joined, of a tuning task's progress the newest replaces what was not sent yet. The
first of each goes out at once, and so does an attempt's end, after what was held of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from node.compute.engine import Event
from node.compute.messages import Ended, NeedFeatures, Progress, Text, frame

__all__ = ["Outbox", "fitting"]

# People see text flow at 10 pieces a second, and a broker carries 10 messages a second per answer. A bar
# moves smoothly enough at 4.
TEXT_EVERY_S = 0.07
PROGRESS_EVERY_S = 0.25


class Outbox:
    """Takes an engine's events and says them. ``say`` sends one message; ``clock`` is monotonic."""

    def __init__(self, say: Callable[[object], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        # One entry for each attempt that runs: the engine's slots bound them.
        self._held: dict[tuple[str, int], Text | Progress] = {}
        self._next_at: dict[tuple[str, int], float] = {}  # of attempts that have said something

    @property
    def due_s(self) -> float | None:
        """Seconds until ``flush`` has something to send; ``None`` = nothing is held."""
        if not self._held:
            return None
        return max(0.0, min(self._next_at[key] for key in self._held) - self._clock())

    def take(self, event: Event) -> None:
        key = _attempt_of(event)
        if isinstance(event, NeedFeatures):
            self._say(event)
            return
        if isinstance(event, Ended):
            if (held := self._held.pop(key, None)) is not None:
                self._say(held)
            self._next_at.pop(key, None)
            self._say(fitting(event))
            return
        held = self._held.get(key)
        if isinstance(event, Text) and isinstance(held, Text):
            event = Text(
                task=event.task,
                attempt=event.attempt,
                text=held.text + event.text,
                n_tokens=held.n_tokens + event.n_tokens,
            )
        self._held[key] = event
        self._next_at.setdefault(key, self._clock())

    def flush(self) -> None:
        now = self._clock()
        for key in [key for key in self._held if self._next_at[key] <= now]:
            held = self._held.pop(key)
            self._say(held)
            self._next_at[key] = now + (TEXT_EVERY_S if isinstance(held, Text) else PROGRESS_EVERY_S)


def fitting(ended: Ended) -> Ended:
    """The end itself, or, where its result is too large for one message, an end that says so."""
    try:
        frame(ended)
    except ValueError as error:
        return Ended(
            task=ended.task,
            attempt=ended.attempt,
            state="rejected",
            reason=f"the result is too large to travel ({error}); send fewer texts at a time",
            n_prompt_tokens=ended.n_prompt_tokens,
            service_s=ended.service_s,
        )
    return ended


def _attempt_of(event: Event) -> tuple[str, int]:
    at = event.progress if isinstance(event, Progress) else event
    return at.task, at.attempt
