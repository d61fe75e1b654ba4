"""The pass over packed rows, held against plain ``transformers`` + ``peft`` on the whole model.

Every method is trained from feature maps with all that makes it fast (packing, pruning, layers absent) and
must have the logits and the gradients that the whole model has without any of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mesh.errors import ConfigError
from node.compute.tune.batches import rows_per_piece
from node.compute.tune.forward import Layout, TopPass
from node.compute.tune.frozen import FrozenNorm
from node.compute.tune.methods import METHODS, adapt
from node.compute.tune.top_model import check_cut, load_top, read_config, top_bytes, weights_of_row
from tests.tiny import tiny_llama

LAYERS, CUT, LABELS = 5, 3, 3
LENGTHS = (5, 9, 1, 12, 7, 12)
WANTED = ((0, 1), (3, 7, 8), (0,), (5,), tuple(range(7)), (11,))
OPENS = 9
"""The token that invokes an activated adapter."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    source = torch.Generator().manual_seed(5)
    found = [torch.randint(10, 87, (length,), generator=source) for length in LENGTHS]
    for number, text in enumerate(found):
        text[number % len(text)] = OPENS
    return found


@pytest.fixture(scope="module")
def features(model: Path, texts: list[Tensor]) -> Tensor:
    """(rows, d) entering the cut, as ``transformers`` computes them."""
    whole = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        maps = [whole.model(t[None], output_hidden_states=True).hidden_states[CUT][0] for t in texts]
    return torch.cat(maps)


def cases() -> list[Any]:
    return [
        pytest.param(method, task, id=f"{method}-{task}")
        for method in METHODS
        for task in ("classify", "chat")
        if (method, task) != ("alora", "classify")
    ]


def shaken(model: Any) -> None:
    """Adapters start as nothing; give each weight something to do, the same in both models."""
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))


def scalar(logits: Tensor) -> Tensor:
    """A loss in which every logit has a different weight."""
    return (logits * torch.arange(logits.numel()).view_as(logits).cos()).sum()


@pytest.mark.parametrize(("method", "task"), cases())
def test_logits_and_gradients_are_those_of_the_whole_model_under_peft(
    method: str, task: str, model: Path, texts: list[Tensor], features: Tensor, tmp_path: Path
) -> None:
    is_classifier = task == "classify"
    wanted = [(len(text) - 1,) for text in texts] if is_classifier else WANTED
    starts = [int((text == OPENS).nonzero()[-1]) for text in texts] if method == "alora" else None

    top = load_top(model, CUT, "classify" if is_classifier else "lm", LABELS)
    ours = adapt(
        top,
        method,
        layers=range(CUT, LAYERS),
        task=task,
        rank=4,
        seed=3,
        invocation=(OPENS,) if method == "alora" else None,
    )
    shaken(ours)
    top_pass = TopPass(ours, CUT)
    logits = top_pass.logits(top_pass.rows(features, Layout(LENGTHS, wanted, starts)))
    scalar(logits).backward()
    ours.save_pretrained(tmp_path, save_embedding_layers=False)

    of_kind = LlamaForSequenceClassification if is_classifier else LlamaForCausalLM
    extra = {"num_labels": LABELS} if is_classifier else {}
    theirs = peft.PeftModel.from_pretrained(
        of_kind.from_pretrained(model, **extra), tmp_path, is_trainable=True
    )
    plain = [theirs(text[None]).logits for text in texts]
    if not is_classifier:
        plain = [rows[0, list(positions)] for rows, positions in zip(plain, wanted, strict=True)]
    expected = torch.cat(plain)
    scalar(expected).backward()

    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    mine = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    others = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == others.keys(), "PEFT adapts the same modules of the whole model, and no others"
    assert any(grad is not None and float(grad.norm()) > 0 for grad in mine.values())
    for name, grad in others.items():
        if grad is None:
            assert mine[name] is None
            continue
        # Sums of some hundred products in another order: a few units in the last of 24 bits.
        assert float((grad - mine[name]).norm()) <= 4e-6 * float(grad.norm()) + 1e-9, name


