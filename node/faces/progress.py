"""A tuning task's progress for one person: a bar on a terminal, a line now and then elsewhere.

All of it is talk and goes to stderr; what the command gives goes to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from mesh.messages import TaskProgress
from node.faces.tuning import is_passing, progress_words

__all__ = ["TuneProgress"]

LINE_EVERY_S = 5.0  # off a terminal, where a line stays for ever


class TuneProgress:
    """Shows what ``show`` is given until the block ends. A newer attempt's word counts over an older one's.

    Args:
        name: Of the adapter.
        stream: Where to write [stderr]; a bar is drawn only on a terminal.
        clock: Monotonic seconds.
    """

    def __init__(
        self, name: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._stream = stream = stream or sys.stderr
        self._clock = clock
        self._at = (0, -1)  # attempt and seq of the newest
        self._said: tuple[str, int, str] | None = None
        self._line_at = float("-inf")
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        if stream.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[name]}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(file=stream, highlight=False),
                transient=True,
            )
            self._bar_task = self._bar.add_task("waiting for a node", total=1.0, name=name)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: TaskProgress) -> None:
        """One more word of how far it is; late and repeated ones change nothing."""
        if (progress.attempt, progress.seq) <= self._at:
            return
        self._at = (progress.attempt, progress.seq)
        words = _harmless(progress_words(progress))
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=progress.fraction, description=words)
        self._say_if_new(progress, words)

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._line(_harmless(text))

    def _say_if_new(self, progress: TaskProgress, words: str) -> None:
        """What stays: reasons anywhere; off a terminal also phases, epochs and a sign of life."""
        text = "" if is_passing(progress) else progress.text
        before, self._said = self._said, (progress.phase, progress.epoch, text)
        if text and (before is None or before[2] != text):
            self._line(_harmless(text))
        if self._bar is not None:
            return
        is_news = before is None or before[:2] != self._said[:2]
        if is_news or self._clock() >= self._line_at + LINE_EVERY_S:
            self._line_at = self._clock()
            self._line(f"{progress.fraction:4.0%}  {words}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, style="dim")
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()


def _harmless(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(letter for letter in text if letter.isprintable())
