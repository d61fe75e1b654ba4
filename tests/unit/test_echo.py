"""The built-in model: words in, the same words out."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.errors import ConfigError
from mesh.ids import TaskId
from mesh.messages import ChatMessage, Submit, TuneSpec
from node.compute.echo import CONTEXT_WORDS, EchoEngine
from node.compute.messages import Ended, Pause, Resume, Run, Stop, Text
from node.compute.models import echo_rate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def generate(task: str = "t1", **submit: Any) -> Run:
    return Run(task=TaskId(task), attempt=1, submit=Submit(**submit))


def run(engine: EchoEngine, clock: Clock | None = None) -> tuple[list[Text], list[Ended]]:
    texts: list[Text] = []
    ends: list[Ended] = []
    for _ in range(10_000):
        if (due_s := engine.due_s) is None:
            return texts, ends
        if clock is not None:
            clock.now += due_s
        for event in engine.step():
            (texts if isinstance(event, Text) else ends).append(event)  # type: ignore[arg-type]
    raise AssertionError("the engine does not end")


def test_the_answer_is_the_prompt_with_its_spaces() -> None:
    engine = EchoEngine()
    prompt = "  to be,\n or  not\tto be "
    assert engine.start(generate(prompt=prompt)) == []
    texts, (end,) = run(engine)
    assert "".join(text.text for text in texts) == end.text == prompt
    assert (end.state, end.finish_reason, end.n_tokens, end.n_prompt_tokens) == ("done", "stop", 6, 6)
    assert engine.due_s is None


def test_messages_are_answered_with_the_last_one() -> None:
    engine = EchoEngine()
    engine.start(
        generate(
            messages=[
                ChatMessage(role="system", content="be brief"),
                ChatMessage(role="user", content="hi you"),
            ]
        )
    )
    assert run(engine)[1][0].text == "hi you"


def test_max_tokens_cuts_the_answer_and_says_so() -> None:
    engine = EchoEngine()
    engine.start(generate(prompt="one two three", max_tokens=2))
    (end,) = run(engine)[1]
    assert (end.text, end.finish_reason, end.n_tokens) == ("one two ", "length", 2)


def test_a_stop_string_is_not_in_the_answer() -> None:
    engine = EchoEngine()
    engine.start(generate(prompt="one two three four", stop=["o th"]))
    (end,) = run(engine)[1]
    assert (end.text, end.finish_reason) == ("one tw", "stop")


def test_an_answer_that_stops_at_once_is_empty_and_still_ends() -> None:
    engine = EchoEngine()
    engine.start(generate(prompt="one two", stop=["one"]))
    (end,) = run(engine)[1]
    assert (end.state, end.text, end.n_tokens, end.ttft_s) == ("done", "", 0, None)


def test_a_rate_gives_words_at_that_rate() -> None:
    clock = Clock()
    engine = EchoEngine("echo:20", clock)
    engine.start(generate(prompt="a b c d"))
    assert engine.step() == [], "the first word is not due yet"
    run(engine, clock)
    assert clock.now == pytest.approx(100 + 4 / 20)


def test_attempts_run_side_by_side_up_to_the_slots() -> None:
    clock = Clock()
    engine = EchoEngine("echo:10", clock)
    for i in range(engine.slots):
        assert engine.start(generate(f"t{i}", prompt="a b")) == []
    (refused,) = engine.start(generate("one-more", prompt="a b"))
    assert isinstance(refused, Ended) and refused.state == "failed" and "slots" in (refused.reason or "")
    run(engine, clock)
    assert clock.now == pytest.approx(100.2), "all four took the time of one"


def test_stopping_keeps_what_was_said_and_twice_is_harmless() -> None:
    clock = Clock()
    engine = EchoEngine("echo:10", clock)
    engine.start(generate(prompt="a b c"))
    clock.now += 0.1
    engine.step()
    stop = Stop(task=TaskId("t1"), attempt=1, reason="cancelled by the client")
    (end,) = engine.stop(stop)
    assert isinstance(end, Ended)
    assert (end.state, end.text, end.reason) == ("cancelled", "a ", "cancelled by the client")
    assert engine.stop(stop) == [] and engine.due_s is None


@pytest.mark.parametrize(
    ("submit", "words"),
    [
        ({"prompt": "x", "model": "llama-70b"}, "llama-70b"),
        ({"prompt": "x", "adapter": "poet"}, "poet"),
        ({"prompt": "word " * (CONTEXT_WORDS + 1)}, str(CONTEXT_WORDS)),
    ],
)
def test_what_it_cannot_do_is_rejected_with_the_reason(submit: dict[str, Any], words: str) -> None:
    engine = EchoEngine()
    (end,) = engine.start(generate(**submit))
    assert isinstance(end, Ended) and end.state == "rejected"
    assert words in (end.reason or "")
    assert engine.due_s is None


@pytest.mark.parametrize("name", ["echo:", "echo:fast", "echo:0", "echo:-1", "echo:nan", "echo:inf"])
def test_an_impossible_rate_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="echo:20"):
        echo_rate(name)


@pytest.mark.parametrize(
    ("submit", "what"),
    [
        ({"kind": "score", "texts": ["hi"]}, "score with"),
        ({"kind": "embed", "texts": ["hi"]}, "embed with"),
        ({"kind": "tune", "tune": TuneSpec(adapter="a", data="{}")}, "tune"),
    ],
)
def test_what_needs_weights_is_refused_in_words(submit: dict[str, Any], what: str) -> None:
    engine = EchoEngine()
    (ended,) = engine.start(generate(**submit))
    assert isinstance(ended, Ended) and ended.state == "rejected"
    assert ended.reason == f"echo has no weights to {what}; ask a node with a real model"
    assert engine.due_s is None


def test_a_slowed_echo_gives_words_that_many_times_slower() -> None:
    clock = Clock()
    engine = EchoEngine("echo:20", clock, slowdown=4)
    engine.start(generate(prompt="a b c d e f g h i j"))
    _, (end,) = run(engine, clock)
    assert end.service_s == pytest.approx(10 * 4 / 20)


def test_a_paused_echo_takes_no_slot_and_goes_on_with_the_next_word() -> None:
    clock = Clock()
    engine = EchoEngine("echo:10", clock)
    engine.slots = 1  # type: ignore[misc]
    engine.start(generate(prompt="a b c d"))
    clock.now += 0.15
    assert [event.text for event in engine.step() if isinstance(event, Text)] == ["a "]
    engine.pause(Pause(task=TaskId("t1"), attempt=1))
    assert engine.due_s is None
    assert engine.start(generate("t2", prompt="x")) == []
    clock.now += 5
    engine.step()
    engine.resume(Resume(task=TaskId("t1"), attempt=1))
    texts, (end,) = run(engine, clock)
    assert "".join(text.text for text in texts) == "b c d" and end.text == "a b c d"


def test_a_paused_echo_can_be_stopped() -> None:
    engine = EchoEngine("echo:10", Clock())
    engine.start(generate(prompt="a b"))
    engine.pause(Pause(task=TaskId("t1"), attempt=1))
    (end,) = engine.stop(Stop(task=TaskId("t1"), attempt=1, reason="enough"))
    assert isinstance(end, Ended) and end.state == "cancelled"
