"""Printing for commands: tables to stdout as wide as they need, talk to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table

from node.faces.tui import header, node_table, task_table
from node.faces.view import NodeRow, TaskRow, View

__all__ = ["nodes_out", "status_out", "table_out", "tasks_out"]

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


def nodes_out(nodes: Sequence[NodeRow]) -> None:
    _put(node_table(nodes, _console().width))


def tasks_out(tasks: Sequence[TaskRow]) -> None:
    _put(task_table(tasks, _console().width))


def table_out(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: left-aligned words, two blanks between columns, no frame."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _put(table)
