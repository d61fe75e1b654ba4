"""All kinds of tasks and all kinds of adapters in the same steps, each as if it were alone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh.ids import TaskId
from mesh.messages import TuneSpec
from node.compute.assembly import model_engine
from node.compute.backbone.contract import Segment
from node.compute.backbone.generic import GenericBackbone
from node.compute.backbone.load import load_backbone
from node.compute.engine import Event
from node.compute.messages import Ended, Load, Progress, Stop, Text
from node.compute.model_engine import ModelEngine, Tokens
from tests.reference.made_adapters import VOCABULARY, peft_logits
from tests.serving_world import INVOCATION, Letters, World, drive, run_of
from tests.tiny import tiny_llama
from tests.tuning import class_lines, completion_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def words(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return "".join(chr(rng.randrange(300, 300 + VOCABULARY - 12)) for _ in range(n))


def numbers(ended: Ended) -> torch.Tensor:
    assert ended.output is not None, ended.reason
    return torch.tensor([n for found in (*ended.output.scores, *ended.output.vectors) for n in found])


CALL = Letters().text(INVOCATION)

MIXED: dict[str, dict[str, Any]] = {
    "plain": {"prompt": words(1, 300), "max_tokens": 20},
    "sampled": {"prompt": words(2, 20), "max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 5},
    "top": {"prompt": words(3, 90), "adapter": "top", "max_tokens": 20},
    "top-too": {"prompt": words(3, 90), "adapter": "top-too", "max_tokens": 20},
    "middle": {"prompt": words(3, 90), "adapter": "middle", "max_tokens": 20},
    "whole": {"prompt": words(4, 300), "adapter": "whole", "max_tokens": 20},
    "activated": {"prompt": words(5, 70) + CALL + words(6, 4), "adapter": "activated"},
    "scored": {"kind": "score", "texts": [words(7, 40), words(8, 300), words(9, 1)]},
    "scored after": {"kind": "score", "prompt": words(10, 100), "texts": [words(i, 9) for i in range(20)]},
    "scored by": {"kind": "score", "texts": [words(7, 40)], "adapter": "middle"},
    "classified": {"kind": "classify", "texts": [words(i, 5 + i) for i in range(9)], "adapter": "classifier"},
    "embedded": {"kind": "embed", "texts": [words(11, 3), words(12, 350)]},
    "embedded by": {"kind": "embed", "texts": [words(11, 3)], "adapter": "top"},
}  # fmt: skip


def test_a_mixture_of_all_kinds_gives_what_each_gives_alone(world: World) -> None:
    together = drive(world.engine(), {name.replace(" ", "-"): submit for name, submit in MIXED.items()})
    for name, submit in MIXED.items():
        alone, ended = world.alone(**submit), together[name.replace(" ", "-")]
        assert ended.state == "done", ended.reason
        if submit.get("kind", "generate") == "generate":
            assert ended.text == alone.text and ended.finish_reason == alone.finish_reason, name
        else:
            assert torch.allclose(numbers(ended), numbers(alone), atol=1e-5), name
        assert (ended.n_prompt_tokens, ended.n_tokens) == (alone.n_prompt_tokens, alone.n_tokens)


@pytest.mark.parametrize("seed", range(4))
def test_who_joins_leaves_or_is_cancelled_between_steps_changes_nobody_and_frees_all(
    world: World, seed: int
) -> None:
    rng = random.Random(seed)
    engine = world.engine()
    waiting = list(MIXED)
    rng.shuffle(waiting)
    ends: dict[str, Ended] = {}
    cancelled: set[str] = set()
    texts: dict[str, str] = {}

    def hear(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                texts[event.task] = texts.get(event.task, "") + event.text
            elif isinstance(event, Ended):
                assert event.task not in ends, "one end each"
                ends[event.task] = event

    while waiting or engine.due_s is not None:
        if waiting and rng.random() < 0.4:
            name = waiting.pop()
            hear(engine.start(run_of(name.replace(" ", "-"), **MIXED[name])))
        if rng.random() < 0.15 and engine._attempts:
            task, _ = rng.choice(list(engine._attempts))
            cancelled.add(task)
            hear(engine.stop(Stop(task=TaskId(task), attempt=1, reason="enough")))
        hear(engine.step())
    assert len(ends) == len(MIXED)
    for name, submit in MIXED.items():
        task = name.replace(" ", "-")
        ended, alone = ends[task], world.alone(**submit)
        assert ended.text == texts.get(task, ended.text)
        if task in cancelled:
            assert ended.state == "cancelled" and alone.text.startswith(ended.text) and ended.output is None
        elif submit.get("kind", "generate") == "generate":
            assert ended.text == alone.text
        else:
            assert torch.allclose(numbers(ended), numbers(alone), atol=1e-5)
    assert engine.prefixes is not None
    assert all(not reading.is_running for reading in engine.prefixes._readings)
    assert all(held.n_pins == 0 for held in world.shelf._loaded.values())
    engine.prefixes.clear()
    assert engine.prefixes.held_bytes == 0 and not engine.prefixes._by_block


def test_scores_classes_and_vectors_are_those_of_transformers_and_peft(world: World) -> None:
    text = words(20, 30)
    ids = world.tokens.plain(text)
    (scores,) = world.alone(kind="score", texts=[text], adapter="middle").output.scores  # type: ignore[union-attr]
    logits = peft_logits(world.model, world.shelf_dir / "middle", [1, *ids])
    expected = torch.log_softmax(logits, -1)[torch.arange(30), torch.tensor(ids)]
    assert torch.allclose(torch.tensor(scores), expected, atol=1e-3)
    output = world.alone(kind="classify", texts=[text], adapter="classifier").output
    assert output is not None
    # PEFT has no place for labels, so they are numbers; three of them.
    expected = torch.softmax(peft_logits(world.model, world.shelf_dir / "classifier", ids, 3), -1)
    assert torch.allclose(torch.tensor(output.scores[0]), expected, atol=1e-4)
    assert output.classes == ["0", "1", "2"] and output.labels == [str(int(expected.argmax()))]
    (vector,) = world.alone(kind="embed", texts=[text]).output.vectors  # type: ignore[union-attr]
    rows = world.backbone.forward([Segment(world.backbone.states(30), ids, n_wanted=30)]).rows
    mean = rows.mean(0)
    assert torch.allclose(torch.tensor(vector), mean / mean.norm(), atol=1e-5)


def test_every_adapter_writes_what_peft_writes(world: World) -> None:
    ids = world.tokens.plain(words(21, 12))
    for name in ("top", "whole"):
        found = world.alone(prompt=world.tokens.text(ids), adapter=name, max_tokens=4)
        expected, so_far = [], list(ids)
        while (
            len(expected) < 4
            and (token := int(peft_logits(world.model, world.shelf_dir / name, so_far)[-1].argmax()))
            not in world.tokens.ends
        ):
            expected.append(token)
            so_far.append(token)
        assert found.text == world.tokens.decode(expected), name


def test_a_long_prompt_delays_the_next_token_of_others_by_one_piece(world: World) -> None:
    engine = world.engine()
    engine.start(run_of("writer", prompt=words(30, 10), max_tokens=50))
    engine.step()
    engine.start(run_of("reader", prompt=words(31, 450)))
    events = [event for _ in range(2) for event in engine.step()]
    assert sum(isinstance(event, Text) and event.task == "writer" for event in events) == 2


def test_prompts_that_wait_take_turns(world: World) -> None:
    engine = world.engine()
    engine.start(run_of("long", kind="embed", texts=[words(i, 400) for i in range(40, 60)]))
    engine.step()
    engine.start(run_of("short", prompt=words(32, 20), max_tokens=1))
    ends = [event for _ in range(3) for event in engine.step() if isinstance(event, Ended)]
    assert [ended.task for ended in ends] == ["short"]


@pytest.mark.parametrize(
    ("submit", "state", "said"),
    [
        ({"kind": "classify", "texts": ["x"], "adapter": "top"}, "rejected", ("no class head",)),
        ({"kind": "embed", "texts": ["x"] * 64}, "done", ()),
        ({"kind": "score", "texts": ["x" * 513]}, "rejected", ("text 1", "514", "512")),
        ({"kind": "score", "texts": ["x" * 500] * 90}, "rejected", ("45000", "40000")),
        ({"prompt": "x", "adapter": "poet"}, "rejected", ("poet", "top-too", "classifier")),
        ({"prompt": "x" * 600}, "rejected", ("600", "512")),
        ({"kind": "tune", "tune": TuneSpec(adapter="a", data="{}")}, "rejected", ("tuned",)),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_with_numbers_and_takes_nothing(
    world: World, submit: dict[str, Any], state: str, said: tuple[str, ...]
) -> None:
    engine = world.engine()
    if "prompt" not in submit:
        submit = {"max_tokens": 8, **submit}
    ended = drive(engine, {"t": submit})["t"]
    assert ended.state == state and all(word in (ended.reason or "") for word in said), ended.reason
    assert engine.due_s is None and all(held.n_pins == 0 for held in world.shelf._loaded.values())


def test_room_is_taken_by_those_who_fit_and_the_others_wait(world: World) -> None:
    engine = world.engine()
    for number in range(ModelEngine.slots):
        prompt = words(70 + number, 5)
        assert engine.start(run_of(f"t{number}", prompt=prompt, max_tokens=500)) == []
    (refused,) = engine.start(run_of("one-more", prompt="x"))
    assert isinstance(refused, Ended) and refused.state == "failed" and "slots" in (refused.reason or "")
    most = 0
    while engine.due_s is not None:
        engine.step()
        open_now = [s.capacity for a in engine._attempts.values() for s in a.sequences if s.is_open]
        most = max(most, sum(open_now))
        if len(open_now) == 4:  # of 505 tokens each; the model takes 512
            break
    assert 0 < most <= 4 * engine.context_tokens


def test_a_model_of_another_family_answers_and_refuses_adapters_by_name(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    generic = GenericBackbone(model, "cpu", torch.float32)
    why = "a model of type 'other' has none"
    engine = ModelEngine(("other",), generic, Tokens(model), why_plain=why)
    ended = drive(
        engine, {"a": {"prompt": "w1 w2", "max_tokens": 5}, "b": {"prompt": "x", "adapter": "poet"}}
    )
    assert ended["a"].state == "done" and ended["a"].n_tokens > 0
    assert ended["b"].state == "rejected" and "'poet'" in str(ended["b"].reason)
    assert "a model of type 'other' has none" in str(ended["b"].reason)


# ── tuning among the others ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tuned(tmp_path: Path) -> ModelEngine:
    model = tiny_llama(tmp_path / "model")
    load = Load(
        model="tiny",
        models_dir=str(tmp_path),
        adapters_dir=str(tmp_path / "adapters"),
        datasets_dir=str(tmp_path / "datasets"),
        features_dir=str(tmp_path / "features"),
    )
    (tmp_path / "adapters").mkdir()
    return model_engine(load, ("tiny",), model, "f" * 64, load_backbone(model), 1)


def tune(name: str, **more: Any) -> dict[str, Any]:
    spec = TuneSpec(**{"adapter": name, "data": class_lines(), "top_layers": 2, "epochs": 2, **more})
    return {"kind": "tune", "tune": spec}


def test_a_tuned_adapter_answers_at_once_and_others_went_on_meanwhile(tuned: ModelEngine) -> None:
    job = replace(run_of("tune", **tune("fresh")), budget_s=0.5)  # no time to stand back
    tuned.start(job)
    tuned.start(run_of("write", prompt="w1 w2 w3", max_tokens=100))
    order: list[str] = []
    ends: dict[str, Ended] = {}
    progress: list[Progress] = []
    while tuned.due_s is not None:
        for event in tuned.step():
            if isinstance(event, Progress):
                order.append("tune")
                progress.append(event)
            elif isinstance(event, Ended):
                ends[event.task] = event
            else:
                order.append("write")
    assert ends["tune"].state == "done", ends["tune"].reason
    card = ends["tune"].output.adapter  # type: ignore[union-attr]
    assert card is not None and card.name == "fresh" and card.first_layer == 3
    assert {"features", "training"} <= {event.progress.phase for event in progress}
    assert progress[-1].progress.fraction == 1.0
    together = order[: 1 + max(at for at, what in enumerate(order) if what == "write")]
    assert 5 <= together.count("tune") < order.count("tune"), "they take turns, as much time each"
    found = drive(
        tuned, {"c": {"kind": "classify", "texts": ["w1 w1 w1 w5", "w2 w2 w2"], "adapter": "fresh"}}
    )
    assert found["c"].output is not None and found["c"].output.classes == ["class 0", "class 1", "class 2"]


def test_an_adapter_that_learned_completions_sees_the_prompt_as_it_learned_it(tuned: ModelEngine) -> None:
    data = completion_lines()
    prompt = json.loads(data.splitlines()[0])["prompt"]
    learned = drive(tuned, {"t": tune("goes-on", task="complete", data=data, epochs=1)})["t"]
    assert learned.state == "done", learned.reason
    ends = drive(
        tuned,
        {
            "chat": {"prompt": prompt, "max_tokens": 1},
            "plain": {"prompt": prompt, "max_tokens": 1, "adapter": "goes-on"},
        },
    )
    assert ends["plain"].n_prompt_tokens == len(prompt.split())
    assert ends["chat"].n_prompt_tokens > len(prompt.split()), "a question to the model is a chat message"


def test_a_second_tuning_task_waits_for_the_first_and_both_are_done(tuned: ModelEngine) -> None:
    events = tuned.start(run_of("one", **tune("first"))) + tuned.start(run_of("two", **tune("second")))
    assert [e.progress.text for e in events if isinstance(e, Progress)] == [
        "waits for 1 other tuning task on this node"
    ]
    ends = []
    while tuned.due_s is not None:
        ends += [event for event in tuned.step() if isinstance(event, Ended)]
    assert [(ended.task, ended.state) for ended in ends] == [("one", "done"), ("two", "done")]
    assert set(tuned.adapters()) == {"first", "second"}


def test_a_cancelled_tuning_task_leaves_its_checkpoint_and_a_bad_one_says_why(tuned: ModelEngine) -> None:
    tuned.start(run_of("t", **tune("gone", epochs=500)))
    for _ in range(10):
        tuned.step()
    (ended,) = tuned.stop(Stop(task=TaskId("t"), attempt=1, reason="enough"))
    assert isinstance(ended, Ended) and ended.state == "cancelled" and tuned.due_s is None
    bad = drive(tuned, {"b": tune("bad", data=json.dumps({"text": "no label"}))})["b"]
    assert bad.state == "rejected" and "line 1" in str(bad.reason)


def test_who_waits_for_a_first_token_comes_before_tuning(tuned: ModelEngine) -> None:
    tuned.start(run_of("tune", **tune("later", epochs=50)))
    for _ in range(6):
        tuned.step()
    tuned.start(run_of("ask", prompt="w1 w2", max_tokens=3))
    events = tuned.step()
    assert [event.text for event in events if isinstance(event, Text)], "a token, and no chunk before it"
    tuned.stop(Stop(task=TaskId("tune"), attempt=1, reason="enough"))
