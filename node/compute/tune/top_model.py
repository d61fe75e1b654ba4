"""The top of a model: a ``transformers`` model in which only the layers from the cut on exist.

Module names are those of the whole model (``model.layers.26.self_attn.q_proj``), so any PEFT method wraps
them as it would wrap the whole, and what ``save_pretrained`` writes loads there. The layers below the cut
and the embeddings are absent: rows come in as feature maps. Weights are views into the file on disk: memory
holds the pages that are used, and gives them back under pressure.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from mesh.errors import ConfigError
from node.compute.backbone.llama import LlamaBackbone
from node.compute.backbone.weights import Weights
from node.compute.tune.frozen import Absent, FrozenNorm, frozen_linear

__all__ = ["Kind", "check_cut", "load_top", "read_config", "top_bytes", "weights_of_row"]

Kind = Literal["classify", "lm"]
"""A head of labels on the last row, or the model's own head on every labelled row."""

_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def read_config(directory: Path) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: Its architecture is not one whose layers can be adapted from feature maps.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not LlamaBackbone.can_run(config):
        raise ConfigError(
            f"{directory.name} is a {config.model_type} model; adapters are trained for the Llama family "
            "(llama, mistral, qwen2 with full attention). Choose such a model with --model"
        )
    return config


def check_cut(config: Any, top_layers: int) -> int:
    """The cut of ``top_layers``.

    Raises:
        ConfigError: The model has fewer layers.
    """
    n_layers: int = config.num_hidden_layers
    if not 1 <= top_layers <= n_layers:
        raise ConfigError(
            f"--top-layers {top_layers}: the model has {n_layers} layers; "
            f"give a number from 1 to {n_layers}, or auto"
        )
    return n_layers - top_layers


def top_bytes(config: Any, top_layers: int, kind: Kind) -> int:
    """What the weights of the top take, in float32."""
    _, layer = _weights_of_layer(config)
    return int(4 * (top_layers * layer + _weights_of_head(config, kind)))


def weights_of_row(config: Any, top_layers: int, kind: Kind) -> int:
    """Numbers in the matrices that a row meets on its way. Of a classifier's last layer, most rows meet
    keys and values only; in a language model, any row may be one to learn from."""
    keys_values, layer = _weights_of_layer(config)
    last = keys_values if kind == "classify" else layer
    return int((top_layers - 1) * layer + last + _weights_of_head(config, kind))


def _weights_of_layer(config: Any) -> tuple[int, int]:
    """In the matrices of keys and values, and in all."""
    d, d_mlp = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
    keys_values = 2 * d * head_dim * config.num_key_value_heads
    return keys_values, keys_values + 2 * d * head_dim * config.num_attention_heads + 3 * d * d_mlp


def _weights_of_head(config: Any, kind: Kind) -> int:
    return int(config.vocab_size * config.hidden_size) if kind == "lm" else 0


def load_top(directory: Path, cut: int, kind: Kind, n_labels: int = 0) -> nn.Module:
    """Layers from ``cut`` on, the final norm and a head, in float32 on the CPU.

    The head of labels has zeros for weights; training starts it. Nothing below the cut is read.
    """
    config = read_config(directory)
    small = copy.deepcopy(config)
    small.num_hidden_layers = config.num_hidden_layers - cut
    if getattr(config, "layer_types", None):
        small.layer_types = list(config.layer_types[cut:])
    small.dtype = torch.float32
    if kind == "classify":
        small.num_labels = n_labels
    of_kind = AutoModelForSequenceClassification if kind == "classify" else AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = of_kind.from_config(small, attn_implementation="sdpa")
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config)  # outside ``meta``: it computes its frequencies
    body.embed_tokens = Absent()
    with Weights(directory, "cpu", torch.float32) as weights:
        for at, layer in enumerate(body.layers):
            _fill(layer, weights, f"model.layers.{cut + at}.", config.rms_norm_eps)
        body.norm = FrozenNorm(weights["model.norm.weight"].clone(), config.rms_norm_eps)
        if kind == "classify":
            model.score = _head(n_labels, config.hidden_size)
        else:
            tied = config.tie_word_embeddings or "lm_head.weight" not in weights
            name = "model.embed_tokens.weight" if tied else "lm_head.weight"
            model.lm_head = frozen_linear(weights[name])
    body.layers = nn.ModuleList([*(Absent() for _ in range(cut)), *body.layers])
    model.config.num_hidden_layers = config.num_hidden_layers
    if getattr(config, "layer_types", None):
        model.config.layer_types = list(config.layer_types)
    model.config.name_or_path = str(directory)
    whole: nn.Module = model.train()
    assert not any(p.is_meta for p in whole.parameters()), "every weight that is left has been read"
    return whole


def _fill(layer: Any, weights: Weights, prefix: str, eps: float) -> None:
    for block, names in _PROJECTIONS.items():
        for name in names:
            stem = f"{prefix}{block}.{name}"
            bias: Tensor | None = weights[stem + ".bias"].clone() if stem + ".bias" in weights else None
            setattr(getattr(layer, block), name, frozen_linear(weights[stem + ".weight"], bias))
    for name in ("input_layernorm", "post_attention_layernorm"):
        # A clone, so that no small tensor keeps the whole file mapped.
        setattr(layer, name, FrozenNorm(weights[f"{prefix}{name}.weight"].clone(), eps))


def _head(n_labels: int, width: int) -> nn.Linear:
    head = nn.Linear(width, n_labels, bias=False)
    with torch.no_grad():
        head.weight.zero_()
    return head
