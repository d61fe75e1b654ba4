"""What a ``features`` task makes, and how a worker that cannot make them asks its coordinator for some.

    child ─▷ worker ──FeaturesWanted, again and again──▶ coordinator ──▶ a ``features`` task, elsewhere
    child ◁─ worker ◀──FeaturesReady── coordinator, once that has ended

The maps themselves are the cache's to carry: what is said here is that they are there, and of which kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh.ids import Epoch, TaskId
from mesh.messages.checks import check_count, check_id, check_text
from mesh.messages.output import FeaturesHeld

__all__ = ["FEATURE_ROUNDS_MAX", "FeaturesReady", "FeaturesSpec", "FeaturesWanted"]

FEATURE_ROUNDS_MAX = 4
"""How often one attempt may ask for feature maps: they may be lost again before it has read them."""

ReadsLike = Literal["tune", "score", "classify", "embed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesSpec:
    """Which feature maps: of the records of ``Submit.tune``, or of ``Submit.texts``."""

    top_layers: int
    """How many layers are above the cut that the features enter."""
    reads: ReadsLike = "tune"
    """The kind of task that will read them: it decides how texts become tokens."""
    completes: bool = False
    """A prompt is plain text to go on from, not a question to a chat model (``score``)."""
    parent: TaskId | None = None
    """The task that is going to read them."""
    is_ahead: bool = False
    """Nobody waits for them yet: everything else comes first."""

    def __post_init__(self) -> None:
        check_count("top_layers", self.top_layers, 1024, least=1)
        if self.parent is not None:
            check_id("parent", self.parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesWanted:
    """An attempt on this node needs feature maps that the node cannot compute. Repeated until answered."""

    task: TaskId
    attempt: int
    round: int
    """Counts what this attempt has asked for, from 0."""
    spec: FeaturesSpec

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_count("attempt", self.attempt, 1000, least=1)
        check_count("round", self.round, FEATURE_ROUNDS_MAX - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesReady:
    """The answer: the mesh has them now (``made``), or nobody can make them (``reason``)."""

    epoch: Epoch
    task: TaskId
    attempt: int
    round: int
    made: FeaturesHeld | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_text("reason", self.reason, 2000)
