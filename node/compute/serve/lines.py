"""All long work of one engine: tuning, feature maps that somebody waits for, and feature maps ahead of need.

Each is a line of its own (``node.compute.serve.tuning``), or a task on another node would wait for this
node's tuning to end before it gets the feature maps it needs. The first two take turns; what is made ahead of
need has its turn when nothing else runs.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.messages.task import TaskKind
from node.compute.engine import Event
from node.compute.messages import Run, Stop
from node.compute.serve.tuning import Begin, MakeJob, Tuning, tunes

__all__ = ["LongWork"]


class LongWork:
    """``make_job`` starts a tuning task, ``make_features`` one of kind ``features``; ``None``: not here."""

    def __init__(
        self, make_job: MakeJob | None, make_features: Begin | None, clock: Callable[[], float]
    ) -> None:
        self._tuning = Tuning(tunes(make_job), clock) if make_job is not None else None
        self._wanted = Tuning(make_features, clock) if make_features is not None else None
        self._ahead = Tuning(make_features, clock) if make_features is not None else None
        self._last: Tuning | None = None

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines)

    @property
    def _lines(self) -> list[Tuning]:
        return [line for line in (self._tuning, self._wanted, self._ahead) if line is not None]

    def takes(self, kind: TaskKind) -> bool:
        return (self._tuning if kind == "tune" else self._wanted) is not None

    def start(self, run: Run) -> list[Event]:
        spec = run.submit.features
        if run.submit.kind == "tune":
            line = self._tuning
        else:
            line = self._ahead if spec is not None and spec.is_ahead else self._wanted
        assert line is not None, "the engine has asked whether this kind is taken"
        return line.start(run)

    def stop(self, stop: Stop) -> list[Event]:
        return [event for line in self._lines for event in line.stop(stop)]

    def is_due(self, *, is_alone: bool) -> bool:
        """Whether ``step`` has something to do. ``is_alone``: nothing but long work runs on this engine."""
        return (is_alone and len(self) > 0) or bool(self._pressing)

    @property
    def stands_back(self) -> bool:
        """Whether all that is due has the time to let answers and prompts go first; nobody waits for it."""
        return all(line is self._tuning and line.stands_back for line in self._pressing)

    @property
    def _pressing(self) -> list[Tuning]:
        return [line for line in (self._tuning, self._wanted) if line is not None and len(line)]

    def step(self) -> list[Event]:
        """One chunk of whose turn it is."""
        lines = self._pressing or [line for line in (self._ahead,) if line is not None and len(line)]
        line = next((one for one in lines if one is not self._last), lines[0])
        self._last = line
        return line.step()
