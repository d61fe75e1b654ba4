"""Decisions in words and numbers, for ``edgemesh task show`` and the event log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from heapq import nsmallest
from typing import Final, NamedTuple, overload

import numpy as np

from coordinator.policy.cost import CostModel, parts_of
from coordinator.policy.decisions import Candidate, Features, Job, NodeView, Why
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable, Running, Share
from coordinator.policy.pricing import prices
from mesh.ids import NodeId

__all__ = ["Candidates", "candidates_of", "hopeless_words", "sentence"]

CANDIDATES_MAX: Final = 8


class Candidates(Sequence[Candidate]):
    """Numbers of a decision, as they were when it was made, put into words when somebody reads them: of most
    decisions nobody asks. Bound: ``CANDIDATES_MAX`` options, each five numbers and a name."""

    __slots__ = ("_made", "_make", "_n")

    def __init__(self, n: int, make: Callable[[], tuple[Candidate, ...]]) -> None:
        """``make`` must depend on nothing that changes, and keep nothing large alive."""
        self._n = n
        self._make: Callable[[], tuple[Candidate, ...]] | None = make
        self._made: tuple[Candidate, ...] = ()

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, at: int) -> Candidate: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, at: int | slice) -> Candidate | tuple[Candidate, ...]:
        return self._all()[at]

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Candidates) else other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())

    def _all(self) -> tuple[Candidate, ...]:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made


class _Option(NamedTuple):
    """A node as it was when decided."""

    view: NodeView
    service_s: float
    has_room: bool
    free_at: float
    share: Share


def candidates_of(
    jobs: JobTable, nodes: NodeTable, cost: CostModel, row: int, taken: int | None, now: float
) -> Candidates:
    """The node taken, if any, and the next best, each with its estimate and why it was not taken."""
    job = jobs.jobs[row]
    finish_s = prices(jobs, nodes, np.array([row]), slice(None), now).finish_s[0].tolist()
    options = [
        _Option(
            nodes.view(node),
            finish_s[node],
            nodes.has_room.item(node),
            nodes.free_at.item(node),
            nodes.share_of(job, node),
        )
        for node in _best(nodes, finish_s, taken)
    ]
    if taken is None:
        return Candidates(len(options), partial(_worded, job, options, now, None, 0.0))
    rows, correction = nodes.n_rows.item(taken) + 1, cost.correction(job.work.kind, nodes.ids[taken])
    return Candidates(len(options), partial(_worded, job, options, now, rows, correction))


def _worded(
    job: Job, options: Sequence[_Option], now: float, rows: float | None, correction: float
) -> tuple[Candidate, ...]:
    """
    Args:
        rows: Answers in the batch of the first option, which is taken; ``None``: none is.
        correction: Of the estimates there.
    """
    found: list[Candidate] = []
    for option in options:
        features = _features(job, option.share)
        node, service_s = option.view.id, option.service_s
        if rows is not None and not found:
            parts = parts_of(job.work, option.view.rates, correction, *option.share, rows=rows)
            found.append(
                Candidate(node=node, service_s=service_s, why_not=None, parts=parts, features=features)
            )
        else:
            ahead_s = -1.0 if rows is None else service_s - options[0].service_s
            why_not = _why_not(option, now, job.deadline_at, ahead_s)
            found.append(Candidate(node=node, service_s=service_s, why_not=why_not, features=features))
    return tuple(found)


def _features(job: Job, share: Share) -> Features | None:
    n_tokens = job.work.n_feature_tokens
    if not n_tokens or not job.work.n_feature_bytes:
        return None
    reuse, far = share
    computed = max(0.0, 1 - reuse - far)
    return Features(found=n_tokens * reuse, fetched=n_tokens * far, computed=n_tokens * computed)


def _best(nodes: NodeTable, finish_s: list[float], taken: int | None) -> list[int]:
    """The node taken, then those where the task would end first."""
    options = list(zip(finish_s, nodes.ids, range(len(finish_s)), strict=True))
    # Of few, sorting all takes a quarter of the time.
    best = sorted(options) if len(options) <= 64 else nsmallest(CANDIDATES_MAX + 1, options)
    others = [node for *_, node in best[: CANDIDATES_MAX + 1] if node != taken]
    return [*([] if taken is None else [taken]), *others][:CANDIDATES_MAX]


def _why_not(option: _Option, now: float, deadline_at: float, ahead_s: float) -> str:
    if option.service_s == np.inf:
        return "has not the model, the adapter or the data"
    if not option.view.is_ready:
        return "takes no work now"
    if not option.has_room:
        room_in_s = option.free_at - now
        return (
            "has no room" if room_in_s <= 0 or room_in_s == np.inf else f"has no room for {room_in_s:.1f} s"
        )
    late_s = now + option.service_s - deadline_at
    if now + option.service_s > deadline_at:
        return f"would end {late_s:.1f} s too late"
    return f"would end {ahead_s:.1f} s later" if ahead_s >= 0 else "others go first, or it refused"


def sentence(why: Why, node: NodeId, after: Running | None, features: Features | None) -> str:
    """The decision to start a task on the node, in one sentence."""
    spare = "no deadline" if why.laxity_s is None else f"{why.laxity_s:.1f} s to spare"
    order = f"first of {why.n_waiting + 1} by {why.policy}" if why.n_waiting else "nothing else waits"
    words = f"on {node}: {why.service_s:.1f} s expected, {spare}, value density {why.density:.3g}/s, {order}"
    if features is not None:
        words += (
            f"; feature maps of {features.found:,.0f} tokens are there, of {features.fetched:,.0f} come from "
            f"other nodes, of {features.computed:,.0f} are computed"
        )
    return words if after is None else f"{words}; {after.job.task} gives way"


def hopeless_words(best_s: float, left_s: float) -> str:
    """Why a task is rejected."""
    if left_s <= 0:
        return "its deadline passed before it could start"
    return f"best node needs {best_s:.1f} s, {left_s:.1f} s left"
