"""Answers from a real model: several sequences share every pass over the weights.

One step is one forward pass. In it every running answer gets its next token, and one prompt that is
still being read gets up to ``PROMPT_PIECE_TOKENS`` further (Sarathi's chunked prefill,
arXiv 2308.16369): a long prompt delays the others' tokens by a bounded time instead of by its length,
and a cancellation is seen between two steps.

A ``prompt`` is one user message to a model that has a chat template, because that is what a question is;
to a model without one it is text to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from mesh.messages import Submit
from mesh.messages.task import ANSWER_BYTES_MAX
from node.compute.backbone.contract import Backbone, Segment
from node.compute.engine import Event, refusal, refused
from node.compute.messages import Ended, Run, Stop, Text
from node.compute.serve.generate import Sampler, TextStream
from node.compute.threads import ThreadChoice

__all__ = ["ModelEngine", "Tokens"]

# Four rows cost a CPU hardly more per step than one (the weights are read once); beyond that, each
# answer gets noticeably slower, and the states of four full contexts of SmolLM2 are 1.5 GB already.
SLOTS = 4

# About 0.2 s of work on two cores for a model of 135 M weights.
PROMPT_PIECE_TOKENS = 256

# Where an answer is cut as by max_tokens. The margin is for the last token and what was held back.
_ANSWER_BYTES_CUT = ANSWER_BYTES_MAX - 8 * 1024


class Tokens:
    """The model's tokenizer, chat template and end tokens."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self.ends: frozenset[int] = _end_tokens(directory, self._tokenizer)

    def encode(self, submit: Submit) -> list[int]:
        """The prompt as the model shall see it.

        Raises:
            ValueError: The chat template does not take these messages; the text says why.
        """
        if submit.prompt is not None and not self._tokenizer.chat_template:
            ids: list[int] = self._tokenizer.encode(submit.prompt)
            return ids
        messages = [{"role": message.role, "content": message.content} for message in submit.messages]
        if submit.prompt is not None:
            messages = [{"role": "user", "content": submit.prompt}]
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: send 'prompt' instead of 'messages'")
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@dataclass(slots=True)
class _Sequence:
    """One attempt on its way. ``waiting`` are the tokens the model has not seen yet."""

    run: Run
    states: Any
    sampler: Sampler
    stream: TextStream
    waiting: list[int]
    n_prompt: int
    started_at: float
    n_tokens: int = 0
    ttft_s: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.run.task, self.run.attempt


class ModelEngine:
    """See ``node.compute.engine.Engine``. ``names`` are all names this model answers to, its own first."""

    slots = SLOTS

    def __init__(
        self,
        names: Sequence[str],
        backbone: Backbone,
        tokens: Tokens,
        threads_max: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = names[0]
        self.names = tuple(names)
        self._backbone = backbone
        self._tokens = tokens
        self._threads = ThreadChoice(threads_max if backbone.device == "cpu" else 1)
        self._clock = clock
        self._running: dict[tuple[str, int], _Sequence] = {}

    @property
    def context_tokens(self) -> int:
        return self._backbone.context_tokens

    @property
    def device(self) -> str:
        return self._backbone.device

    @property
    def due_s(self) -> float | None:
        return 0.0 if self._running else None

    def start(self, run: Run) -> list[Event]:
        started_at = self._clock()
        submit = run.submit
        refuse = refusal(run, self.names, slots_taken=len(self._running) >= self.slots)
        if refuse is not None:
            return [refuse]
        try:
            ids = self._tokens.encode(submit)
        except ValueError as error:
            return [refused(run, str(error))]
        if len(ids) + submit.max_tokens > self.context_tokens:
            reason = (
                f"the prompt has {len(ids)} tokens and max_tokens is {submit.max_tokens}; "
                f"together the model takes at most {self.context_tokens}"
            )
            return [refused(run, reason, n_prompt_tokens=len(ids))]
        sequence = _Sequence(
            run=run,
            states=self._backbone.states(len(ids) + submit.max_tokens),
            sampler=Sampler(submit.temperature, submit.top_p, submit.seed),
            stream=TextStream(self._tokens.decode, submit.stop),
            waiting=ids,
            n_prompt=len(ids),
            started_at=started_at,
        )
        self._running[sequence.key] = sequence
        return []

    def stop(self, stop: Stop) -> list[Event]:
        sequence = self._running.get((stop.task, stop.attempt))
        if sequence is None:
            return []
        return self._end(sequence, "cancelled", None, stop.reason)

    def step(self) -> list[Event]:
        segments, owners = self._segments()
        if not segments:
            return []
        is_decode = all(len(segment.ids) == 1 for segment in segments)
        if self.device == "cpu" and torch.get_num_threads() != self._threads.threads:
            torch.set_num_threads(self._threads.threads)
        before = self._clock()
        logits = self._backbone.logits(self._backbone.forward(segments).rows)
        if is_decode:
            self._threads.saw(self._clock() - before)
        events: list[Event] = []
        for row, (segment, sequence) in enumerate(zip(segments, owners, strict=True)):
            del sequence.waiting[: len(segment.ids)]
            if not sequence.waiting:
                events += self._advance(sequence, logits[row])
        return events

    def _segments(self) -> tuple[list[Segment], list[_Sequence]]:
        """One token of every answer being written, and a piece of the first prompt not yet read."""
        segments, owners = [], []
        is_reading = False
        for sequence in self._running.values():
            if len(sequence.waiting) > 1:
                if is_reading:
                    continue
                is_reading = True
            segments.append(Segment(sequence.states, sequence.waiting[:PROMPT_PIECE_TOKENS]))
            owners.append(sequence)
        return segments, owners

    def _advance(self, sequence: _Sequence, logits: Tensor) -> list[Event]:
        submit, stream = sequence.run.submit, sequence.stream
        token = sequence.sampler.choose(logits)
        if sequence.ttft_s is None:
            sequence.ttft_s = self._clock() - sequence.started_at
        if token in self._tokens.ends:
            return self._end(sequence, "done", "stop", None)
        sequence.n_tokens += 1
        sequence.waiting.append(token)
        piece = stream.add(token)
        events: list[Event] = [
            Text(task=sequence.run.task, attempt=sequence.run.attempt, text=piece, n_tokens=1)
        ]
        if stream.stopped:
            return events + self._end(sequence, "done", "stop", None)
        if sequence.n_tokens >= submit.max_tokens or len(stream.text.encode()) > _ANSWER_BYTES_CUT:
            return events + self._end(sequence, "done", "length", None)
        return events

    def _end(
        self,
        sequence: _Sequence,
        state: Literal["done", "cancelled"],
        finish_reason: str | None,
        reason: str | None,
    ) -> list[Event]:
        del self._running[sequence.key]
        run = sequence.run
        events: list[Event] = []
        if piece := sequence.stream.finish():
            events.append(Text(task=run.task, attempt=run.attempt, text=piece, n_tokens=0))
        events.append(
            Ended(
                task=run.task,
                attempt=run.attempt,
                state=state,
                text=sequence.stream.text,
                finish_reason=finish_reason,
                reason=reason,
                n_prompt_tokens=sequence.n_prompt,
                n_tokens=sequence.n_tokens,
                ttft_s=sequence.ttft_s,
                service_s=self._clock() - sequence.started_at,
            )
        )
        return events


def _end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation config's, and the tokenizer's own."""
    ends: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (directory / "generation_config.json").exists():
        configured = GenerationConfig.from_pretrained(directory).eos_token_id
        ends.update(
            configured if isinstance(configured, list) else [] if configured is None else [configured]
        )
    return frozenset(ends)
