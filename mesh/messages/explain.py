"""Why the coordinator did with a task what it did, and how well it foresees what work takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages.checks import check_count, check_id, check_seconds, check_text
from mesh.messages.task import TaskState

__all__ = [
    "CandidateNode",
    "CostReport",
    "DecisionVerb",
    "ExplainTask",
    "KindError",
    "TaskDecision",
    "TaskExplanation",
]

DecisionVerb = Literal["start", "drop", "pause", "resume", "wait"]
"""What was decided; ``wait``: what it would be now, of a task that waits."""

CANDIDATES_MAX = 16
DECISIONS_MAX = 16
PARTS_MAX = 16
WORDS_BYTES_MAX = 1000
KINDS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainTask:
    """A client asks why; the task's id is in the topic."""

    task: TaskId

    def __post_init__(self) -> None:
        check_id("task", self.task)


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateNode:
    """One node, and why it was, or was not, taken."""

    node: NodeId
    service_s: float | None
    """Expected from start to end, in the company it would have there."""
    why_not: str | None
    """``None``: taken."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by part, such as ``prefill`` and ``decode``."""
    features: dict[str, float] = field(default_factory=dict)
    """Tokens whose feature maps would be ``found`` there, ``fetched`` from others, and ``computed``; empty
    where the task needs none, or nobody knows where they are."""

    def __post_init__(self) -> None:
        check_id("node", self.node)
        check_seconds("service_s", self.service_s)
        check_text("why_not", self.why_not, WORDS_BYTES_MAX)
        _check_length("parts", self.parts, PARTS_MAX)
        _check_length("features", self.features, PARTS_MAX)
        for field_name, numbers in (("parts", self.parts), ("features", self.features)):
            for name, number in numbers.items():
                check_text(field_name, name, 64)
                check_seconds(f"{field_name}.{name[:64]}", number)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDecision:
    """One decision and the numbers behind it."""

    verb: DecisionVerb
    age_s: float
    """Since the decision, when this was sent."""
    words: str
    """One sentence."""
    node: NodeId | None = None
    policy: str | None = None
    score: float | None = None
    """The policy's own; the highest goes first."""
    density: float | None = None
    """Value per second of node time."""
    laxity_s: float | None = None
    """The slack: seconds to spare after its expected end; ``None`` without a deadline."""
    cost_s: float | None = None
    """Node time it takes from others: less than ``service_s`` when it joins a batch."""
    service_s: float | None = None
    """Expected from start to end."""
    n_waiting: int | None = None
    """How many others waited then."""
    candidates: list[CandidateNode] = field(default_factory=list)
    """The taken one first, then by expected end."""
    n_candidates: int = 0
    """How many there were; the list may have fewer."""

    def __post_init__(self) -> None:
        check_seconds("age_s", self.age_s)
        check_text("words", self.words, WORDS_BYTES_MAX)
        check_text("policy", self.policy, 100)
        if self.node is not None:
            check_id("node", self.node)
        check_seconds("cost_s", self.cost_s)
        check_seconds("service_s", self.service_s)
        check_count("n_candidates", self.n_candidates)
        _check_length("candidates", self.candidates, CANDIDATES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExplanation:
    """The coordinator's answer to ``ExplainTask``: what it decided about the task, the oldest first.

    A coordinator knows its own decisions: those of an earlier one are gone with it.
    """

    task: TaskId
    epoch: Epoch
    """Of the coordinator that answers."""
    state: TaskState | None
    """``None``: it knows no such task (any more)."""
    reason: str | None = None
    """Of its state, as in ``TaskStatus``."""
    kind: str | None = None
    value: float | None = None
    budget_s: float | None = None
    """Seconds left to the deadline when this was sent."""
    node: NodeId | None = None
    attempt: int = 0
    decisions: list[TaskDecision] = field(default_factory=list)
    n_decisions: int = 0
    """How many there were; the list has the newest."""

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_seconds("budget_s", self.budget_s)
        check_count("n_decisions", self.n_decisions)
        _check_length("decisions", self.decisions, DECISIONS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindError:
    """How far off predictions for one kind of task were lately."""

    kind: str
    p50: float
    """Half of the predictions were off by at most this share of what was predicted."""
    n: int
    """Outcomes behind it."""

    def __post_init__(self) -> None:
        check_text("kind", self.kind, 64)
        check_seconds("p50", self.p50)
        check_count("n", self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """Retained: how well the coordinator foresees how long work takes, |actual / predicted - 1| by kind."""

    epoch: Epoch
    errors: list[KindError]

    def __post_init__(self) -> None:
        _check_length("errors", self.errors, KINDS_MAX)


def _check_length(name: str, items: Sequence[object] | dict[str, float], most: int) -> None:
    if len(items) > most:
        raise ValueError(f"{name} has at most {most} entries, got {len(items)}")
