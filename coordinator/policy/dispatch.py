"""The queue and the decisions: who starts where now, who gives way, who is refused.

    add ─▶ waiting ──decide: Start──▶ running ──ended──▶ (forgotten)
              │  ▲                     │   ▲
              │  └──── requeue ────────┤   └── decide: Resume
              ▼                        ▼
       decide: Drop             decide: Pause

``decide`` changes the dispatcher's own books at once: what it returns has happened as far as it is
concerned, and ``requeue`` takes a start back. Everything is deterministic: in which order calls at one
``now`` were made changes nothing; ties are broken by deadline, ``Job.tie`` and id.

Bounds: a row per waiting task and a record per running one (the caller's admission bounds both), two
entries per waiting task on the list of what may become hopeless.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor, nextafter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, NodeView, Pause, Resume, Start, Why
from coordinator.policy.density import Floats
from coordinator.policy.explaining import candidates_of, hopeless_words, sentence
from coordinator.policy.jobs import JobTable
from coordinator.policy.looking import Look, look, overview
from coordinator.policy.nodes import NodeTable, Running
from coordinator.policy.ordering import PAIRS_MAX, blocks, column_for, first_of, in_order
from coordinator.policy.policies import Policy, margin_after, vdf_plain
from coordinator.policy.preempting import Pairs
from coordinator.policy.pricing import all_fastest_s, fastest_s
from coordinator.policy.recent import RecentTasks
from coordinator.policy.work import KINDS
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

__all__ = ["DispatchConfig", "Dispatcher"]

_PATIENT_CHUNKS: Final = 4
"""Chunks between two looks at tuning that runs on, while nobody comes."""
_TUNE: Final = KINDS.index("tune")


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    patience_s: float = 30.0
    """A task without a deadline is as urgent as can be after this and its own service time; then it ages."""
    chunk_s: float = 1.0
    """Longest chunk of tuning: how long a newcomer may wait for it."""
    preempt_ratio: float = 2.0
    """A newcomer's density over the runner's, at least, for generation to be paused."""
    select_every_s: float = 5.0
    """How long what ``Policy.keeps`` said holds while no task and no node comes: 0 to 20 s measured alike."""
    explain: bool = True
    """Fill in ``Why.candidates`` and ``Why.words``; the simulator goes without."""


class Dispatcher:
    """One policy at work on one queue."""

    def __init__(self, policy: Policy, cost: CostModel, config: DispatchConfig | None = None) -> None:
        self.policy = policy
        self._margin_max = policy.margin
        self.cost = cost
        self._config = config or DispatchConfig()
        self._jobs = JobTable()
        self._nodes = NodeTable(cost, chunk_s=self._config.chunk_s if policy.chunk else FOREVER)
        self._recent = RecentTasks()
        self._filling = replace(policy, score=vdf_plain, keeps=None, gambles=True)
        """How nodes are used that ``policy`` would leave idle."""
        self._runs_on: dict[TaskId, NodeId] = {}
        self._hopeless: list[tuple[float, TaskId]] = []
        self._yielding: dict[TaskId, float] = {}
        """Tuning that runs in chunks -> when it is next compared with who waits."""
        self._paused: dict[NodeId, TaskId] = {}
        """Generation that stands still; at most one on a node, so that a pause ends soon."""
        self._select_at = -FOREVER
        """When the policy is asked again what may start."""
        self._is_stale = False
        """Nodes came, left or changed since the last decision."""
        self._is_news = False
        """A task or a node came, left or changed since the last decision."""
        self._again_at = FOREVER
        """When time alone may let a waiting task start."""
        self._newcomers: list[TaskId] = []
        """Added since the last decision."""
        self._mean_s = 1.0
        """Mean cost of the waiting tasks when last looked at."""

    # ── what others may read ────────────────────────────────────────────────────────────────────────

    def __contains__(self, task: TaskId) -> bool:
        return task in self._jobs or task in self._runs_on

    @property
    def n_waiting(self) -> int:
        return len(self._jobs)

    @property
    def n_running(self) -> int:
        return len(self._runs_on)

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset(self._nodes.ids)

    def waiting(self, task: TaskId) -> Job | None:
        """The task as it was added, if it waits."""
        return self._jobs.get(task)

    def node_of(self, task: TaskId) -> NodeId | None:
        """Where the task runs; ``None`` if it does not."""
        return self._runs_on.get(task)

    def certain_s(self, job: Job) -> float:
        """What the best node needs for a job that is not here, as far as it is certain."""
        row = self._enter(job)
        _, certain_s = fastest_s(self._jobs, self._nodes, row)
        self._leave(job.task)
        return certain_s

    def outlook(self, task: TaskId, now: float) -> Why | None:
        """What the next decision about a waiting task would be made from: where it could go and why it does
        not. ``None`` if it does not wait."""
        if task not in self._jobs:
            return None
        row = self._jobs.row(task)
        job, best_s = self._jobs.jobs[row], float(self._jobs.column("best_s")[row])
        is_virtual = job.deadline_at == FOREVER
        return Why(
            at=now,
            policy=self.policy.name,
            words=f"waits with {len(self._jobs) - 1} others; its best node needs {best_s:.1f} s",
            score=-FOREVER,
            density=job.value / best_s if best_s else FOREVER,
            laxity_s=None if is_virtual else job.deadline_at - now - best_s,
            cost_s=best_s,
            service_s=best_s,
            n_waiting=len(self._jobs) - 1,
            candidates=candidates_of(self._jobs, self._nodes, self.cost, row, None, now),
            n_candidates=len(self._nodes),
        )

    @property
    def wake_at(self) -> float:
        """When ``decide`` has something to do though nothing happens: a task is hopeless, a chunk ends."""
        if self._is_stale and len(self._jobs):
            return -FOREVER
        hopeless_at = self._hopeless[0][0] if self._hopeless else FOREVER
        if not len(self._jobs):
            return hopeless_at
        contest_at = min(self._yielding.values(), default=FOREVER)
        return min(hopeless_at, contest_at, self._again_at if self._nodes.has_room.any() else FOREVER)

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def put_node(self, view: NodeView) -> None:
        """A node is here, or something about it changed."""
        self._is_stale |= self._nodes.put(view)
        self._is_news = True

    def drop_node(self, node: NodeId) -> list[TaskId]:
        """A node is gone. What ran there is forgotten: ``add`` again what shall run elsewhere."""
        if node not in self._nodes:
            return []
        lost = [running.job.task for running in self._nodes.drop(node)]
        for task in lost:
            self._stops(task)
        self._is_stale = self._is_news = True
        return sorted(lost)

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, job: Job, now: float) -> None:
        """The job waits from now on. Its place in the order does not depend on when it was added."""
        assert job.task not in self, f"task {job.task} is here already"
        row = self._enter(job)
        best_s, certain_s = fastest_s(self._jobs, self._nodes, row)
        self._jobs.rate(row, best_s, self._config.patience_s + best_s)
        if job.deadline_at < FOREVER and self.policy.drop:
            heapq.heappush(self._hopeless, (job.deadline_at - certain_s, job.task))
            self._tidy()
        self._select_at = -FOREVER
        self._newcomers.append(job.task)
        self._is_news = True
        for task, at in self._yielding.items():
            row = self._nodes.row(self._runs_on[task])
            self._yielding[task] = min(at, self._chunk_end(self._nodes.running(row)[task], now))
        self._recent.add(job, best_s)

    def withdraw(self, task: TaskId, now: float) -> None:
        """Forget the task, whatever it does."""
        if task in self._jobs:
            self._leave(task)
        elif task in self._runs_on:
            self._nodes.end(self._nodes.row(self._stops(task)), task, now)

    def running(self, job: Job, node: NodeId, now: float) -> None:
        """The task runs on ``node`` whoever started it, such as an earlier coordinator."""
        if self._runs_on.get(job.task) == node:
            return
        self.withdraw(job.task, now)
        if node in self._nodes:
            self._run(job, self._nodes.row(node), now)

    def ended(self, task: TaskId, now: float, observed: Observed | None = None) -> None:
        """The task is over; ``observed`` teaches the cost model."""
        if task not in self._runs_on:
            self.withdraw(task, now)
            return
        node = self._stops(task)
        row = self._nodes.row(node)
        running, rows = self._nodes.end(row, task, now)
        if observed is not None and not running.stood_s:  # else much of its time was another's
            self.cost.learn(
                running.job.work,
                node,
                self._nodes.view(row).rates,
                observed if observed.rows >= rows else replace(observed, rows=rows),
                reuse=running.reuse,
                predicted_s=running.expected_s,
            )
            self._nodes.learned(node, running.job.work.kind)

    def requeue(
        self, task: TaskId, now: float, *, left: float = 1.0, avoid: Mapping[NodeId, float] | None = None
    ) -> None:
        """The attempt is over and the task is not (refused, lost, given way): it waits again.

        Args:
            left: Share of the work that is still to be done, 0 to 1.
            avoid: Nodes that refused or failed it -> until when not to ask them.
        """
        running, _ = self._nodes.end(self._nodes.row(self._stops(task)), task, now)
        job = replace(running.job, work=running.job.work.left(left), avoid=avoid or running.job.avoid)
        self.add(job, now)

    # ── decisions ───────────────────────────────────────────────────────────────────────────────────

    def decide(self, now: float) -> list[Decision]:
        """Everything that is to be done now, in order. A second call at the same time returns nothing.

        Cost: with m nodes that have room and n waiting tasks about 20 passes over n * m numbers, and
        next to nothing while no node has room.
        """
        decisions: list[Decision] = []
        if self._is_stale:
            self._look_again()
        if self._hopeless and self._hopeless[0][0] <= now:
            decisions += self._drop_hopeless(now)
        if self._paused:
            decisions += self._resume(now)
        if len(self._jobs):
            due = [task for task, at in self._yielding.items() if at <= now]
            is_news = self._is_news or now >= self._again_at
            if due or (is_news and self._nodes.has_room.any()):
                self._select(now)
                decisions += self._fill(now, self.policy)
                if self.policy.fill and len(self._jobs):
                    decisions += self._fill(now, self._filling)
                decisions += self._end_chunks(sorted(due), now)
            if self._newcomers and self.policy.preempt:
                decisions += self._preempt(now)
            self._is_news, self._again_at = False, self._next_look_at(now)
        self._newcomers.clear()
        return decisions

    def _next_look_at(self, now: float) -> float:
        """When time alone may let a waiting task start on a node that has room."""
        again_at = FOREVER
        for task in self._jobs.avoiding:
            avoid = self._jobs.jobs[self._jobs.row(task)].avoid
            again_at = min(again_at, min((until for until in avoid.values() if until > now), default=FOREVER))
        if self.policy.keeps is not None or self.policy.margin != 1.0:
            again_at = min(again_at, now + self._config.chunk_s)
        return again_at

    def _drop_hopeless(self, now: float) -> list[Decision]:
        dropped: list[Decision] = []
        while self._hopeless and self._hopeless[0][0] <= now:
            _, task = heapq.heappop(self._hopeless)
            job = self._jobs.get(task)
            if job is None:
                continue
            _, certain_s = fastest_s(self._jobs, self._nodes, self._jobs.row(task))
            if now + certain_s <= job.deadline_at and now < job.deadline_at:
                # Rounding must not bring it up at this same moment for ever.
                again_at = max(job.deadline_at - certain_s, nextafter(now, FOREVER))
                heapq.heappush(self._hopeless, (again_at, task))
                continue
            self._leave(task)
            dropped.append(Drop(task=task, reason=hopeless_words(certain_s, job.deadline_at - now)))
        return sorted(dropped, key=lambda drop: drop.task)

    def _resume(self, now: float) -> list[Decision]:
        """Paused generation goes on as soon as its node has room, before anything new starts there."""
        resumed: list[Decision] = []
        for node, task in sorted(self._paused.items()):
            row = self._nodes.row(node)
            if not self._nodes.has_room[row]:
                continue
            running = self._nodes.running(row)[task]
            running.stood_s += now - running.paused_at
            running.is_paused = False
            self._nodes.change(row, now)
            del self._paused[node]
            words = f"goes on after {running.stood_s:.1f} s: {node} has room again"
            why = self._why_runner(running, words, now)
            resumed.append(Resume(task=task, node=node, why=why))
        return resumed

    # ── starting ────────────────────────────────────────────────────────────────────────────────────

    def _select(self, now: float) -> None:
        """Ask the policy which of the waiting tasks may start at all, if there is news since it was asked."""
        keeps = self.policy.keeps
        if keeps is not None and self._select_at <= now:
            self._select_at = now + self._config.select_every_s
            margin = margin_after(self._margin_max, self.cost.errors().values())
            self.policy, self._filling = (replace(one, margin=margin) for one in (self.policy, self._filling))
            scene = overview(self._jobs, self._nodes, now, self._recent)
            self._jobs.kept[:] = keeps(scene)

    def _fill(self, now: float, policy: Policy) -> list[Decision]:
        """Start what can start on nodes with room."""
        open_nodes = np.flatnonzero(self._nodes.has_room)
        if not len(open_nodes):
            return []
        if len(open_nodes) == 1:
            return self._fill_one(now, policy, open_nodes)
        started: list[Start] = []
        for rows, seen in blocks(policy, self._jobs, self._nodes, now, self._recent, open_nodes):
            self._mean_s = float(seen.scene.mean_s.mean())
            started += self._place(rows, seen, now, policy)
            if not self._nodes.has_room[open_nodes].any():
                break
        for start in started:
            self._leave(start.task)
        return list[Decision](started)

    def _place(self, rows: NDArray[np.intp], seen: Look, now: float, policy: Policy) -> list[Start]:
        """Start the tasks ``rows`` in the order of their scores while there are nodes for them."""
        started: list[Start] = []
        order = in_order(self._jobs, seen.scores.max(axis=1), rows)
        at = 0
        while at < len(order):
            index = int(order[at])
            at += 1
            column = column_for(self._nodes, seen, index, policy.place)
            if column is None:  # it fitted only nodes that are full by now; perhaps many others did, too
                order, at = order[at:], 0
                order = order[(seen.scores[order] > -np.inf).any(axis=1)]
                continue
            started.append(self._start(int(rows[index]), seen, index, column, now))
            node = seen.scene.open_nodes[column : column + 1]
            if self._nodes.has_room[node[0]]:  # the next one joins what has just started
                seen.renew(column, self._look_at(policy, rows, now, node, seen.scene.mean_s[column]))
            else:
                seen.scores[:, column] = -np.inf
        return started

    def _fill_one(self, now: float, policy: Policy, open_nodes: NDArray[np.intp]) -> list[Decision]:
        """The common case: one node has room."""
        started: list[Decision] = []
        while len(self._jobs) and self._nodes.has_room[open_nodes[0]]:
            seen = look(policy, self._jobs, self._nodes, now, self._recent, columns=open_nodes)
            self._mean_s = float(seen.scene.mean_s[0])
            scores = seen.scores[:, 0]
            row = first_of(self._jobs, scores)
            if row is None:
                break
            start = self._start(row, seen, row, 0, now)
            self._leave(start.task)
            started.append(start)
        return started

    def _look_at(
        self,
        policy: Policy,
        rows: NDArray[np.intp],
        now: float,
        columns: NDArray[np.intp],
        mean_s: Floats | None = None,
    ) -> Look:
        return look(
            policy, self._jobs, self._nodes, now, self._recent, rows=rows, columns=columns, mean_s=mean_s
        )

    def _start(
        self, row: int, seen: Look, index: int, column: int, now: float, *, after: Running | None = None
    ) -> Start:
        """Put the task of ``row`` on a node. It is still in the table of who waits."""
        job, node = self._jobs.jobs[row], int(seen.scene.open_nodes[column])
        scene = seen.scene
        cost_s, service_s = float(seen.cost_s[index, column]), float(seen.finish_s[index, column])
        why = Why(
            at=now,
            policy=self.policy.name,
            words="",
            score=float(seen.scores[index, column]),
            density=float(scene.value[index]) / cost_s,
            laxity_s=None if scene.is_virtual[index] else job.deadline_at - now - service_s,
            cost_s=cost_s,
            service_s=service_s,
            n_waiting=len(self._jobs) - 1,
        )
        if self._config.explain:
            found = candidates_of(self._jobs, self._nodes, self.cost, row, node, now)
            words = sentence(why, self._nodes.ids[node], after)
            why = replace(why, candidates=found, n_candidates=len(self._nodes), words=words)
        self._run(job, node, now, expected_s=why.service_s)
        self._nodes.joined(node, job.task, cost_s, service_s, now)
        return Start(
            task=job.task, node=self._nodes.ids[node], why=why, after=after.job.task if after else None
        )

    # ── giving way ──────────────────────────────────────────────────────────────────────────────────

    def _end_chunks(self, tasks: list[TaskId], now: float) -> list[Decision]:
        """Tuning on a full node gives way to what scores higher, at the end of its chunk.

        Compared just before the end if somebody came since, who so waits for one chunk at most, and now and
        then anyway: who waits grows urgent.
        """
        decisions: list[Decision] = []
        for task in tasks:
            row = self._nodes.row(self._runs_on[task])
            runner = self._nodes.running(row)[task]
            self._yielding[task] = self._chunk_end(runner, now) + _PATIENT_CHUNKS * self._config.chunk_s
            if not self._nodes.has_room[row] and not runner.is_pausing and len(self._jobs):
                decisions += self._contest(runner, row, now)
        return decisions

    def _chunk_end(self, runner: Running, now: float) -> float:
        """Just before the end of the chunk after the one that ends now."""
        chunk_s, margin_s = self._config.chunk_s, self._config.chunk_s / 1000
        n_ended = floor((now + 1.5 * margin_s - runner.started_at) / chunk_s)
        return runner.started_at + (n_ended + 1) * chunk_s - margin_s

    def _contest(self, runner: Running, row: int, now: float) -> list[Decision]:
        """Score the runner among who waits, as if its chunk were over."""
        runner.is_pausing = True
        self._nodes.change(row, now)
        own = self._enter(runner.job)
        self._jobs.keep_left(own, runner.left_share(now))
        seen = look(self.policy, self._jobs, self._nodes, now, self._recent, columns=np.array([row]))
        scores = seen.scores[:, 0]
        least = scores[own]
        may = (scores > least) & (self._jobs.numbers("kind") != _TUNE)
        first = first_of(self._jobs, np.where(may, scores, -np.inf)) if may.any() else None
        self._leave(runner.job.task)  # the last row: no other row moves
        if first is None:
            runner.is_pausing = False
            self._nodes.change(row, now)
            return []
        start = self._start(first, seen, first, 0, now, after=runner)
        self._leave(start.task)
        pause = Pause(
            task=runner.job.task,
            node=runner.node,
            why=self._why_runner(runner, f"gives way to {start.task} at the end of its chunk", now),
        )
        return [pause, start]

    def _preempt(self, now: float) -> list[Decision]:
        """A newcomer of at least twice the density goes before a generation that can afford to wait."""
        runners = self._interruptible()
        newcomers = [task for task in self._newcomers if task in self._jobs]
        if not runners or not newcomers:
            return []
        pairs = self._pairs(newcomers, runners, now)
        decisions: list[Decision] = []
        for row in sorted(pairs.rows, key=self._jobs.tie_of):
            task = self._jobs.jobs[row].task
            found = [
                (finish_s, runner.node, runner.job.task, runner)
                for finish_s, runner in pairs.of(row)
                if runner.node not in self._paused
            ]
            if found:
                decisions += self._interrupt(task, min(found)[3], now)
        for decision in decisions:
            if isinstance(decision, Start):
                self._leave(decision.task)
        return decisions

    def _interruptible(self) -> list[Running]:
        """Generation on full nodes, where none stands still already."""
        found: list[Running] = []
        for row in map(int, np.flatnonzero(~self._nodes.has_room)):
            view = self._nodes.view(row)
            if view.can_pause and view.is_ready and view.id not in self._paused:
                running = self._nodes.running(row).values()
                found += [one for one in running if one.job.work.kind == "generate" and not one.is_paused]
        return found

    def _pairs(self, newcomers: list[TaskId], runners: list[Running], now: float) -> Pairs:
        """Which newcomers may go before which runners: the rule, for all pairs at once."""
        rows = np.array([self._jobs.row(task) for task in newcomers])
        is_eligible = (self._jobs.numbers("kind")[rows] != _TUNE) & (
            self._jobs.column("patience_s")[rows] == np.inf
        )
        rows = rows[is_eligible][: max(1, PAIRS_MAX // len(runners))]
        return Pairs.found(
            self._jobs,
            self._nodes,
            rows,
            runners,
            now,
            mean_s=self._mean_s,
            ratio=self._config.preempt_ratio,
            margin=self.policy.margin,
            only_late=self.policy.preempts_late,
        )

    def _interrupt(self, task: TaskId, runner: Running, now: float) -> list[Decision]:
        node = self._nodes.row(runner.node)
        runner.is_paused, runner.paused_at = True, now
        self._paused[runner.node] = runner.job.task
        self._nodes.change(node, now)
        row = self._jobs.row(task)
        seen = self._look_at(self.policy, np.array([row]), now, np.array([node]))
        words = f"waits between two tokens for {task} of twice its density, and still ends in time"
        pause = Pause(task=runner.job.task, node=runner.node, why=self._why_runner(runner, words, now))
        return [pause, self._start(row, seen, 0, 0, now, after=runner)]

    # ── books ───────────────────────────────────────────────────────────────────────────────────────

    def _enter(self, job: Job) -> int:
        needs, reuse = self._nodes.take_keys(job)
        return self._jobs.add(job, needs=needs, reuse=reuse, best_s=0.0, patience_s=self._config.patience_s)

    def _leave(self, task: TaskId) -> None:
        _, needs, reuse = self._jobs.remove(task)
        self._nodes.release_keys(needs, reuse)

    def _run(self, job: Job, row: int, now: float, *, expected_s: float | None = None) -> None:
        node, view = self._nodes.ids[row], self._nodes.view(row)
        reuse = self._nodes.reuse_of(job, row)
        if expected_s is None:
            expected_s = self.cost.estimate(job.work, node, view.rates, reuse=reuse).service_s
        self._nodes.start(row, Running(job, node, now, expected_s, reuse, 0.0), now)
        self._runs_on[job.task] = node
        if job.work.kind == "tune" and self.policy.chunk and not view.tunes_beside:
            self._yielding[job.task] = self._chunk_end(self._nodes.running(row)[job.task], now)

    def _stops(self, task: TaskId) -> NodeId:
        """The task runs no longer; where it did."""
        self._is_news = True
        node = self._runs_on.pop(task)
        self._yielding.pop(task, None)
        if self._paused.get(node) == task:
            del self._paused[node]
        return node

    def _why_runner(self, running: Running, words: str, now: float) -> Why:
        """Of a decision about a task that runs."""
        job, left_s = running.job, running.left_s(now)
        return Why(
            at=now,
            policy=self.policy.name,
            words=words,
            score=job.value / left_s,
            density=job.value / left_s,
            laxity_s=None if job.deadline_at == FOREVER else job.deadline_at - now - left_s,
            cost_s=left_s,
            service_s=left_s,
            n_waiting=len(self._jobs),
        )

    def _look_again(self) -> None:
        """What tasks take on their best nodes changed: what was hopeless may not be, and the reverse."""
        self._is_stale = False
        best_s, certain_s = all_fastest_s(self._jobs, self._nodes)
        self._jobs.rate_all(best_s)
        if self.policy.drop:
            hopeless_at = (self._jobs.column("deadline_at") - certain_s).tolist()
            self._hopeless = [
                (at, job.task)
                for at, job in zip(hopeless_at, self._jobs.jobs, strict=True)
                if job.deadline_at < FOREVER
            ]
            heapq.heapify(self._hopeless)

    def _tidy(self) -> None:
        """Entries of tasks that are gone are left on the list; here it is kept from growing by them."""
        if len(self._hopeless) > 2 * len(self._jobs) + 64:
            self._hopeless = [entry for entry in self._hopeless if entry[1] in self._jobs]
            heapq.heapify(self._hopeless)
