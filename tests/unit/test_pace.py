"""A node that plays a slower device: what its engine reads from the clock, and when it may go on."""

from __future__ import annotations

import pytest

from node.compute.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_takes_four_times_as_long_by_its_own_clock_and_by_everybodys() -> None:
    clock = Clock()
    pace = Pace(4, clock)
    with pace.working():
        started_at = pace.clock()
        clock.now += 0.5
        assert pace.clock() - started_at == 2.0
    assert pace.rest_s == 1.5
    assert pace.clock() - started_at == 2.0, "while it rests, the step has just ended"
    clock.now += 1.5
    assert pace.rest_s == 0
    clock.now += 1.0
    assert pace.clock() - started_at == 3.0, "between steps time passes as everywhere"


def test_without_a_slowdown_nothing_changes() -> None:
    clock = Clock()
    pace = Pace(1, clock)
    with pace.working():
        clock.now += 0.7
        assert pace.clock() == clock.now
    assert (pace.rest_s, pace.clock()) == (0, clock.now)


@pytest.mark.parametrize("slowdown", [1, 1.5, 7])
def test_the_clock_never_goes_back(slowdown: float) -> None:
    clock = Clock()
    pace = Pace(slowdown, clock)
    seen = [pace.clock()]
    for took_s in (0.1, 0.0, 0.3):
        with pace.working():
            seen.append(pace.clock())
            clock.now += took_s
            seen.append(pace.clock())
        seen.append(pace.clock())
        clock.now += pace.rest_s
        seen.append(pace.clock())
        clock.now += 0.05
    assert seen == sorted(seen)


def test_a_step_that_fails_is_over_all_the_same() -> None:
    clock = Clock()
    pace = Pace(2, clock)
    with pytest.raises(RuntimeError), pace.working():
        clock.now += 1
        raise RuntimeError
    assert pace.rest_s == 1
