"""One job on several nodes: the same adapter whoever does which part, in any order, and about as good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from mesh.errors import ConfigError
from mesh.ids import TaskId
from mesh.messages import Output, TuneSpec
from mesh.messages.tune import TunePart
from node.compute.adapters.card import read_card
from node.compute.features.store import LocalStore
from node.compute.tune.part_job import OtherNumericsError, PartJob
from tests.tiny import tiny_llama
from tests.tuning import class_lines, completion_lines, job, memory, run, source, spec

PROFILE = "fp32 here"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def part_job(model: Path, work: Path, wish: TuneSpec, store: LocalStore, **changes: Any) -> PartJob:
    arguments: dict[str, Any] = {
        "directory": model,
        "digest": "f" * 64,
        "shelf_dir": work / "shelf",
        "checkpoint_dir": work / "checkpoints",
        "maps_factory": source(model, memory()),
        "features_name": PROFILE,
        "threads": 1,
        **changes,
    }
    return PartJob(wish, store=store, **arguments)


def part(wish: TuneSpec, stage: str, index: int = 0, round: int = 0, starts: Any = ()) -> TuneSpec:
    made = TunePart(
        parent=TaskId("job"), stage=stage, index=index, round=round,  # type: ignore[arg-type]
        profile="" if stage == "begin" else PROFILE, starts=list(starts),
    )  # fmt: skip
    return replace(wish, part=made)


def outputs(model: Path, work: Path, wish: TuneSpec, store: LocalStore, **changes: Any) -> Output:
    made = part_job(model, work, wish, store, **changes)
    run(made)  # type: ignore[arg-type]
    return made.output


def whole(model: Path, work: Path, wish: TuneSpec, rng: Random | None = None) -> Output:
    """As ``coordinator.rounds`` has it done: each part on a machine of its own, in any order, some twice."""
    rng = rng or Random(0)
    store = memory()  # the mesh's
    begun = outputs(model, work / "begin", part(wish, "begin"), store)
    assert begun.features is not None
    wish = replace(wish, top_layers=begun.features.top_layers)
    starts: list[str] = []
    for round in range(wish.epochs):
        order = [*range(wish.nodes), rng.randrange(wish.nodes)]  # one of them fails and is done again
        rng.shuffle(order)
        left: dict[int, str] = {}
        for index in order:
            torch.manual_seed(rng.randrange(1000))  # nodes are in different states
            asked = part(wish, "train", index, round, starts)
            output = outputs(model, work / f"{round}-{index}", asked, store)
            assert output.state is not None and left.setdefault(index, output.state) == output.state
        starts = [left[index] for index in range(wish.nodes)]
    return outputs(model, work / "merge", part(wish, "merge", 0, wish.epochs, starts), store)


# ── one adapter ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("nodes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_whoever_does_the_parts_in_whatever_order_the_adapter_is_the_same(
    nodes: int, model: Path, tmp_path: Path
) -> None:
    wish = spec(nodes=nodes, data=class_lines(24), eval_data=class_lines(12, seed=9))
    digests = set()
    for number in range(2):
        made = whole(model, tmp_path / str(number), wish, Random(number)).adapter
        assert made is not None
        digests.add(made.digest)
    assert len(digests) == 1
    card = read_card(tmp_path / "0" / "merge" / "shelf" / "a")
    assert card is not None
    assert card.made == made.made == f"the mean of {nodes} parts, after each of 2 epochs"
    assert made.metric is not None


def test_seed_and_number_of_nodes_are_part_of_the_result(model: Path, tmp_path: Path) -> None:
    wish = spec(nodes=2, data=class_lines(12), epochs=1)
    changed = [wish, replace(wish, seed=1), replace(wish, nodes=3)]
    made = [whole(model, tmp_path / str(n), one).adapter for n, one in enumerate(changed)]
    assert len({card.digest for card in made if card}) == 3


def test_layers_are_chosen_once_for_all_parts(model: Path, tmp_path: Path) -> None:
    wish = spec(nodes=2, top_layers=None, data=class_lines(60), epochs=1)
    begun = outputs(model, tmp_path, part(wish, "begin"), memory())
    assert begun.features is not None and begun.features.top_layers >= 1
    assert begun.features.profile == PROFILE and begun.adapter is None


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_completions_and_other_methods_are_trained_in_parts_too(
    method: str, model: Path, tmp_path: Path
) -> None:
    wish = spec(nodes=2, task="complete", data=completion_lines(), method=method, epochs=1)
    made = whole(model, tmp_path, wish).adapter
    assert made is not None and made.task == "complete"


# ── as good ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_loss_is_close_to_that_of_one_node(model: Path, tmp_path: Path) -> None:
    """Measured on these records: see the numbers in docs/adr/0024."""
    wish = spec(
        task="complete", data=completion_lines(96), eval_data=completion_lines(32, seed=5), epochs=6, batch=8,
        learning_rate=3e-3,
    )  # fmt: skip
    alone = job(model, tmp_path / "alone", wish)
    run(alone)
    assert alone.result is not None and alone.result.metric is not None
    untrained = job(model, tmp_path / "none", replace(wish, epochs=1, learning_rate=1e-9))
    run(untrained)
    assert untrained.result is not None and untrained.result.metric is not None
    made = whole(model, tmp_path / "nodes", replace(wish, nodes=3)).adapter
    assert made is not None and made.metric is not None
    gained = (untrained.result.metric - made.metric) / (untrained.result.metric - alone.result.metric)
    assert gained > 0.8, f"{untrained.result.metric} {alone.result.metric} {made.metric}"


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────


class Clock:
    """Each look takes so long."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


def test_states_that_nobody_has_are_named_after_a_bounded_wait(model: Path, tmp_path: Path) -> None:
    wish, store = spec(nodes=2), memory()
    one = outputs(model, tmp_path, part(wish, "train", 0), store).state
    assert one is not None
    starts = [one, "0" * 64]
    asked = part(wish, "train", 0, 1, starts)
    output = outputs(model, tmp_path, asked, store, clock=Clock())
    assert output.lacking == [1] and output.state is None
    merged = outputs(model, tmp_path, part(wish, "merge", 0, 1, starts), store, clock=Clock())
    assert merged.lacking == [1] and merged.adapter is None


def test_a_node_that_computes_otherwise_leaves_the_part_to_others(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OtherNumericsError, match="computes features as bf16"):
        outputs(model, tmp_path, part(spec(nodes=2), "train"), memory(), features_name="bf16 there")


def test_fewer_records_than_nodes_is_said(model: Path, tmp_path: Path) -> None:
    wish = spec(nodes=40, data=class_lines(12))
    with pytest.raises(ConfigError, match="12 records cannot be split into 40 parts"):
        outputs(model, tmp_path, part(wish, "begin"), memory())
