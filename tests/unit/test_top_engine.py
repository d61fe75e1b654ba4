"""An engine without bottom layers: what it does, what it asks for, and what it leaves to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.ids import TaskId
from mesh.messages import FeaturesHeld, Submit
from node.compute.assembly import FeatureMemory, model_engine
from node.compute.backbone.load import load_backbone
from node.compute.messages import Ended, FeaturesGiven, Load, NeedFeatures, Progress, Run, Stop
from node.compute.model_engine import ModelEngine
from node.compute.top_assembly import top_engine
from node.compute.top_engine import TopEngine
from tests import tuning
from tests.tiny import tiny_llama

DIGEST = "f" * 64
LAYERS, HELD = 5, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=LAYERS)


def load(place: Path, **changes: Any) -> Load:
    """Two engines of one place find what the other left there, as two nodes do by the mesh."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "models_dir": str(place),
        "adapters_dir": str(place / "adapters"),
        "datasets_dir": str(place / "datasets"),
        "features_dir": str(place / "features"),
        "top_layers": HELD,
        **changes,
    }
    return Load(**fields)


def whole(model: Path, place: Path, precision: str = "fp32") -> ModelEngine:
    backbone = load_backbone(model, precision=precision)
    memory = FeatureMemory(load(place), backbone, 1, proof=tuning.kept_proof(model, backbone))
    return model_engine(load(place), ["tiny"], model, DIGEST, backbone, 1, memory=memory)


def top(model: Path, place: Path) -> TopEngine:
    return top_engine(load(place), ["tiny"], model, DIGEST, "cpu", 1)


def tune(name: str = "a", task: str = "classify", **changes: Any) -> Submit:
    return Submit(kind="tune", tune=tuning.spec(adapter=name, task=task, **changes))


def run(task: str, submit: Submit, budget_s: float | None = None) -> Run:
    return Run(task=TaskId(task), attempt=1, submit=submit, budget_s=budget_s)


def finished(engine: ModelEngine | TopEngine, events: list[Any], n: int = 1) -> list[Ended]:
    """Step until so many have ended."""
    events = list(events)
    for _ in range(20_000):
        ends = [event for event in events if isinstance(event, Ended)]
        if len(ends) >= n:
            return ends
        events += engine.step()
    raise AssertionError("it does not end")


def done(engine: ModelEngine | TopEngine, task: str, submit: Submit) -> Ended:
    (end,) = finished(engine, engine.start(run(task, submit)))
    return end


