"""Promises of the dispatcher on any sequence of events. Each has a planted bug that turns its check red.

A ``Mesh`` drives one dispatcher as a coordinator does, with true times that differ from the estimates, and
checks every decision as it is made; what must hold at the end is checked when everything has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from coordinator.policy import dispatch, few, looking, ordering, starting
from coordinator.policy.books import Books
from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Drop, Job, NodeView, Pause, Resume, Start
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.jobs import JobTable
from coordinator.policy.nodes import NodeTable, Running
from coordinator.policy.policies import POLICIES, policy_named
from coordinator.policy.rates import Rates
from coordinator.policy.work import Work
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

RATES = Rates(
    prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0, tune_tokens_per_s=100.0, adapter_load_s=0.3
)
NAMES = [
    "vdf", "vdf+preempt", "vdf-preempt", "vdf-plain+drop", "edf+drop+chunk", "fifo", "sjf+drop", "hvf",
    "llf+drop+chunk+preempt", *POLICIES,
]  # fmt: skip


class BrokenPromise(AssertionError):
    pass


@dataclass(slots=True)
class Mesh:
    """True state beside the dispatcher's books."""

    policy: str
    seed: int
    n_nodes: int = 3
    slots: int = 1
    now: float = 0.0
    dispatcher: Dispatcher = field(init=False)
    rng: Random = field(init=False)
    jobs: dict[TaskId, Job] = field(default_factory=dict)
    runs: dict[TaskId, NodeId] = field(default_factory=dict)
    paused: set[TaskId] = field(default_factory=set)
    pausing: set[TaskId] = field(default_factory=set)
    ended: dict[TaskId, str] = field(default_factory=dict)
    started: list[tuple[float, TaskId, NodeId]] = field(default_factory=list)
    left_s: dict[TaskId, float] = field(default_factory=dict)
    since: dict[TaskId, float] = field(default_factory=dict)
    _due: list[tuple[float, int, TaskId, str]] = field(default_factory=list)
    _n: int = 0

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.dispatcher = Dispatcher(policy_named(self.policy), CostModel(), DispatchConfig(explain=False))
        for k in range(self.n_nodes):
            self.put_node(k)

    def put_node(self, k: int) -> None:
        speed = (1.0, 0.5, 6.0, 2.0)[k % 4]
        self.dispatcher.put_node(NodeView(id=NodeId(f"n{k}"), rates=RATES.scaled(speed), slots=self.slots))

    # ── events ──────────────────────────────────────────────────────────────────────────────────────

    def arrive(self, n: int) -> None:
        for _ in range(n):
            rng, name = self.rng, TaskId(f"t{len(self.jobs):04}")
            is_tune = rng.random() < 0.15
            work = (
                Work(kind="tune", n_feature_tokens=50.0, n_tune_tokens=rng.uniform(100, 2000))
                if is_tune
                else Work(n_prompt_tokens=rng.uniform(1, 200), n_tokens=rng.uniform(1, 60))
            )
            in_s = rng.choice([FOREVER, rng.uniform(0.1, 4), rng.uniform(2, 60)])
            job = Job(
                task=name, work=work, value=rng.choice([1.0, 3.0, 10.0]), arrived_at=self.now,
                deadline_at=self.now + in_s,
            )  # fmt: skip
            self.jobs[name] = job
            # The truth: 30 % of mis-estimate that nobody knows.
            self.left_s[name] = rng.lognormvariate(0, 0.3)
            self.dispatcher.add(job, self.now)
            if in_s < FOREVER:
                self._at(job.deadline_at, name, "deadline")

    def lose_node(self, k: int) -> None:
        lost = self.dispatcher.drop_node(NodeId(f"n{k}"))
        mine = sorted(task for task, node in self.runs.items() if node == f"n{k}")
        if lost != mine:
            raise BrokenPromise(f"the dispatcher thinks {lost} ran on n{k}, it were {mine}")
        for task in lost:
            self._off(task)
            if self.jobs[task].deadline_at > self.now:
                self.dispatcher.add(self.jobs[task], self.now)

    def step(self) -> bool:
        """To the next event; ``False`` if there is none."""
        at = self._next_at
        if at == FOREVER:
            return False
        self.now = max(self.now, at)
        while self._due and self._due[0][0] <= self.now:
            _, n, task, what = heapq.heappop(self._due)
            self._happen(n, task, what)
        self.decide()
        return True

    @property
    def _next_at(self) -> float:
        return min(self._due[0][0] if self._due else FOREVER, self.dispatcher.wake_at)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while (
            min(self._due[0][0] if self._due else FOREVER, self.dispatcher.wake_at) <= until and self.step()
        ):
            pass
        self.now = until

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.step():
                break
        else:
            raise BrokenPromise("it goes on for ever")
        open_tasks = set(self.jobs) - set(self.ended)
        if open_tasks:
            raise BrokenPromise(f"{sorted(open_tasks)} never ended")
        if self.dispatcher.n_waiting or self.dispatcher.n_running or self.dispatcher._books.paused:
            raise BrokenPromise("something is left in the books")

    # ── decisions ───────────────────────────────────────────────────────────────────────────────────

    def decide(self) -> None:
        for decision in self.dispatcher.decide(self.now):
            match decision:
                case Start(task=task, node=node):
                    self._start(decision, task, node)
                case Drop(task=task):
                    self._only_open(task)
                    if task in self.runs:
                        raise BrokenPromise(f"{task} runs and is rejected")
                    self.ended[task] = "rejected"
                case Pause(task=task):
                    if self.runs.get(task) != decision.node:
                        raise BrokenPromise(f"{task} does not run on {decision.node} and is paused there")
                    if self.jobs[task].work.kind == "tune":
                        self.pausing.add(task)
                        self._at(self.now + 0.5, task, "chunk")
                    else:
                        self._stand_still(task)
                case Resume(task=task):
                    self.paused.remove(task)
                    self.since[task] = self.now
                    self._at(self.now + self.left_s[task], task, "end")
        if self.dispatcher.decide(self.now):
            raise BrokenPromise("a second decision at the same time decides something")
        for node in {*self.runs.values()}:
            active = [t for t, n in self.runs.items() if n == node and t not in self.paused | self.pausing]
            if len(active) > self.slots:
                raise BrokenPromise(f"{node} has {self.slots} slots and runs {active}")

    def _start(self, start: Start, task: TaskId, node: NodeId) -> None:
        self._only_open(task)
        job = self.jobs[task]
        if task in self.runs:
            raise BrokenPromise(f"{task} runs on {self.runs[task]} and is started on {node}")
        if self.dispatcher.policy.drop:
            if job.deadline_at <= self.now:
                raise BrokenPromise(f"{task} is started {self.now - job.deadline_at} s after its deadline")
            if self.now + start.why.service_s > job.deadline_at + 1e-9:
                raise BrokenPromise(f"{task} is started though it cannot end in time")
        self.started.append((self.now, task, node))
        self.runs[task] = node
        self.since[task] = self.now
        truth = self.left_s[task]
        self.left_s[task] = start.why.service_s * (truth if truth < 5 else 1.0)
        self._at(self.now + self.left_s[task], task, "end")

    def _only_open(self, task: TaskId) -> None:
        if task in self.ended:
            raise BrokenPromise(f"{task} is over ({self.ended[task]}) and decided about")

    def _stand_still(self, task: TaskId) -> None:
        self.paused.add(task)
        self.left_s[task] = max(0.0, self.left_s[task] - (self.now - self.since[task]))
        self.since[task] = FOREVER
        standing = [t for t in self.paused if self.runs[t] == self.runs[task]]
        if len(standing) > 1:
            raise BrokenPromise(f"{standing} stand still on one node")

    def _happen(self, n: int, task: TaskId, what: str) -> None:
        match what:
            case "end" if task in self.runs and task not in self.paused and self._is_current(task):
                self._off(task)
                self.dispatcher.ended(task, self.now, Observed(service_s=self.rng.uniform(0.1, 9)))
                self.ended[task] = "done"
            case "chunk" if task in self.pausing:
                self._off(task)
                self.left_s[task] = 1.0
                self.jobs[task] = replace(self.jobs[task], work=self.jobs[task].work.left(0.5))
                self.dispatcher.requeue(task, self.now, left=0.5)
            case "deadline" if task not in self.ended:
                self._off(task)
                self.dispatcher.withdraw(task, self.now)
                self.ended[task] = "expired"

    def _is_current(self, task: TaskId) -> bool:
        return abs(self.since[task] + self.left_s[task] - self.now) < 1e-6

    def _off(self, task: TaskId) -> None:
        self.runs.pop(task, None)
        self.paused.discard(task)
        self.pausing.discard(task)

    def _at(self, at: float, task: TaskId, what: str) -> None:
        self._n += 1
        heapq.heappush(self._due, (at, self._n, task, what))


