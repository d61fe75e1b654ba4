"""Who shares a node, what that costs, and who should wait."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.policy.company import Company
from coordinator.policy.rates import Rates
from coordinator.policy.work import PATIENCE, Work
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.nodes import VirtualNode
from coordinator.virtual.workload import VirtualTask
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

RATES = Rates(
    prefill_tokens_per_s=1.0, decode_tokens_per_s=1.0, row_cost=0.25, features_tokens_per_s=1.0,
    tune_tokens_per_s=1.0, adapter_load_s=0.0,
)  # fmt: skip
"""A token is a second."""
LENGTH = st.floats(0.1, 50)
TEXTS, JOBS = st.lists(LENGTH, max_size=4), st.lists(LENGTH, max_size=3)


def task(name: str, work: Work, deadline_at: float = FOREVER) -> VirtualTask:
    return VirtualTask(
        id=TaskId(name), arrives_at=0, deadline_at=deadline_at, value=1, work=work, true_factor=1
    )


def text(name: str, n: float) -> VirtualTask:
    return task(name, Work(kind="score", n_prompt_tokens=n))


def tuning(name: str, n: float) -> VirtualTask:
    """Too late to stand back."""
    return task(name, Work(kind="tune", n_tune_tokens=n), deadline_at=0.0)


def those(texts: list[float], jobs: list[float]) -> list[VirtualTask]:
    reading = [text(f"t{k}", length) for k, length in enumerate(texts)]
    return reading + [tuning(f"j{k}", length) for k, length in enumerate(jobs)]


def left_of(texts: list[float], jobs: list[float]) -> list[tuple[float, bool]]:
    return [(length, False) for length in texts] + [(length, True) for length in jobs]


def extra_s(
    others: list[tuple[float, bool]],
    answers_s: float,
    alone_s: float,
    steps_s: float = 0.0,
    *,
    tunes: bool = False,
) -> float:
    company = Company.of([(left_s, 1.0, tunes) for left_s, tunes in others], answers_s)
    if company is None:
        return 0.0
    return float(company.extra_s(np.array([alone_s]), np.array([steps_s]), np.array([tunes]))[0])


def ends(node: VirtualNode) -> dict[str, float]:
    """When each of those on the node is done."""
    found = {}
    while (at := node.next_at()) < FOREVER:
        node.advance(at)
        found |= {attempt.task.id: at for attempt in node.ended()}
    return found


def shared_node(*tasks: VirtualTask) -> VirtualNode:
    node = VirtualNode(NodeSpec(id=NodeId("n"), rates=RATES, slots=16))
    for one in tasks:
        node.start(one, 1.0, 0.0)
    return node


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.floats(0.1, 50), min_size=1, max_size=6), joiner=st.floats(0.1, 50))
def test_who_joins_readers_ends_when_the_virtual_node_says(lengths: list[float], joiner: float) -> None:
    others = [text(f"t{k}", length) for k, length in enumerate(lengths)]
    expected = joiner + extra_s([(length, False) for length in lengths], 0.0, joiner)
    assert ends(shared_node(*others, text("joiner", joiner)))["joiner"] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, jobs=JOBS, reading=LENGTH, answer=LENGTH)
def test_an_answer_waits_for_all_that_is_read_and_takes_turns_with_tuning(
    texts: list[float], jobs: list[float], reading: float, answer: float
) -> None:
    expected = reading + answer + extra_s(left_of(texts, jobs), 0.0, reading, answer)
    node = shared_node(*those(texts, jobs), task("joiner", Work(n_prompt_tokens=reading, n_tokens=answer)))
    assert ends(node)["joiner"] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, jobs=JOBS, answer=LENGTH, joiner=LENGTH)
def test_tuning_waits_for_all_that_is_read_and_takes_turns_with_answers(
    texts: list[float], jobs: list[float], answer: float, joiner: float
) -> None:
    expected = joiner + extra_s(left_of(texts, jobs), answer, joiner, tunes=True)
    node = shared_node(*those(texts, jobs), task("a", Work(n_tokens=answer)), tuning("joiner", joiner))
    assert ends(node)["joiner"] == pytest.approx(expected)


def test_a_text_is_read_as_fast_beside_answers_as_alone() -> None:
    assert extra_s([], 30.0, 4.0) == 0.0
    node = shared_node(task("a", Work(n_tokens=30.0)), text("t", 4.0))
    assert ends(node) == {"t": pytest.approx(4.0), "a": pytest.approx(34.0)}


def test_nobody_is_no_company() -> None:
    assert Company.of([(0.0, 3.0, False)], answers_s=0.0) is None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_task_is_welcome_if_it_saves_more_than_it_takes(seed: int) -> None:
    """Against the two cases played out: it reads with the others, or after them."""
    rng = Random(seed)
    others = [(rng.uniform(0.1, 20), rng.choice([1.0, 3.0, 10.0])) for _ in range(rng.randint(1, 4))]
    value, length = rng.choice([1.0, 3.0, 10.0]), rng.uniform(0.1, 20)
    company = Company.of([(alone_s, worth, False) for alone_s, worth in others], answers_s=0.0)
    assert company is not None
    texts = [text(f"t{k}", alone_s) for k, (alone_s, _) in enumerate(others)]
    now, later = ends(shared_node(*texts, text("joiner", length))), ends(shared_node(*texts))
    lost = sum((now[f"t{k}"] - later[f"t{k}"]) * worth for k, (_, worth) in enumerate(others))
    saved = value * (max(later.values()) + length - now["joiner"])
    if saved != pytest.approx(lost, rel=1e-6, abs=1e-6):
        found = bool(company.welcomes(np.array([value]), np.array([length]))[0])
        assert found == (saved > lost)


def test_tuning_that_has_time_stands_back_until_it_must_not() -> None:
    job = task("job", Work(kind="tune", n_tune_tokens=10.0), deadline_at=100.0)
    node = shared_node(job, task("t", Work(n_tokens=200.0)))
    node.advance(1.0)
    assert node.next_at() == 100.0 - PATIENCE * 10.0, "it has not moved until then"
    found = ends(node)
    assert found["job"] == pytest.approx(40.0 + 2 * 10.0), "from there it takes its equal share"
    assert found["t"] == pytest.approx(210.0)


def test_tuning_alone_does_not_wait() -> None:
    job = task("job", Work(kind="tune", n_tune_tokens=10.0), deadline_at=1000.0)
    assert ends(shared_node(job)) == {"job": 10.0}


def test_joining_costs_more_the_more_read() -> None:
    costs = [extra_s([(5.0, False)] * n, 0.0, 4.0) for n in range(1, 5)]
    assert all(more > less for less, more in pairwise(costs))
