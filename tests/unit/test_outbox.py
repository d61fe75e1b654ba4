"""What leaves the compute process: in pieces, in order, and never too large."""

from __future__ import annotations

from typing import Any

from mesh.ids import TaskId
from mesh.messages import Output, TaskProgress
from mesh.messages.output import NUMBERS_MAX
from node.compute.messages import Ended, Progress, Text, frame
from node.compute.outbox import PROGRESS_EVERY_S, Outbox, fitting


class Said:
    def __init__(self) -> None:
        self.now = 10.0
        self.all: list[Any] = []
        self.outbox = Outbox(self.all.append, lambda: self.now)


def token(text: str) -> Text:
    return Text(task=TaskId("t1"), attempt=1, text=text, n_tokens=1)


def progress(step: int, task: str = "t2") -> Progress:
    at = TaskProgress(task=TaskId(task), attempt=1, seq=0, phase="training", fraction=step / 1000, step=step)
    return Progress(progress=at)


def test_the_first_token_goes_out_at_once_and_the_rest_is_joined() -> None:
    said = Said()
    said.outbox.take(token("a"))
    said.outbox.flush()
    assert [piece.text for piece in said.all] == ["a"]
    for text in "bcd":
        said.now += 0.01
        said.outbox.take(token(text))
        said.outbox.flush()
    assert len(said.all) == 1 and 0 < (said.outbox.due_s or 0) <= 0.07
    said.now += 0.1
    said.outbox.flush()
    said.outbox.take(token("e"))
    said.outbox.take(Ended(task=TaskId("t1"), attempt=1, state="done", text="abcde"))
    assert [piece.text for piece in said.all] == ["a", "bcd", "e", "abcde"]
    assert [getattr(piece, "n_tokens", 0) for piece in said.all][:3] == [1, 3, 1]
    assert said.outbox.due_s is None


def test_the_newest_progress_replaces_what_was_not_sent_and_the_last_one_is_said_before_the_end() -> None:
    said = Said()
    for step in range(1000):  # a step every 10 ms: ten seconds
        said.outbox.take(progress(step))
        said.outbox.flush()
        said.now += 0.01
    steps = [one.progress.step for one in said.all]
    assert steps[0] == 0 and steps == sorted(steps)
    assert len(steps) <= 10 / PROGRESS_EVERY_S + 1 <= 5 * 10
    said.outbox.take(progress(1000))
    said.outbox.take(Ended(task=TaskId("t2"), attempt=1, state="done"))
    assert [type(one) for one in said.all[-2:]] == [Progress, Ended]
    assert said.all[-2].progress.step == 1000 and said.outbox.due_s is None


def test_a_tuning_task_and_an_answer_side_by_side_keep_apart() -> None:
    said = Said()
    for _ in range(3):
        said.outbox.take(token("x"))
        said.outbox.take(progress(1))
    said.outbox.flush()
    assert [type(one) for one in said.all] == [Text, Progress]
    assert said.all[0].text == "xxx"


def test_a_result_too_large_to_travel_ends_its_task_in_words_instead_of_the_process() -> None:
    vectors = [[0.5] * (NUMBERS_MAX // 256)] * 256
    fits = Ended(task=TaskId("t"), attempt=1, state="done", output=Output(vectors=vectors))
    assert fitting(fits) is fits
    large = Ended(
        task=TaskId("t"), attempt=1, state="done", text="x" * 500_000, output=Output(vectors=vectors)
    )
    ended = fitting(large)
    assert ended.state == "rejected" and "too large to travel" in (ended.reason or "")
    assert frame(ended)