def live(policy: str, seed: int, n_nodes: int, slots: int) -> Mesh:
    """Bursts, calm, nodes that come and go; then everything ends."""
    mesh = Mesh(policy, seed, n_nodes, slots)
    for _ in range(6):
        mesh.arrive(mesh.rng.randint(0, 12))
        mesh.decide()
        mesh.run(mesh.rng.choice([0.0, 0.3, 5.0]))
        k = mesh.rng.randrange(n_nodes)
        if mesh.rng.random() < 0.3:
            mesh.lose_node(k)
            mesh.decide()
            mesh.run(mesh.rng.uniform(0, 3))
            mesh.put_node(k)
    mesh.finish()
    return mesh


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    policy=st.sampled_from(NAMES),
    seed=st.integers(0, 2**32),
    n_nodes=st.integers(1, 4),
    slots=st.sampled_from([1, 1, 2, 4]),
)
def test_nothing_starts_late_or_twice_and_every_task_ends(
    policy: str, seed: int, n_nodes: int, slots: int
) -> None:
    live(policy, seed, n_nodes, slots)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(policy=st.sampled_from(NAMES), seed=st.integers(0, 2**32), data=st.data())
def test_the_order_of_simultaneous_arrivals_and_of_nodes_changes_nothing(
    policy: str, seed: int, data: st.DataObject
) -> None:
    order_changes_nothing(policy, seed, data)


