"""Tiny models and random adapters of every kind, written by transformers and PEFT themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

__all__ = ["N_LAYERS", "VOCABULARY", "D", "make_adapter", "make_model", "peft_logits"]

D, N_LAYERS, VOCABULARY = 64, 5, 211
_SIZES: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
}  # fmt: skip


def make_model(directory: Path, family: str = "llama") -> Path:
    """A random model; of Qwen2 with biases that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        if family == "llama":
            # Pad is set because classification by transformers pads to the longest.
            config = LlamaConfig(**_SIZES, tie_word_embeddings=True, pad_token_id=0, initializer_range=0.1)
            model: Any = LlamaForCausalLM(config)
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=False, initializer_range=0.1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(directory)
    return directory


def make_adapter(
    directory: Path, model: Path, config: Any, *, seed: int = 0, size: float = 0.1, n_labels: int = 0
) -> Path:
    """A random adapter of ``config``: every trained number moved by about ``size``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = (
            AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_labels)
            if n_labels
            else AutoModelForCausalLM.from_pretrained(model)
        )
        made = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        made.save_pretrained(directory)
    return directory


def peft_logits(model: Path, adapter: Path | None, ids: list[int], n_labels: int = 0) -> torch.Tensor:
    """By plain transformers and PEFT: (len(ids), vocabulary), or (labels,) of a classification adapter."""
    plain: Any = (
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_labels)
        if n_labels
        else AutoModelForCausalLM.from_pretrained(model)
    )
    if adapter is not None:
        plain = PeftModel.from_pretrained(plain, adapter)
    with torch.no_grad():
        logits: torch.Tensor = plain.eval()(input_ids=torch.tensor([ids])).logits[0]
    return logits
