"""From a directory to a backbone on the best device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from node.compute.backbone.contract import Backbone
from node.compute.backbone.generic import GenericBackbone
from node.compute.backbone.llama import LlamaBackbone

__all__ = ["best_device", "load_backbone"]


def best_device() -> str:
    """``cuda``, ``mps`` or ``cpu``, whichever is there, in this order."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_backbone(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """The weights in ``directory``, by our own pass where it fits the architecture."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if LlamaBackbone.can_run(config):
        return LlamaBackbone(directory, config, device, dtype)
    return GenericBackbone(directory, device, dtype)
