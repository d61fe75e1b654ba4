"""Which methods there are, what is refused and why, and that none of them leaves its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mesh.errors import ConfigError
from node.compute.tune.methods import METHODS, adapt, check_method
from node.compute.tune.top_model import load_top
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adalora", "moves rank between layers"),
        ("adaption_prompt", "replaces whole attention modules"),
        ("prompt_tuning", "puts tokens before the text"),
        ("prefix", "key/value states before the text"),
        ("p-tuning", "puts tokens before the text"),
        ("trainable_tokens", "changes the embeddings"),
    ],
)
def test_a_method_that_cannot_be_cached_is_refused_by_name_with_what_to_take_instead(
    name: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match="choose lora") as refused:
        check_method(name, [], "classify")
    assert name in str(refused.value) and reason in str(refused.value)


def test_an_unknown_method_is_told_all_there_are() -> None:
    with pytest.raises(ConfigError, match="no method 'lore'; choose one of lora, rslora"):
        check_method("lore", [], "classify")


def test_targets_that_a_method_cannot_adapt_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot adapt embed_tokens .the embeddings are below every cut"):
        check_method("lora", ["q_proj", "embed_tokens"], "chat")
    with pytest.raises(ConfigError, match="choose among input_layernorm"):
        check_method("ln_tuning", ["q_proj"], "chat")


def test_a_classifier_has_no_lm_head_to_adapt_and_no_answer_that_invokes() -> None:
    with pytest.raises(ConfigError, match="leave lm_head out"):
        check_method("lora", ["lm_head"], "classify")
    with pytest.raises(ConfigError, match="for classify choose lora"):
        check_method("alora", [], "classify")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_trained_lies_in_the_layers_asked_for(method: str, model: Path) -> None:
    whole = load_top(model, 1, "lm")  # more layers than shall be adapted, so that a stray one is seen
    invocation = (5, 6) if method == "alora" else None
    wrapped = adapt(whole, method, layers=range(3, 5), task="chat", invocation=invocation)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all(".layers.3." in name or ".layers.4." in name or ".vera_lambda_" in name for name in trained)
    assert {".layers.3." in name for name in trained} == {True, False}


def test_the_output_head_can_be_adapted_too(model: Path) -> None:
    wrapped = adapt(
        load_top(model, 3, "lm"), "lora", layers=range(3, 5), task="chat", targets=["q_proj", "lm_head"]
    )
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    assert all("lm_head" in name or "q_proj" in name for name in trained)


def test_starting_values_follow_from_the_seed_and_disturb_nobody_elses(model: Path) -> None:
    def started(seed: int) -> torch.Tensor:
        wrapped = adapt(load_top(model, 4, "lm"), "lora", layers=range(4, 5), task="chat", seed=seed)
        return next(p for name, p in wrapped.named_parameters() if "lora_A" in name)

    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, same, other = started(1), started(1), started(2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, same) and not torch.equal(one, other)
