"""Runs the cases of a study side by side, one process a core, and gives what came out in the study's order.

Every case depends on nothing but itself, so where it ran changes no bit of it. Where processes cannot be
forked (Windows, macOS by default) the cases run one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.virtual.metrics import RunMetrics
    from coordinator.virtual.study import Case, Study

__all__ = ["cores", "runs_of"]

LOOK_S = 0.2
"""How often progress is told."""

_here: dict[str, Any] = {}
"""In a forked process: the study, and how many of its tasks have ended in all processes."""


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runs_of(study: Study, went_on: Callable[[int], None], n_processes: int) -> Iterator[RunMetrics]:
    """What each of ``study.cases`` gives, in their order. ``went_on``: told how many more tasks have ended.

    Raises:
        ValueError: As ``Study.run``.
    """
    cases = study.cases
    n_processes = min(n_processes, len(cases))
    if n_processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        for case in cases:
            yield study.run(case, went_on)
        return
    context = multiprocessing.get_context("fork")
    n_ended: Synchronized[int] = context.Value("q", 0)
    told = 0
    # Forked, so the study travels as it is: its source may be a function that no pickle knows.
    with context.Pool(n_processes, _begin, (study, n_ended)) as pool:
        results = pool.imap(_run, cases)
        for _ in cases:
            while True:
                try:
                    found = results.next(timeout=LOOK_S)
                except multiprocessing.TimeoutError:
                    found = None
                if n_ended.value > told:
                    went_on(n_ended.value - told)
                    told = n_ended.value
                if found is not None:
                    yield found
                    break


def _begin(study: Study, n_ended: Synchronized[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for us, and it ends us
    _here["study"], _here["n_ended"] = study, n_ended


def _run(case: Case) -> RunMetrics:
    study: Study = _here["study"]
    return study.run(case, _count)


def _count(n_tasks: int) -> None:
    n_ended: Synchronized[int] = _here["n_ended"]
    with n_ended.get_lock():
        n_ended.value += n_tasks
