"""Texts to score, to classify or to embed: each is read once, many of them in one pass, nothing is written.

score     log-probability of each token of a text after the prompt, or after the token that begins a text
classify  probabilities by the class head of the adapter, from the last token's row
embed     the mean of all rows after the final norm, as a unit vector
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mesh.messages import Output, Submit
from mesh.messages.output import NUMBERS_MAX
from mesh.messages.task import ANSWER_BYTES_MAX, TaskKind
from node.compute.backbone.contract import Backbone
from node.compute.backbone.deltas import Adapter
from node.compute.engine import Event
from node.compute.messages import Ended, Run
from node.compute.serve.sequences import Sequence
from node.compute.serve.tokens import Tokens

__all__ = ["Texts", "read_ids", "texts_ids"]

# Logits of 64 rows over 49,152 tokens are 12 MB.
_LOGIT_ROWS = 64


def texts_ids(
    submit: Submit, kind: TaskKind, tokens: Tokens, *, completes: bool = False
) -> tuple[list[list[int]], int]:
    """The tokens of each text as a task of this kind sees them, and how many of them come before the text.

    Raises:
        ValueError: The chat template does not take the messages.
    """
    if kind != "score":
        return [tokens.plain(text) for text in submit.texts], 0
    asks = submit.prompt is not None or bool(submit.messages)
    before = tokens.encode(submit, completes=completes) if asks else tokens.beginning()
    return [before + tokens.continuation(text) for text in submit.texts], len(before)


def read_ids(ids: list[int], kind: TaskKind) -> list[int]:
    """Those that the model reads: the last token of a text to score predicts nothing that is asked for."""
    return ids[:-1] if kind == "score" else list(ids)


class Texts:
    """A ``score``, ``classify`` or ``embed`` attempt. ``make_sequence``: as ``Sequence``.

    Raises:
        ValueError: It cannot be done as asked; the text says why, with numbers.
    """

    def __init__(
        self,
        run: Run,
        adapter: Adapter | None,
        tokens: Tokens,
        backbone: Backbone,
        clock: Callable[[], float],
        make_sequence: Callable[..., Sequence] = Sequence,
    ) -> None:
        submit = run.submit
        self._make_sequence = make_sequence
        self.run = run
        self.adapter = adapter
        self._backbone = backbone
        self._clock = clock
        self._started_at = clock()
        self._kind = submit.kind
        self._head = adapter.head if adapter is not None else None
        if self._kind == "classify" and self._head is None:
            assert adapter is not None, "the submission has been checked"
            raise ValueError(
                f"adapter {adapter.name!r} has no class head: choose one that was tuned to classify"
            )
        completes = adapter is not None and adapter.completes
        self._ids, n_before = texts_ids(submit, self._kind, tokens, completes=completes)
        self._check(n_before)
        self.sequences = [self._sequence(ids, n_before) for ids in self._ids]
        self._all = list(self.sequences)
        self.n_tokens = sum(map(len, self._ids))
        # What has come of each text so far; rows of long texts come in pieces.
        self._numbers: list[list[float]] = [[] for _ in self._ids]
        self._sums: dict[int, Tensor] = {}

    def _check(self, n_before: int) -> None:
        most = self._backbone.context_tokens
        for at, ids in enumerate(self._ids):
            if len(ids) <= n_before:
                raise ValueError(f"text {at + 1} has no tokens")
            if len(ids) > most:
                also = f" with the {n_before} before it" if n_before > 1 else ""
                raise ValueError(
                    f"text {at + 1} has {len(ids)} tokens{also}; the model takes at most {most}: split it"
                )
        each = self._backbone.width
        if self._head is not None:
            each = len(self._head.labels)
        n_numbers = len(self._ids) * each
        if self._kind == "score":
            n_numbers = sum(len(ids) - n_before for ids in self._ids)
        if n_numbers > NUMBERS_MAX:
            advice = "send fewer or shorter texts at a time"
            if self._kind != "score":
                advice = f"send at most {NUMBERS_MAX // each} texts at a time"
            raise ValueError(f"this would give {n_numbers} numbers, a result holds {NUMBERS_MAX}: {advice}")

    def _sequence(self, ids: list[int], n_before: int) -> Sequence:
        read = read_ids(ids, self._kind)
        if self._kind == "score":
            # What comes before all texts is read once.
            return self._make_sequence(
                read,
                self.adapter,
                capacity=len(read),
                n_wanted=len(ids) - n_before,
                n_shared=n_before,
            )
        n_wanted = len(ids) if self._kind == "embed" else 1
        return self._make_sequence(read, self.adapter, capacity=len(ids), n_wanted=n_wanted)

    def take(self, sequence: Sequence, rows: Tensor) -> list[Event]:
        """Rows (n, d) of ``sequence`` after the final norm, the last of them its newest. The end once all are
        through."""
        at = self._all.index(sequence)
        if len(rows):
            self._take(at, sequence, rows)
        if sequence.n_left:
            return []
        self.sequences.remove(sequence)
        return [] if self.sequences else [self._ended("done", None)]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _take(self, at: int, sequence: Sequence, rows: Tensor) -> None:
        if self._kind == "score":
            ids, first = self._ids[at], sequence.n_read - len(rows)
            for start in range(0, len(rows), _LOGIT_ROWS):
                some = rows[start : start + _LOGIT_ROWS]
                whose = [sequence.adapter_at(first + start + i) for i in range(len(some))]
                following = ids[first + start + 1 : first + start + 1 + len(some)]
                logits = self._backbone.logits(some, whose)
                targets = torch.tensor(following, device=logits.device)[:, None]
                chosen = logits.gather(1, targets)[:, 0] - logits.logsumexp(dim=1)
                self._numbers[at] += chosen.tolist()
        elif self._kind == "embed":
            self._sums[at] = self._sums.get(at, 0.0) + rows.float().sum(0)
            if not sequence.n_left:
                mean = self._sums.pop(at)
                self._numbers[at] = (mean / mean.norm().clamp_min(1e-12)).tolist()
        else:
            assert self._head is not None
            self._numbers[at] = torch.softmax(self._head.logits(rows[-1:])[0], dim=-1).tolist()

    def cancel(self, reason: str) -> list[Event]:
        return [self._ended("cancelled", reason)]

    def _ended(self, state: str, reason: str | None) -> Ended:
        assert state in ("done", "cancelled")
        is_done = state == "done"
        output, text = self._output() if is_done else (None, "")
        return Ended(
            task=self.run.task,
            attempt=self.run.attempt,
            state="done" if is_done else "cancelled",
            text=text,
            reason=reason,
            n_prompt_tokens=self.n_tokens,
            service_s=self._clock() - self._started_at,
            output=output,
        )

    def _output(self) -> tuple[Output, str]:
        """The result, and the same for people: a line for each text."""
        numbers = self._numbers
        if self._kind == "embed":
            return Output(vectors=numbers), f"{len(numbers)} unit vectors of {len(numbers[0])} numbers"
        if self._kind == "score":
            lines = [
                f"{sum(found):.3f} for {len(found)} tokens, perplexity {_perplexity(found):.4g}"
                for found in numbers
            ]
            return Output(scores=numbers), _bounded(lines)
        assert self._head is not None
        classes = list(self._head.labels)
        best = [max(range(len(classes)), key=found.__getitem__) for found in numbers]
        labels = [classes[at] for at in best]
        lines = [f"{classes[at]} ({found[at]:.3f})" for at, found in zip(best, numbers, strict=True)]
        return Output(labels=labels, classes=classes, scores=numbers), _bounded(lines)


def _perplexity(scores: list[float]) -> float:
    return math.exp(min(700.0, -sum(scores) / len(scores)))


def _bounded(lines: list[str]) -> str:
    """Labels may be long; the output has them all."""
    text = "\n".join(lines)
    return text if len(text.encode()) <= ANSWER_BYTES_MAX // 2 else f"{len(lines)} results"
