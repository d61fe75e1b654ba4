"""The built-in model ``echo``: gives the prompt's words back. It needs no weights and loads at once.

For trying out a mesh before any model is on it, and for tests and benchmarks of everything around the
model. ``echo`` answers as fast as it can, ``echo:20`` with 20 words per second. A word and the spaces
after it are its token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mesh.messages import Submit
from node.compute.engine import Event, refusal, refused
from node.compute.messages import Ended, FeaturesGiven, Pause, Resume, Run, Stop, Text
from node.compute.models import echo_rate

__all__ = ["EchoEngine"]

CONTEXT_WORDS = 4096
SLOTS = 4

_WITHOUT_WEIGHTS = {"score": "score with", "classify": "classify with", "embed": "embed with", "tune": "tune"}
_WITHOUT_WEIGHTS["features"] = "make feature maps with"

_WORD = re.compile(r"\s*\S+\s*")


@dataclass(slots=True)
class _Attempt:
    run: Run
    words: list[str]
    n_prompt: int
    started_at: float
    due_at: float
    is_cut: bool
    """The answer has fewer words than the prompt, because of ``max_tokens``."""
    n_given: int = 0
    ttft_s: float | None = None


class EchoEngine:
    """See ``node.compute.engine.Engine``."""

    device = "cpu"
    context_tokens = CONTEXT_WORDS
    slots = SLOTS

    def __init__(
        self, name: str = "echo", clock: Callable[[], float] = time.monotonic, slowdown: float = 1.0
    ) -> None:
        """``slowdown``: gives words that many times slower."""
        rate = echo_rate(name)
        self.model = "echo"
        self.names = ("echo", name)
        self._interval_s = slowdown / rate if rate else 0.0
        self._clock = clock
        self._running: dict[tuple[str, int], _Attempt] = {}
        self._paused: dict[tuple[str, int], _Attempt] = {}

    @property
    def due_s(self) -> float | None:
        if not self._running:
            return None
        return max(0.0, min(attempt.due_at for attempt in self._running.values()) - self._clock())

    def start(self, run: Run) -> list[Event]:
        submit, key = run.submit, (run.task, run.attempt)
        refuse = refusal(run, self.names, slots_taken=len(self._running) >= self.slots)
        if refuse is None and (reason := _WITHOUT_WEIGHTS.get(submit.kind)) is not None:
            refuse = refused(run, f"echo has no weights to {reason}; ask a node with a real model")
        if refuse is not None:
            return [refuse]
        words = _WORD.findall(_text_of(submit))
        if len(words) > CONTEXT_WORDS:
            return [refused(run, f"the prompt has {len(words)} words, echo takes at most {CONTEXT_WORDS}")]
        answer = _until_stop(words, submit.stop)
        now = self._clock()
        self._running[key] = _Attempt(
            run=run,
            words=answer[: submit.max_tokens],
            n_prompt=len(words),
            started_at=now,
            due_at=now + self._interval_s,
            is_cut=len(answer) > submit.max_tokens,
        )
        return []

    def stop(self, stop: Stop) -> list[Event]:
        key = (stop.task, stop.attempt)
        attempt = self._running.pop(key, None) or self._paused.pop(key, None)
        return [] if attempt is None else [self._ended(attempt, "cancelled", None, stop.reason)]

    def pause(self, pause: Pause) -> None:
        key = (pause.task, pause.attempt)
        if key in self._running:
            self._paused[key] = self._running.pop(key)

    def resume(self, resume: Resume) -> None:
        key = (resume.task, resume.attempt)
        if key in self._paused:
            attempt = self._running[key] = self._paused.pop(key)
            attempt.due_at = self._clock() + self._interval_s

    def give(self, given: FeaturesGiven) -> list[Event]:
        return []

    def step(self) -> list[Event]:
        events: list[Event] = []
        for key, attempt in list(self._running.items()):
            now = self._clock()
            if attempt.due_at > now:
                continue
            if attempt.n_given < len(attempt.words):
                word = attempt.words[attempt.n_given]
                attempt.n_given += 1
                attempt.due_at += self._interval_s
                if attempt.ttft_s is None:
                    attempt.ttft_s = now - attempt.started_at
                task, number = attempt.run.task, attempt.run.attempt
                events.append(Text(task=task, attempt=number, text=word, n_tokens=1))
            if attempt.n_given == len(attempt.words):
                del self._running[key]
                events.append(self._ended(attempt, "done", "length" if attempt.is_cut else "stop", None))
        return events

    def _ended(
        self,
        attempt: _Attempt,
        state: Literal["done", "cancelled"],
        finish_reason: str | None,
        reason: str | None,
    ) -> Ended:
        return Ended(
            task=attempt.run.task,
            attempt=attempt.run.attempt,
            state=state,
            text="".join(attempt.words[: attempt.n_given]),
            finish_reason=finish_reason,
            reason=reason,
            n_prompt_tokens=attempt.n_prompt,
            n_tokens=attempt.n_given,
            ttft_s=attempt.ttft_s,
            service_s=self._clock() - attempt.started_at,
        )


def _text_of(submit: Submit) -> str:
    """The prompt, or what the last message with content says."""
    if submit.prompt is not None:
        return submit.prompt
    return next(message.content for message in reversed(submit.messages) if message.content.strip())


def _until_stop(words: list[str], stops: list[str]) -> list[str]:
    """The words before the first stop string."""
    text = "".join(words)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return _WORD.findall(text[: min(ends)]) if ends else words
