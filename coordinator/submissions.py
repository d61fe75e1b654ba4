"""What clients said in the last seconds, in case the coordinator that heard it is gone.

Every node hears every submission and cancellation. Whoever becomes coordinator repeats to itself those
that the recovered ledger does not know: by id, or, where the client gave none, by body and age, each
recovered task standing for one submission (equal bodies are a multiset, not a set).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from coordinator.task import Task, digest_of
from mesh.ids import TaskId
from mesh.messages import CancelTask, Submit, Unacceptable

__all__ = ["SubmissionBuffer", "unknown_to"]

Said = Submit | CancelTask | Unacceptable

KEEP_S = 15.0
"""Longer than the longest failover: 10 s until the broker's successor serves, 5 s to an election."""

_BUFFERED_MAX = 256
# At the largest prompt (256 KiB) 64 MiB, at a usual one of 2 KiB half a megabyte. The oldest go first:
# they are the ones whose client will ask again soonest.

# How far two nodes' memories of the same submission may differ in age: the time a record takes to its
# holder, and back to a new coordinator, on a slow link.
_SAME_WITHIN_S = 5.0


class SubmissionBuffer:
    def __init__(self) -> None:
        self._said: deque[tuple[float, Said]] = deque(maxlen=_BUFFERED_MAX)

    def __len__(self) -> int:
        return len(self._said)

    def keep(self, said: Said, at: float) -> None:
        self._said.append((at, said))

    def take(self, now: float) -> list[tuple[float, Said]]:
        """What is still fresh, oldest first, each with its time; the buffer is empty after."""
        fresh = sorted(
            ((at, said) for at, said in self._said if now - at <= KEEP_S), key=lambda entry: entry[0]
        )
        self._said.clear()
        return fresh


def unknown_to(tasks: Iterable[Task], said: list[tuple[float, Said]]) -> list[tuple[float, Said]]:
    """Those entries of ``said`` that no task of the ledger stands for."""
    ids: set[TaskId] = set()
    ages: dict[tuple[str, str | None, str | None], list[float]] = {}
    for task in tasks:
        ids.add(task.id)
        if task.submit.id is None:
            key = (task.digest, task.submit.reply_to, task.submit.correlation)
            ages.setdefault(key, []).append(task.accepted_at)
    return [(at, message) for at, message in said if not _is_known(at, message, ids, ages)]


def _is_known(
    at: float, said: Said, ids: set[TaskId], ages: dict[tuple[str, str | None, str | None], list[float]]
) -> bool:
    if not isinstance(said, Submit):
        return False
    if said.id is not None:
        return said.id in ids
    candidates = ages.get((digest_of(said), said.reply_to, said.correlation), [])
    nearest = min(candidates, key=lambda accepted_at: abs(accepted_at - at), default=None)
    if nearest is None or abs(nearest - at) > _SAME_WITHIN_S:
        return False
    candidates.remove(nearest)
    return True
