"""Results of ``edgemesh sim`` as a table: one block for each load, the best of what counts in bold."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.virtual.metrics import Interval
from coordinator.virtual.study import Cell

__all__ = ["load_words", "sim_table"]

_COLUMNS = (
    ("timeouts", "timeouts"),
    ("value kept", "value_kept"),
    ("rejected", "rejected"),
    ("expired", "expired"),
    ("p50", "latency_p50_s"),
    ("p95", "latency_p95_s"),
    ("busy", "utilization"),
    ("in vain", "wasted"),
)
"""Title and metric."""
_SPARED = ("wasted", "expired", "latency_p50_s", "utilization", "rejected", "latency_p95_s")
"""Left out of a narrow terminal, in this order; never cut in the middle."""
_BEST = {"timeouts": min, "value_kept": max}
"""What policies are judged by, with intervals; the rest explains."""


def sim_table(cells: Sequence[Cell], width: int | None = None) -> Table:
    """All cells, as means over the seeds.

    Args:
        width: Of the terminal; ``None``: as wide as it needs.
    """
    for n_spared in range(len(_SPARED) + 1):
        table = _table(cells, [metric for _, metric in _COLUMNS if metric not in _SPARED[:n_spared]])
        if width is None or Console(width=10_000).measure(table).maximum <= width:
            break
    return table


def _table(cells: Sequence[Cell], metrics: Sequence[str]) -> Table:
    has_meshes = len({cell.mesh for cell in cells}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in (*(["mesh"] if has_meshes else []), "load", "policy"):
        table.add_column(title, no_wrap=True)
    titles = {metric: title for title, metric in _COLUMNS}
    for metric in metrics:
        table.add_column(titles[metric], justify="right", no_wrap=True)
    for group in _groups(cells):
        best = {name: choose(_mean(cell, name) for cell in group) for name, choose in _BEST.items()}
        for at, cell in enumerate(group):
            head = [load_words(cell.load) if at == 0 else "", cell.policy]
            if has_meshes:
                head.insert(0, cell.mesh if at == 0 else "")
            words = [Text(word) for word in head]
            for metric in metrics:
                is_best = len(group) > 1 and best.get(metric) == _mean(cell, metric)
                text = _words(metric, cell.over_seeds(metric))
                words.append(Text(text, style="bold green" if is_best else ""))
            table.add_row(*words)
    return table


def load_words(load: float | None) -> str:
    return "as recorded" if load is None else f"{load}"


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.mesh, cell.load), []).append(cell)
    return list(groups.values())


def _mean(cell: Cell, metric: str) -> float:
    return cell.over_seeds(metric).mean


def _words(metric: str, found: Interval) -> str:
    if metric.endswith("_s"):
        return f"{found.mean:.1f} s"
    has_interval = metric in _BEST and found.half > 0
    return f"{found.mean:.1%}" + (f" ±{100 * found.half:.1f}" if has_interval else "")
