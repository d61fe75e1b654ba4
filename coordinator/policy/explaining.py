"""Decisions in words and numbers, for ``edgemesh task show`` and the event log."""

from __future__ import annotations

from typing import Final

import numpy as np

from coordinator.policy.cost import CostModel
from coordinator.policy.decisions import Candidate, Features, Job, Why
from coordinator.policy.density import Floats
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable, Running
from coordinator.policy.pricing import prices
from mesh.ids import NodeId

__all__ = ["candidates_of", "hopeless_words", "sentence"]

CANDIDATES_MAX: Final = 8


def candidates_of(
    jobs: JobTable, nodes: NodeTable, cost: CostModel, row: int, taken: int | None, now: float
) -> tuple[Candidate, ...]:
    """The node taken, if any, and the next best, each with its estimate and why it was not taken."""
    job = jobs.jobs[row]
    finish_s = prices(jobs, nodes, np.array([row]), slice(None), now).finish_s[0]
    found = []
    for node in _best(nodes, finish_s, taken):
        view, service_s = nodes.view(node), float(finish_s[node])
        features = _features(nodes, job, node)
        if node == taken:
            rows = float(nodes.n_rows[node]) + 1
            reuse, far = nodes.share_of(job, node)
            parts = cost.estimate(job.work, view.id, view.rates, reuse=reuse, far=far, rows=rows).parts
            taken_one = Candidate(
                node=view.id, service_s=service_s, why_not=None, parts=parts, features=features
            )
            found.append(taken_one)
        else:
            ahead_s = -1.0 if taken is None else service_s - float(finish_s[taken])
            why_not = _why_not(nodes, node, now, job.deadline_at, service_s, ahead_s)
            found.append(Candidate(node=view.id, service_s=service_s, why_not=why_not, features=features))
    return tuple(found)


def _features(nodes: NodeTable, job: Job, node: int) -> Features | None:
    n_tokens = job.work.n_feature_tokens
    if not n_tokens or not job.work.n_feature_bytes:
        return None
    reuse, far = nodes.share_of(job, node)
    computed = max(0.0, 1 - reuse - far)
    return Features(found=n_tokens * reuse, fetched=n_tokens * far, computed=n_tokens * computed)


def _best(nodes: NodeTable, finish_s: Floats, taken: int | None) -> list[int]:
    """The node taken, then those where the task would end first."""
    n = min(CANDIDATES_MAX, len(finish_s))
    last_s = np.partition(finish_s, n - 1)[n - 1] if n else 0.0
    near = (finish_s <= last_s).nonzero()[0]
    in_order = sorted(
        zip(finish_s[near].tolist(), [nodes.ids[node] for node in near], near.tolist(), strict=True)
    )
    others = [node for *_, node in in_order if node != taken]
    return [*([] if taken is None else [taken]), *others][:CANDIDATES_MAX]


def _why_not(
    nodes: NodeTable, node: int, now: float, deadline_at: float, finish_s: float, ahead_s: float
) -> str:
    if finish_s == np.inf:
        return "has not the model, the adapter or the data"
    if not nodes.view(node).is_ready:
        return "takes no work now"
    if not nodes.has_room[node]:
        room_in_s = float(nodes.free_at[node]) - now
        return (
            "has no room" if room_in_s <= 0 or room_in_s == np.inf else f"has no room for {room_in_s:.1f} s"
        )
    if now + finish_s > deadline_at:
        return f"would end {now + finish_s - deadline_at:.1f} s too late"
    return f"would end {ahead_s:.1f} s later" if ahead_s >= 0 else "others go first, or it refused"


def sentence(why: Why, node: NodeId, after: Running | None) -> str:
    """The decision to start a task, whose first candidate is the node, in one sentence."""
    spare = "no deadline" if why.laxity_s is None else f"{why.laxity_s:.1f} s to spare"
    order = f"first of {why.n_waiting + 1} by {why.policy}" if why.n_waiting else "nothing else waits"
    words = f"on {node}: {why.service_s:.1f} s expected, {spare}, value density {why.density:.3g}/s, {order}"
    features = why.candidates[0].features if why.candidates else None
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
