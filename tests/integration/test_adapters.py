"""Adapters as PEFT writes them, served by our pass, held against plain transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.files import load_adapter
from node.compute.backbone.contract import Segment
from node.compute.backbone.load import load_backbone
from tests.reference.made_adapters import N_LAYERS, VOCABULARY, make_adapter, make_model, peft_logits

QV = ["q_proj", "v_proj"]
ALL = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP = {"layers_to_transform": [3, 4], "layers_pattern": "layers"}
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12}

METHODS: dict[str, tuple[Any, int]] = {
    "lora on q and v": (peft.LoraConfig(**LORA, target_modules=QV), 0),
    "lora on every linear module of the top": (peft.LoraConfig(**LORA, target_modules=ALL, **TOP), 3),
    "lora by a regular expression": (
        peft.LoraConfig(**LORA, target_modules=r".*layers\.[24]\.mlp\.(up|down)_proj"),
        2,
    ),
    "lora with ranks and alphas by pattern": (
        peft.LoraConfig(
            **LORA,
            target_modules=ALL,
            rank_pattern={"q_proj": 1, r"layers\.3\.mlp\.up_proj": 17},
            alpha_pattern={"v_proj": 3, "down_proj": 40},
        ),
        0,
    ),
    "rslora": (peft.LoraConfig(**LORA, target_modules=ALL, use_rslora=True, **TOP), 3),
    "dora": (peft.LoraConfig(**LORA, target_modules=ALL, use_dora=True, **TOP), 3),
    "lora with trained biases": (peft.LoraConfig(**LORA, target_modules=ALL, bias="all"), 0),
    "dora with trained biases": (
        peft.LoraConfig(**LORA, target_modules=QV, bias="lora_only", use_dora=True),
        0,
    ),
    "lora with a bias of B": (peft.LoraConfig(**LORA, target_modules=ALL, lora_bias=True), 0),
    "lora on the head": (peft.LoraConfig(**LORA, target_modules=["lm_head"]), N_LAYERS),
    "lora with a whole module saved": (
        peft.LoraConfig(**LORA, target_modules=QV, modules_to_save=["down_proj", "input_layernorm"], **TOP),
        0,
    ),
    "adalora": (
        peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=ALL, init_r=6, total_step=10, lora_alpha=24),
        0,
    ),
    "ia3": (
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        0,
    ),
    "ia3 on the input of one of several": (
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["v_proj", "up_proj"], feedforward_modules=["up_proj"]
        ),
        0,
    ),
    "loha": (peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, alpha=8, **TOP), 3),
    "lokr": (peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, alpha=8, **TOP), 3),
    "oft": (peft.OFTConfig(task_type="CAUSAL_LM", target_modules=ALL, oft_block_size=8, r=0, **TOP), 3),
    "boft": (peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=ALL, boft_block_size=8, **TOP), 3),
    "hra": (peft.HRAConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, **TOP), 3),
    "vera": (peft.VeraConfig(task_type="CAUSAL_LM", target_modules=ALL, r=16, **TOP), 3),
    "vera without its projections": (
        peft.VeraConfig(task_type="CAUSAL_LM", target_modules=QV, r=16, save_projection=False, **TOP),
        3,
    ),
    "fourierft": (
        peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=ALL, n_frequency=50, scaling=20.0, **TOP),
        3,
    ),
    "ln_tuning": (
        peft.LNTuningConfig(
            task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
        ),
        0,
    ),
    "ln_tuning of the final norm": (
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["model.norm"]),
        N_LAYERS,
    ),
}
"""Kind -> PEFT's configuration, and the first layer it changes."""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def token_ids(n: int, seed: int = 5) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()
    return ids


def our_logits(backbone: Any, adapter: Any, ids: list[int], piece: int = 7) -> torch.Tensor:
    """Every position's, in pieces: prompts and single tokens both occur."""
    states, found = backbone.states(len(ids)), []
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        rows = backbone.forward([Segment(states, part, adapter, n_wanted=len(part))]).rows
        found.append(backbone.logits(rows, [adapter] * len(part)))
    return torch.cat(found)


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", METHODS)
def test_every_kind_gives_the_logits_of_transformers_and_peft(kind: str, model: Path, tmp_path: Path) -> None:
    config, first_layer = METHODS[kind]
    directory = make_adapter(tmp_path / "a", model, config)
    adapter = load_adapter(directory, BackboneFacts.of(model))
    ids = token_ids(22)
    expected, base = peft_logits(model, directory, ids), peft_logits(model, None, ids)
    ours = our_logits(load_backbone(model), adapter, ids)
    assert difference(base, expected) > 3e-3, "an adapter without effect would prove nothing"
    assert difference(ours, expected) <= 1e-4
    assert adapter.first_layer == first_layer