def order_changes_nothing(policy: str, seed: int, data: st.DataObject) -> None:
    rng = Random(seed)
    jobs = [
        Job(
            task=TaskId(f"t{k}"),
            work=Work(n_tokens=rng.choice([10.0, 20.0, 30.0])),
            value=rng.choice([1.0, 2.0]),
            deadline_at=rng.choice([FOREVER, 5.0, 8.0]),
        )
        for k in range(8)
    ]
    nodes = [NodeView(id=NodeId(f"n{k}"), rates=RATES.scaled(rng.choice([1.0, 2.0]))) for k in range(3)]

    def story(jobs: list[Job], nodes: list[NodeView]) -> list[tuple[str, str, str | None]]:
        made = Dispatcher(policy_named(policy), CostModel())
        for view in nodes:
            made.put_node(view)
        for job in jobs:
            made.add(job, 0.0)
        told: list[tuple[str, str, str | None]] = []
        for step in range(12):
            now = 0.7 * step
            for decision in made.decide(now):
                told.append((type(decision).__name__, decision.task, getattr(decision, "node", None)))
            for task in sorted(made._books.runs_on)[:1]:
                made.ended(task, now)
        return told

    others = story(data.draw(st.permutations(jobs)), data.draw(st.permutations(nodes)))
    assert story(jobs, nodes) == others


