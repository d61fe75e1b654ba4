"""Long jobs among the others, tuning or feature maps: one of a line at a time, a chunk between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

from coordinator.policy.work import PATIENCE
from mesh.errors import ConfigError
from mesh.messages import Output, TaskProgress, TuneSpec
from node.compute.engine import Event, refused
from node.compute.features.maps import MissingFeaturesError
from node.compute.messages import Ended, Progress, Run, Stop
from node.compute.tune.job import Snapshot, TuneEvent

__all__ = ["Begin", "Job", "MakeJob", "Tuning", "tunes"]

log = logging.getLogger(__name__)


class Job(Protocol):
    """See ``node.compute.tune.job.TuneJob``."""

    progress: Snapshot

    @property
    def output(self) -> Output:
        """Once it is done: what was trained, and what it read or made."""

    def step(self) -> TuneEvent: ...
    def close(self) -> None: ...


_KNOWN_FROM = 0.02
"""Share of a job that must be done before what is left of it is known well enough to put it off."""

MakeJob = Callable[[TuneSpec, float | None], Job]
"""What to train, and the seconds left for it, ``None`` = no hurry."""

Begin = Callable[[Run, float | None], Job]
"""The same from the whole order."""


def tunes(make: MakeJob) -> Begin:
    def begin(run: Run, left_s: float | None) -> Job:
        assert run.submit.tune is not None, "the submission has been checked"
        return make(run.submit.tune, left_s)

    return begin


class Tuning:
    """Two jobs at once would take twice the time and memory each; in line, the first is done sooner.

    ``on_missing``: told of a job that needs feature maps which this node can neither find nor make, and when
    it came into the line; says what becomes of it. ``None``: it fails.
    """

    def __init__(
        self,
        begin: Begin,
        clock: Callable[[], float],
        on_missing: Callable[[Run, float, str], list[Event]] | None = None,
    ) -> None:
        self._begin = begin
        self._clock = clock
        self._on_missing = on_missing
        self._line: dict[tuple[str, int], tuple[Run, float]] = {}  # bounded by the engine's slots
        self._job: Job | None = None
        self._seq = 0
        # Of the job that runs: time it worked here, and its progress when it began and now.
        self._worked_s = self._began_with = self._fraction = 0.0

    def __len__(self) -> int:
        return len(self._line)

    @property
    def stands_back(self) -> bool:
        """Whether the first job has the time to let everything else on this node go first."""
        run, started_at = next(iter(self._line.values()))
        if run.budget_s is None:
            return True
        done = self._fraction - self._began_with
        if done < _KNOWN_FROM:
            return False
        left_s = run.budget_s - (self._clock() - started_at)
        return left_s > PATIENCE * self._worked_s * (1 - self._fraction) / done

    def start(self, run: Run) -> list[Event]:
        ahead = len(self._line)
        self._line[run.task, run.attempt] = (run, self._clock())
        if not ahead:
            return []
        text = f"waits for {ahead} other tuning task{'s' if ahead > 1 else ''} on this node"
        return [self._progress(run, Snapshot(text=text))]

    def stop(self, stop: Stop) -> list[Event]:
        """What was trained so far stays in its checkpoint, for the same task another time."""
        key = (stop.task, stop.attempt)
        if key not in self._line:
            return []
        is_first = key == next(iter(self._line))
        run, started_at = self._line.pop(key)
        if is_first:
            self._close()
        return [self._ended(run, started_at, "cancelled", stop.reason)]

    def step(self) -> list[Event]:
        """One chunk of the first job. An ``Ended`` with an output says that there is a new adapter."""
        key, (run, started_at) = next(iter(self._line.items()))
        try:
            if self._job is None:
                waited_s = self._clock() - started_at
                left_s = None if run.budget_s is None else max(0.0, run.budget_s - waited_s)
                self._job = self._begin(run, left_s)
                self._began_with = self._job.progress.fraction
            began_at = self._clock()
            event = self._job.step()
            self._worked_s += self._clock() - began_at
            self._fraction = event.progress.fraction
            events: list[Event] = [self._progress(run, event.progress)]
        except MissingFeaturesError as error:
            del self._line[key]
            self._close()
            if self._on_missing is None:
                return [self._ended(run, started_at, "failed", str(error))]
            return self._on_missing(run, started_at, str(error))
        except ConfigError as error:
            del self._line[key]
            self._close()
            return [refused(run, str(error))]
        except Exception as error:
            # A full disk, too little memory, or a fault of ours: the other attempts of this process go on.
            log.exception("tuning failed task=%s attempt=%d", run.task, run.attempt)
            del self._line[key]
            self._close()
            return [self._ended(run, started_at, "failed", f"tuning failed here: {error}"[:500])]
        if event.text:
            log.info("tuning task=%s %s", run.task, event.text)
        if event.is_done:
            output = self._job.output
            assert output != Output(), "a job that is done has made something"
            del self._line[key]
            self._close()
            events.append(self._ended(run, started_at, "done", None, output))
        return events

    def _close(self) -> None:
        if self._job is not None:
            self._job.close()
        self._job = None
        self._worked_s = self._began_with = self._fraction = 0.0

    def _progress(self, run: Run, snapshot: Snapshot) -> Progress:
        self._seq += 1
        # Sums of shares may exceed 1 in the last bit.
        snapshot = replace(snapshot, fraction=min(1.0, snapshot.fraction))
        found: TaskProgress = snapshot.message(run.task, run.attempt, self._seq)
        return Progress(progress=found)

    def _ended(
        self,
        run: Run,
        started_at: float,
        state: Literal["done", "cancelled", "failed"],
        reason: str | None,
        output: Output | None = None,
    ) -> Ended:
        return Ended(
            task=run.task,
            attempt=run.attempt,
            state=state,
            text=_said(output) if output is not None else "",
            reason=reason,
            service_s=self._clock() - started_at,
            output=output,
        )


def _said(output: Output) -> str:
    card, held = output.adapter, output.features
    if output.lacking:
        return f"the states of {len(output.lacking)} parts of the round before are nowhere"
    if output.state is not None:
        return f"a part of an adapter is trained: state {output.state[:12]}…"
    if card is None:
        assert held is not None
        n_new = held.n_computed
        made = f"feature maps of {held.n_tokens} tokens below the top {held.top_layers} layers"
        return f"{made}, {n_new} of them new"
    measure = "accuracy" if card.task == "classify" else "loss"
    metric = "" if card.metric is None else f", {measure} {card.metric:.4g} on the evaluation records"
    return f"adapter {card.name}: {card.method} on the top {card.top_layers} layers{metric}"
