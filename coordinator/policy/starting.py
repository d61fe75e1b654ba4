"""Starting waiting tasks on nodes that have room, in the order of a policy's scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.books import Books
from coordinator.policy.decisions import Decision, Start, Why
from coordinator.policy.density import Floats
from coordinator.policy.explaining import candidates_of, sentence
from coordinator.policy.looking import Look, look
from coordinator.policy.nodes import Running
from coordinator.policy.ordering import blocks, column_for, first_of, in_order
from coordinator.policy.policies import Policy
from coordinator.policy.pricing import Rows
from mesh.core import FOREVER

__all__ = ["fill", "look_at", "start"]


def fill(books: Books, policy: Policy, now: float) -> list[Decision]:
    """Start what can start on nodes with room."""
    if not books.nodes.n_open:
        return []
    open_nodes = books.nodes.has_room.nonzero()[0]
    if len(open_nodes) == 1:
        return _fill_one(books, policy, now, open_nodes)
    started: list[Start] = []
    for rows, seen in blocks(policy, books.jobs, books.nodes, now, books.recent, open_nodes):
        books.mean_s = float(seen.mean_s.mean())
        if seen.may_start:
            started += _place(books, policy, rows, seen, now)
        if not books.nodes.has_room[open_nodes].any():
            break
    for begun in started:
        books.leave(begun.task)
    return list[Decision](started)


def _place(books: Books, policy: Policy, rows: NDArray[np.intp], seen: Look, now: float) -> list[Start]:
    """Start the tasks ``rows`` in the order of their scores while there are nodes for them."""
    started: list[Start] = []
    order = in_order(books.jobs, seen.scores.max(axis=1), rows)
    at = 0
    while at < len(order):
        index = int(order[at])
        at += 1
        column = column_for(books.nodes, seen, index, policy.place)
        if column is None:  # it fitted only nodes that are full by now; perhaps many others did, too
            order, at = order[at:], 0
            order = order[(seen.scores[order] > -np.inf).any(axis=1)]
            continue
        started.append(start(books, policy, int(rows[index]), seen, index, column, now))
        node = seen.nodes[column : column + 1]
        if books.nodes.has_room[node[0]]:  # the next one joins what has just started
            seen.renew(column, look_at(books, policy, now, node, rows=rows, mean_s=seen.mean_s[column]))
        else:
            seen.scores[:, column] = -np.inf
    return started


def _fill_one(books: Books, policy: Policy, now: float, open_nodes: NDArray[np.intp]) -> list[Decision]:
    """The common case: one node has room."""
    started: list[Decision] = []
    while len(books.jobs) and books.nodes.has_room[open_nodes[0]]:
        seen = look_at(books, policy, now, open_nodes)
        books.mean_s = float(seen.mean_s[0])
        row = first_of(books.jobs, seen.scores[:, 0]) if seen.may_start else None
        if row is None:
            break
        begun = start(books, policy, row, seen, row, 0, now)
        books.leave(begun.task)
        started.append(begun)
    return started


def look_at(
    books: Books,
    policy: Policy,
    now: float,
    columns: NDArray[np.intp],
    *,
    rows: Rows = slice(None),
    mean_s: Floats | None = None,
) -> Look:
    """``look`` at who waits, or only at ``rows``."""
    return look(policy, books.jobs, books.nodes, now, books.recent, rows=rows, columns=columns, mean_s=mean_s)


def start(
    books: Books,
    policy: Policy,
    row: int,
    seen: Look,
    index: int,
    column: int,
    now: float,
    *,
    after: Running | None = None,
) -> Start:
    """Put the task of ``row`` on a node. It is still in the table of who waits."""
    job, node = books.jobs.jobs[row], int(seen.nodes[column])
    cost_s, service_s = float(seen.cost_s[index, column]), float(seen.finish_s[index, column])
    why = Why(
        at=now,
        policy=policy.name,
        words="",
        score=float(seen.scores[index, column]),
        density=float(seen.value[index]) / cost_s,
        laxity_s=None if job.deadline_at == FOREVER else job.deadline_at - now - service_s,
        cost_s=cost_s,
        service_s=service_s,
        n_waiting=len(books.jobs) - 1,
    )
    if books.config.explain:
        found = candidates_of(books.jobs, books.nodes, books.cost, row, node, now)
        features = found[0].features if job.work.n_feature_bytes else None
        words = sentence(why, books.nodes.ids[node], after, features)
        why = replace(why, candidates=found, n_candidates=len(books.nodes), words=words)
    books.run(job, node, now, expected_s=why.service_s)
    books.nodes.joined(node, job.task, cost_s, service_s, now)
    return Start(task=job.task, node=books.nodes.ids[node], why=why, after=after.job.task if after else None)
