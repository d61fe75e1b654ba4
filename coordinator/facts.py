"""Facts between the coordinator's and the worker's cores and the shell that computes."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.ids import TaskId
from mesh.messages import Assign, FeaturesHeld, FeaturesSpec, NodeRates, Outcome, TaskProgress

__all__ = [
    "NODE_STOPS",
    "AdaptersChanged",
    "AttemptFinished",
    "AttemptProgress",
    "AttemptText",
    "DrainChanged",
    "EngineLost",
    "EngineReady",
    "FeaturesArrived",
    "FeaturesNeeded",
    "FeaturesProfiled",
    "PauseAttempt",
    "RatesMeasured",
    "ResumeAttempt",
    "StartAttempt",
    "StopAttempt",
]


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Shell to worker core: the model is loaded; attempts may start."""

    model: str
    context_tokens: int
    slots: int
    also_called: tuple[str, ...] = ()
    precision: str = ""
    """Of the weights while they compute; empty where there are none."""
    precision_reason: str = ""
    adapters: tuple[str, ...] = ()
    rates: NodeRates | None = None
    can_pause: bool = False
    features_profile: str | None = None
    """How it computes feature maps, if that is known already."""
    top_layers: int | None = None
    """It holds so many layers at the top; ``None``: all of them."""


NODE_STOPS = "the node is stopping"
"""The one reason of ``EngineLost`` that is no trouble."""


@dataclass(frozen=True, slots=True)
class EngineLost:
    """Shell to worker core: the compute process ended; every running attempt is lost with it."""

    reason: str


@dataclass(frozen=True, slots=True)
class AdaptersChanged:
    """Shell to worker core: from now on these adapters can be served, and no others."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RatesMeasured:
    """Shell to shell: how fast this node works, better known than when its engine was ready."""

    rates: NodeRates


@dataclass(frozen=True, slots=True)
class FeaturesProfiled:
    """Shell to shell: how this node computes feature maps, known later than its engine was ready."""

    profile: str


@dataclass(frozen=True, slots=True)
class StartAttempt:
    """Worker core to shell: compute this. ``AttemptText`` and one ``AttemptFinished`` follow."""

    assign: Assign


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Worker core to shell: end it between two tokens; ``AttemptFinished`` still follows."""

    task: TaskId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class PauseAttempt:
    """Worker core to shell: let it stand still between two tokens; it keeps what it has and takes no slot."""

    task: TaskId
    attempt: int


@dataclass(frozen=True, slots=True)
class ResumeAttempt:
    """Worker core to shell: let it go on where it stood."""

    task: TaskId
    attempt: int


@dataclass(frozen=True, slots=True)
class AttemptText:
    """Shell to worker core: more of the answer."""

    task: TaskId
    attempt: int
    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class AttemptProgress:
    """Shell to worker core: how far a tuning attempt is. ``seq`` is the core's to set."""

    progress: TaskProgress


@dataclass(frozen=True, slots=True)
class FeaturesNeeded:
    """Shell to worker core: the attempt waits for feature maps that this node cannot make."""

    task: TaskId
    attempt: int
    round: int
    spec: FeaturesSpec


@dataclass(frozen=True, slots=True)
class FeaturesArrived:
    """Worker core to shell: the mesh has them (``made``), or will not (``reason``)."""

    task: TaskId
    attempt: int
    round: int
    made: FeaturesHeld | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """Shell to worker core: this attempt is over."""

    task: TaskId
    attempt: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class DrainChanged:
    """Worker core to membership and shell: the node takes no new work (or does again)."""

    draining: bool
    leave: bool
