"""Printing for commands: tables to stdout as wide as they need, talk to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mesh.messages import TaskExplanation
from node.faces.tui import error_line, header, node_table, printable, task_table
from node.faces.view import NodeRow, TaskRow, View
from node.faces.why import candidate_rows, head_line, nothing_line, number_line, verb_line

__all__ = ["explanation_out", "nodes_out", "status_out", "table_out", "table_put", "tasks_out"]

# A file or a pipe has no width: give every column room, so that grep and awk find whole words.
PIPE_WIDTH = 240


def _console() -> Console:
    # highlight=False: numbers in answers and names are not ours to colour.
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _put(*parts: RenderableType) -> None:
    console = _console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    lines = [line.rstrip() for line in capture.get().splitlines()]
    sys.stdout.write("".join(f"{line}\n" for line in lines if line.strip("─") or not line))  # words only


def status_out(view: View) -> None:
    """The whole picture, once. Without events: whoever just came has only seen who was there already."""
    console = _console()
    _put(*header(view, console.width), node_table(view.nodes, console.width))
    if view.tasks:
        _put("", task_table(view.tasks, console.width))
    if view.prediction_errors:
        _put("", error_line(view.prediction_errors))


def explanation_out(told: TaskExplanation) -> None:
    """What was decided about one task, the oldest decision first."""
    _put(_line(head_line(told), "bold"))
    if (nothing := nothing_line(told)) is not None:
        _put(_line(nothing, "dim"))
    for decision in told.decisions:
        _put("", _line(verb_line(decision), "bold" if decision.verb == "wait" else ""))
        if (numbers := number_line(decision)) is not None:
            _put(_line(f"  {numbers}", ""))
        if rows := candidate_rows(decision):
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            for title in ("   ", "node", "takes", "of which", "why not"):
                table.add_column(title, justify="right" if title == "takes" else "left")
            for row in rows:
                table.add_row(*(printable(cell) for cell in row))
            _put(table)


def nodes_out(nodes: Sequence[NodeRow]) -> None:
    _put(node_table(nodes, _console().width))


def tasks_out(tasks: Sequence[TaskRow]) -> None:
    _put(task_table(tasks, _console().width))


def _line(text: str, style: str) -> Text:
    line = printable(text)
    line.stylize(style)
    return line


def table_out(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: left-aligned words, two blanks between columns, no frame."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _put(table)


def table_put(table: Table) -> None:
    """A table that is made already."""
    _put(table)
