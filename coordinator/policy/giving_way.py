"""Giving way: tuning between two chunks, generation between two tokens, and how it goes on."""

from __future__ import annotations

from typing import Final

import numpy as np

from coordinator.policy.books import Books
from coordinator.policy.decisions import Decision, Pause, Resume, Start, Why
from coordinator.policy.few import are_few, few_prices, few_starts
from coordinator.policy.nodes import Running
from coordinator.policy.ordering import PAIRS_MAX, first_of
from coordinator.policy.policies import Policy
from coordinator.policy.preempting import Pairs
from coordinator.policy.starting import look_at, start
from coordinator.policy.work import KINDS
from mesh.core import FOREVER
from mesh.ids import TaskId

__all__ = ["end_chunks", "preempt", "resume"]

_PATIENT_CHUNKS: Final = 4
"""Chunks between two looks at tuning that runs on, while nobody comes."""
_TUNE: Final = KINDS.index("tune")


def end_chunks(books: Books, policy: Policy, tasks: list[TaskId], now: float) -> list[Decision]:
    """Tuning on a full node gives way to what scores higher, at the end of its chunk.

    Compared just before the end if somebody came since, who so waits for one chunk at most, and now and
    then anyway: who waits grows urgent.
    """
    decisions: list[Decision] = []
    for task in tasks:
        row = books.nodes.row(books.runs_on[task])
        runner = books.nodes.running(row)[task]
        books.yielding[task] = books.chunk_end(runner, now) + _PATIENT_CHUNKS * books.config.chunk_s
        if not books.nodes.has_room[row] and not runner.is_pausing and len(books.jobs):
            decisions += _contest(books, policy, runner, row, now)
    return decisions


def _contest(books: Books, policy: Policy, runner: Running, row: int, now: float) -> list[Decision]:
    """Score the runner among who waits, as if its chunk were over."""
    if not (books.jobs.kept & (books.jobs.numbers("kind") != _TUNE)).any():
        return []
    runner.is_pausing = True
    books.nodes.change(row, now)
    if _nobody_may(books, policy, row, now):
        runner.is_pausing = False
        books.nodes.change(row, now)
        return []
    own = books.enter(runner.job)
    books.jobs.keep_left(own, runner.left_share(now))
    seen = look_at(books, policy, now, np.array([row]))
    scores = seen.scores[:, 0]
    least = scores[own]
    may = (scores > least) & (books.jobs.numbers("kind") != _TUNE)
    first = first_of(books.jobs, np.where(may, scores, -np.inf)) if may.any() else None
    books.leave(runner.job.task)  # the last row: no other row moves
    if first is None:
        runner.is_pausing = False
        books.nodes.change(row, now)
        return []
    begun = start(books, policy, first, seen, first, 0, now, after=runner)
    books.leave(begun.task)
    pause = Pause(
        task=runner.job.task,
        node=runner.node,
        why=_why_runner(books, policy, runner, f"gives way to {begun.task} at the end of its chunk", now),
    )
    return [pause, begun]


def _nobody_may(books: Books, policy: Policy, row: int, now: float) -> bool:
    """Whether none of few waiting tasks may start on a node, but tuning: then nothing has to be scored."""
    jobs, nodes = books.jobs, books.nodes
    if not are_few(jobs, nodes, len(jobs), [row]):
        return False
    rows = slice(None)
    starts = few_starts(policy, jobs, nodes, now, rows, np.array([row]), few_prices(jobs, nodes, rows, [row]))
    kinds = jobs.numbers("kind").tolist()
    return not any(may and kind != _TUNE for (may,), kind in zip(starts, kinds, strict=True))


