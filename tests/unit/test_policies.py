"""The formulas and the policies, one row of a table each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from coordinator.policy.density import age_factor, laxity_s, slack_discount, value_density
from coordinator.policy.policies import DEFAULT_POLICY, POLICIES, Recent, Scene, policy_named
from coordinator.policy.preempting import may_preempt

E = math.e


def scene(
    *tasks: tuple[float, float, float, float], now: float = 0.0, mean_s: float = 2.0, speed: float = 1.0
) -> Scene:
    """Tasks as (value, service seconds, deadline, arrival), on one node ``speed`` times as fast."""
    value, service_s, deadline_at, arrived_at = (np.array(column) for column in zip(*tasks, strict=True))
    finish_s = service_s[:, None] / speed
    nothing = np.zeros(0)
    return Scene(
        now=now,
        value=value,
        deadline_at=deadline_at,
        is_virtual=np.zeros(len(tasks), np.bool_),
        arrived_at=arrived_at,
        cost_s=finish_s,
        finish_s=finish_s,
        mean_s=np.array([mean_s]),
        best_s=finish_s[:, 0],
        open_nodes=np.array([0]),
        room_in_s=lambda: np.zeros(1),
        capacity=lambda: np.ones(1),
        recent=lambda: Recent(arrived_at=nothing, deadline_at=nothing, value=nothing, best_s=nothing),
        all_finish_s=lambda: finish_s,
    )


# ── formulas ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("deadline_at", "now", "service_s", "expected"),
    [(10.0, 0.0, 3.0, 7.0), (10.0, 7.0, 3.0, 0.0), (10.0, 8.0, 3.0, -1.0), (math.inf, 8.0, 3.0, math.inf)],
)
def test_laxity_is_what_is_left_after_the_service(
    deadline_at: float, now: float, service_s: float, expected: float
) -> None:
    assert laxity_s(np.array(deadline_at), now, np.array(service_s)) == expected


@pytest.mark.parametrize(
    ("laxity", "mean_s", "k", "expected"),
    [
        (0.0, 2.0, 2.0, 1.0),
        (-5.0, 2.0, 2.0, 1.0),  # lost work never looks more urgent than urgent work
        (4.0, 2.0, 2.0, 1 / E),
        (8.0, 2.0, 2.0, 1 / E**2),
        (math.inf, 2.0, 2.0, 0.0),
    ],
)
def test_time_to_spare_discounts_by_e_for_each_k_mean_services(
    laxity: float, mean_s: float, k: float, expected: float
) -> None:
    assert slack_discount(np.array(laxity), np.array(mean_s), k) == pytest.approx(expected)


def test_density_is_value_per_second() -> None:
    assert value_density(np.array([6.0]), np.array([3.0])) == [2.0]


@pytest.mark.parametrize(
    ("now", "expected"), [(0.0, 1.0), (30.0, 1.0), (60.0, 2.0), (90.0, 4.0), (1e9, 2.0**40)]
)
def test_a_task_without_a_deadline_ages_by_doubling(now: float, expected: float) -> None:
    assert age_factor(now, np.array([30.0]), np.array([30.0])) == [expected]


def test_a_task_with_a_deadline_does_not_age() -> None:
    assert age_factor(1e6, np.array([30.0]), np.array([np.inf])) == [1.0]


@pytest.mark.parametrize(
    ("newcomer", "runner", "newcomer_s", "left_s", "deadline_in_s", "expected"),
    [
        (2.0, 1.0, 3.0, 4.0, 7.0, True),
        (1.9, 1.0, 3.0, 4.0, 7.0, False),  # not twice as dense
        (2.0, 1.0, 3.0, 4.0, 6.9, False),  # the runner would be late
        (2.0, 1.0, 3.0, 4.0, math.inf, True),
        (0.0, 0.0, 3.0, 4.0, 7.0, True),
    ],
)
def test_preemption_needs_twice_the_density_and_a_runner_that_still_ends_in_time(
    newcomer: float, runner: float, newcomer_s: float, left_s: float, deadline_in_s: float, expected: bool
) -> None:
    numbers = (np.array(x) for x in (newcomer, runner, newcomer_s, left_s, deadline_in_s))
    assert bool(may_preempt(*numbers, ratio=2.0)) is expected


# ── policies ────────────────────────────────────────────────────────────────────────────────────────

#          value  service  deadline  arrival
SMALL = (1.0, 1.0, 50.0, 3.0)
DEAR = (9.0, 6.0, 60.0, 2.0)
EARLY = (2.0, 4.0, 10.0, 1.0)
FIRST = (3.0, 9.0, 40.0, 0.0)
TIGHT = (2.5, 30.0, 45.0, 4.0)
TASKS = {"small": SMALL, "dear": DEAR, "early": EARLY, "first": FIRST, "tight": TIGHT}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fifo", ["first", "early", "dear", "small", "tight"]),
        ("edf", ["early", "first", "tight", "small", "dear"]),
        ("sjf", ["small", "early", "dear", "first", "tight"]),
        ("hvf", ["dear", "first", "tight", "early", "small"]),
        ("llf", ["early", "tight", "first", "small", "dear"]),
        ("vdf-plain", ["dear", "small", "early", "first", "tight"]),
        ("vdf", ["early", "tight", "first", "small", "dear"]),
    ],
)
def test_each_policy_orders_by_its_own_rule(name: str, expected: list[str]) -> None:
    scores = POLICIES[name].score(scene(*TASKS.values(), mean_s=4.0))[:, 0]
    assert [list(TASKS)[row] for row in np.argsort(-scores)] == expected


def test_vdf_is_the_density_of_the_definition() -> None:
    (score,) = POLICIES["vdf"].score(scene((6.0, 3.0, 10.0, 0.0), now=1.0, mean_s=2.0))[:, 0]
    assert score == pytest.approx(6 / 3 * math.exp(-(10 - 1 - 3) / (2 * 2)))


def test_a_faster_node_makes_a_task_denser() -> None:
    for name in ("vdf", "vdf-plain", "sjf"):
        slow, fast = (POLICIES[name].score(scene(SMALL, speed=speed))[0, 0] for speed in (1.0, 6.0))
        assert name == "vdf" or fast > slow, name


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_scores_are_one_number_for_each_task_and_node(name: str) -> None:
    seen = scene(*TASKS.values())
    scores = POLICIES[name].score(seen)
    assert scores.shape == (len(TASKS), 1) and np.isfinite(scores).all()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_order_of_the_rows_changes_no_score(name: str) -> None:
    tasks = list(TASKS.values())
    ahead = POLICIES[name].score(scene(*tasks, mean_s=3.0))[:, 0]
    behind = POLICIES[name].score(scene(*reversed(tasks), mean_s=3.0))[:, 0]
    assert ahead.tolist() == behind[::-1].tolist()


# ── names ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "drop", "chunk", "preempt"),
    [
        ("fifo", False, False, False),
        ("edf+drop", True, False, False),
        ("edf+drop+chunk", True, True, False),
        ("vdf", True, True, POLICIES["vdf"].preempt),
        ("vdf-drop-chunk", False, False, POLICIES["vdf"].preempt),
        ("vdf-plain+drop+preempt", True, False, True),
        ("vdf-plain", False, False, False),
    ],
)
def test_rules_are_added_and_taken_away_by_name(text: str, drop: bool, chunk: bool, preempt: bool) -> None:
    policy = policy_named(text)
    assert (policy.name, policy.drop, policy.chunk, policy.preempt) == (text, drop, chunk, preempt)


@pytest.mark.parametrize("text", ["", "best", "vdf+", "vdf+fast", "+drop", "fifo drop"])
def test_an_unknown_policy_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="there are vdf, "):
        policy_named(text)


def test_the_default_is_there() -> None:
    assert DEFAULT_POLICY in POLICIES
