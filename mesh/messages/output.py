"""What a task gives besides text: labels, scores, vectors, a trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.messages.checks import check_count, check_text

__all__ = ["AdapterCard", "Output"]

# 9 bytes each in msgpack, about 20 in JSON: with the largest submission they still fit one frame, and alone
# one JSON message (see ``mesh.wire``). Engines refuse sooner, as they know what a text will give.
NUMBERS_MAX = 40_000
LABELS_MAX = 4096
"""Classes of one classifier."""
LABEL_BYTES_MAX = 64 * 1024
"""All labels of one output together."""
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
        check_labels(self.labels)


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

    @property
    def n_bytes(self) -> int:
        """About what it takes in msgpack."""
        numbers = sum(map(len, self.scores)) + sum(map(len, self.vectors))
        labels = [*self.labels, *self.classes, *(self.adapter.labels if self.adapter is not None else ())]
        return 9 * numbers + sum(len(label.encode("utf-8", "surrogatepass")) for label in labels)

    def __post_init__(self) -> None:
        numbers = sum(map(len, self.scores)) + sum(map(len, self.vectors))
        if numbers > NUMBERS_MAX:
            raise ValueError(f"an output holds at most {NUMBERS_MAX} numbers, got {numbers}")
        if max(len(self.labels), len(self.scores), len(self.vectors)) > TEXTS_MAX:
            raise ValueError(f"an output is of at most {TEXTS_MAX} texts")
        check_labels(self.classes, self.labels)


def check_labels(classes: list[str], labels: Sequence[str] = ()) -> None:
    """A classifier's classes, and what it said of some texts.

    Raises:
        ValueError: They are too many, or too long together.
    """
    n_bytes = sum(len(label.encode("utf-8", "surrogatepass")) for label in (*classes, *labels))
    if len(classes) > LABELS_MAX or n_bytes > LABEL_BYTES_MAX:
        raise ValueError(f"at most {LABELS_MAX} labels, {LABEL_BYTES_MAX} bytes together")
