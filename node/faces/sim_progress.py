"""How far a simulation is: a bar on a terminal, a line now and then elsewhere. To stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["SimProgress"]

LINE_EVERY_S = 10.0  # off a terminal, where a line stays for ever


class SimProgress:
    """Counts simulated tasks until the block ends, then says how fast it went.

    Args:
        n_tasks: In all runs together.
        stream: Where to write [stderr]; a bar is drawn only on a terminal.
        clock: Monotonic seconds.
    """

    def __init__(
        self, n_tasks: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._n_tasks = n_tasks
        self._n_done = 0
        self._stream = stream = stream or sys.stderr
        self._clock = clock
        self._began_at = self._line_at = clock()
        self._bar: Progress | None = None
        if stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=32),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=Console(file=stream, highlight=False),
                transient=True,
            )
            self._task = self._bar.add_task("simulating", total=n_tasks)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        took_s = self._clock() - self._began_at
        if kind is None and took_s > 0:
            per_minute = self._n_done / took_s * 60
            self._say(f"{self._n_done:,} tasks in {took_s:.1f} s: {per_minute:,.0f} a minute")

    def went_on(self, n_tasks: int) -> None:
        """So many more tasks have ended."""
        self._n_done += n_tasks
        if self._bar is not None:
            self._bar.update(self._task, completed=self._n_done)
        elif self._clock() >= self._line_at + LINE_EVERY_S:
            self._line_at = self._clock()
            self._say(f"{self._n_done / self._n_tasks:4.0%}  {self._n_done:,} of {self._n_tasks:,} tasks")

    def _say(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()
