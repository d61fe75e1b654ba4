"""What goes into the dispatcher and what comes out, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.policy.rates import Rates
from coordinator.policy.work import ANYTHING, Needs, Work
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

__all__ = ["Candidate", "Decision", "Drop", "Features", "Job", "NodeView", "Pause", "Resume", "Start", "Why"]


def _has_all(needs: Needs) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node as the dispatcher sees it. Put it anew whenever one of these changes."""

    id: NodeId
    rates: Rates
    slots: int = 1
    """Attempts it runs at once, sharing each step of the backbone."""
    has: Callable[[Needs], bool] = _has_all
    """Whether it has model, adapter and data of a task. Asked once for each (needs, node)."""
    is_ready: bool = True
    """``False``: here, but takes nothing now (loading, draining). Its tasks are not hopeless for that."""
    tunes_max: int = 1
    """Tuning tasks at once: they do not share steps, so a second one only waits on the node."""
    can_pause: bool = True
    """Lets one generation stand still for another."""
    tunes_beside: bool = False
    """Its engine itself runs tuning between the steps of inference: nothing has to be paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A task that may start. Times are on the caller's monotonic clock."""

    task: TaskId
    work: Work
    value: float = 1.0
    arrived_at: float = 0.0
    deadline_at: float = FOREVER
    needs: Needs = ANYTHING
    tie: str = ""
    """Orders tasks of equal score and deadline, before the id: with a digest, equal bodies come together."""
    avoid: Mapping[NodeId, float] = field(default_factory=dict)
    """Nodes that refused or failed it -> until when not to ask them."""

    def __post_init__(self) -> None:
        if not 0 < self.value < FOREVER:
            raise ValueError(f"value must be positive and finite, got {self.value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Tokens whose feature maps a tuning job would find on a node, fetch from others, and compute."""

    found: float
    fetched: float
    computed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One node and why it was, or was not, taken."""

    node: NodeId
    service_s: float
    """Expected from start to end, in its present company."""
    why_not: str | None
    """``None``: taken."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part, see ``coordinator.policy.rates.PARTS``; only of the node taken."""
    features: Features | None = None
    """``None``: the job reads none, or nobody knows where they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """The numbers behind a decision, for people and as JSON."""

    at: float
    policy: str
    words: str
    """One sentence."""
    score: float
    """The policy's own; the highest went first."""
    density: float
    """Value per second of node time on the node taken, before any discount."""
    laxity_s: float | None
    """Seconds to spare after its expected end; ``None`` without a deadline."""
    cost_s: float
    """Node time it takes from others: marginal when it joins a batch."""
    service_s: float
    """Expected from start to end."""
    n_waiting: int
    candidates: Sequence[Candidate] = ()
    """At most 8, the taken one first, then by expected end."""
    n_candidates: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Start the task on the node; a tuning task that was paused carries on from where it is."""

    task: TaskId
    node: NodeId
    why: Why
    after: TaskId | None = None
    """Starts when this task, which is paused in the same decision, has given way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Reject the task: it cannot be done in time."""

    task: TaskId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Have the task give way: tuning at the end of its chunk (then ``Dispatcher.requeue`` with what is left),
    generation between two tokens (it stays on the node until ``Resume``)."""

    task: TaskId
    node: NodeId
    why: Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Carry on with a generation paused on this node."""

    task: TaskId
    node: NodeId
    why: Why


Decision = Start | Drop | Pause | Resume
