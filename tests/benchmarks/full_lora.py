"""The baseline of the tuning benchmarks: plain ``transformers`` and ``peft``, LoRA in all layers.

As good as plain code gets: batches padded to their own longest text, fused AdamW, no dropout, a linear
schedule with warm-up, all cores, and bfloat16 where a step is measured to be faster in it. Its best learning
rate is found on the validation texts by ``python -m tests.benchmarks.full_lora NAME`` (half an hour a data
set on two cores); the rates below are the usual ones of LoRA, until that search has said better.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from tests.benchmarks.datasets import Labelled, Split, load

# That a new head is new is no news.
logging.set_verbosity_error()

__all__ = ["MAX_TOKENS", "RATE", "RATES", "FullLora", "Point", "token_ids"]

MAX_TOKENS = 48
RATE = 1e-3
"""For data whose best rate is not known."""
RATES: dict[str, float] = {"r8": 1e-3, "r52": 1e-3, "newsgroups": 1e-3, "polarity": 5e-4}
_SEARCHED = (5e-4, 1e-3, 2e-3)
_BATCH, _RANK = 16, 8
_TARGETS = ["q_proj", "v_proj"]  # PEFT's own choice for Llama, and the cheapest
_WARM_UP = 0.06
_PAD = 2


@dataclass(frozen=True, slots=True)
class Point:
    """How far a run is after an epoch. ``seconds``: of training alone, evaluation not counted."""

    epoch: int
    seconds: float
    accuracy: float


def token_ids(tokenizer: Any, items: Sequence[Labelled]) -> list[list[int]]:
    return [tokenizer.encode(item.text)[:MAX_TOKENS] for item in items]


class FullLora:
    """One run on ``split``; ``epochs()`` trains."""

    def __init__(self, directory: Path, split: Split, *, rate: float, n_epochs: int, seed: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        number = {label: at for at, label in enumerate(split.labels)}

        def encoded(items: Sequence[Labelled]) -> list[tuple[list[int], int]]:
            labels = [number.get(item.label, -1) for item in items]
            return list(zip(token_ids(tokenizer, items), labels, strict=True))

        self._train, self._test = encoded(split.train), encoded(split.test)
        self._validation = encoded(split.validation)
        self._n_epochs, self._seed, self._rate = n_epochs, seed, rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, num_labels=len(number), dtype=torch.float32, pad_token_id=_PAD
            )
            model.config.use_cache = False
            config = LoraConfig(
                task_type="SEQ_CLS", r=_RANK, lora_alpha=2 * _RANK, lora_dropout=0.0, target_modules=_TARGETS
            )
            self._model: Any = get_peft_model(model, config)
        weights = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
        self._steps = n_epochs * math.ceil(len(self._train) / _BATCH)
        self._done = 0
        self.is_bf16 = self._is_faster_in_bf16()

    def epochs(self, *, evaluates: bool = True, on_validation: bool = False) -> Iterator[Point]:
        mixed = random.Random(self._seed)
        seconds = 0.0
        for epoch in range(1, self._n_epochs + 1):
            order = list(self._train)
            mixed.shuffle(order)
            start_s = time.perf_counter()
            self._model.train()
            for at in range(0, len(order), _BATCH):
                self._step(order[at : at + _BATCH])
            seconds += time.perf_counter() - start_s
            judged = self._validation if on_validation else self._test
            yield Point(epoch, seconds, self._accuracy(judged) if evaluates else math.nan)

    def _step(self, batch: Sequence[tuple[list[int], int]]) -> None:
        rise = max(1, round(_WARM_UP * self._steps))
        share = min(1.0, (self._done + 1) / rise) * (self._steps - self._done) / self._steps
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * share
        self._loss(batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1

    def _loss(self, batch: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        ids, mask, labels = _padded(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.is_bf16):
            logits = self._model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits.float(), labels)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _accuracy(self, items: Sequence[tuple[list[int], int]]) -> float:
        self._model.eval()
        ordered = sorted(items, key=lambda item: len(item[0]))
        right = 0
        for at in range(0, len(ordered), 2 * _BATCH):
            ids, mask, labels = _padded(ordered[at : at + 2 * _BATCH])
            right += int((self._model(input_ids=ids, attention_mask=mask).logits.argmax(-1) == labels).sum())
        return right / len(items)

    def _is_faster_in_bf16(self) -> bool:
        """By the better of two steps each (nothing is updated)."""
        seconds = {}
        for is_bf16 in (False, True):
            self.is_bf16 = is_bf16
            times = []
            for _ in range(2):
                start_s = time.perf_counter()
                self._loss(self._train[:4]).backward()
                times.append(time.perf_counter() - start_s)
            seconds[is_bf16] = min(times)
        self._optimizer.zero_grad(set_to_none=True)
        return seconds[True] < 0.95 * seconds[False]


def _padded(batch: Sequence[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), _PAD)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, (text, _) in enumerate(batch):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids, mask, torch.tensor([label for _, label in batch])


def _search(name: str) -> None:
    from tests.benchmarks.cached import prepared_model

    for rate in _SEARCHED:
        run = FullLora(prepared_model(), load(name), rate=rate, n_epochs=5, seed=1)
        for point in run.epochs(on_validation=True):
            print(f"{name} rate {rate:g} epoch {point.epoch} validation {point.accuracy:.3f}", flush=True)


if __name__ == "__main__":
    _search(sys.argv[1])