@settings(max_examples=25, deadline=None, derandomize=True)
@given(policy=st.sampled_from(NAMES), seed=st.integers(0, 2**32))
def test_a_seed_replays_to_the_same_decisions(policy: str, seed: int) -> None:
    assert live(policy, seed, 3, 1).started == live(policy, seed, 3, 1).started


@settings(max_examples=25, deadline=None, derandomize=True)
@given(policy=st.sampled_from(NAMES), seed=st.integers(0, 2**32), slots=st.sampled_from([1, 3]))
def test_what_the_dispatcher_holds_is_bounded_by_what_waits_and_runs(
    policy: str, seed: int, slots: int
) -> None:
    assert sizes(policy, seed, slots) == []


def sizes(policy: str, seed: int, slots: int) -> list[str]:
    """What is larger than it may be."""
    mesh = Mesh(policy, seed, 2, slots)
    for _ in range(40):
        mesh.arrive(4)
        mesh.decide()
        mesh.run(1.0)
        made = mesh.dispatcher
        n = made.n_waiting + made.n_running
        if len(made._hopeless) > 2 * made.n_waiting + 65:
            return ["_hopeless"]
        books = made._books
        if len(books.runs_on) > n or len(books.yielding) > n or len(made._newcomers) > n:
            return ["books"]
    mesh.finish()
    made, books = mesh.dispatcher, mesh.dispatcher._books
    held = [
        len(table) for table in (books.jobs, books.runs_on, books.yielding, books.paused, made._newcomers)
    ]
    left = [*held, len(books.nodes.needs.items()), len(books.nodes.reuses.items())]
    return [f"left {left}"] if any(left) else []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 30), m=st.integers(1, 5), slots=st.integers(1, 3))
def test_prices_are_the_cost_models_own_one_by_one(seed: int, n: int, m: int, slots: int) -> None:
    """The arrays against the plain sum of parts, and of what each that runs there takes meanwhile."""
    from coordinator.policy.pricing import prices

    mesh = Mesh("vdf", seed, m, slots)
    mesh.arrive(n)
    mesh.decide()
    made = mesh.dispatcher
    if not made.n_waiting:
        return
    for columns in (np.arange(m), np.array([m - 1])):
        priced = prices(made._books.jobs, made._books.nodes, slice(None), columns, mesh.now)
        for row, job in enumerate(made._books.jobs.jobs):
            for index, node in enumerate(columns):
                view = made._books.nodes.view(int(node))
                rows = float(made._books.nodes.n_rows[node]) + 1
                found = made.cost.estimate(job.work, view.id, view.rates, rows=rows)
                steps_s = found.parts["decode"]
                here = made._books.nodes.running(int(node)).values() if slots > 1 else ()
                others = [one for one in here if one.is_active and not one.stands_back(mesh.now)]
                alone_s, tunes = found.service_s - steps_s, job.work.kind == "tune"
                read = [one.alone_left_s(mesh.now) for one in others if not one.tunes]
                read_s = sum(read) if tunes or steps_s else sum(min(left_s, alone_s) for left_s in read)
                turns_s = alone_s if tunes else steps_s
                tuned_s = sum(min(one.alone_left_s(mesh.now), turns_s) for one in others if one.tunes)
                writing_s = max((one.left_s(mesh.now) for one in others if one.writes), default=0.0)
                expected = found.service_s + read_s + tuned_s + (min(alone_s, writing_s) if tunes else 0.0)
                assert priced.finish_s[row, index] == pytest.approx(expected)


# ── each check can fail ─────────────────────────────────────────────────────────────────────────────


def runs_red(check: Callable[[int], object], seeds: int = 40) -> bool:
    for seed in range(seeds):
        try:
            check(seed)
        except (BrokenPromise, AssertionError, KeyError):
            return True
    return False


