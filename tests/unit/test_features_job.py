"""Feature maps as a task: what it leaves is what the task that it is for reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.messages import ChatMessage, FeaturesSpec, Submit
from node.compute.features.maps import MissingFeaturesError
from node.compute.serve.tokens import Tokens
from node.compute.tune.making import FeaturesJob
from tests import tuning
from tests.tiny import tiny_llama

PROFILE = "fp32 here"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def job(model: Path, submit: Submit, store: object) -> FeaturesJob:
    return FeaturesJob(
        submit,
        directory=model,
        maps_factory=tuning.source(model, store),  # type: ignore[arg-type]
        tokens=Tokens(model),
        profile=PROFILE,
    )


def run(work: FeaturesJob) -> None:
    for _ in range(10_000):
        if work.step().is_done:
            return
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("classify", tuning.class_lines()),
        ("complete", tuning.completion_lines()),
        ("chat", tuning.chat_lines()),
    ],
)
def test_tuning_without_bottom_layers_finds_all_that_it_reads(
    model: Path, tmp_path: Path, task: str, lines: str
) -> None:
    store = tuning.memory()
    wish = tuning.spec(task=task, data=lines, eval_data=lines.splitlines()[0])
    with pytest.raises(MissingFeaturesError):
        tuning.run(
            tuning.job(model, tmp_path, wish, maps_factory=tuning.source(model, store, holds_all=False))
        )
    made = job(model, Submit(kind="features", tune=wish), store)
    run(made)
    elsewhere = tuning.job(
        model, tmp_path / "top", wish, maps_factory=tuning.source(model, store, holds_all=False)
    )
    tuning.run(elsewhere)
    whole = tuning.job(model, tmp_path / "whole", wish)
    tuning.run(whole)
    assert elsewhere.result is not None and whole.result is not None
    assert elsewhere.result.digest == whole.result.digest


def test_it_says_what_there_is_and_the_second_time_that_nothing_was_new(model: Path) -> None:
    store, submit = tuning.memory(), Submit(kind="features", tune=tuning.spec())
    first, second = job(model, submit, store), job(model, submit, store)
    run(first)
    run(second)
    assert first.held is not None and second.held is not None
    assert first.held.n_computed == first.held.n_tokens == second.held.n_found > 0
    assert second.held.n_computed == 0
    assert first.held.profile == PROFILE and first.held.top_layers == 2
    assert 0 < len(first.held.sample_keys) <= 32
    assert first.held.sample_keys == second.held.sample_keys
    assert all(entry for entry in store.get([bytes.fromhex(key) for key in first.held.sample_keys]))


def test_texts_to_score_are_read_after_their_prompt(model: Path) -> None:
    spec = FeaturesSpec(top_layers=2, reads="score")
    plain = Submit(kind="features", texts=["w1 w2", "w3"], features=spec)
    asked = Submit(
        kind="features",
        texts=["w1 w2", "w3"],
        features=spec,
        messages=[ChatMessage(role="user", content="w9")],
    )
    store = tuning.memory()
    alone, after = job(model, plain, store), job(model, asked, store)
    run(alone)
    run(after)
    assert alone.held is not None and after.held is not None
    assert alone.held.n_tokens == 2 + 1  # a text's last token predicts nothing
    assert after.held.n_tokens > alone.held.n_tokens


def test_what_cannot_be_done_says_what_to_change(model: Path) -> None:
    with pytest.raises(ConfigError, match="5 layers"):
        job(model, Submit(kind="features", tune=tuning.spec(top_layers=9)), tuning.memory())
    bad = job(model, Submit(kind="features", tune=tuning.spec(data='{"text": 1}')), tuning.memory())
    with pytest.raises(ConfigError):
        run(bad)
