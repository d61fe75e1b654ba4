"""The plan that says which tasks may start: what it keeps, what it takes out, and what it expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy.cost import PredictionError
from coordinator.policy.foresight import capacity_s, expected, kept, mean_of, worth
from coordinator.policy.policies import PROMISE, Policy, Scene, margin_after, policy_named
from coordinator.virtual.devices import parse_nodes
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import run
from coordinator.virtual.workload import Mix, at_load, tasks_of

NOBODY = (np.zeros(0), np.zeros(0), np.zeros(0))
ONE_NODE = (np.array([1.0]), np.array([0.0]))

numbers = st.integers(1, 40).map(float)
tasks = st.lists(st.tuples(numbers, numbers, numbers), max_size=12)


def arrays(rows: list[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(worth, work, due) rows as columns."""
    columns = np.array(rows, dtype=float).reshape(-1, 3).T
    return columns[0], columns[1], columns[2]


def kept_slowly(rows: list[tuple[float, float, float]], pool: tuple[np.ndarray, np.ndarray]) -> set[int]:
    """The rule as its docstring tells it, one step at a time."""
    inside: list[int] = []
    density = [value / work for value, work, _ in rows]
    order = sorted(range(len(rows)), key=lambda k: (rows[k][2], density[k], rows[k][1]))
    for k in order:
        inside.append(k)
        can_s = sum(
            capacity * max(0.0, rows[k][2] - room)
            for capacity, room in zip(pool[0].tolist(), pool[1].tolist(), strict=True)
        )
        while sum(rows[i][1] for i in inside) > can_s + 1e-9:
            inside.remove(min(inside, key=lambda i: (density[i], -rows[i][2], rows[i][1])))
    return set(inside)


def test_everything_is_kept_where_everything_fits() -> None:
    assert kept(*arrays([(1, 2, 4), (5, 2, 4), (1, 3, 7)]), NOBODY, ONE_NODE).all()


def test_of_too_much_the_least_worth_per_second_goes() -> None:
    is_kept = kept(*arrays([(4, 2, 4), (1, 2, 4), (4, 2, 5)]), NOBODY, ONE_NODE)
    assert is_kept.tolist() == [True, False, True]


def test_a_later_task_of_more_worth_takes_the_place_of_an_earlier_one() -> None:
    assert kept(*arrays([(1, 3, 3), (9, 3, 4)]), NOBODY, ONE_NODE).tolist() == [False, True]


def test_what_is_expected_takes_the_place_of_who_waits() -> None:
    waiting = arrays([(1, 3, 5)])
    assert kept(*waiting, NOBODY, ONE_NODE).all()
    assert not kept(*waiting, arrays([(9, 3, 5)]), ONE_NODE).any()
    assert kept(*waiting, arrays([(0.1, 3, 5)]), ONE_NODE).all(), "of less worth: it goes itself"
    assert kept(*waiting, arrays([(9, 3, 6)]), ONE_NODE).all(), "due later: not its turn yet"


def test_the_past_comes_again_in_the_mirror() -> None:
    _, _, due_in_s = expected(10.0, np.array([4.0, 9.0]), np.array([7.0, 11.0]), np.ones(2), np.ones(2))
    assert due_in_s.tolist() == [6.0 + 3.0, 1.0 + 2.0]


@pytest.mark.parametrize(
    ("value", "recent", "worths"),
    [([2.0], [4.0, 6.0], [7.0]), ([2.0, 4.0], [], [5.0, 7.0]), ([], [3.0], []), ([], [], [])],
)
def test_a_promise_is_worth_the_mean_value_of_recent_tasks(
    value: list[float], recent: list[float], worths: list[float]
) -> None:
    assert worth(np.array(value), mean_of(np.array(recent)), 1.0).tolist() == worths


@given(tasks, tasks, st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3))
def test_it_is_the_rule_it_says_it_is(
    waiting: list[tuple[float, float, float]],
    likely: list[tuple[float, float, float]],
    nodes: list[tuple[float, float]],
) -> None:
    pool = (np.array([c for c, _ in nodes]) / 20, np.array([r for _, r in nodes]) / 10)
    is_kept = kept(*arrays(waiting), arrays(likely), pool)
    due = max((row[2] for row in waiting), default=0.0)
    rows = waiting + [row for row in likely if row[2] <= due]
    slow = kept_slowly(rows, pool)
    alike = {waiting[k] for k in slow if k < len(waiting)}
    # Tasks alike in density, work and deadline are kept together; the slow rule keeps the first few of them.
    assert {waiting[k] for k in np.flatnonzero(is_kept)} >= alike
    if len(set(rows)) == len(rows):
        assert set(np.flatnonzero(is_kept).tolist()) == {k for k in slow if k < len(waiting)}


