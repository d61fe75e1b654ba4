"""From records to pieces of work: tokens, what is learned from them, and their order.

A batch is what one optimizer step learns from. It is computed in pieces of a bounded number of rows whose
gradients add up, so that no piece blocks the process for long and memory does not grow with the batch.
Order and pieces follow from the seed and the lengths alone, never from a clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer

from mesh.errors import ConfigError
from node.compute.tune.records import Record, Records

__all__ = ["Example", "TuneTokens", "batches", "encoded", "pieces", "rows_per_piece"]

# Measured (milliseconds a text of 37 tokens, one core, SmolLM2, pieces of 96 / 192 / 384 / 768 rows): top 4
# 44.6 / 38.1 / 34.0 / 33.7, top 2 20.5 / 15.2 / 13.2 / 13.0, top 1 5.3 / 3.5 / 2.3 / 1.7.
_PIECE_ROWS_MAX = 768
_PIECE_ROWS_MIN = 32
# About 0.25 s of two cores, forward and backward (four operations a weight and row).
_PIECE_FLOP = 18e9


@dataclass(frozen=True, slots=True)
class Example:
    """One record as the top layers see it: rows 0 to the last one read, nothing behind it."""

    ids: tuple[int, ...]
    wanted: tuple[int, ...]
    """Positions whose output is read, ascending; the last is len(ids) - 1."""
    targets: tuple[int, ...]
    """What each of them shall say: a label's number, or the next token."""
    active_from: int = 0
    """The first position an activated adapter changes."""


class TuneTokens:
    """The model's tokenizer, and how each task's records become examples."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self._max_tokens = max_tokens

    def invocation(self) -> tuple[int, ...]:
        """The tokens with which the chat template opens an answer: where an activated adapter begins.

        Raises:
            ConfigError: The model has no chat template, or one that marks no answer.
        """
        question = [{"role": "user", "content": "?"}]
        closed, opened = self._template(question, False), self._template(question, True)
        if len(opened) <= len(closed) or opened[: len(closed)] != closed:
            raise ConfigError(
                "alora needs a chat template that marks where an answer begins; choose lora for this model"
            )
        return tuple(opened[len(closed) :])

    def example(self, record: Record, records: Records, invocation: Sequence[int] = ()) -> Example:
        """Raises:
        ValueError: Nothing can be learned from it within ``max_tokens``; the text says why.
        """
        if records.task == "classify":
            ids = self._plain(record.text)[: self._max_tokens]
            if not ids:
                raise ValueError("the text has no tokens")
            return Example(tuple(ids), (len(ids) - 1,), (records.label_of[record.answer],))
        if records.task == "complete":
            ids, learned = self._completion(record)
        else:
            ids, learned = self._chat(record)
        ids, learned = ids[: self._max_tokens], learned[: self._max_tokens]
        wanted = tuple(at - 1 for at in range(1, len(ids)) if learned[at])
        if not wanted:
            raise ValueError(
                f"within {self._max_tokens} tokens there is no answer to learn from: shorten what comes "
                "before it, or raise max_tokens"
            )
        n = wanted[-1] + 1
        active_from = _last_place(ids[:n], invocation) if invocation else 0
        return Example(tuple(ids[:n]), wanted, tuple(ids[at + 1] for at in wanted), active_from)

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def _completion(self, record: Record) -> tuple[list[int], list[bool]]:
        prompt = self._plain(record.text)
        answer = self._tokenizer.encode(record.answer, add_special_tokens=False)
        end = self._tokenizer.eos_token_id
        answer = [*answer, end] if end is not None else answer
        return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)

    def _chat(self, record: Record) -> tuple[list[int], list[bool]]:
        """Each assistant's message is learned, with the tokens that close it."""
        messages = [{"role": turn.role, "content": turn.content} for turn in record.turns]
        last = max(at for at, turn in enumerate(record.turns) if turn.role == "assistant")
        ids = self._template(messages[: last + 1], False)
        learned = [False] * len(ids)
        for at, turn in enumerate(record.turns[: last + 1]):
            if turn.role != "assistant":
                continue
            before = self._template(messages[:at], True) if at else []
            through = self._template(messages[: at + 1], False)
            if ids[: len(through)] != through or through[: len(before)] != before:
                raise ValueError(
                    "the model's chat template rewrites earlier messages when later ones come, so answers "
                    "cannot be told apart; give each conversation one answer, at its end"
                )
            learned[len(before) : len(through)] = [True] * (len(through) - len(before))
        return ids, learned

    def _template(self, messages: list[dict[str, str]], opens_answer: bool) -> list[int]:
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "this model has no chat template: give prompts and completions (--task complete)"
            )
        try:
            found = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens_answer, return_dict=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return list(found["input_ids"])


def encoded(
    records: Records,
    tokens: TuneTokens,
    invocation: Sequence[int] = (),
    *,
    skip_bad: bool,
    name: str = "the data",
) -> Iterator[Example]:
    """One example after another, so that the caller can do other things between them.

    Raises:
        ConfigError: A record has nothing to learn from and ``skip_bad`` is not set, or none has.
    """
    n = 0
    for record in records.items:
        try:
            example = tokens.example(record, records, invocation)
        except ValueError as error:
            if skip_bad:
                continue
            raise ConfigError(f"{name}, line {record.line}: {error} (or leave it out: --skip-bad)") from error
        n += 1
        yield example
    if not n:
        raise ConfigError(f"{name}: no record has anything to learn from within max_tokens")


def rows_per_piece(weights_of_row: int) -> int:
    """``weights_of_row``: numbers in the matrices that a row meets, see ``top_model.weights_of_row``."""
    return int(max(_PIECE_ROWS_MIN, min(_PIECE_ROWS_MAX, _PIECE_FLOP / (4 * max(1, weights_of_row)))))


def batches(n_examples: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """The examples of every step of one epoch, by number; each is in one of them."""
    mixed = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    source = torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)
    order = torch.randperm(n_examples, generator=source).tolist()
    return [order[start : start + size] for start in range(0, n_examples, size)]


def pieces(examples: Sequence[Example], numbers: Sequence[int], n_rows: int) -> list[list[int]]:
    """``numbers``, shortest example first, cut into pieces of at most ``n_rows`` rows (or one example)."""
    found: list[list[int]] = []
    room = 0
    for number in sorted(numbers, key=lambda number: (len(examples[number].ids), number)):
        length = len(examples[number].ids)
        if not found or length > room:
            found.append([])
            room = n_rows
        found[-1].append(number)
        room -= length
    return found


def _last_place(ids: Sequence[int], marks: Sequence[int]) -> int:
    """Where ``marks`` stand last; past the end where they do not stand at all."""
    n = len(marks)
    places = [at for at in range(len(ids) - n + 1) if tuple(ids[at : at + n]) == tuple(marks)]
    return places[-1] if places else len(ids)
