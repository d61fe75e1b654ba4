"""Promises about tasks under loss, repetition, reordering, deaths, restarts and changes of coordinator.

Safety is checked over everything that was ever said; liveness after the faults have ended.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.admission import AdmissionConfig
from coordinator.scheduler import SchedulerConfig
from coordinator.task import TERMINAL_STATES
from mesh.facts import Deposed
from mesh.ids import Epoch, TaskId
from mesh.messages import CancelTask, TaskRecord, TaskResult, TaskStatus
from tests.unit.task_world import World, answer_of, ask


def rough_world(seed: int, n_nodes: int, loss: float, delay_s: float = 0.8) -> World:
    rng = Random(f"answers/{seed}")

    def answer(assign):  # type: ignore[no-untyped-def]
        if rng.random() < 0.1:
            return answer_of(assign, state="failed", reason="out of memory", retry=True)
        return answer_of(assign)

    world = World(seed=seed, loss=loss, repeat=0.2, delay_s=(0.001, delay_s), service_s=0.7, answer=answer)
    world.start(*(f"n{i}" for i in range(n_nodes)))
    world.elect("n0")
    return world.run(0.5)


def submit_some(world: World, chaos: Random, n: int, first: int) -> list[str]:
    ids = []
    for i in range(first, first + n):
        deadline_s = chaos.choice([None, None, 1.0, 3.0, 20.0])
        world.say(ask(f"prompt {i}", id=TaskId(f"t{i}"), deadline_s=deadline_s))
        ids.append(f"t{i}")
    return ids


def heal(world: World) -> None:
    """No more faults: everybody is up, everybody talks, one coordinates."""
    world.loss, world.repeat, world.delay_s = 0.0, 0.0, (0.001, 0.01)
    world.start(*(host.node for host in world.hosts.values() if not host.is_up))
    if world.coordinator is None:
        world.elect("n0")
    world.run(90)


def check(world: World, ids: list[str], submitted_at: dict[str, float], late_max_s: float) -> None:
    acknowledged = {
        m.task for _, _, m in world.said if isinstance(m, TaskStatus) and m.durable_on and m.state == "queued"
    }
    for task in ids:
        results = [m for _, _, m in world.said if isinstance(m, TaskResult) and m.task == task]
        if task in acknowledged:
            assert results, f"{task} was acknowledged and never ended; states {world.states(task)}"
        assert len({(r.state, r.text, r.attempt, r.epoch) for r in results}) <= 1, (
            f"{task} ended twice: {results}"
        )
        outcomes = [
            record.outcome
            for host in world.up
            if isinstance(record := host.journal.get(f"task/{task}"), TaskRecord)
        ]
        assert len({(o.state, o.text) if o else None for o in outcomes}) <= 1, f"disks disagree on {task}"
        for epoch in {status.epoch for status in world.heard(TaskStatus, task)}:
            statuses = [status.state for status in world.heard(TaskStatus, task) if status.epoch == epoch]
            ends = [i for i, state in enumerate(statuses) if state in TERMINAL_STATES]
            if ends:
                assert set(statuses[ends[0] :]) == {statuses[ends[0]]}, (
                    f"{task} went on after its end: {statuses}"
                )
    for at, node, assign in world.started:
        deadline_s = assign.submit.deadline_s
        if deadline_s is not None:
            # A message cannot know how long it was under way; that is all a start may be late.
            late_s = at - submitted_at[assign.task] - deadline_s
            assert late_s <= late_max_s, f"{assign.task} started on {node} {late_s} s after its deadline"
    for host in world.up:
        assert not any(key.startswith("attempt/") for key in host.journal), "an outcome was never taken"
        assert not host.running and not host.store.running


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n_nodes=st.integers(1, 5), loss=st.sampled_from([0.0, 0.05, 0.3]))
def test_every_acknowledged_task_ends_once_under_loss_and_reordering(
    seed: int, n_nodes: int, loss: float
) -> None:
    world, chaos = rough_world(seed, n_nodes, loss), Random(f"chaos/{seed}")
    ids: list[str] = []
    submitted_at: dict[str, float] = {}
    for step in range(6):
        for task in submit_some(world, chaos, 3, 3 * step):
            ids.append(task)
            submitted_at[task] = world.now
        if chaos.random() < 0.3:
            world.say(CancelTask(task=TaskId(chaos.choice(ids))))
        world.run(chaos.uniform(0, 3))
    heal(world)
    check(world, ids, submitted_at, late_max_s=0.8)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n_nodes=st.integers(2, 5), loss=st.sampled_from([0.0, 0.1]))
def test_every_acknowledged_task_ends_once_while_nodes_die_and_come_back(
    seed: int, n_nodes: int, loss: float
) -> None:
    """One node at a time is away, so of two disks that have a task one is always there."""
    world, chaos = rough_world(seed, n_nodes, loss, delay_s=0.2), Random(f"chaos/{seed}")
    ids: list[str] = []
    submitted_at: dict[str, float] = {}
    for step in range(6):
        for task in submit_some(world, chaos, 3, 3 * step):
            ids.append(task)
            submitted_at[task] = world.now
        world.run(chaos.uniform(0, 2))
        victim = chaos.choice(sorted(world.hosts))
        world.kill(victim)
        world.run(chaos.uniform(0, 2))
        world.bury(victim)
        if world.coordinator is None:
            world.elect(chaos.choice(world.up).node)
        world.run(chaos.uniform(0, 4))
        world.start(victim)
        world.run(4)  # copies are made good: the promise is two disks, not more
    heal(world)
    check(world, ids, submitted_at, late_max_s=3 * 0.2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n_nodes=st.integers(2, 5))
def test_handing_over_the_coordination_at_any_moment_loses_and_doubles_nothing(
    seed: int, n_nodes: int
) -> None:
    world, chaos = rough_world(seed, n_nodes, 0.0, delay_s=0.2), Random(f"chaos/{seed}")
    ids: list[str] = []
    submitted_at: dict[str, float] = {}
    for step in range(8):
        for task in submit_some(world, chaos, 2, 2 * step):
            ids.append(task)
            submitted_at[task] = world.now
        world.run(chaos.uniform(0, 1.5))
        old = world.coordinator
        assert old is not None
        if chaos.random() < 0.5:  # else it does not know yet, and must be stopped by the fences
            world.learn(old, Deposed(Epoch(world.term, old)))
        world.elect(chaos.choice(sorted(world.hosts)))
        world.run(chaos.uniform(0, 1.5))
    heal(world)
    check(world, ids, submitted_at, late_max_s=3 * 0.2)
    assert {world.states(task)[-1] for task in ids} <= TERMINAL_STATES


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 60), open_max=st.integers(1, 20))
def test_queues_are_bounded_and_every_submission_gets_an_answer(seed: int, n: int, open_max: int) -> None:
    config = SchedulerConfig(admission=AdmissionConfig(open_max=open_max))
    world = World(seed=seed, config=config, slots=1, service_s=0.2).start("n0", "n1")
    world.elect("n0")
    world.run(0.1)
    most = 0
    for i in range(n):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
        most = max(
            most, sum(n for state, n in world.scheduler.counts.items() if state not in TERMINAL_STATES)
        )
    assert most <= open_max
    world.run(60)
    assert all(world.states(f"t{i}")[-1] in ("done", "rejected") for i in range(n))
    assert sum(world.states(f"t{i}")[-1] == "done" for i in range(n)) >= min(n, open_max)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(prompts=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8), data=st.data())
def test_permuted_simultaneous_arrivals_start_in_one_order(prompts: list[str], data: st.DataObject) -> None:
    def starts(order: list[str]) -> list[str | None]:
        world = World(slots=1).start("n0")
        world.elect("n0")
        world.say(ask("keeps the only slot"))
        for prompt in order:
            world.say(ask(prompt))
        world.run(30)
        return [assign.submit.prompt for _, _, assign in world.started]

    assert starts(prompts) == starts(data.draw(st.permutations(prompts)))


# ── the checker can fail ────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_forgets_its_outcome_at_once_turns_the_check_red(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: no dedup of what ended. Repeated and late ``Assign``s then run a task again."""
    from coordinator import worker

    monkeypatch.setattr(worker.Worker, "_remember", lambda self, attempt, answer: None)
    monkeypatch.setattr(worker, "_is_answer", lambda ended: False)
    doubled = 0
    for seed in range(20):
        world = World(seed=seed, repeat=0.5, delay_s=(0.001, 3.0), service_s=0.1).start("n0", "n1")
        world.elect("n0")
        world.run(1)
        world.say(ask(id=TaskId("t1")))
        world.run(30)
        doubled += len(world.started) - len({(node, a.task, a.attempt) for _, node, a in world.started})
    assert doubled, "the planted bug was not noticed"


def test_the_same_worlds_without_the_planted_bug_stay_green() -> None:
    for seed in range(20):
        world = World(seed=seed, repeat=0.5, delay_s=(0.001, 3.0), service_s=0.1).start("n0", "n1")
        world.elect("n0")
        world.run(1)
        world.say(ask(id=TaskId("t1")))
        world.run(30)
        starts = [(node, assign.task, assign.attempt) for _, node, assign in world.started]
        assert len(starts) == len(set(starts))
