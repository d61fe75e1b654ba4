"""The tensors in a directory's safetensors files by name, read (mapped) one at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["Weights"]


class Weights:
    """A mapping from name to tensor while entered; a tensor keeps its whole file mapped while it lives."""

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        index = directory / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        for file in files:
            opened = self._stack.enter_context(safe_open(directory / file, framework="pt", device=device))
            self._file_of.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._file_of.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor.to(self._dtype)
