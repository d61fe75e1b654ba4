"""The engine, and generations that stand still for others.

An answer that is paused is out of the engine's sight: it has no part in a step and takes no slot. What it has
written and its states in the model stay where they are, so it goes on with its next token.
"""

from __future__ import annotations

from typing import Any

from node.compute.engine import Event
from node.compute.messages import Pause, Resume, Stop
from node.compute.model_engine import ModelEngine
from node.compute.serve.answers import Answer

__all__ = ["PausingEngine"]


class PausingEngine(ModelEngine):
    """See ``node.compute.engine.Engine``. The worker core pauses one at a time, which bounds their memory."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._paused: dict[tuple[str, int], Answer] = {}

    def pause(self, pause: Pause) -> None:
        key = (pause.task, pause.attempt)
        attempt = self._attempts.get(key)
        if not isinstance(attempt, Answer):
            return
        for sequence in attempt.sequences:
            # Others that begin alike wait for who is reading. It reads again later, from what was kept.
            if sequence.is_open and sequence.is_reading:
                sequence.close(self.prefixes)
        self._paused[key] = attempt
        del self._attempts[key]

    def resume(self, resume: Resume) -> None:
        key = (resume.task, resume.attempt)
        if key in self._paused:
            self._attempts[key] = self._paused.pop(key)

    def stop(self, stop: Stop) -> list[Event]:
        self.resume(Resume(task=stop.task, attempt=stop.attempt))
        return super().stop(stop)
