"""Plain numbers for few tasks say what the arrays say, to the last bit: which of them decides is no matter.

Numbers are drawn coarse, so that equal deadlines, densities and costs are common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.policy import few, looking, policies, preempting, pricing
from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Job, NodeView, Start
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.foresight import RecentTask, expected, expected_soon, kept, kept_of_few
from coordinator.policy.policies import POLICIES, policy_named
from coordinator.policy.rates import Rates
from coordinator.policy.work import Work
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

NAMES = [*POLICIES, "edf+drop+chunk", "sjf+drop", "llf+drop+chunk+preempt", "vdf-drop"]
RATES = Rates(decode_tokens_per_s=10.0, adapter_load_s=0.3)

coarse = st.integers(1, 12).map(lambda n: n / 3)
tasks = st.lists(st.tuples(coarse, coarse, coarse), max_size=9)


def columns(rows: list[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array(rows, dtype=float).reshape(-1, 3).T
    return table[0], table[1], table[2]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(waiting=tasks.filter(bool), likely=tasks, nodes=st.lists(st.tuples(coarse, coarse), max_size=3))
def test_the_plan_of_few_is_the_plan(
    waiting: list[tuple[float, float, float]],
    likely: list[tuple[float, float, float]],
    nodes: list[tuple[float, float]],
) -> None:
    pool = (np.array([speed for speed, _ in nodes]), np.array([room for _, room in nodes]))
    last_s = max(due for *_, due in waiting)
    soon = [task for task in likely if task[2] <= last_s]
    worths, work_s, due_in_s = (column.tolist() for column in columns(waiting))
    plan = kept_of_few(worths, work_s, due_in_s, soon, pool)
    assert plan == kept(*columns(waiting), columns(likely), pool).tolist()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    recent=st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 100), coarse, coarse), max_size=12),
    ago_s=st.floats(0, 10),
    within_s=st.floats(0, 50),
)
def test_who_is_expected_soon_is_who_is_expected_within_the_time(
    recent: list[tuple[float, float, float, float]], ago_s: float, within_s: float
) -> None:
    now = max((arrived_at for arrived_at, *_ in recent), default=0.0) + ago_s
    known = sorted(
        RecentTask(arrived_at + in_s - 2 * arrived_at, arrived_at, arrived_at + in_s, value, best_s)
        for arrived_at, in_s, value, best_s in recent
    )
    _, arrived_at, deadline_at, value, best_s = (
        np.array(column) for column in (zip(*known, strict=True) if known else ((),) * 5)
    )
    worths, work_s, due_in_s = expected(now, arrived_at, deadline_at, value, best_s)
    is_soon = due_in_s <= within_s
    slow = zip(*(column[is_soon].tolist() for column in (worths, work_s, due_in_s)), strict=True)
    assert expected_soon(now, known, within_s, 99) == list(slow)


def life(policy: str, seed: int, *, n_nodes: int, explain: bool = False) -> list[tuple[float, Decision]]:
    """Everything that is decided while tasks come in bursts and end as they like."""
    rng = Random(seed)
    made = Dispatcher(policy_named(policy), CostModel(), DispatchConfig(explain=explain))
    for k in range(n_nodes):
        made.put_node(NodeView(id=NodeId(f"n{k}"), rates=RATES.scaled((1.0, 0.5, 6.0)[k % 3])))
    told: list[tuple[float, Decision]] = []
    running: list[TaskId] = []
    now = 0.0
    for n in range(40):
        now += rng.choice([0.0, 0.25, 1.0, 3.0])
        for k in range(rng.choice([0, 1, 1, 3])):
            is_tune = rng.random() < 0.15
            work = (
                Work(kind="tune", n_feature_tokens=50.0, n_tune_tokens=500.0, reuses="data")
                if is_tune
                else Work(
                    n_prompt_tokens=rng.choice([10.0, 50.0]),
                    n_tokens=rng.choice([5.0, 20.0]),
                    n_adapter_loads=rng.choice([0.0, 1.0]),
                    reuses=rng.choice([None, "a", "b"]),
                )
            )
            in_s = rng.choice([1.0, 4.0, 9.0, 40.0] if rng.random() < 0.97 else [FOREVER])
            task = TaskId(f"t{n}-{k}")
            made.add(
                Job(
                    task=task,
                    work=work,
                    value=rng.choice([1.0, 3.0]),
                    arrived_at=now,
                    deadline_at=now + in_s,
                ),
                now,
            )
        for decision in made.decide(now):
            told.append((now, decision))
            if isinstance(decision, Start):
                running.append(decision.task)
        rng.shuffle(running)
        while running and rng.random() < 0.5:
            made.ended(running.pop(), now, Observed(service_s=rng.uniform(0.5, 5)))
    return told


def lives_differ(monkeypatch: pytest.MonkeyPatch, policy: str, seed: int) -> bool:
    """Whether anything is decided otherwise, or by other numbers, where nothing is few."""
    by_numbers = life(policy, seed, n_nodes=1 + seed % 3)
    with monkeypatch.context() as patch:
        patch.setattr(few, "_PAIRS_MAX", -1)
        patch.setattr(policies, "_FEW_MAX", -1)
        patch.setattr(preempting, "_FEW_MAX", -1)
        patch.setattr(pricing, "_FEW_NODES", -1)
        by_arrays = life(policy, seed, n_nodes=1 + seed % 3)
    return by_numbers != by_arrays


@pytest.mark.parametrize("policy", NAMES)
def test_few_tasks_are_decided_as_many_are(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    assert not any(lives_differ(monkeypatch, policy, seed) for seed in range(12))


def plant_other_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit more."""
    original = pricing.price_alone
    monkeypatch.setattr(few, "price_alone", lambda *rest: float(np.nextafter(original(*rest), np.inf)))


def plant_starts_without_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    original = few.few_starts

    def starts(policy, *rest):  # type: ignore[no-untyped-def]
        return original(replace(policy, margin=1.0), *rest)

    monkeypatch.setattr(looking, "few_starts", starts)


def plant_no_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    original = preempting._is_never

    def is_never(*rest, **more):  # type: ignore[no-untyped-def]
        return original(*rest, **more) or preempting._FEW_MAX > 0

    monkeypatch.setattr(preempting, "_is_never", is_never)


def plant_everything_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "kept_of_few", lambda worths, *rest: [True] * len(worths))


def plant_other_best(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pricing._fastest_of_few_s
    monkeypatch.setattr(pricing, "_fastest_of_few_s", lambda *rest: 1.01 * original(*rest))


@pytest.mark.parametrize(
    "plant",
    [
        plant_other_prices,
        plant_starts_without_a_margin,
        plant_no_preemption,
        plant_everything_kept,
        plant_other_best,
    ],
)
def test_a_planted_difference_turns_the_comparison_red(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    assert any(lives_differ(monkeypatch, "foresight", seed) for seed in range(25)), plant.__name__
