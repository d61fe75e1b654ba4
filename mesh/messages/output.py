"""What a task gives besides text: labels, scores, vectors, a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.messages.checks import check_count, check_text

__all__ = ["AdapterCard", "Output"]

# A vector of 4,096 numbers takes 37 kB in msgpack; a frame takes 512 KiB. Engines say it sooner, per model.
NUMBERS_MAX = 40_000
TEXTS_MAX = 256
"""Inputs of one score, classify or embed task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """A trained adapter, as its result and its listing show it."""

    name: str
    digest: str
    """BLAKE2b of its weights and configuration."""
    method: str
    top_layers: int
    first_layer: int
    """The cut: feature maps entering this layer or a lower one do not depend on the adapter."""
    bytes: int
    task: str
    labels: list[str] = field(default_factory=list)
    metric: float | None = None
    """On the evaluation records, if there were any."""

    def __post_init__(self) -> None:
        check_text("name", self.name, 256)
        check_count("bytes", self.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One entry per input text, in order. Only what the task's kind gives is filled."""

    labels: list[str] = field(default_factory=list)
    """classify: the likeliest label of each text."""
    classes: list[str] = field(default_factory=list)
    """classify: all labels, in the order of ``scores``."""
    scores: list[list[float]] = field(default_factory=list)
    """classify: probabilities by class. score: log-probability of each token of each text."""
    vectors: list[list[float]] = field(default_factory=list)
    """embed: a unit vector for each text."""
    adapter: AdapterCard | None = None
    """tune: what was trained."""

    def __post_init__(self) -> None:
        numbers = sum(map(len, self.scores)) + sum(map(len, self.vectors))
        if numbers > NUMBERS_MAX:
            raise ValueError(f"an output holds at most {NUMBERS_MAX} numbers, got {numbers}")
