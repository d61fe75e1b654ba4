"""Answers that stand still for others: nothing of what they say changes, and nobody waits for them."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.ids import TaskId
from node.compute.messages import Ended, Pause, Resume, Stop, Text
from node.compute.model_engine import ModelEngine
from tests.serving_world import World, run_of

LONG: dict[str, Any] = {"prompt": "a long story please " * 20, "max_tokens": 24}
SAMPLED: dict[str, Any] = {**LONG, "temperature": 1.0, "seed": 7}
URGENT: dict[str, Any] = {"prompt": "quick", "max_tokens": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), ("top",))


class Driven:
    """An engine and all it has said."""

    def __init__(self, world: World, slots: int = 16) -> None:
        self.engine = ModelEngine(("tiny",), world.backbone, world.tokens, shelf=world.shelf)
        self.engine.slots = slots  # type: ignore[misc]
        self.events: list[Any] = []

    def start(self, task: str, **submit: Any) -> None:
        self.events += self.engine.start(run_of(task, **submit))

    def steps(self, n: int = 10_000) -> None:
        for _ in range(n):
            if self.engine.due_s is None:
                return
            self.events += self.engine.step()

    def pause(self, task: str) -> None:
        self.engine.pause(Pause(task=TaskId(task), attempt=1))

    def resume(self, task: str) -> None:
        self.engine.resume(Resume(task=TaskId(task), attempt=1))

    def end(self, task: str) -> Ended | None:
        return next((e for e in self.events if isinstance(e, Ended) and e.task == task), None)

    def n_said(self, task: str) -> int:
        return sum(isinstance(event, Text) and event.task == task for event in self.events)


@pytest.mark.parametrize("submit", [LONG, SAMPLED, {**LONG, "adapter": "top"}])
@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 9, 15])
def test_a_paused_answer_says_nothing_meanwhile_and_in_the_end_what_it_would_have_said(
    world: World, submit: dict[str, Any], n_steps: int
) -> None:
    """Paused before, while and after its prompt is read."""
    driven = Driven(world)
    driven.start("long", **submit)
    driven.steps(n_steps)
    driven.pause("long")
    before = driven.n_said("long")
    driven.start("urgent", **URGENT)
    driven.steps()
    urgent = driven.end("urgent")
    assert urgent is not None and urgent.text == world.alone(**URGENT).text
    assert driven.n_said("long") == before and driven.end("long") is None
    assert driven.engine.due_s is None, "who stands still wants no steps"
    driven.resume("long")
    driven.steps()
    end, alone = driven.end("long"), world.alone(**submit)
    assert end is not None
    assert (end.text, end.n_tokens, end.state) == (alone.text, alone.n_tokens, "done")


def test_a_newcomer_that_begins_alike_does_not_wait_for_who_stands_still(world: World) -> None:
    """The engine lets one read a common beginning and the others wait: not for one that is paused."""
    alike = {**LONG, "prompt": LONG["prompt"] + "or a short one", "max_tokens": 3}
    driven = Driven(world)
    driven.start("long", **LONG)
    driven.steps(1)
    driven.pause("long")
    driven.start("alike", **alike)
    driven.steps()
    end = driven.end("alike")
    assert end is not None and end.text == world.alone(**alike).text


def test_a_paused_answer_takes_no_slot(world: World) -> None:
    driven = Driven(world, slots=1)
    driven.start("long", **LONG)
    driven.steps(4)
    driven.start("refused", **URGENT)
    refused = driven.end("refused")
    assert refused is not None and "slots" in (refused.reason or "")
    driven.pause("long")
    driven.start("urgent", **URGENT)
    driven.steps()
    urgent = driven.end("urgent")
    assert urgent is not None and urgent.state == "done"


def test_a_paused_answer_is_cancelled_with_what_it_has_said(world: World) -> None:
    driven = Driven(world)
    driven.start("long", **LONG)
    driven.steps(8)
    driven.pause("long")
    (end,) = driven.engine.stop(Stop(task=TaskId("long"), attempt=1, reason="enough"))
    assert isinstance(end, Ended) and end.state == "cancelled" and end.text
    assert world.alone(**LONG).text.startswith(end.text)
    driven.resume("long")
    assert driven.engine.due_s is None


def test_what_cannot_stand_still_goes_on(world: World) -> None:
    driven = Driven(world)
    driven.start("texts", kind="embed", texts=["a", "b"])
    for task in ("texts", "unknown"):
        driven.pause(task)
    driven.steps()
    end = driven.end("texts")
    assert end is not None and end.state == "done"


def test_again_and_again_it_stays_the_same_and_nothing_is_left(world: World) -> None:
    driven = Driven(world)
    for round_ in range(3):
        driven.start(f"long-{round_}", **LONG)
        driven.steps(5)
        driven.pause(f"long-{round_}")
        driven.start(f"urgent-{round_}", **URGENT)
        driven.steps()
        driven.resume(f"long-{round_}")
        driven.steps()
    assert all(driven.end(f"long-{k}").text == world.alone(**LONG).text for k in range(3))  # type: ignore[union-attr]
    assert not driven.engine._attempts and not driven.engine._paused
