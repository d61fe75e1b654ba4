"""How many layers: the decision from what was measured, and what it says about it."""

from __future__ import annotations

import pytest

from node.compute.tune.auto import Measured, decide


def measured(k: int, loss: float, accuracy: float, whole_s: float, error: float = 0.02) -> Measured:
    return Measured(k, loss, error, accuracy, whole_s)


FOUND = [
    measured(1, 0.90, 0.70, 10),
    measured(2, 0.60, 0.80, 25),
    measured(4, 0.41, 0.88, 60),
    measured(8, 0.40, 0.89, 150),
]


def test_the_smallest_that_is_as_good_as_the_best_within_the_noise_is_taken() -> None:
    assert decide(FOUND, 30, None, is_classifier=True).top_layers == 4


def test_what_would_be_too_late_is_not_taken_and_is_named() -> None:
    choice = decide(FOUND, 30, 50.0, is_classifier=True)
    assert choice.top_layers == 2
    assert choice.reason == (
        "2 of 30 layers: 80% right on held-out records in a short trial (1: 70% right, 4: 88% right, "
        "8: 89% right), about 25 s of the 50 s left; 4 would be too late"
    )


def test_a_clear_gain_is_worth_more_layers() -> None:
    found = [*FOUND[:3], measured(8, 0.30, 0.93, 150)]
    assert decide(found, 30, None, is_classifier=True).top_layers == 8


def test_where_nothing_is_in_time_the_quickest_is_taken_and_says_so() -> None:
    choice = decide(FOUND, 30, 5.0, is_classifier=True)
    assert choice.top_layers == 1
    assert "the quickest, and still about 10 s with 5 s left" in choice.reason


def test_a_language_model_is_judged_by_its_loss() -> None:
    reason = decide(FOUND, 30, None, is_classifier=False).reason
    assert reason.startswith("4 of 30 layers: loss 0.41 on held-out records")


@pytest.mark.parametrize("left_s", [1.0, 30.0, 100.0, 1000.0])
def test_more_time_never_means_fewer_layers(left_s: float) -> None:
    less = decide(FOUND, 30, left_s, is_classifier=True).top_layers
    more = decide(FOUND, 30, 2 * left_s, is_classifier=True).top_layers
    assert more >= less
