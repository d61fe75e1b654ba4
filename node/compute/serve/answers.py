"""One answer being written: which token comes next, when it ends, and what goes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from mesh.messages.task import ANSWER_BYTES_MAX
from node.compute.backbone.deltas import Adapter
from node.compute.engine import Event
from node.compute.messages import Ended, Run, Text
from node.compute.serve.generate import Sampler, TextStream
from node.compute.serve.sequences import Sequence
from node.compute.serve.tokens import Tokens

__all__ = ["Answer"]

# Where an answer is cut as by max_tokens. The margin is for the last token and what was held back.
_ANSWER_BYTES_CUT = ANSWER_BYTES_MAX - 8 * 1024


class Answer:
    """A ``generate`` attempt. ``ids`` is its prompt; each token of it is read once, each new one written."""

    def __init__(
        self, run: Run, ids: list[int], adapter: Adapter | None, tokens: Tokens, clock: Callable[[], float]
    ) -> None:
        submit = run.submit
        self.run = run
        self.adapter = adapter
        self.sequences = [
            Sequence(
                ids,
                adapter,
                capacity=len(ids) + submit.max_tokens,
                n_shared=len(ids),
                shares_answer=True,
            )
        ]
        self._sampler = Sampler(submit.temperature, submit.top_p, submit.seed)
        self._stream = TextStream(tokens.decode, submit.stop)
        self._ends = tokens.ends
        self._clock = clock
        self._started_at = clock()
        self._n_tokens = 0
        self._ttft_s: float | None = None

    def take(self, logits: Tensor) -> list[Event]:
        """Shapes: logits (vocabulary,), after everything there is. An ``Ended`` is the last event."""
        (sequence,) = self.sequences
        token = self._sampler.choose(logits)
        if self._ttft_s is None:
            self._ttft_s = self._clock() - self._started_at
        if token in self._ends:
            return self.end("done", "stop", None)
        self._n_tokens += 1
        sequence.ids.append(token)
        piece = self._stream.add(token)
        events: list[Event] = [
            Text(task=self.run.task, attempt=self.run.attempt, text=piece, n_tokens=1),
        ]
        if self._stream.stopped:
            return events + self.end("done", "stop", None)
        is_full = len(self._stream.text.encode()) > _ANSWER_BYTES_CUT
        if self._n_tokens >= self.run.submit.max_tokens or is_full:
            return events + self.end("done", "length", None)
        return events

    def end(
        self, state: Literal["done", "cancelled"], finish_reason: str | None, reason: str | None
    ) -> list[Event]:
        """What was held back, and the end."""
        run = self.run
        events: list[Event] = []
        if piece := self._stream.finish():
            events.append(Text(task=run.task, attempt=run.attempt, text=piece, n_tokens=0))
        events.append(
            Ended(
                task=run.task,
                attempt=run.attempt,
                state=state,
                text=self._stream.text,
                finish_reason=finish_reason,
                reason=reason,
                n_prompt_tokens=self.sequences[0].n_given,
                n_tokens=self._n_tokens,
                ttft_s=self._ttft_s,
                service_s=self._clock() - self._started_at,
            )
        )
        return events

    def cancel(self, reason: str) -> list[Event]:
        return self.end("cancelled", None, reason)
