"""What computes attempts, one small step at a time: the seam between the compute process and a model.

``node.compute.echo`` and ``node.compute.model_engine`` implement it. An engine is single-threaded and
synchronous; the process around it (``node.compute``) looks for new messages between two steps, so a step
is short: a piece of a prompt, one token for every running attempt, or a few steps of training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from coordinator.cluster import serves
from node.compute.messages import Ended, FeaturesGiven, NeedFeatures, Pause, Progress, Resume, Run, Stop, Text

__all__ = ["Engine", "Event", "refusal", "refused"]

Event = Text | Progress | NeedFeatures | Ended


class Engine(Protocol):
    """Attempts in, events out. Every started attempt gets exactly one ``Ended``."""

    @property
    def model(self) -> str:
        """The name under which the node offers it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names it answers to, ``model`` first."""

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together."""

    @property
    def slots(self) -> int:
        """How many attempts run at once."""

    @property
    def device(self) -> str: ...

    @property
    def due_s(self) -> float | None:
        """Seconds until ``step`` has something to do; 0 = now, ``None`` = nothing runs."""

    def start(self, run: Run) -> list[Event]:
        """Begin an attempt; a refusal comes back at once as its ``Ended``."""

    def stop(self, stop: Stop) -> list[Event]:
        """End an attempt with what it has so far. One that does not run gives nothing."""

    def pause(self, pause: Pause) -> None:
        """Let a generation stand still and take no slot. One that does not run is left alone."""

    def resume(self, resume: Resume) -> None:
        """Let it go on where it stood."""

    def give(self, given: FeaturesGiven) -> list[Event]:
        """What an attempt waits for is there, or will not be. One that waits for nothing is left alone."""

    def step(self) -> list[Event]:
        """Do a little of everything that runs."""


def refusal(
    run: Run, names: Iterable[str], slots_taken: bool, adapters: Collection[str] = ()
) -> Ended | None:
    """The end of an attempt that cannot start here, or ``None``.

    ``failed`` blames this node (another may take it), ``rejected`` blames the task.
    """
    submit = run.submit
    known = list(names)
    if not serves(known[0], submit.model, known[1:]):
        return refused(run, f"model {submit.model!r} is not served here; this node has {known[0]!r}")
    if submit.adapter is not None and submit.adapter not in adapters:
        there = ", ".join(sorted(adapters)[:20]) or "none"
        return refused(
            run,
            f"no adapter {submit.adapter!r} on this node, there are: {there}; "
            "leave 'adapter' out for the plain model",
        )
    if slots_taken:
        reason = "all slots of this node are taken"
        return Ended(task=run.task, attempt=run.attempt, state="failed", reason=reason)
    return None


def refused(run: Run, reason: str, n_prompt_tokens: int = 0) -> Ended:
    """The end of an attempt whose task no node could do."""
    return Ended(
        task=run.task,
        attempt=run.attempt,
        state="rejected",
        reason=reason,
        n_prompt_tokens=n_prompt_tokens,
    )
