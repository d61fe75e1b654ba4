"""Requests drawn from a description, for whoever has no trace.

Times between arrivals are gamma distributed (``burstiness`` is their squared coefficient of variation: 1 is
Poisson, the Azure conversation trace has 1.2), lengths are log-normal. The defaults have the medians and the
spread of that trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from coordinator.virtual.traces import Request
from mesh.messages.checks import check_count, check_positive

__all__ = ["GeneratorSpec", "generate"]

_TASKS_MAX = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorSpec:
    """What to draw; every field is a key of ``edgemesh sim --generate``."""

    tasks: int = 2000
    rate: float = 5.5
    """Arrivals a second; a load factor stretches or squeezes the times afterwards."""
    burstiness: float = 1.2
    prompt_tokens: float = 800.0
    """Median."""
    prompt_spread: float = 1.0
    """Of the logarithm: 1 means that two of three prompts are within a factor of e of the median."""
    prompt_tokens_max: int = 8192
    answer_tokens: float = 150.0
    answer_spread: float = 0.8
    answer_tokens_max: int = 2048

    def __post_init__(self) -> None:
        check_count("tasks", self.tasks, _TASKS_MAX, least=1)
        for name in ("rate", "burstiness", "prompt_tokens", "answer_tokens"):
            check_positive(name, getattr(self, name))
        for name in ("prompt_spread", "answer_spread"):
            if not 0 <= getattr(self, name) <= 5:
                raise ValueError(f"{name} must be from 0 to 5, got {getattr(self, name)}")
        check_count("prompt_tokens_max", self.prompt_tokens_max, _TASKS_MAX, least=1)
        check_count("answer_tokens_max", self.answer_tokens_max, _TASKS_MAX, least=1)


def generate(spec: GeneratorSpec, rng: Random) -> list[Request]:
    """``spec.tasks`` requests in order of time, the first at 0."""
    shape = 1.0 / spec.burstiness
    scale_s = spec.burstiness / spec.rate
    requests, at_s = [], 0.0
    for _ in range(spec.tasks):
        n_prompt_tokens = _length(rng, spec.prompt_tokens, spec.prompt_spread, spec.prompt_tokens_max)
        n_tokens = _length(rng, spec.answer_tokens, spec.answer_spread, spec.answer_tokens_max)
        requests.append(Request(at_s, n_prompt_tokens, n_tokens))
        at_s += rng.gammavariate(shape, scale_s)
    return requests


def _length(rng: Random, median: float, spread: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(median), spread))))
