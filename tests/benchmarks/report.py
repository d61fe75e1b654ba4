"""How every benchmark speaks: the same flags, the same table, the same JSON lines.

    def measure(options: Options) -> Iterator[Metric]: ...

    if __name__ == "__main__":
        sys.exit(main("what this measures", measure))

With ``--json`` each metric is one line ``{"metric", "value", "unit", "target", "seeds", "detail"}`` as
soon as it is known; otherwise a table at the end. The exit code is 1 if a target is missed, so that a
benchmark can gate. Talk goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Metric", "Options", "main", "percentile", "spread", "table"]


@dataclass(frozen=True, slots=True)
class Options:
    quick: bool
    """Fewer repetitions: proves that the benchmark runs, not what it says."""
    seed: int
    train: Path | None = None
    """JSON lines ``{"text", "label"}`` to use instead of the benchmark's own data; ``test`` goes with it."""
    test: Path | None = None
    seeds: int | None = None
    """How many seeds, instead of the benchmark's own number."""
    trace: Path | None = None
    """Requests to replay instead of the benchmark's own."""
    limit: int | None = None
    """Only the first of these requests."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number. ``target`` reads ``>= 1`` or ``<= 5``; ``None`` = informative."""

    metric: str
    value: float
    unit: str
    target: str | None = None
    seeds: int = 1
    """How many independent repetitions are behind the value."""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        if self.target is None:
            return None
        sign, bound = self.target.split()
        assert sign in (">=", "<="), f"a target is '>= x' or '<= x', got {self.target!r}"
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)

    def line(self) -> str:
        return json.dumps(
            {
                "metric": self.metric,
                "value": self.value,
                "unit": self.unit,
                "target": self.target,
                "seeds": self.seeds,
                "detail": self.detail,
            }
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of them lie, by the nearest rank: always one that was measured."""
    assert values and 0 <= percent <= 100
    ordered = sorted(values)
    rank = math.ceil(len(ordered) * percent / 100)
    return ordered[max(rank, 1) - 1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, rounded for people."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def table(metrics: Iterable[Metric]) -> str:
    rows = [("metric", "value", "unit", "target", "", "detail")]
    for metric in metrics:
        met = {True: "met", False: "MISSED", None: ""}[metric.is_met]
        detail = ", ".join(f"{key} {value}" for key, value in metric.detail.items())
        rows.append((metric.metric, f"{metric.value:.4g}", metric.unit, metric.target or "", met, detail))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * min(100, max(map(len, lines))), *lines[1:]])


def main(
    description: str,
    measure: Callable[[Options], Iterator[Metric]],
    argv: Sequence[str] | None = None,
    *,
    takes_files: bool = False,
    takes_trace: bool = False,
) -> int:
    """Parse the flags, run, print. Exit code 1 if a target was missed (never with ``--quick``)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repetitions; targets do not gate")
    parser.add_argument("--json", action="store_true", help="one JSON object per metric and line")
    parser.add_argument("--seed", type=int, default=1)
    if takes_files:
        parser.add_argument("--seeds", type=int, metavar="N", help="instead of 3")
        parser.add_argument("--train", type=Path, metavar="FILE", help='JSON lines {"text", "label"}')
        parser.add_argument("--test", type=Path, metavar="FILE", help="the same, never trained on")
    if takes_trace:
        parser.add_argument("--seeds", type=int, metavar="N", help="instead of 5")
        parser.add_argument("--trace", type=Path, metavar="FILE", help="requests to replay")
        parser.add_argument("--limit", type=int, metavar="TASKS", help="only the first of them")
    parser.set_defaults(train=None, test=None, seeds=None, trace=None, limit=None)
    arguments = parser.parse_args(argv)
    if (arguments.train is None) != (arguments.test is None):
        parser.error("--train and --test go together")
    logging.getLogger("mesh").setLevel(logging.ERROR)  # links that benchmarks break on purpose are no news
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    options = Options(
        arguments.quick,
        arguments.seed,
        arguments.train,
        arguments.test,
        arguments.seeds,
        arguments.trace,
        arguments.limit,
    )
    metrics = []
    for metric in measure(options):
        metrics.append(metric)
        if arguments.json:
            print(metric.line(), flush=True)
        else:
            print(f"{metric.metric}: {metric.value:.4g} {metric.unit}", file=sys.stderr, flush=True)
    if not arguments.json:
        print(table(metrics))
    missed = [metric.metric for metric in metrics if metric.is_met is False]
    return 1 if missed and not arguments.quick else 0
