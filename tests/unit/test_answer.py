"""The streamed answer: whatever was lost or started over, the whole text is printed, and only once."""

from __future__ import annotations

from dataclasses import replace

from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import TaskResult, TaskTokens
from node.faces.answer import Answer

PIECE = TaskTokens(task=TaskId("t-1"), attempt=1, seq=0, text="", n_tokens=1)
RESULT = TaskResult(
    task=TaskId("t-1"), state="done", text="one two three", finish_reason="stop", reason=None,
    node=NodeId("pi"), attempt=1, epoch=Epoch(1, NodeId("pi")), n_prompt_tokens=1, n_tokens=3, queue_s=0.0,
    ttft_s=0.1, service_s=1.0,
)  # fmt: skip


def piece(seq: int, text: str, attempt: int = 1) -> TaskTokens:
    return replace(PIECE, seq=seq, text=text, attempt=attempt)


def test_pieces_come_out_as_they_come_in_and_repetitions_do_not() -> None:
    answer = Answer()
    said = [answer.feed(p) for p in (piece(0, "one "), piece(1, "two "), piece(1, "two "), piece(2, "three"))]
    assert said == ["one ", "two ", "", "three"]
    assert answer.finish(RESULT) == ""


def test_after_a_lost_piece_the_result_fills_in() -> None:
    answer = Answer()
    assert answer.feed(piece(0, "one ")) == "one "
    assert answer.feed(piece(2, "three")) == ""
    assert answer.finish(RESULT) == "two three"


def test_an_attempt_that_says_the_same_again_is_not_printed_twice() -> None:
    answer = Answer()
    shown = answer.feed(piece(0, "one two "))
    shown += answer.feed(piece(0, "one ", attempt=2))
    shown += answer.feed(piece(1, "two ", attempt=1))  # the dead attempt's last word
    shown += answer.feed(piece(1, "two three", attempt=2))
    assert shown + answer.finish(RESULT) == "one two three"


def test_an_attempt_that_says_something_else_starts_on_a_new_line() -> None:
    answer = Answer()
    assert answer.feed(piece(0, "uno ")) == "uno "
    assert answer.feed(piece(0, "one ", attempt=2)) == "\none "
    assert answer.finish(RESULT) == "two three"


def test_without_a_stream_the_result_is_printed_whole() -> None:
    assert Answer().finish(RESULT) == "one two three"