class Mesh:
    """Whoever asks has its features made by an engine that holds all layers."""

    def __init__(self, helper: ModelEngine) -> None:
        self.helper = helper
        self.asked: list[NeedFeatures] = []

    def made(self, need: NeedFeatures, submit: Submit) -> FeaturesGiven:
        self.asked.append(need)
        wanted = Submit(
            kind="features",
            tune=submit.tune,
            texts=submit.texts,
            prompt=submit.prompt,
            messages=submit.messages,
            features=need.spec,
        )
        end = done(self.helper, f"f-{len(self.asked)}", wanted)
        assert end.state == "done" and end.output is not None
        return FeaturesGiven(task=need.task, attempt=need.attempt, round=need.round, made=end.output.features)

    def serve(self, engine: TopEngine, task: str, submit: Submit) -> Ended:
        events = engine.start(run(task, submit))
        for _ in range(20_000):
            for event in events:
                if isinstance(event, NeedFeatures):
                    engine.give(self.made(event, submit))
                elif isinstance(event, Ended):
                    return event
            events = engine.step()
        raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a classifier, and the features it was trained from."""
    place = tmp_path_factory.mktemp("place")
    assert done(whole(model, place), "t", tune("labels")).state == "done"
    return place


@pytest.mark.parametrize(
    ("task", "lines"), [("complete", tuning.completion_lines()), ("chat", tuning.chat_lines())]
)
def test_it_tunes_from_maps_that_others_make_and_gives_the_same_adapter(
    model: Path, tmp_path: Path, task: str, lines: str
) -> None:
    """To the bit: the same numerics profile, a lossless codec."""
    wish = tune(task=task, data=lines)
    here = done(whole(model, tmp_path / "whole"), "t", wish)
    mesh = Mesh(whole(model, tmp_path / "shared"))
    there = mesh.serve(top(model, tmp_path / "shared"), "t", wish)
    assert here.state == there.state == "done", (here.reason, there.reason)
    assert here.output is not None and there.output is not None
    assert here.output.adapter is not None and there.output.adapter is not None
    assert here.output.adapter.digest == there.output.adapter.digest
    assert [need.spec.top_layers for need in mesh.asked] == [2]


def test_auto_means_the_layers_that_are_there(model: Path, tmp_path: Path) -> None:
    mesh = Mesh(whole(model, tmp_path))
    end = mesh.serve(top(model, tmp_path), "t", tune(top_layers=None))
    assert end.output is not None and end.output.adapter is not None
    assert end.output.adapter.top_layers == HELD


@pytest.mark.parametrize(
    "submit",
    [
        Submit(kind="classify", texts=["w1 w1 w2", "w5 w0 w0 w0"], adapter="labels"),
        Submit(kind="embed", texts=["w1 w2 w3", "w1 w2 w3", "w9"], adapter="labels"),
        Submit(kind="embed", texts=[" ".join(f"w{n % 80}" for n in range(200))]),
        Submit(kind="score", texts=["w1 w2 w3 w4", "w9"]),
        Submit(kind="score", texts=["w1 w2 w3 w4", "w9"], prompt="w7 w8"),
    ],
    ids=lambda submit: f"{submit.kind}-{submit.adapter}-{submit.prompt}",
)
def test_texts_give_what_a_whole_model_gives(model: Path, trained: Path, submit: Submit) -> None:
    """But for the last bits: there all rows go through the layers together."""
    expected = done(whole(model, trained), "x", submit)
    engine = top(model, trained)
    found = Mesh(whole(model, trained)).serve(engine, "x", submit)
    assert found.state == expected.state == "done", found.reason
    assert found.output is not None and expected.output is not None
    assert found.output.labels == expected.output.labels
    assert found.n_prompt_tokens == expected.n_prompt_tokens
    for got, want in (
        (found.output.scores, expected.output.scores),
        (found.output.vectors, expected.output.vectors),
    ):
        assert [len(row) for row in got] == [len(row) for row in want]
        assert [x for row in got for x in row] == pytest.approx([x for row in want for x in row], abs=1e-5)
    assert engine.due_s is None


def test_a_classifier_loads_no_head_of_the_vocabulary(model: Path, trained: Path) -> None:
    engine = top(model, trained)
    classify = Submit(kind="classify", texts=["w1 w1 w2"], adapter="labels")
    assert Mesh(whole(model, trained)).serve(engine, "x", classify).state == "done"
    held = engine._top._loaded
    assert held is not None and held._own_head is None and sorted(held._layers) == [2, 3, 4]


def test_what_the_mesh_has_already_is_not_asked_for_again(model: Path, trained: Path) -> None:
    engine, mesh = top(model, trained), Mesh(whole(model, trained))
    submit = Submit(kind="embed", texts=["w41 w42 w43"])
    assert mesh.serve(engine, "x", submit).state == "done"
    assert mesh.serve(engine, "y", submit).state == "done"
    assert len(mesh.asked) == 1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_layers_here_continue_in_the_format_of_those_that_made_the_maps(
    model: Path, tmp_path: Path, precision: str
) -> None:
    submit = Submit(kind="embed", texts=["w1 w2 w3"])
    helper = whole(model, tmp_path, precision)
    expected = done(helper, "x", submit)
    engine = top(model, tmp_path)
    found = Mesh(helper).serve(engine, "x", submit)
    assert engine._top.precision == precision
    assert found.output is not None and expected.output is not None
    assert found.output.vectors[0] == pytest.approx(expected.output.vectors[0], abs=1e-5)


@pytest.mark.parametrize(
    ("submit", "words"),
    [
        (Submit(prompt="w1"), "needs a node that holds the whole model"),
        (Submit(kind="features", tune=tuning.spec()), "needs a node that holds the whole model"),
        (tune(top_layers=4), "holds its top 3"),
    ],
)
def test_what_it_cannot_do_is_left_to_others_with_the_reason(
    model: Path, tmp_path: Path, submit: Submit, words: str
) -> None:
    (end,) = top(model, tmp_path).start(run("x", submit))
    assert isinstance(end, Ended) and end.state == "failed"  # this node's failure, not the task's
    assert words in (end.reason or "")


def test_an_adapter_that_begins_below_is_not_offered(model: Path, tmp_path: Path) -> None:
    assert done(whole(model, tmp_path), "t", tune("deep", top_layers=4)).state == "done"
    assert done(whole(model, tmp_path), "t", tune("high", top_layers=3)).state == "done"
    assert whole(model, tmp_path).adapters() == ("deep", "high")
    assert top(model, tmp_path).adapters() == ("high",)


def test_nobody_can_make_them_and_the_attempt_fails_with_that_reason(model: Path, tmp_path: Path) -> None:
    engine = top(model, tmp_path)
    events = engine.start(run("t", tune()))
    (need,) = [event for event in events if isinstance(event, NeedFeatures)]
    assert any(isinstance(event, Progress) and "waits" in event.progress.text for event in events)
    assert engine.due_s is None  # it computes nothing while it waits
    (end,) = engine.give(
        FeaturesGiven(task=need.task, attempt=1, round=0, reason="no node holds the whole model")
    )
    assert isinstance(end, Ended) and end.state == "failed"
    assert "no node holds the whole model" in (end.reason or "")
    assert engine.due_s is None and not engine._attempts


def test_maps_that_are_lost_again_are_asked_for_a_bounded_number_of_times(
    model: Path, tmp_path: Path
) -> None:
    engine = top(model, tmp_path)
    now = 0.0
    engine._clock = lambda: now
    events = engine.start(run("t", Submit(kind="embed", texts=["w1 w2"])))
    rounds = []
    ended: list[Ended] = []
    for _ in range(1000):
        for event in events:
            if isinstance(event, NeedFeatures):
                rounds.append(event.round)
                lie = FeaturesHeld(
                    top_layers=3, profile="fp32 nowhere", n_tokens=2, n_bytes=9, sample_keys=["0" * 64]
                )
                engine.give(FeaturesGiven(task=event.task, attempt=1, round=event.round, made=lie))
            elif isinstance(event, Ended):
                ended.append(event)
        if ended:
            break
        now += 1.0
        events = engine.step()
    assert rounds == [0, 1, 2, 3]
    assert ended[0].state == "failed" and "not in the cache" in (ended[0].reason or "")


def test_while_one_waits_another_goes_on_and_either_may_be_stopped(model: Path, trained: Path) -> None:
    engine, mesh = top(model, trained), Mesh(whole(model, trained))
    events = engine.start(run("waits", tune(data=tuning.class_lines(seed=7))))
    assert any(isinstance(event, NeedFeatures) for event in events)
    classify = Submit(kind="classify", texts=["w1 w1 w2"], adapter="labels")
    assert mesh.serve(engine, "quick", classify).state == "done"
    (end,) = engine.stop(Stop(task=TaskId("waits"), attempt=1, reason="enough"))
    assert isinstance(end, Ended) and end.state == "cancelled" and end.reason == "enough"
    assert engine.due_s is None and not engine._attempts
    assert engine.give(FeaturesGiven(task=TaskId("waits"), attempt=1, round=0)) == []
