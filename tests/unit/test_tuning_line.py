"""Tuning tasks in line: one at a time, each told what is left of its deadline when its turn comes."""

from __future__ import annotations

from coordinator.policy.work import PATIENCE
from mesh.errors import ConfigError
from mesh.ids import TaskId
from mesh.messages import AdapterCard, Output, Submit, TuneSpec
from node.compute.messages import Ended, Progress, Run, Stop
from node.compute.serve.tuning import Tuning, tunes
from node.compute.tune.job import Snapshot, TuneEvent

CARD = AdapterCard(name="a", digest="d", method="lora", top_layers=1, first_layer=3, bytes=9, task="classify")


class Line:
    """A line of jobs of two chunks each, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.step_s = 0.0
        self.made: list[tuple[str, float | None]] = []
        self.closed = 0
        self.tuning = Tuning(tunes(self._make), lambda: self.now)

    def _make(self, spec: TuneSpec, left_s: float | None) -> _Job:
        if spec.adapter == "bad":
            raise ConfigError("line 3: 'label' missing")
        self.made.append((spec.adapter, left_s))
        return _Job(self)

    def start(self, adapter: str, budget_s: float | None = None) -> list[object]:
        submit = Submit(kind="tune", tune=TuneSpec(adapter=adapter, data="{}"))
        return list(self.tuning.start(Run(task=TaskId(adapter), attempt=1, submit=submit, budget_s=budget_s)))


class _Job:
    def __init__(self, line: Line) -> None:
        self.progress = Snapshot()
        self.output = Output()
        self._line = line
        self._n = 0

    def step(self) -> TuneEvent:
        self._n += 1
        self._line.now += self._line.step_s
        self.progress = Snapshot(phase="training", fraction=self._n / 2)
        if self._n == 2:
            self.output = Output(adapter=CARD)
        return TuneEvent(self.progress, is_done=self._n == 2)

    def close(self) -> None:
        self._line.closed += 1


def test_each_is_told_the_time_that_is_left_when_its_turn_comes() -> None:
    line = Line()
    assert line.start("first", 30.0) == []
    (waiting,) = line.start("second", 10.0)
    assert isinstance(waiting, Progress) and "waits for 1 other" in waiting.progress.text
    line.start("third")
    while len(line.tuning):
        line.now += 2.0
        line.tuning.step()
    assert line.made == [("first", 28.0), ("second", 4.0), ("third", None)]
    assert line.closed == 3


def test_a_deadline_that_passed_in_line_leaves_nothing_and_not_less() -> None:
    line = Line()
    line.start("first", 1.0)
    line.now += 5.0
    line.tuning.step()
    assert line.made == [("first", 0.0)]


def test_bad_data_reject_their_own_task_and_the_next_one_goes_on() -> None:
    line = Line()
    line.start("bad")
    line.start("good")
    (refused,) = line.tuning.step()
    assert isinstance(refused, Ended)
    assert (refused.state, refused.task, refused.reason) == ("rejected", "bad", "line 3: 'label' missing")
    line.tuning.step()
    *_, done = line.tuning.step()
    assert isinstance(done, Ended) and done.output is not None
    assert (done.state, done.task, done.output.adapter) == ("done", "good", CARD)


def test_one_that_is_stopped_in_line_leaves_the_first_alone() -> None:
    line = Line()
    line.start("first")
    line.start("second")
    line.tuning.step()
    (ended,) = line.tuning.stop(Stop(task=TaskId("second"), attempt=1, reason="enough"))
    assert isinstance(ended, Ended) and (ended.state, ended.reason, line.closed) == ("cancelled", "enough", 0)
    *_, done = line.tuning.step()
    assert isinstance(done, Ended) and (done.state, done.task) == ("done", "first")


def test_a_job_stands_back_while_it_has_the_time_and_takes_its_share_once_it_has_not() -> None:
    line = Line()
    line.start("first", 200.0)
    assert not line.tuning.stands_back, "nobody knows yet how long it takes"
    line.step_s = 10.0
    line.tuning.step()  # half of it: ten more seconds are left
    assert line.tuning.stands_back
    line.now += 200.0 - 10.0 - PATIENCE * 10.0
    assert not line.tuning.stands_back


def test_a_job_without_a_deadline_always_stands_back() -> None:
    line = Line()
    line.start("first")
    assert line.tuning.stands_back
