"""Metrics of a run: rejected and never-run tasks are timeouts; intervals are Student's."""

from __future__ import annotations

import pytest

from coordinator.virtual.metrics import End, How, interval, measured


def end(name: str, value: float, ended_at: float, how: How, deadline_at: float = 10.0) -> End:
    return End(name, "generate", value, 0.0, deadline_at, ended_at, how)


def test_whoever_turns_work_away_does_not_look_better_for_it() -> None:
    ends = [
        end("a", 4.0, 5.0, "done"),
        end("b", 3.0, 11.0, "done"),  # late
        end("c", 2.0, 1.0, "rejected"),
        end("d", 1.0, 10.0, "expired"),
        end("e", 6.0, 10.0, "done"),  # just in time
    ]
    found = measured(
        ends, busy_s={"n": 6.0}, present_s={"n": 10.0, "m": 10.0}, wasted_s=1.5, pauses=0, failovers=0
    )
    assert found.timeouts == pytest.approx(3 / 5)
    assert found.value_kept == pytest.approx(10 / 16)
    assert (found.late, found.rejected, found.expired) == (0.2, 0.2, 0.2)
    assert found.utilization == pytest.approx(0.3)
    assert found.wasted == pytest.approx(0.25)
    assert found.busy == {"m": 0.0, "n": 0.6}
    assert found.latency_p50_s == 10.0


def test_an_interval_is_by_students_t() -> None:
    # Five values: 2.7764 (Student, 4 degrees) times 0.018708 (their deviation) over the root of 5.
    found = interval([0.10, 0.12, 0.11, 0.15, 0.12])
    assert found.mean == pytest.approx(0.12)
    assert found.half == pytest.approx(0.023229, abs=1e-6)
    assert interval([0.3]).half == 0.0
    assert interval([float(k % 2) for k in range(60)]).half == pytest.approx(0.130253, abs=2e-4)
