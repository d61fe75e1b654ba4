"""The terminal view: pure functions from a ``View`` to what Rich draws, and the loop that shows it.

    ┌ header   mesh · epoch · coordinator · broker · link · totals
    ├ nodes    one line each; columns come and go with the width
    ├ tasks    newest first, unfinished before finished; the answer's tail as it is made
    └ events   newest last

Colour only repeats what a word or a sign already says, so ``NO_COLOR`` and colour-blind readers lose
nothing. ``render`` fills a given height exactly once: on a short terminal nodes and unfinished tasks
stay, events and finished tasks go.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mesh.messages import KindError
from mesh.messages.task import TERMINAL_STATES
from mesh.units import bytes_text, seconds_text
from node.faces.tuning import bar, short_words
from node.faces.view import EventRow, NodeRow, TaskRow, View

__all__ = [
    "error_line",
    "event_lines",
    "header",
    "node_table",
    "printable",
    "render",
    "screen",
    "task_table",
]

STATE_STYLE = {
    "online": "green",
    "loading": "yellow",
    "draining": "yellow",
    "suspect": "magenta",
    "offline": "red",
    "left": "dim",
    "queued": "yellow",
    "assigned": "cyan",
    "running": "bold cyan",
    "done": "green",
    "failed": "red",
    "rejected": "red",
    "expired": "red",
    "cancelled": "dim",
    "up": "green",
    "connecting": "yellow",
    "down": "bold red",
}

EVENT_LINES = 5
BUSY_FRAMES_PER_S = 5.0
IDLE_FRAMES_PER_S = 1.0  # a still screen must not cost a battery: one frame takes about 10 ms on a Pi

Row = TypeVar("Row")

HELP = (
    "q  leave the mesh and stop this node (tasks move to other nodes)\n"
    "h  this help, and back\n"
    "\n"
    "★  coordinator: assigns tasks        ⇄  hosts the broker        ›  this node\n"
    "\n"
    "edgemesh run 'What is a mesh?'       ask the mesh, from any terminal of this machine\n"
    "edgemesh token                       the join code for another device\n"
    "edgemesh mqtt                        mosquitto_pub and mosquitto_sub lines that work here\n"
    "edgemesh drain                       finish what runs, take nothing new"
)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────


def render(view: View, width: int, height: int, *, with_help: bool = False) -> RenderableType:
    """One screen of ``width`` columns and at most ``height`` lines."""
    top = header(view, width)
    if with_help:
        return Group(*top, Rule(style="dim"), Text(HELP, overflow="ellipsis", no_wrap=True))
    rows = _Rows.share(view, height - len(top))
    parts: list[RenderableType] = [*top, node_table(_first_nodes(view.nodes, rows.nodes), width)]
    if len(view.nodes) > rows.nodes:
        parts.append(_line(f"  … and {len(view.nodes) - rows.nodes} more nodes", "dim"))
    if rows.tasks:
        parts.append(task_table(_first_tasks(view.tasks, rows.tasks), width))
    elif rows.is_roomy and not view.tasks:
        parts += [Rule(style="dim"), _line("  no tasks yet: try  edgemesh run 'What is a mesh?'", "dim")]
    if rows.events:
        parts.append(Rule(style="dim"))
        parts += event_lines(view.events[-rows.events :])
    return Group(*parts)


@dataclass(frozen=True, slots=True)
class _Rows:
    """How many lines of each kind fit."""

    nodes: int
    tasks: int
    events: int
    is_roomy: bool

    @staticmethod
    def share(view: View, height: int) -> _Rows:
        """Nodes get up to half, events up to five lines, tasks the rest. A table's head costs two lines."""
        free = max(height, 6) - 2
        nodes = min(len(view.nodes), max(1, free if free < 6 else free // 2))
        free -= nodes + (1 if len(view.nodes) > nodes else 0)
        wish = min(len(view.events), EVENT_LINES)
        events = min(wish, max(0, free - 5 - min(len(view.tasks), 4)))
        free -= events + 1 if events else 0
        tasks = min(len(view.tasks), max(0, free - 2))
        return _Rows(nodes, tasks, events, is_roomy=free >= 2)


def header(view: View, width: int) -> list[Text]:
    """Two lines: who we are and who leads; how we are linked and what is going on."""
    first = Text(no_wrap=True, overflow="ellipsis")
    first.append(" edgemesh ", style="bold reverse")
    first.append(f" {view.mesh}", style="bold")
    if view.fingerprint and width >= 100:
        first.append(f" ({view.fingerprint})", style="dim")
    first.append("  coordinator ")
    if view.coordinator:
        first.append(f"★ {view.coordinator}", style="bold yellow")
    else:
        first.append("none yet", style="yellow")
    first.append(f"  epoch {view.epoch.partition('@')[0]}")
    if width >= 100:
        first.append(f"  version {view.version}", style="dim")

    second = Text(" ", no_wrap=True, overflow="ellipsis")
    second.append(f"broker {view.broker or 'none yet'} ")
    second.append(view.link, style=STATE_STYLE[view.link])
    n_online = sum(node.state in ("online", "draining") for node in view.nodes)
    n_open = sum(task.state not in TERMINAL_STATES for task in view.tasks)
    rate = sum(node.tokens_per_s or 0.0 for node in view.nodes)
    second.append(f" · {_count(n_online, 'node')} · {_count(n_open, 'open task')} · {rate:.1f} tok/s")
    return [first, second]


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────

GAP = 2
WIDE_WIDTH_MIN = 24  # what is left for activity or answer before another column must go
NAME_WIDTH_MIN = 16
ADAPTERS_WIDTH = 20
BAR_WIDTH = 8


@dataclass(frozen=True, slots=True)
class _Column(Generic[Row]):
    """One column. ``rank`` says who goes first when the terminal is narrow: the highest; 0 stays."""

    title: str
    cell: Callable[[Row], Text | str]
    rank: int = 0
    width_min: int = 0
    """Room for the usual values, so that columns stand still while numbers change."""
    is_number: bool = False
    is_optional: bool = False
    """Goes where no row has anything to show in it."""


@dataclass(frozen=True, slots=True)
class _Tail(Generic[Row]):
    """The last column: takes what is left of the line and is told how much that is."""

    title: str
    cell: Callable[[Row, int], Text]


def _table(columns: Sequence[_Column[Row]], tail: _Tail[Row], rows: Sequence[Row], width: int) -> Table:
    """A table of exactly ``width`` columns of terminal. The first column is the name and may be cut."""
    cells = {column.title: [printable(column.cell(row)) for row in rows] for column in columns}
    natural = {
        column.title: max(
            [cell_len(column.title), column.width_min, *(c.cell_len for c in cells[column.title])]
        )
        for column in columns
    }
    shown = [
        column
        for column in columns
        if not column.is_optional or any(cell.plain != "–" for cell in cells[column.title])
    ]

    def left() -> int:
        return width - sum(natural[column.title] + GAP for column in shown)

    while left() < WIDE_WIDTH_MIN and (droppable := [column for column in shown if column.rank]):
        shown.remove(max(droppable, key=lambda column: column.rank))
    name = shown[0].title
    natural[name] = max(min(NAME_WIDTH_MIN, natural[name]), natural[name] + min(0, left() - WIDE_WIDTH_MIN))
    tail_width = max(left(), 1)

    table = Table(
        box=box.SIMPLE_HEAD,
        width=width,
        padding=(0, GAP - 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="dim",
        border_style="dim",
    )
    for column in shown:
        table.add_column(
            column.title,
            width=natural[column.title],
            justify="right" if column.is_number else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    table.add_column(tail.title, width=tail_width, no_wrap=True, overflow="ellipsis")
    for number, row in enumerate(rows):
        table.add_row(
            *(cells[column.title][number] for column in shown), printable(tail.cell(row, tail_width))
        )
    return table


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────


def node_table(nodes: Sequence[NodeRow], width: int) -> Table:
    """One line per node."""
    return _table(_NODE_COLUMNS, _Tail("activity", _activity), nodes, width)


def _node_name(row: NodeRow) -> Text:
    signs = (
        ("›" if row.is_me else " ") + ("★" if row.is_coordinator else " ") + ("⇄" if row.is_broker else " ")
    )
    return Text.assemble((signs, "bold yellow"), " ", (row.node, "bold" if row.is_me else ""))


def _node_state(row: NodeRow) -> Text:
    word = "loading" if row.state == "online" and row.slots and not row.ready else row.state
    return Text(word, style=STATE_STYLE[word])


def _memory(row: NodeRow) -> str:
    if row.memory_bytes is None:
        return "–"
    if row.memory_free_bytes is None:
        return bytes_text(row.memory_bytes)
    free, whole = bytes_text(row.memory_free_bytes), bytes_text(row.memory_bytes)
    return f"{free.removesuffix(whole[whole.index(' ') :])} of {whole}"


def _activity(row: NodeRow, _width: int) -> Text:
    if row.state in ("offline", "left"):
        return Text("–", style="dim")
    return Text(row.activity or "has not reported yet", style="" if row.activity else "dim")


def _heard(row: NodeRow) -> str:
    if row.heard_s is None:
        return "–"
    return "now" if row.heard_s < 2 else f"{seconds_text(round(row.heard_s))} ago".replace(".0 s", " s")


def _adapters(row: NodeRow) -> str:
    """The first names that fit a column, and how many more."""
    shown: list[str] = []
    for name in row.adapters:
        if shown and len(", ".join([*shown, name])) > ADAPTERS_WIDTH:
            break
        shown.append(name if len(name) <= ADAPTERS_WIDTH else f"{name[: ADAPTERS_WIDTH - 1]}…")
    more = len(row.adapters) - len(shown)
    return (", ".join(shown) or "–") + (f" +{more}" if more else "")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else format(value, form) + unit


def _played(row: NodeRow) -> Text | str:
    """Never left out: who compares nodes must see which one is not what it seems."""
    if row.emulated_slowdown <= 1:
        return "–"
    return Text(f"÷{row.emulated_slowdown:g} (emulated)", style="magenta")


def _runs(row: NodeRow) -> str:
    return "–" if row.running is None else f"{row.running}/{row.slots or 0}"


_NODE_COLUMNS: tuple[_Column[NodeRow], ...] = (
    _Column("    node", _node_name),
    _Column("state", _node_state, width_min=8),
    _Column("device", lambda row: row.device or "–", rank=5),
    _Column("model", lambda row: row.model or "–", rank=6),
    _Column("precision", lambda row: row.precision or "–", rank=8, is_optional=True),
    _Column("adapters", _adapters, rank=7, is_optional=True),
    _Column("plays", _played, is_optional=True),
    _Column("cpu", lambda row: _number(row.cpu_percent, ".0f", " %"), rank=3, width_min=5, is_number=True),
    _Column("free memory", _memory, rank=9, is_number=True),
    _Column("temp", lambda row: _number(row.temperature_c, ".0f", " °C"), rank=10, is_number=True),
    _Column("runs", _runs, rank=2, is_number=True),
    _Column("tok/s", lambda row: _number(row.tokens_per_s, ".1f"), rank=1, is_number=True),
    _Column("heard", _heard, rank=11, width_min=8, is_number=True),
)


def _first_nodes(nodes: Sequence[NodeRow], most: int) -> list[NodeRow]:
    """The ``most`` that matter, in the order given: living before dead, this node and coordinator first."""
    by_weight = sorted(
        nodes, key=lambda row: (row.state in ("offline", "left"), not (row.is_me or row.is_coordinator))
    )
    kept = {row.node for row in by_weight[:most]}
    return [row for row in nodes if row.node in kept]


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────


def task_table(tasks: Sequence[TaskRow], width: int) -> Table:
    """One line per task."""
    return _table(_TASK_COLUMNS, _Tail("answer", _answer), tasks, width)


def _deadline(row: TaskRow) -> Text:
    if row.budget_s is None:
        return Text("–", style="dim")
    if row.budget_s <= 0:
        return Text("past", style="red")
    return Text(seconds_text(row.budget_s), style="red" if row.budget_s < 5 else "")


def _answer(row: TaskRow, width: int) -> Text:
    """How far it is, the end of a growing answer, the beginning of a finished one, or why there is none."""
    if row.progress is not None and row.state not in TERMINAL_STATES:
        words = f"{row.progress.fraction:4.0%} {short_words(row.progress)}"
        if width >= BAR_WIDTH + WIDE_WIDTH_MIN:
            words = f"{bar(row.progress.fraction, BAR_WIDTH)} {words}"
        return Text(words)
    text = " ".join(row.text_tail.split())
    if row.reason and not text:
        return Text(row.reason, style="dim")
    if row.state not in TERMINAL_STATES and cell_len(text) > width:
        text = text[-width:]
        while cell_len(text) >= width:  # a wide character takes two columns
            text = text[1:]
        text = f"…{text}"
    return Text(text)


_TASK_COLUMNS: tuple[_Column[TaskRow], ...] = (
    _Column("    task", lambda row: Text(f"    {row.task}")),
    _Column("state", lambda row: Text(row.state, style=STATE_STYLE[row.state]), width_min=9),
    _Column("kind", lambda row: row.kind, rank=6),
    _Column("value", lambda row: f"{row.value:g}", rank=4, is_number=True),
    _Column("deadline", _deadline, rank=2, width_min=10, is_number=True),
    _Column("node", lambda row: row.node or "–", rank=3),
    _Column("try", lambda row: str(row.attempt) if row.attempt else "–", rank=5, is_number=True),
    _Column("tokens", lambda row: str(row.n_tokens), rank=1, is_number=True),
)


def _first_tasks(tasks: Sequence[TaskRow], most: int) -> list[TaskRow]:
    """Unfinished ones first, each group newest first."""
    newest = sorted(tasks, key=lambda row: row.age_s)
    return sorted(newest, key=lambda row: row.state in TERMINAL_STATES)[:most]


# ── the rest ────────────────────────────────────────────────────────────────────────────────────────


def event_lines(events: Sequence[EventRow]) -> list[Text]:
    lines = []
    for event in events:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{_age(event.age_s):>9}  ", style="dim")
        line.append(printable(" ".join(event.text.split())))
        lines.append(line)
    return lines


def error_line(errors: Sequence[KindError]) -> Text:
    """How far off the coordinator's predictions were lately, by kind of task."""
    kinds = " · ".join(f"{error.kind} {error.p50:.0%} (of {error.n})" for error in errors)
    return _line(f" half of the predicted times are off by at most: {kinds}", "")


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def printable(text: Text | str) -> Text:
    """Without control characters: what a peer or a model says must not steer the terminal."""
    if isinstance(text, str):
        text = Text(text)
    if not text.plain.isprintable():
        text.plain = "".join(letter if letter.isprintable() else " " for letter in text.plain)
    return text


def _age(age_s: float) -> str:
    return "now" if age_s < 1 else f"-{age_s:.0f} s" if age_s < 100 else f"-{age_s / 60:.0f} min"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# ── the loop ────────────────────────────────────────────────────────────────────────────────────────


async def screen(view: Callable[[], View], console: Console | None = None) -> None:
    """Show ``view()`` on the terminal until ``q`` is pressed or the task is cancelled.

    Takes the alternate screen and gives the old one back, however it ends. Ctrl-C stays a signal.
    """
    console = console or Console()
    keys: asyncio.Queue[str] = asyncio.Queue(
        maxsize=16
    )  # more unread keys than this are a cat on the keyboard
    with_help = False
    with _until_closed(), _keyboard(keys), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            picture = view()
            live.update(render(picture, *console.size, with_help=with_help), refresh=True)
            is_busy = any(task.state not in TERMINAL_STATES for task in picture.tasks)
            try:
                async with asyncio.timeout(1 / (BUSY_FRAMES_PER_S if is_busy else IDLE_FRAMES_PER_S)):
                    key = await keys.get()
            except TimeoutError:
                continue
            if key in ("q", "Q"):
                return
            with_help = key in ("h", "H", "?") and not with_help


@contextmanager
def _until_closed() -> Iterator[None]:
    """A terminal that went away ends the view like ``q``: the node behind it still has a goodbye to say."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


@contextmanager
def _keyboard(keys: asyncio.Queue[str]) -> Iterator[None]:
    """Single keys into ``keys``, unechoed, while the block runs; nothing if stdin is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            typed = os.read(descriptor, 64).decode(errors="replace")
        except OSError:
            typed = ""
        if not typed:  # the terminal went away; a reader at end of file would spin
            loop.remove_reader(descriptor)
        for key in typed:
            if not keys.full():
                keys.put_nowait(key)

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        with suppress(termios.error):  # no terminal, no old settings
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
