"""Fetching or computing: what took less lately is chosen, and one bad estimate does not freeze the choice."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from node.compute.features.choice import FetchOrCompute, Verdict

EXPECTED_S = 0.01
ROWS, LAYERS = 10_000, 28


def choice() -> FetchOrCompute:
    return FetchOrCompute(2**-17)  # these rows take 2.1 s


def decided(of: FetchOrCompute, expected_s: float | None = EXPECTED_S) -> Verdict:
    return of.decide(of.fetch_s(expected_s), of.compute_s(ROWS, LAYERS))


def test_the_side_that_took_less_is_chosen_and_both_estimates_are_told() -> None:
    verdict = decided(choice())
    assert (verdict.side, verdict.fetch_s, verdict.compute_s) == ("fetch", EXPECTED_S, ROWS * LAYERS * 2**-17)
    assert verdict.text == "about 0.01 s, computing them would take 2.1 s"
    slow = choice()
    for _ in range(10):
        slow.fetched(EXPECTED_S, 50.0)
    assert decided(slow).side == "compute"


def test_where_there_is_only_one_way_nothing_is_chosen() -> None:
    of = choice()
    assert decided(of, None).side == "compute"
    assert of.decide(of.fetch_s(EXPECTED_S), math.inf).side == "fetch"
    assert (of.n_fetches, of.n_computes, of.verdict) == (0, 0, None)


def test_a_measured_pace_replaces_the_guess_at_once() -> None:
    of = choice()
    of.computed(100, 10, 5.0)
    assert of.row_layer_s == 5e-3


def test_a_node_that_plays_a_slower_one_computes_as_slowly_as_that() -> None:
    of = FetchOrCompute(1e-5, slowdown=4)
    assert math.isclose(of.row_layer_s, 4e-5)
    of.computed(100, 10, 5.0)
    assert math.isclose(of.row_layer_s, 2e-2)


def test_close_estimates_do_not_make_it_flap() -> None:
    of = choice()
    sides = []
    for number in range(40):
        close = 2.8 * (0.9 if number % 2 else 1.1)
        sides.append(of.decide(close, 2.8))
    settled = [verdict.side for verdict in sides if not verdict.is_trial]
    assert len(set(settled)) == 1


def test_after_fetches_that_failed_it_computes_and_comes_back_once_they_work_again() -> None:
    of = choice()
    while decided(of).side == "fetch":
        of.fetched(EXPECTED_S, 10.0, 0.0)
    n_computed = 0
    for _ in range(1000):
        verdict = decided(of)
        if verdict.side == "compute":
            n_computed += 1
            continue
        of.fetched(EXPECTED_S, EXPECTED_S)
        if not verdict.is_trial:
            break
    assert decided(of).side == "fetch" and 0 < n_computed < 200


@given(st.floats(1e-4, 1e3), st.floats(1e-4, 1e3), st.integers(50, 400))
def test_trials_cost_at_most_a_tenth_more_than_always_choosing_right(
    fetch_s: float, compute_s: float, n: int
) -> None:
    """The truth is known and does not change: what is spent stays near the best."""
    of = choice()
    spent_s = sum(
        verdict.fetch_s if verdict.side == "fetch" else verdict.compute_s
        for verdict in (of.decide(fetch_s, compute_s) for _ in range(n))
    )
    best_s = n * min(fetch_s, compute_s)
    # Hysteresis has no first choice to hold on to here.
    assert spent_s <= 1.1 * best_s + 1e-6


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1)), max_size=50))
def test_whatever_was_measured_estimates_stay_usable(seen: list[tuple[float, float, float]]) -> None:
    of = choice()
    for expected_s, took_s, share in seen:
        of.fetched(expected_s, took_s, share)
        of.computed(int(took_s), int(expected_s), took_s)
    verdict = decided(of)
    assert 0 < verdict.fetch_s < math.inf and 0 < verdict.compute_s < math.inf