@pytest.mark.parametrize("cut", [0, 1, LAYERS - 1])
def test_any_cut_gives_the_whole_models_logits(cut: int, model: Path, texts: list[Tensor]) -> None:
    whole = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        outputs = [whole(text[None], output_hidden_states=True) for text in texts]
        top_pass = TopPass(load_top(model, cut, "lm"), cut)
        x = torch.cat([output.hidden_states[cut][0] for output in outputs])
        logits = top_pass.logits(top_pass.rows(x, Layout(LENGTHS, [range(n) for n in LENGTHS])))
    expected = torch.cat([output.logits[0] for output in outputs])
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5


@pytest.mark.parametrize("family", [MistralConfig, Qwen2Config])
def test_other_families_have_their_own_logits(family: Any, texts: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = family(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
        sliding_window=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    of_family = {MistralConfig: MistralForCausalLM, Qwen2Config: Qwen2ForCausalLM}[family]
    whole = of_family(config).eval()
    for parameter in whole.parameters():  # biases start at zero, and would be forgotten unnoticed
        torch.nn.init.normal_(parameter, std=0.2)
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = [whole(text[None], output_hidden_states=True) for text in texts]
        top_pass = TopPass(load_top(tmp_path, 1, "lm"), 1)
        x = torch.cat([output.hidden_states[1][0] for output in outputs])
        logits = top_pass.logits(top_pass.rows(x, Layout(LENGTHS, [range(n) for n in LENGTHS])))
    expected = torch.cat([output.logits[0] for output in outputs])
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_layers_between_two_cuts_are_the_frozen_ones(model: Path, texts: list[Tensor]) -> None:
    whole = LlamaForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        states = whole.model(texts[3][None], output_hidden_states=True).hidden_states
        between = TopPass(load_top(model, 1, "lm"), 1).between(states[1][0], Layout([12], [[11]]), 1, 4)
    torch.testing.assert_close(between, states[4][0], rtol=1e-5, atol=1e-5)


def test_texts_packed_together_do_not_see_each_other(model: Path, features: Tensor) -> None:
    top_pass = TopPass(load_top(model, CUT, "lm"), CUT)
    wanted = [(length - 1,) for length in LENGTHS]
    together = top_pass.rows(features, Layout(LENGTHS, wanted))
    disturbed = features.clone()
    disturbed[: LENGTHS[0]] += 1.0  # the first text only
    after = top_pass.rows(disturbed, Layout(LENGTHS, wanted))
    assert not torch.equal(together[0], after[0])
    assert torch.equal(together[1:], after[1:])


def test_layers_below_the_cut_take_no_memory(model: Path) -> None:
    top = load_top(model, CUT, "classify", LABELS)
    names = {name for name, _ in top.named_parameters()}
    assert not any(name.startswith(f"model.layers.{below}.") for name in names for below in range(CUT))
    assert not any("embed_tokens" in name for name in names)
    assert any(name.startswith(f"model.layers.{CUT}.self_attn.q_proj") for name in names)


def test_frozen_weights_are_counted_as_they_are(model: Path) -> None:
    top = load_top(model, CUT, "lm")
    matrices = sum(p.nbytes for _, p in top.named_parameters() if p.dim() == 2)
    assert top_bytes(read_config(model), LAYERS - CUT, "lm") == matrices


@pytest.mark.parametrize("top_layers", [0, LAYERS + 1])
def test_more_layers_than_there_are_is_an_error_with_the_number(model: Path, top_layers: int) -> None:
    with pytest.raises(ConfigError, match=f"the model has {LAYERS} layers"):
        check_cut(read_config(model), top_layers)


def test_the_norms_gradient_is_autograds() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, dtype=torch.float64, generator=source, requires_grad=True)
    norm = FrozenNorm(torch.rand(8, dtype=torch.float64, generator=source) + 0.5, 1e-6)
    norm.weight.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda rows: norm(rows), (x,))
    norm(x).sin().sum().backward()
    ours = x.grad, norm.weight.grad
    x.grad = norm.weight.grad = None
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight
    plain.sin().sum().backward()
    torch.testing.assert_close(ours, (x.grad, norm.weight.grad))


def test_pieces_shrink_as_models_grow(model: Path) -> None:
    assert rows_per_piece(10_000_000) > rows_per_piece(60_000_000) > rows_per_piece(10**9) == 32
    config = read_config(model)
    of_classifier = [weights_of_row(config, k, "classify") for k in (1, 2, 3)]
    assert of_classifier[2] - of_classifier[1] == top_bytes(config, 1, "classify") // 4
    assert of_classifier[0] < weights_of_row(config, 1, "lm")
