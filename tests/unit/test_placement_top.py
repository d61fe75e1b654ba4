"""Who gets work where some nodes hold the top layers of the model only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.admission import AdmissionConfig, Admit, Reject, admit
from coordinator.cluster import Node
from coordinator.placement import has_what_it_needs, held_layers, why_waiting
from coordinator.policy.work import needs_of
from mesh.ids import NodeId
from mesh.messages import FeaturesSpec, Submit, TuneSpec
from tests.unit.task_world import info, report

GENERATE = Submit(prompt="hi")
TUNE = Submit(kind="tune", tune=TuneSpec(adapter="spam", data="{}", top_layers=4))
TUNE_AUTO = Submit(kind="tune", tune=TuneSpec(adapter="spam", data="{}"))
TUNE_MUCH = Submit(kind="tune", tune=TuneSpec(adapter="spam", data="{}", top_layers=5))
EMBED = Submit(kind="embed", texts=["a"])
FEATURES = Submit(kind="features", texts=["a"], features=FeaturesSpec(top_layers=4, reads="embed"))


def node(name: str, holds: str = "all", *, slots: int = 2) -> Node:
    top_layers = 4 if holds == "top" else None
    about = replace(info(name, slots=slots), holds=holds, top_layers=top_layers)
    return Node(id=NodeId(name), standing="alive", info=about, report=report(name, ready=slots > 0))


def may_run(one: Node, submit: Submit) -> bool:
    assert one.info is not None
    about = one.info
    return has_what_it_needs(
        one.id, about.model, about.also_called, about.adapters, needs_of(submit), held_layers(about)
    )


@pytest.mark.parametrize("submit", [GENERATE, TUNE_MUCH, FEATURES])
def test_what_needs_more_layers_than_a_node_holds_is_not_placed_there(submit: Submit) -> None:
    assert not may_run(node("weak", "top"), submit)
    assert may_run(node("strong"), submit)


@pytest.mark.parametrize("submit", [TUNE, TUNE_AUTO, EMBED])
def test_a_node_that_holds_the_top_tunes_and_reads_texts(submit: Submit) -> None:
    assert may_run(node("weak", "top"), submit)


@pytest.mark.parametrize("submit", [GENERATE, FEATURES])
def test_without_a_whole_model_anywhere_an_answer_is_refused_with_the_reason(submit: Submit) -> None:
    verdict = admit(submit, [node("weak", "top"), node("weaker", "top")], 0, AdmissionConfig())
    assert isinstance(verdict, Reject) and verdict.retry_after_s is None
    assert "needs a node that holds the whole model" in verdict.reason
    assert "top 4 layers" in verdict.reason


def test_too_many_layers_for_every_node_are_refused_with_both_numbers() -> None:
    verdict = admit(TUNE_MUCH, [node("weak", "top")], 0, AdmissionConfig())
    assert isinstance(verdict, Reject)
    assert "top 5 layers" in verdict.reason and "more than 4" in verdict.reason


@pytest.mark.parametrize("others", [["strong"], ["strong", "weak"]])
def test_one_whole_model_is_enough(others: list[str]) -> None:
    nodes = [node("strong")] + [node(name, "top") for name in others[1:]]
    assert admit(GENERATE, nodes, 0, AdmissionConfig()) == Admit()


def test_a_node_that_still_loads_may_turn_out_to_hold_the_whole_model() -> None:
    nodes = [node("weak", "top"), node("loading", slots=0)]
    assert admit(GENERATE, nodes, 0, AdmissionConfig()) == Admit()
    assert "needs a node that holds the whole model" in (why_waiting(GENERATE, nodes) or "")
