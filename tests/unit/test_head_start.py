"""A classifier's closed-form start: the algebra against refitting, and the pool inside a real PEFT model."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from node.compute.backbone.contract import Segment
from node.compute.backbone.load import load_backbone
from node.compute.tune import head_start
from node.compute.tune.batches import Example
from node.compute.tune.head_start import HeadStart, pool_patterns, start_classifier
from node.compute.tune.methods import adapt
from node.compute.tune.ridge import indicators, mix, ridge
from node.compute.tune.top_model import load_top
from node.compute.tune.trainer import Recipe, Trainer
from tests.tiny import tiny_llama

N_LAYERS = 5


def finish(work: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


class TestRidge:
    @pytest.mark.parametrize("has_mean", [False, True])
    @pytest.mark.parametrize("n", [9, 40])  # fewer texts than numbers in a row, and more
    def test_what_it_says_without_a_text_is_what_a_fit_without_the_text_says(
        self, has_mean: bool, n: int
    ) -> None:
        source = torch.Generator().manual_seed(n)
        x = torch.randn(n, 12, generator=source, dtype=torch.float64) + 2
        y = torch.randn(n, 3, generator=source, dtype=torch.float64)
        fit = ridge(x, y, has_mean=has_mean)
        centred = x - x.mean(0) if has_mean else x
        punishment = fit.strength * float(centred.square().sum()) / n
        for left_out in range(n):
            others = [at for at in range(n) if at != left_out]
            ones = torch.ones(n, 1, dtype=torch.float64)
            whole = torch.cat((x, ones), dim=1) if has_mean else x
            free = torch.eye(whole.shape[1], dtype=torch.float64) * punishment
            if has_mean:
                free[-1, -1] = 0  # the mean is not punished
            a = whole[others]
            weight = torch.linalg.solve(a.T @ a + free, a.T @ y[others])
            assert torch.allclose(whole[left_out] @ weight, fit.held_out[left_out], atol=1e-8)

    def test_noise_is_not_mistaken_for_knowledge(self) -> None:
        """With more numbers than texts any labels can be fitted; what is said of left-out texts must not be
        better than guessing, which a mean that counts the text itself would make it."""
        source = torch.Generator().manual_seed(3)
        x = torch.randn(60, 200, generator=source, dtype=torch.float64)
        labels = torch.randint(0, 4, (60,), generator=source)
        fit = ridge(x, indicators(labels, 4), has_mean=True)
        assert float((fit.held_out.argmax(1) == labels).double().mean()) < 0.5


class TestMix:
    def test_the_factors_are_the_best_there_are(self) -> None:
        source = torch.Generator().manual_seed(1)
        labels = torch.randint(0, 5, (200,), generator=source)
        truth = indicators(labels, 5)
        some = [truth + noise * torch.randn(200, 5, generator=source).double() for noise in (0.6, 1.0)]
        found = mix(some, labels)
        total = found.factors[0] * some[0] + found.factors[1] * some[1]
        assert found.loss == pytest.approx(float(F.cross_entropy(total, labels)))
        for first in (0.9, 1, 1.1):
            for second in (0.9, 1, 1.1):
                other = first * found.factors[0] * some[0] + second * found.factors[1] * some[1]
                assert float(F.cross_entropy(other, labels)) >= found.loss - 1e-9

    def test_a_classifier_that_is_always_wrong_is_left_out(self) -> None:
        labels = torch.tensor([0, 1, 0, 1, 1, 0])
        good = indicators(labels, 2) + 0.9 * indicators(labels.flip(0), 2)
        found = mix([-indicators(labels, 2), good], labels)
        assert found.factors[0] == 0 and found.factors[1] > 0

    def test_no_error_at_all_asks_for_no_infinity(self) -> None:
        labels = torch.tensor([0, 1, 2])
        (factor,) = mix([indicators(labels, 3)], labels).factors
        assert 1 < factor < 1e4


def texts(n: int, seed: int, n_labels: int = 3) -> list[Example]:
    """The label's own token stands somewhere, never last: only a look at all rows finds it."""
    source = random.Random(seed)
    found = []
    for number in range(n):
        label = number % n_labels
        ids = [source.randrange(30, 100) for _ in range(source.randrange(4, 12))]
        for at in source.sample(range(len(ids) - 1), 2):
            ids[at] = 10 + label % 20
        found.append(Example(tuple(ids), (len(ids) - 1,), (label,)))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), layers=N_LAYERS)


