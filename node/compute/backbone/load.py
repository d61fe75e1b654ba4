"""From a directory to a backbone on the best device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from mesh.errors import ConfigError
from node.compute.backbone.contract import Backbone
from node.compute.backbone.generic import GenericBackbone
from node.compute.backbone.llama import LlamaBackbone
from node.compute.lean import give_back

__all__ = ["best_device", "load_backbone"]


def best_device() -> str:
    """``cuda``, ``mps`` or ``cpu``, whichever is there, in this order."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_backbone(directory: Path, device: str = "cpu", precision: str = "fp32") -> Backbone:
    """The weights in ``directory``, by our own pass where it fits the architecture.

    Raises:
        ConfigError: The architecture is computed by ``transformers``, which has no such weights.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if LlamaBackbone.can_run(config):
        backbone = LlamaBackbone(directory, config, device, precision)
        give_back()
        return backbone
    if precision in ("int8", "int4"):
        raise ConfigError(
            f"{config.model_type} models have no {precision} weights here, only the Llama family has "
            "(Llama, Mistral, Qwen2): choose --precision fp32 or bf16"
        )
    return GenericBackbone(directory, device, precision)
