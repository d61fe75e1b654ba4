"""What a task gives besides text: labels, scores, vectors, a trained adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.messages.checks import check_count, check_seconds, check_text

__all__ = ["SAMPLE_KEYS_MAX", "AdapterCard", "FeaturesHeld", "Output"]

# 9 bytes each in msgpack, about 20 in JSON: with the largest submission they still fit one frame, and alone
# one JSON message (see ``mesh.wire``). Engines refuse sooner, as they know what a text will give.
NUMBERS_MAX = 40_000
LABELS_MAX = 4096
"""Classes of one classifier."""
LABEL_BYTES_MAX = 64 * 1024
"""All labels of one output together."""
TEXTS_MAX = 256
"""Inputs of one score, classify or embed task."""
SAMPLE_KEYS_MAX = 32
"""A share estimated from so many keys is off by .09 at most, two times of three."""
_KEY_DIGITS = 64


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
    made: str = ""
    """How, where that is not the usual way, such as on several nodes."""

    def __post_init__(self) -> None:
        check_text("name", self.name, 256)
        check_text("made", self.made, 1024)
        check_count("bytes", self.bytes)
        check_labels(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesHeld:
    """The feature maps that a task needed, and where it had them from.

    Whoever wants to know how many of them a node has asks its catalogue for ``sample_keys``.
    """

    top_layers: int
    """Adapted above the cut at which they enter."""
    profile: str
    """How they were computed, precision and numerics, as in ``NodeInfo.features_profile``."""
    n_tokens: int
    n_bytes: int
    """What all of them take, as stored."""
    codec: str = "raw"
    """How they are written down."""
    sample_keys: list[str] = field(default_factory=list)
    """Keys of some blocks in hexadecimal, spread over all texts."""
    n_found: int = 0
    """Tokens whose features were on this node; ``n_fetched`` came from others, ``n_computed`` is the rest."""
    n_fetched: int = 0
    n_computed: int = 0
    fetch_s: float = 0.0
    """What the fetching took."""

    def __post_init__(self) -> None:
        for name in ("top_layers", "n_tokens", "n_bytes", "n_found", "n_fetched", "n_computed"):
            check_count(name, getattr(self, name))
        check_text("profile", self.profile, 512)
        check_text("codec", self.codec, 32)
        check_seconds("fetch_s", self.fetch_s)
        if len(self.sample_keys) > SAMPLE_KEYS_MAX:
            raise ValueError(f"at most {SAMPLE_KEYS_MAX} sample_keys")
        for key in self.sample_keys:
            if len(key) != _KEY_DIGITS or not set(key) <= set("0123456789abcdef"):
                raise ValueError(f"sample_keys must be {_KEY_DIGITS} hexadecimal digits each")


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
    features: FeaturesHeld | None = None
    """tune, features: what the task read, for those who place the next one."""
    state: str | None = None
    """A part of a tuning job: digest of what it trained, in hexadecimal."""
    lacking: list[int] = field(default_factory=list)
    """A part of a tuning job that could not start: parts of the round before whose states nobody has."""

    @property
    def n_bytes(self) -> int:
        """About what it takes in msgpack."""
        numbers = sum(map(len, self.scores)) + sum(map(len, self.vectors))
        labels = [*self.labels, *self.classes, *(self.adapter.labels if self.adapter is not None else ())]
        keys = self.features.sample_keys if self.features is not None else ()
        n_bytes = 9 * numbers + _KEY_DIGITS * len(keys)
        return n_bytes + sum(len(label.encode("utf-8", "surrogatepass")) for label in labels)

    def __post_init__(self) -> None:
        numbers = sum(map(len, self.scores)) + sum(map(len, self.vectors))
        if numbers > NUMBERS_MAX:
            raise ValueError(f"an output holds at most {NUMBERS_MAX} numbers, got {numbers}")
        check_text("state", self.state, 128)
        if len(self.lacking) > TEXTS_MAX:
            raise ValueError(f"at most {TEXTS_MAX} parts are lacking")
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
