"""The rows of the embedding that occur, read when they occur.

A table of 49,152 tokens is a fifth of a small model's weights, and an answer uses a few hundred of its rows.
On a CPU none is held: each is read from the model's file, whose pages the system keeps as long as memory is
plenty (measured: 2 µs a row). So the table costs an 8- or 4-bit model nothing, and its rows are exact. The
file stays open, so a model that is converted anew meanwhile does not change under a running one.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from node.compute.backbone.weights import Weights

__all__ = ["Embedding"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Embedding:
    """``embedding(ids)``: (len(ids), d) in ``dtype`` on ``device``.

    ``like`` is an empty (0, d) tensor of the same kind. ``nbytes`` is what is held in memory. ``is_used``:
    otherwise only ``like`` is asked for, and nothing is read.
    """

    def __init__(
        self, directory: Path, name: str, device: str, dtype: torch.dtype, *, is_used: bool = True
    ) -> None:
        self._table: Tensor | None = None
        self.nbytes = 0
        if device != "cpu" and not is_used:
            *_, (_, d) = _find(directory, name)
            self.like = torch.empty(0, d, dtype=dtype, device=device)
            return
        if device != "cpu":
            with Weights(directory, device, dtype) as weights:
                self._table = weights[name]
            self.nbytes = self._table.nbytes
            self.like = self._table[:0]
            return
        file, start, self._stored, (self._n_rows, d) = _find(directory, name)
        self.like = torch.empty(0, d, dtype=dtype)
        self._row_bytes = d * self._stored.itemsize
        self._start = start
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """
        Raises:
            IndexError: A token the model does not have.
            OSError: The file cannot be read any more.
        """
        if self._table is not None:
            return self._table[torch.tensor(list(ids), device=self._table.device)]
        size, rows = self._row_bytes, bytearray()
        for token in ids:
            if not 0 <= token < self._n_rows:
                raise IndexError(f"token {token} of a vocabulary of {self._n_rows}")
            rows += os.pread(self._file, size, self._start + token * size)
        if len(rows) != size * len(ids):
            raise OSError("the model's file has become shorter: fetch the model again")
        found = torch.frombuffer(rows, dtype=self._stored).view(len(ids), -1)
        return found.to(self.like.dtype)


def _find(directory: Path, name: str) -> tuple[Path, int, torch.dtype, tuple[int, int]]:
    """File, first byte, type and shape of a tensor, from the header of the safetensors file it is in."""
    index = directory / "model.safetensors.index.json"
    file = directory / "model.safetensors"
    if index.exists():
        file = directory / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
    with file.open("rb") as opened:
        n_header = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(n_header))[name]
    n_rows, d = entry["shape"]
    return file, 8 + n_header + entry["data_offsets"][0], _DTYPES[entry["dtype"]], (n_rows, d)
