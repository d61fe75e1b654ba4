"""``Stack``: facts of one core reach all others before the call returns, in order."""

from __future__ import annotations

import pytest

from mesh.core import FOREVER, Broadcast, Effect, Notify, Stack


class Recorder:
    """Answers a message with a fact, a fact with what the test says, and remembers everything."""

    def __init__(
        self, name: str, answers: dict[object, list[Effect]] | None = None, wake_at: float = FOREVER
    ) -> None:
        self.name = name
        self.answers = answers or {}
        self.wake_at = wake_at
        self.seen: list[object] = []

    def receive(self, message: object, sender: str, now: float) -> list[Effect]:
        self.seen.append(message)
        return self.answers.get(message, [])

    def learn(self, fact: object, now: float) -> list[Effect]:
        self.seen.append(fact)
        return self.answers.get(fact, [])

    def tick(self, now: float) -> list[Effect]:
        self.seen.append("tick")
        self.wake_at = FOREVER
        return []


def test_a_fact_reaches_every_core_but_the_one_that_said_it() -> None:
    a, b, c = Recorder("a", {"m": [Notify("f")]}), Recorder("b"), Recorder("c")
    effects = Stack([a, b, c]).receive("m", "peer", 0.0)
    assert effects == [Notify("f")]
    assert a.seen == ["m"] and b.seen == ["f", "m"] and c.seen == ["f", "m"]


def test_what_a_fact_causes_comes_right_after_it_and_before_later_effects() -> None:
    a = Recorder("a", {"m": [Notify("f"), Broadcast("late")]})
    b = Recorder("b", {"f": [Broadcast("caused")]})
    assert Stack([a, b]).receive("m", "peer", 0.0) == [Notify("f"), Broadcast("caused"), Broadcast("late")]


def test_a_fact_from_the_shell_reaches_every_core_and_is_not_echoed() -> None:
    a, b = Recorder("a"), Recorder("b", {"f": [Broadcast("x")]})
    assert Stack([a, b]).learn("f", 0.0) == [Broadcast("x")]
    assert a.seen == ["f"] and b.seen == ["f"]


def test_only_cores_whose_time_has_come_tick() -> None:
    early, late = Recorder("early", wake_at=1.0), Recorder("late", wake_at=5.0)
    stack = Stack([early, late])
    assert stack.wake_at == 1.0
    stack.tick(2.0)
    assert early.seen == ["tick"] and late.seen == []
    assert stack.wake_at == 5.0


def test_two_cores_that_answer_each_other_for_ever_are_stopped_with_a_sentence() -> None:
    a, b = Recorder("a", {"pong": [Notify("ping")]}), Recorder("b", {"ping": [Notify("pong")]})
    with pytest.raises(AssertionError, match="answer each other for ever"):
        Stack([a, b]).learn("ping", 0.0)