def broken_lives(seed: int) -> None:
    live(("vdf+preempt", "edf+drop+chunk")[seed % 2], seed, 1 + seed % 3, 1 + seed % 2)


def plant_late_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    original = looking._allowed

    def allowed(policy, *rest):  # type: ignore[no-untyped-def]
        return original(replace(policy, drop=False), *rest)

    monkeypatch.setattr(looking, "_allowed", allowed)
    few_starts = few.few_starts
    monkeypatch.setattr(
        looking, "few_starts", lambda policy, *rest: few_starts(replace(policy, drop=False), *rest)
    )


def plant_double_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Books, "leave", lambda self, task: None)


def plant_overfull_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = NodeTable._count

    def count(self: NodeTable, row: int) -> None:
        original(self, row)
        self.has_room[row] = True
        self.n_open = len(self)

    monkeypatch.setattr(NodeTable, "_count", count)


def plant_forgotten_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuning task that gave way is not put back."""
    monkeypatch.setattr(Dispatcher, "requeue", lambda self, task, now, **rest: self.withdraw(task, now))


def plant_forgotten_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "resume", lambda books, policy, now: [])


def plant_rejected_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop_anything(self: Dispatcher, now: float) -> list[Drop]:
        self._hopeless.clear()
        return [Drop(task=task, reason="bad mood") for task in list(self._books.runs_on)[:1]]

    monkeypatch.setattr(Dispatcher, "_drop_hopeless", drop_anything)


@pytest.mark.parametrize(
    "plant",
    [
        plant_late_starts,
        plant_double_starts,
        plant_overfull_nodes,
        plant_forgotten_requeue,
        plant_forgotten_resume,
        plant_rejected_runners,
    ],
)
def test_a_planted_bug_turns_the_checks_red(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    assert runs_red(broken_lives), f"{plant.__name__} was not noticed"


def test_without_a_planted_bug_the_same_lives_are_green() -> None:
    assert not runs_red(broken_lives)


# Where a failure is wanted, the smallest one is not: shrinking takes ten times as long as finding.
is_order_nothing = settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])(
    given(policy=st.sampled_from(NAMES), seed=st.integers(0, 2**32), data=st.data())(order_changes_nothing)
)


def test_ties_by_row_instead_of_by_rule_turn_the_permutation_check_red(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: equal scores go in the order of the table, which is that of arrival."""
    monkeypatch.setattr(JobTable, "tie_of", lambda self, row: (0.0, "", TaskId(str(row))))
    assert runs_red(lambda seed: is_order_nothing(), seeds=1)


def test_nodes_in_the_order_they_came_turn_the_permutation_check_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def column_for(nodes, seen, index, place):  # type: ignore[no-untyped-def]
        keys = np.where(seen.scores[index] > -np.inf, seen.finish_s[index], np.inf)
        return None if keys.min() == np.inf else int(keys.argmin())

    monkeypatch.setattr(starting, "column_for", column_for)
    assert runs_red(lambda seed: is_order_nothing(), seeds=1)


def test_entries_that_nobody_tidies_turn_the_check_of_bounds_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatcher, "_tidy", lambda self: None)
    original = Dispatcher.add

    def add(self: Dispatcher, job: Job, now: float) -> None:
        original(self, job, now)
        self._hopeless += [(1e9, job.task)] * 3

    monkeypatch.setattr(Dispatcher, "add", add)
    assert sizes("edf+drop", 1, 1) == ["_hopeless"]


def test_left_work_that_is_never_nothing_is_what_a_runner_has() -> None:
    running = Running(Job(task=TaskId("t"), work=Work()), NodeId("a"), 0.0, 10.0, 0.0, 0.0)
    assert [running.left_share(at) for at in (0.0, 5.0, 10.0, 99.0)] == [1.0, 0.5, 0.05, 0.05]
    assert ordering.PAIRS_MAX >= 16_000  # a thousand tasks on sixteen nodes are scored at once
