"""Results of ``edgemesh sim`` as a table: one block for each load, the best of each column in bold."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from coordinator.virtual.metrics import Interval
from coordinator.virtual.study import Cell

__all__ = ["load_words", "sim_table"]

_COLUMNS = (
    ("timeouts", "timeouts", True),
    ("value kept", "value_kept", False),
    ("rejected", "rejected", None),
    ("expired", "expired", None),
    ("p50", "latency_p50_s", True),
    ("p95", "latency_p95_s", True),
    ("busy", "utilization", None),
    ("in vain", "wasted", True),
)
"""Title, metric, whether less is better (``None``: neither)."""


def sim_table(cells: Sequence[Cell]) -> Table:
    """All cells; means over the seeds with their 95 % intervals where there are several."""
    has_meshes = len({cell.mesh for cell in cells}) > 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    if has_meshes:
        table.add_column("mesh", no_wrap=True)
    table.add_column("load", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for title, *_ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for group in _groups(cells):
        best = {metric: _best(group, metric, less) for _, metric, less in _COLUMNS if less is not None}
        for at, cell in enumerate(group):
            head = [load_words(cell.load) if at == 0 else "", cell.policy]
            if has_meshes:
                head.insert(0, cell.mesh if at == 0 else "")
            words = [Text(word) for word in head]
            for _, metric, _ in _COLUMNS:
                found = cell.over_seeds(metric)
                is_best = len(group) > 1 and best.get(metric) == found.mean
                words.append(Text(_words(metric, found), style="bold green" if is_best else ""))
            table.add_row(*words, end_section=at == len(group) - 1)
    return table


def load_words(load: float | None) -> str:
    return "as recorded" if load is None else f"{load}"


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.mesh, cell.load), []).append(cell)
    return list(groups.values())


def _best(group: Sequence[Cell], metric: str, is_less: bool) -> float:
    means = [cell.over_seeds(metric).mean for cell in group]
    return min(means) if is_less else max(means)


def _words(metric: str, found: Interval) -> str:
    if metric.endswith("_s"):
        return f"{found.mean:.1f} s" + (f" ±{found.half:.1f}" if found.half else "")
    return f"{found.mean:.1%}" + (f" ±{100 * found.half:.1f}" if found.half else "")
