"""Prefixes read before: never a wrong value, never more memory than allowed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.ids import TaskId
from node.compute.messages import Ended, Stop
from node.compute.model_engine import ModelEngine
from node.compute.serve import prefixes as prefixes_file
from tests.reference.made_adapters import make_adapter
from tests.serving_world import ADAPTERS, INVOCATION, World, drive, run_of

NAMES = [None, *(name for name in ADAPTERS if name != "classifier")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def prompt(world: World, seed: int, n: int) -> str:
    rng = random.Random(seed)
    return world.tokens.text([rng.randrange(10, 201) for _ in range(n)])


def reused(engine: ModelEngine) -> list[int]:
    """Tokens that the sequences now open did not read again."""
    return [
        sequence.reading.n_reused
        for attempt in engine._attempts.values()
        for sequence in attempt.sequences
        if sequence.reading is not None
    ]


def begin(engine: ModelEngine, task: str, **submit: object) -> int:
    """Start a task, do a step, and say how many tokens it found."""
    assert engine.start(run_of(task, **submit)) == []
    engine.step()
    return reused(engine)[-1]


def finish(engine: ModelEngine) -> None:
    while engine.due_s is not None:
        engine.step()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.integers(0, 1),  # which conversation
        st.sampled_from([30, 64, 100, 190, 257, 330]),  # how much of it
        st.integers(0, 2),  # which question follows
        st.booleans(),  # together with the next
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.parametrize("copies", [256, 64])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=STEPS)
def test_answers_are_those_of_an_engine_that_has_seen_nothing(
    world: World, copies: int, steps: list[tuple[str | None, int, int, int, bool]]
) -> None:
    conversations = [prompt(world, 1, 330), prompt(world, 2, 330)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes_file, "SEEN_TOKENS_MIN", copies)
        engine = world.engine()
        batch: dict[str, dict[str, object]] = {}
        for at, (adapter, which, n, question, with_next) in enumerate(steps):
            text = conversations[which][:n] + prompt(world, 10 + question, 5)
            if adapter == "activated":
                text += world.tokens.text(INVOCATION) + prompt(world, 20 + question, 3)
            batch[f"t{at}"] = {"prompt": text, "adapter": adapter, "max_tokens": 6}
            if with_next and at + 1 < len(steps):
                continue
            for task, ended in drive(engine, batch).items():
                assert ended.text == world.alone(**batch[task]).text, batch[task]
            batch = {}
        assert not reused(engine)


def test_the_same_adapter_reads_nothing_twice_but_the_last_token(world: World) -> None:
    engine, text = world.engine(), prompt(world, 3, 300)
    for adapter in (None, "top"):
        begin(engine, "a", prompt=text, adapter=adapter)
        finish(engine)
        assert begin(engine, "b", prompt=text, adapter=adapter) == 299
        finish(engine)


def test_below_both_cuts_everybody_shares_and_above_them_nobody(world: World) -> None:
    text = prompt(world, 4, 300)
    for first, second, below in (
        (None, "top", 4), ("top", None, 4), ("top", "top-too", 4), ("top", "middle", 2), ("middle", "top", 2),
    ):  # fmt: skip
        engine = world.engine()
        for name in ("top", "middle"):  # seen once, so that their cuts are known
            drive(engine, {"x": {"prompt": "?", "adapter": name}})
        begin(engine, "a", prompt=text, adapter=first)
        finish(engine)
        assert engine.start(run_of("b", prompt=text, adapter=second)) == []
        engine.step()
        (attempt,) = engine._attempts.values()
        reading = attempt.sequences[0].reading
        assert reading is not None and (reading.enters, reading.n_reused) == (below, 299)
        finish(engine)


def test_an_adapter_of_all_layers_shares_with_none_but_itself(world: World) -> None:
    engine, text = world.engine(), prompt(world, 5, 200)
    begin(engine, "a", prompt=text)
    finish(engine)
    assert begin(engine, "b", prompt=text, adapter="whole") == 0
    finish(engine)
    assert begin(engine, "c", prompt=text, adapter="whole") == 199
    finish(engine)


def test_before_its_invocation_an_activated_adapter_reuses_what_the_plain_model_read(world: World) -> None:
    engine, text = world.engine(), prompt(world, 6, 200)
    begin(engine, "a", prompt=text)
    finish(engine)
    invoked = text + world.tokens.text(INVOCATION) + prompt(world, 7, 10)
    assert begin(engine, "b", prompt=invoked, adapter="activated") == 200
    finish(engine)
    # What it read after its invocation is its own, and no use to the plain model.
    assert begin(engine, "c", prompt=invoked + "abc") == 200
    finish(engine)


# PEFT says that the adapter was made from the same model in another place.
@pytest.mark.filterwarnings("ignore:The PEFT config:UserWarning")
def test_an_adapter_trained_anew_under_its_name_never_sees_its_predecessors_states(tmp_path: Path) -> None:
    world = World(tmp_path, ["top"])
    engine, text = world.engine(), prompt(world, 8, 280)
    asked = {"prompt": text, "adapter": "top", "seed": 3, "temperature": 1.0, "max_tokens": 12}
    before = drive(engine, {"a": asked})["a"].text
    assert drive(engine, {"b": asked})["b"].text == before
    new = make_adapter(tmp_path / "new", world.model, ADAPTERS["top"][0], seed=99, size=0.5)
    (world.shelf_dir / "top").rename(tmp_path / "old")
    new.rename(world.shelf_dir / "top")
    engine.adapters()
    after = drive(engine, {"c": asked})["c"].text
    assert after == world.alone(**asked).text != before


def test_two_who_read_the_same_at_once_read_it_once(world: World) -> None:
    engine, text = world.engine(), prompt(world, 9, 400)
    rows: list[int] = []
    forward = world.backbone.forward

    def counted(segments: object, **more: object) -> object:
        rows.append(sum(len(segment.ids) for segment in segments if segment.hidden is None))  # type: ignore[attr-defined]
        return forward(segments, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.backbone, "forward", counted)
        drive(engine, {f"t{i}": {"prompt": text + str(i), "max_tokens": 1} for i in range(4)})
    assert sum(rows) <= 400 + 4 * 65  # a block may be read twice, the whole may not


def test_memory_stays_within_its_budget_and_the_oldest_goes_first(world: World) -> None:
    one = 2 * 5 * 2 * 16 * 4  # bytes a token: keys and values, layers, key heads, head_dim, float32
    engine = world.engine(prefix_bytes=700 * one)
    assert engine.prefixes is not None
    for seed in range(30, 36):
        drive(engine, {"a": {"prompt": prompt(world, seed, 200), "max_tokens": 4}})
        assert engine.prefixes.held_bytes <= 700 * one
    assert len(engine.prefixes) == 3
    assert begin(engine, "b", prompt=prompt(world, 35, 200)) == 199
    finish(engine)
    assert begin(engine, "c", prompt=prompt(world, 30, 200)) == 0
    finish(engine)


def test_what_is_shared_is_held_once(world: World) -> None:
    engine, text = world.engine(), prompt(world, 11, 300)
    assert engine.prefixes is not None
    drive(engine, {"a": {"prompt": text, "max_tokens": 1}})
    once = engine.prefixes.held_bytes
    drive(engine, {f"t{i}": {"prompt": text + 20 * str(i), "max_tokens": 1} for i in range(5)})
    assert engine.prefixes.held_bytes < 1.5 * once


def test_an_end_in_the_middle_of_reading_leaves_what_was_read(world: World) -> None:
    engine, text = world.engine(), prompt(world, 12, 400)
    begin(engine, "a", prompt=text)
    (ended,) = engine.stop(Stop(task=TaskId("a"), attempt=1, reason="enough"))
    assert isinstance(ended, Ended) and ended.state == "cancelled" and engine.due_s is None
    assert begin(engine, "b", prompt=text) == 256
    finish(engine)


def test_nothing_is_kept_of_short_prompts(world: World) -> None:
    engine = world.engine()
    assert engine.prefixes is not None
    drive(engine, {"a": {"prompt": "hello", "max_tokens": 4}})
    assert len(engine.prefixes) == 0 and engine.prefixes.held_bytes == 0