def preempt(books: Books, policy: Policy, newcomers: list[TaskId], now: float) -> list[Decision]:
    """A newcomer of at least twice the density goes before a generation that can afford to wait."""
    urgent = [task for task in newcomers if _is_urgent(books, task)]
    runners = _interruptible(books, policy, now) if urgent else []
    if not runners:
        return []
    pairs = _pairs(books, policy, urgent, runners, now)
    decisions: list[Decision] = []
    for row in sorted(pairs.rows, key=books.jobs.tie_of):
        task = books.jobs.jobs[row].task
        found = [
            (finish_s, runner.node, runner.job.task, runner)
            for finish_s, runner in pairs.of(row)
            if runner.node not in books.paused
        ]
        if found:
            decisions += _interrupt(books, policy, task, min(found)[3], now)
    for decision in decisions:
        if isinstance(decision, Start):
            books.leave(decision.task)
    return decisions


def _is_urgent(books: Books, task: TaskId) -> bool:
    """It waits, for something that has a deadline and is over soon."""
    job = books.jobs.get(task)
    return job is not None and job.work.kind != "tune" and job.deadline_at < FOREVER


def _interruptible(books: Books, policy: Policy, now: float) -> list[Running]:
    """Generation with time to spare on full nodes, where none stands still already."""
    found: list[Running] = []
    for row in (~books.nodes.has_room).nonzero()[0].tolist():
        view = books.nodes.view(row)
        if view.can_pause and view.is_ready and view.id not in books.paused:
            running = books.nodes.running(row).values()
            found += [
                one
                for one in running
                if one.job.work.kind == "generate"
                and not one.is_paused
                and policy.margin * one.left_s(now) < one.job.deadline_at - now
            ]
    return found


def _pairs(
    books: Books, policy: Policy, newcomers: list[TaskId], runners: list[Running], now: float
) -> Pairs:
    """Which newcomers may go before which runners: the rule, for all pairs at once."""
    rows = np.array([books.jobs.row(task) for task in newcomers])
    rows = rows[: max(1, PAIRS_MAX // len(runners))]
    return Pairs.found(
        books.jobs,
        books.nodes,
        rows,
        runners,
        now,
        mean_s=books.mean_s,
        ratio=books.config.preempt_ratio,
        margin=policy.margin,
        only_late=policy.preempts_late,
    )


def _interrupt(books: Books, policy: Policy, task: TaskId, runner: Running, now: float) -> list[Decision]:
    node = books.nodes.row(runner.node)
    runner.is_paused, runner.paused_at = True, now
    books.paused[runner.node] = runner.job.task
    books.nodes.change(node, now)
    row = books.jobs.row(task)
    seen = look_at(books, policy, now, np.array([node]), rows=np.array([row]))
    words = f"waits between two tokens for {task} of twice its density, and still ends in time"
    pause = Pause(task=runner.job.task, node=runner.node, why=_why_runner(books, policy, runner, words, now))
    return [pause, start(books, policy, row, seen, 0, 0, now, after=runner)]


def resume(books: Books, policy: Policy, now: float) -> list[Decision]:
    """Paused generation goes on as soon as its node has room, before anything new starts there."""
    resumed: list[Decision] = []
    for node, task in sorted(books.paused.items()):
        row = books.nodes.row(node)
        if not books.nodes.has_room[row]:
            continue
        running = books.nodes.running(row)[task]
        running.stood_s += now - running.paused_at
        running.is_paused = False
        books.nodes.change(row, now)
        del books.paused[node]
        words = f"goes on after {running.stood_s:.1f} s: {node} has room again"
        why = _why_runner(books, policy, running, words, now)
        resumed.append(Resume(task=task, node=node, why=why))
    return resumed


def _why_runner(books: Books, policy: Policy, running: Running, words: str, now: float) -> Why:
    """Of a decision about a task that runs."""
    job, left_s = running.job, running.left_s(now)
    return Why(
        at=now,
        policy=policy.name,
        words=words,
        score=job.value / left_s,
        density=job.value / left_s,
        laxity_s=None if job.deadline_at == FOREVER else job.deadline_at - now - left_s,
        cost_s=left_s,
        service_s=left_s,
        n_waiting=len(books.jobs),
    )
