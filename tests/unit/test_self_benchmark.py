"""What a node measures of itself: every kind of work, in pieces, leaving nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mesh.messages import NodeRates
from node.compute.adapters.facts import BackboneFacts
from node.compute.backbone.load import load_backbone
from node.compute.self_benchmark import SelfBenchmark
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("rated") / "model", layers=6)


class Ticking:
    """A clock by which every reading is ``step_s`` after the last one."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def measured(benchmark: SelfBenchmark) -> tuple[NodeRates, int]:
    """The rates, and in how many pieces."""
    running, n_pieces = benchmark.run(), 0
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value, n_pieces
        n_pieces += 1


def test_every_kind_of_work_is_measured_in_pieces(model: Path) -> None:
    backbone = load_backbone(model)
    rates, n_pieces = measured(SelfBenchmark(backbone, 1, BackboneFacts.of(model)))
    assert rates.origin == "measured" and rates.emulated_slowdown == 1
    assert rates.prefill_tokens_per_s > rates.decode_tokens_per_s > 0, "a prompt's tokens share a pass"
    assert rates.tune_tokens_per_s and rates.features_tokens_per_s and rates.adapter_load_s > 0
    assert n_pieces >= 15, "between two of them a task that came is served"


def test_a_model_served_without_adapters_is_rated_for_answers_alone(model: Path) -> None:
    rates, _ = measured(SelfBenchmark(load_backbone(model), 1))
    assert rates.decode_tokens_per_s > 0
    assert (rates.tune_tokens_per_s, rates.features_tokens_per_s, rates.adapter_load_s) == (None, None, 0)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_measuring_leaves_answers_threads_and_random_numbers_as_they_were(
    model: Path, precision: str
) -> None:
    backbone: Any = load_backbone(model, "cpu", precision)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    measured(SelfBenchmark(backbone, threads + 1, BackboneFacts.of(model)))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_slow_device_is_measured_fewer_times_not_longer(model: Path) -> None:
    backbone, facts = load_backbone(model), BackboneFacts.of(model)
    _, often = measured(SelfBenchmark(backbone, 1, facts, Ticking(0.001)))
    slow, seldom = measured(SelfBenchmark(backbone, 1, facts, Ticking(1.0)))
    assert seldom < often / 1.5
    assert slow.decode_tokens_per_s == 1.0, "what was measured once counts all the same"


def test_rates_are_the_tokens_of_a_pass_over_its_time(model: Path) -> None:
    """By a clock that gives every pass 10 ms, whatever it did."""
    rates, _ = measured(SelfBenchmark(load_backbone(model), 1, BackboneFacts.of(model), Ticking(0.01)))
    assert rates.decode_tokens_per_s == pytest.approx(100)
    assert rates.row_cost == pytest.approx(0, abs=1e-9), "eight rows took no longer than one"
    assert rates.adapter_load_s == pytest.approx(0.01)
    assert rates.prefill_tokens_per_s == pytest.approx(25600), "256 tokens a pass, at most"