@given(tasks, st.integers(0, 2**32))
def test_the_order_of_rows_changes_nothing(rows: list[tuple[float, float, float]], seed: int) -> None:
    shuffled = list(range(len(rows)))
    Random(seed).shuffle(shuffled)
    straight = kept(*arrays(rows), NOBODY, ONE_NODE)
    mixed = kept(*arrays([rows[k] for k in shuffled]), NOBODY, ONE_NODE)
    assert mixed.tolist() == straight[shuffled].tolist()


@given(tasks)
def test_distinct_tasks_that_are_kept_all_end_in_time_in_the_order_of_deadlines(
    rows: list[tuple[float, float, float]],
) -> None:
    rows = list(dict.fromkeys(rows))
    is_kept = kept(*arrays(rows), NOBODY, ONE_NODE)
    at = 0.0
    for _, work, due in sorted(
        (row for row, keep in zip(rows, is_kept, strict=True) if keep), key=lambda r: r[2]
    ):
        at += work
        assert at <= due + 1e-6


@given(st.lists(st.tuples(numbers, numbers), max_size=4), st.lists(numbers, max_size=6))
def test_capacity_is_that_of_every_node_from_when_it_has_room(
    nodes: list[tuple[float, float]], until: list[float]
) -> None:
    capacity, room = np.array([c for c, _ in nodes]), np.array([r for _, r in nodes])
    slow = [sum(c * max(0.0, t - r) for c, r in nodes) for t in until]
    assert capacity_s(np.array(until), capacity, room) == pytest.approx(slow)


def test_a_node_that_never_has_room_adds_nothing() -> None:
    assert capacity_s(np.array([5.0]), np.array([1.0, 1.0]), np.array([np.inf, 1.0])).tolist() == [4.0]


@pytest.mark.parametrize(
    ("errors", "margin"),
    [
        ([], 1.2),
        ([(7, 0.01)], 1.2),
        ([(60, 0.05), (20, 0.25)], 1.1),
        ([(100, 0.0)], 1.0),
        ([(100, 0.9)], 1.2),
    ],
)
def test_the_margin_shrinks_to_the_errors_that_were_made(
    errors: list[tuple[int, float]], margin: float
) -> None:
    assert margin_after(1.2, [PredictionError(n, p50) for n, p50 in errors]) == margin


# ── the simulator turns red where the plan is broken ────────────────────────────────────────────────


def lost_by(policy: Policy) -> tuple[float, float]:
    """Share of tasks missed and of value lost, over some seeded bursts, of which not all can be done."""
    nodes = parse_nodes("1,1,0.5,6")
    missed = value_lost = 0.0
    for seed in (1, 2, 3):
        requests = generate(GeneratorSpec(tasks=150), Random(f"requests/{seed}"))
        tasks = at_load(tasks_of(requests, Mix(), seed, nodes), nodes, 1.5)
        metrics = run(tasks, nodes, policy)
        missed += metrics.timeouts / 3
        value_lost += (1 - metrics.value_kept) / 3
    return missed, value_lost


def plan_of(kept_by: Callable[..., np.ndarray]) -> Policy:
    """``foresight`` with another plan; the arguments of ``kept_by`` are those of ``kept``."""

    def keeps(scene: Scene) -> np.ndarray:
        recent = scene.recent()
        worths = worth(recent.value, recent.mean_value, PROMISE)
        ahead = expected(scene.now, recent.arrived_at, recent.deadline_at, worths, recent.best_s)
        waiting = worth(scene.value, recent.mean_value, PROMISE)
        pool = (scene.capacity(), scene.room_in_s())
        return kept_by(waiting, scene.best_s, scene.deadline_at - scene.now, ahead, pool)

    return replace(policy_named("foresight"), keeps=keeps)


def forecast_ignored(worths, work_s, due_in_s, ahead, pool):  # type: ignore[no-untyped-def]
    return kept(worths, work_s, due_in_s, NOBODY, pool)


def capacity_doubled(worths, work_s, due_in_s, ahead, pool):  # type: ignore[no-untyped-def]
    return kept(worths, work_s, due_in_s, ahead, (2 * pool[0], pool[1]))


def worst_kept(worths, work_s, due_in_s, ahead, pool):  # type: ignore[no-untyped-def]
    return kept(1 / worths, work_s, due_in_s, (1 / ahead[0], *ahead[1:]), pool)


def test_the_same_plan_from_outside_decides_the_same() -> None:
    assert lost_by(plan_of(kept)) == lost_by(policy_named("foresight"))


@pytest.mark.parametrize("mutant", [forecast_ignored, capacity_doubled, worst_kept])
def test_a_broken_plan_loses_more(mutant: Callable[..., np.ndarray]) -> None:
    """Planted: each bug costs deadlines or value, as the figures of ``tests.benchmarks.vdf`` would show."""
    right, wrong = lost_by(policy_named("foresight")), lost_by(plan_of(mutant))
    assert sum(wrong) > sum(right) + 0.005, f"{mutant.__name__}: {wrong} against {right}"
