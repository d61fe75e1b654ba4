"""What was decided about tasks, as it is kept and told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from coordinator.explainer import Explainer
from coordinator.explanations import Explanations, told
from coordinator.policy.cost import PredictionError
from coordinator.policy.decisions import Candidate, Decision, Drop, Pause, Resume, Start, Why
from coordinator.scheduler import Mode
from coordinator.task import Task, digest_of
from mesh.core import FOREVER, Broadcast, Effect
from mesh.facts import LinkUp
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import CandidateNode, CostReport, ExplainTask, KindError, Submit, TaskExplanation
from mesh.messages.explain import DECISIONS_MAX
from mesh.wire import JSON_BYTES_MAX, decode_json, encode_json

PI, SERVER, CLIENT = NodeId("pi"), NodeId("server"), NodeId("")
T1 = TaskId("t-1")
EPOCH = Epoch(4, PI)
WHY = Why(
    at=10.0, policy="vdf", words="the server ends it soonest", score=1.5, density=2.0, laxity_s=7.5,
    cost_s=0.5, service_s=1.0, n_waiting=3,
    candidates=(
        Candidate(node=SERVER, service_s=1.0, why_not=None, parts={"prefill": 0.25, "decode": 0.75}),
        Candidate(node=PI, service_s=9.0, why_not="it would end 1.5 s late"),
    ),
    n_candidates=2,
)  # fmt: skip
START = Start(task=T1, node=SERVER, why=WHY)


@dataclass
class Asked:
    """A scheduler as the explainer sees it."""

    mode: Mode = Mode.ACTIVE
    epoch: Epoch = EPOCH
    explanations: Explanations = field(default_factory=Explanations)
    tasks: dict[TaskId, Task] = field(default_factory=dict)
    errors: dict[str, PredictionError] = field(default_factory=dict)
    waiting: Why | None = None

    def task(self, task: TaskId) -> Task | None:
        return self.tasks.get(task)

    def outlook(self, task: TaskId, now: float) -> Why | None:
        return self.waiting

    def cost_errors(self) -> dict[str, PredictionError]:
        return self.errors


def task_of(**submit: Any) -> Task:
    body = Submit(prompt="hi", **submit)
    return Task(id=T1, submit=body, digest=digest_of(body), accepted_at=5.0, deadline_at=20.0)


def answer(scheduler: Asked, now: float = 12.0) -> TaskExplanation:
    """What it says when asked about the task, through the codec."""
    (effect,) = Explainer(scheduler).receive(ExplainTask(task=T1), CLIENT, now)  # type: ignore[arg-type]
    assert isinstance(effect, Broadcast) and isinstance(effect.message, TaskExplanation)
    assert decode_json(encode_json(effect.message), TaskExplanation) == effect.message
    return effect.message


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────


def test_decisions_are_kept_in_order_and_the_newest_of_many() -> None:
    kept = Explanations()
    for at in range(100):
        kept.note(T1, START, float(at))
    assert [noted.at for noted in kept.of(T1)] == [float(at) for at in range(101 - DECISIONS_MAX, 100)]
    assert kept.n_of(T1) == 100


def test_of_many_tasks_those_decided_about_last_are_kept() -> None:
    kept = Explanations(tasks_max=3)
    for name in ("a", "b", "c", "a", "d"):
        kept.note(TaskId(name), START, 0.0)
    assert len(kept) == 3 and not kept.of(TaskId("b"))
    assert [kept.n_of(TaskId(name)) for name in "abcd"] == [2, 0, 1, 1]


# ── what is told ────────────────────────────────────────────────────────────────────────────────────


def test_a_start_is_told_with_its_numbers_and_why_not_the_others() -> None:
    kept = Explanations()
    kept.note(T1, START, 10.0)
    found = told(kept.of(T1)[0], 12.5)
    assert (found.verb, found.node, found.age_s, found.policy) == ("start", SERVER, 2.5, "vdf")
    assert (found.density, found.laxity_s, found.service_s, found.cost_s) == (2.0, 7.5, 1.0, 0.5)
    assert found.candidates == [
        CandidateNode(node=SERVER, service_s=1.0, why_not=None, parts={"prefill": 0.25, "decode": 0.75}),
        CandidateNode(node=PI, service_s=9.0, why_not="it would end 1.5 s late"),
    ]


@pytest.mark.parametrize(
    ("decision", "verb", "words"),
    [
        (
            Drop(task=T1, reason="best node needs 12.3 s, 8.0 s left"),
            "drop",
            "best node needs 12.3 s, 8.0 s left",
        ),
        (Pause(task=T1, node=PI, why=WHY), "pause", WHY.words),
        (Resume(task=T1, node=PI, why=WHY), "resume", WHY.words),
    ],
)
def test_each_kind_of_decision_has_its_verb(decision: Decision, verb: str, words: str) -> None:
    kept = Explanations()
    kept.note(T1, decision, 1.0)
    found = told(kept.of(T1)[0], 1.0)
    assert (found.verb, found.words) == (verb, words)


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_left_out(odd: float) -> None:
    why = replace(
        WHY, score=odd, laxity_s=odd, service_s=odd,
        candidates=(Candidate(node=PI, service_s=odd, why_not="x" * 5000, parts={"decode": odd}),),
    )  # fmt: skip
    scheduler = Asked()
    scheduler.explanations.note(T1, replace(START, why=why), 1.0)
    (found,) = answer(scheduler).decisions
    assert (found.score, found.laxity_s, found.service_s, found.candidates[0].parts) == (None, None, None, {})


def test_the_longest_answer_is_far_from_the_largest_message() -> None:
    many = tuple(
        Candidate(
            node=NodeId(f"n{k:02}" + "x" * 60), service_s=1 / 3, why_not="ü" * 9999,
            parts={f"p{j}": 1 / 7 for j in range(50)},
        )
        for k in range(100)
    )  # fmt: skip
    scheduler = Asked(tasks={T1: task_of()}, waiting=replace(WHY, candidates=many))
    for at in range(50):
        scheduler.explanations.note(T1, replace(START, why=replace(WHY, candidates=many)), float(at))
    assert len(encode_json(answer(scheduler))) < JSON_BYTES_MAX / 4


# ── who asks ────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_is_explained_with_its_state_and_what_it_waits_for() -> None:
    scheduler = Asked(tasks={T1: task_of(value=3.0, kind="generate", deadline_s=15)}, waiting=WHY)
    scheduler.explanations.note(T1, START, 10.0)
    found = answer(scheduler)
    assert (found.state, found.value, found.budget_s, found.n_decisions) == ("queued", 3.0, 8.0, 1)
    assert [decision.verb for decision in found.decisions] == ["start", "wait"]
    assert found.decisions[1].age_s == 0 and found.decisions[1].node is None


def test_what_runs_waits_for_nothing() -> None:
    task = task_of()
    task.assign(SERVER, 1, Epoch(4, PI), 11.0)
    scheduler = Asked(tasks={T1: task}, waiting=WHY)
    assert answer(scheduler).decisions == []
    assert answer(scheduler).node == SERVER


def test_an_unknown_task_is_answered_too() -> None:
    found = answer(Asked())
    assert (found.state, found.decisions, found.epoch) == (None, [], Epoch(4, PI))


def test_only_an_acting_coordinator_answers() -> None:
    for mode in (Mode.FOLLOWING, Mode.RECOVERING):
        explainer = Explainer(Asked(mode=mode))  # type: ignore[arg-type]
        assert explainer.receive(ExplainTask(task=T1), CLIENT, 0.0) == []
        assert explainer.wake_at == FOREVER and explainer.tick(0.0) == []


# ── how well it foresees ────────────────────────────────────────────────────────────────────────────


def reports(effects: list[Effect]) -> list[CostReport]:
    return [e.message for e in effects if isinstance(e, Broadcast) and isinstance(e.message, CostReport)]


def test_errors_are_reported_when_they_change_and_at_most_every_five_seconds() -> None:
    scheduler = Asked()
    explainer = Explainer(scheduler)  # type: ignore[arg-type]
    assert explainer.tick(0.0) == [], "nothing was learned yet"
    scheduler.errors = {"tune": PredictionError(4, 0.3), "generate": PredictionError(20, 0.12345)}
    assert explainer.tick(1.0) == []
    (report,) = reports(explainer.tick(5.0))
    assert report.errors == [
        KindError(kind="generate", p50=0.123, n=20),
        KindError(kind="tune", p50=0.3, n=4),
    ]
    assert explainer.tick(10.0) == [], "the same again is no news"
    scheduler.errors |= {"tune": PredictionError(5, 0.31)}
    assert len(reports(explainer.tick(15.0))) == 1


def test_a_new_broker_and_a_new_term_are_told_again() -> None:
    scheduler = Asked(errors={"tune": PredictionError(4, 0.3)})
    explainer = Explainer(scheduler)  # type: ignore[arg-type]
    assert len(reports(explainer.tick(0.0))) == 1
    explainer.learn(LinkUp(broker_epoch=2, host=PI), 1.0)
    assert len(reports(explainer.tick(5.0))) == 1
    scheduler.epoch = Epoch(5, PI)
    assert len(reports(explainer.tick(10.0))) == 1
    assert reports(explainer.tick(15.0)) == []
