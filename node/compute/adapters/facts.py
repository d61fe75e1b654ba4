"""The shape of the backbone that adapters must fit, read from its directory alone.

An adapter names modules as ``transformers`` does (``layers.26.self_attn.q_proj``); the pass has stacked
matrices. This is the map from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from transformers import AutoConfig

from mesh.errors import ConfigError
from node.compute.backbone.deltas import Norm, Slot
from node.compute.backbone.llama import LlamaBackbone

__all__ = ["BackboneFacts", "Module", "Place"]


@dataclass(frozen=True, slots=True, order=True)
class Module:
    """One module of the backbone; the head and the final norm count as layer ``n_layers``."""

    layer: int
    kind: str
    """Such as ``self_attn.q_proj``, ``input_layernorm``, ``lm_head``, ``norm``."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear module lies in its stacked matrix."""

    slot: Slot
    start: int
    d_out: int
    d_in: int


@dataclass(frozen=True, slots=True)
class BackboneFacts:
    """What an adapter has to fit."""

    directory: Path
    n_layers: int
    width: int
    places: Mapping[str, Place]
    """By kind of module."""
    slot_rows: Mapping[Slot, int]
    """d_out of the stacked matrices."""
    vocabulary: int
    sha256: str = ""
    """Of the weights, where known: a card that names another is refused."""

    NORMS = MappingProxyType[str, Norm](
        {"input_layernorm": "attention", "post_attention_layernorm": "mlp", "norm": "final"}
    )

    @classmethod
    def of(cls, directory: Path, sha256: str = "") -> BackboneFacts:
        """Raises:
        ConfigError: The model is of a family that is served without adapters.
        """
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if not LlamaBackbone.can_run(config):
            raise ConfigError(
                f"a model of type {config.model_type!r} is served without adapters; "
                "choose one of the Llama family (llama, mistral, qwen2)"
            )
        d: int = config.hidden_size
        head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
        q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        mlp = config.intermediate_size
        return cls(
            directory,
            config.num_hidden_layers,
            d,
            {
                "self_attn.q_proj": Place("qkv", 0, q, d),
                "self_attn.k_proj": Place("qkv", q, kv, d),
                "self_attn.v_proj": Place("qkv", q + kv, kv, d),
                "self_attn.o_proj": Place("out", 0, d, q),
                "mlp.gate_proj": Place("gate_up", 0, mlp, d),
                "mlp.up_proj": Place("gate_up", mlp, mlp, d),
                "mlp.down_proj": Place("down", 0, d, mlp),
                "lm_head": Place("head", 0, config.vocab_size, d),
            },
            {"qkv": q + 2 * kv, "out": d, "gate_up": 2 * mlp, "down": d, "head": config.vocab_size},
            config.vocab_size,
            sha256,
        )

    def name_of(self, module: Module) -> str:
        """As the model's own weights call it (without ``.weight``)."""
        if module.kind == "lm_head":
            return "lm_head"
        return "model.norm" if module.kind == "norm" else f"model.layers.{module.layer}.{module.kind}"