def trainer(model: Path, examples: Sequence[Example], n_labels: int, **wish: Any) -> Trainer:
    cut = N_LAYERS - 2
    backbone = load_backbone(model)

    def read(ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return [
            backbone.features([Segment(backbone.states(len(one)), list(one))], cut).clone() for one in ids
        ]

    method = {"name": "lora", "rank": 4, **wish}
    wrapped = adapt(
        load_top(model, cut, "classify", n_labels), layers=range(cut, N_LAYERS), task="classify", **method
    )
    return Trainer(wrapped, cut, "classify", examples, read, Recipe(1e-3, 1, 8, 0), 64)


def started(
    model: Path, examples: Sequence[Example], n_labels: int = 3, **wish: Any
) -> tuple[Trainer, HeadStart]:
    found = trainer(model, examples, n_labels, **wish)
    return found, finish(start_classifier(found, examples, n_labels))


class TestStart:
    def test_new_texts_are_told_apart_before_the_first_step_and_the_pool_does_it(self, model: Path) -> None:
        examples, others = texts(120, seed=1), texts(90, seed=2)
        pooled, start = started(model, examples)
        _, start_alone = started(model, examples, targets=("q_proj", "o_proj"))  # leaves a pool no room
        assert start.pools and not start_alone.pools
        right = finish(pooled.evaluate(others)).accuracy
        assert right > 0.7 and start.loss < start_alone.loss
        assert start.accuracy == pytest.approx(right, abs=0.15), "the promise is about texts left out"

    def test_the_heads_of_the_pool_have_no_keys_so_they_attend_evenly(self, model: Path) -> None:
        examples = texts(120, seed=1)
        found, start = started(model, examples)
        assert start.pools
        base = found.model.get_base_model()
        layer = base.model.layers[N_LAYERS - 1]
        caught: list[Tensor] = []
        layer.input_layernorm.register_forward_hook(lambda _, inputs, normed: caught.append(normed.detach()))
        found.last_rows(examples[:1])
        keys = layer.self_attn.k_proj(caught[0]).unflatten(1, (2, -1))
        before = layer.self_attn.k_proj.get_base_layer()(caught[0]).unflatten(1, (2, -1))
        assert torch.equal(keys[:, 0], before[:, 0]), "the other group of heads is left alone"
        assert float(keys[:, 1].abs().max()) < 1e-5 * float(before[:, 1].abs().max())

    def test_it_follows_from_the_texts_alone(self, model: Path) -> None:
        examples = texts(40, seed=4)
        first, again = (started(model, examples)[0].tensors() for _ in range(2))
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    @pytest.mark.parametrize(
        ("examples", "n_labels"),
        [
            (texts(1, seed=5), 1),
            (texts(2, seed=5, n_labels=2), 2),
            (texts(30, seed=5), 7),  # four labels nobody has
            (texts(90, seed=5, n_labels=40), 40),  # more than the heads of a pool can carry
            ([texts(1, seed=6)[0]] * 12, 3),  # one text, over and over
            ([Example((20 + n,), (0,), (n % 2,)) for n in range(20)], 2),  # texts of one token
        ],
    )
    def test_odd_data_give_numbers_that_training_can_start_from(
        self, model: Path, examples: list[Example], n_labels: int
    ) -> None:
        found, _ = started(model, examples, n_labels)
        assert all(bool(tensor.isfinite().all()) for tensor in found.tensors().values())
        finish(found.take_step())
        assert found.loss is not None and found.loss == found.loss

    def test_other_methods_get_the_head_alone(self, model: Path) -> None:
        for name in ("ia3", "dora", "vera"):
            found, start = started(model, texts(30, seed=7), name=name)
            assert not start.pools
            assert float(found.tensors()["weight." + head_name(found)].abs().max()) > 0

    def test_more_texts_than_it_looks_at_are_thinned_evenly(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(head_start, "TEXTS_MAX", 20)
        examples = texts(50, seed=8)
        thinned, _ = started(model, examples)
        third, _ = started(model, examples[::3])
        name = head_name(thinned)
        assert torch.equal(thinned.tensors()["weight." + name], third.tensors()["weight." + name])


def head_name(found: Trainer) -> str:
    (name,) = [name for name in found.tensors() if ".score." in name and name.startswith("weight.")]
    return name.removeprefix("weight.")


class TestRoom:
    LLAMA = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=5, num_labels=3)
    ALL = ("q_proj", "k_proj", "v_proj")

    def test_the_scale_of_the_larger_matrices_is_that_of_the_others(self) -> None:
        ranks, alphas = pool_patterns(self.LLAMA, "lora", "classify", self.ALL, 8, 16)
        assert ranks == {"layers.4.self_attn.k_proj": 8 + 16, "layers.4.self_attn.v_proj": 8 + 3}
        assert {alphas[name] / rank for name, rank in ranks.items()} == {2.0}
        ranks, alphas = pool_patterns(self.LLAMA, "rslora", "classify", self.ALL, 8, 16)
        assert all(alphas[name] / rank**0.5 == pytest.approx(16 / 8**0.5) for name, rank in ranks.items())

    @pytest.mark.parametrize(
        ("config", "method", "task", "targets"),
        [
            (LLAMA, "dora", "classify", ALL),
            (LLAMA, "lora", "chat", ALL),
            (LLAMA, "lora", "classify", ("q_proj", "v_proj")),
            (Qwen2Config(num_labels=3), "lora", "classify", ALL),
            (LlamaConfig(attention_bias=True, num_labels=3), "lora", "classify", ALL),
        ],
    )
    def test_there_is_none_where_a_pool_would_not_attend_evenly(
        self, config: Any, method: str, task: str, targets: tuple[str, ...]
    ) -> None:
        assert pool_patterns(config, method, task, targets, 8, 16) == ({}, {})
