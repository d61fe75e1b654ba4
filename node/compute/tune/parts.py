"""Training one job in parts: which records each part has, how states become one, and how a state travels.

    round r:   mean of the states of round r - 1 ──▶ part 0, 1, … N - 1, an epoch each ──▶ N states

Local training with averaging after each epoch (McMahan et al., Communication-Efficient Learning of Deep
Networks from Decentralized Data, 2017). Everything here is a function of its inputs: who computes a part, and
in what order parts end, changes no bit.

A state travels as blocks of the mesh's memory under names that follow from its digest: any node that has the
digest finds it, wherever it is kept, and can tell that it is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from random import Random
from typing import Final, Protocol

import torch
from torch import Tensor

from mesh.errors import DecodeError
from node.compute.features.codec import CODECS
from node.compute.features.store import Entry

__all__ = ["BlockStore", "States", "averaged", "digest_of_state", "split"]

_BLOCK_ROWS, _BLOCK_WIDTH = 64, 1024  # 256 KiB, as a block of features of a large model
_RAW: Final = CODECS["raw"]


def split(n_records: int, n_parts: int, seed: int) -> list[list[int]]:
    """Numbers of the records of each part, in their order; sizes differ by one at most.

    >>> split(5, 2, seed=0)
    [[0, 2, 3], [1, 4]]
    """
    order = list(range(n_records))
    Random(f"parts/{seed}").shuffle(order)
    return [sorted(order[part::n_parts]) for part in range(n_parts)]


def averaged(states: Sequence[Mapping[str, Tensor]], weights: Sequence[int]) -> dict[str, Tensor]:
    """The mean of states of equal names and shapes, weighted; added in their order, in float64.

    Raises:
        ValueError: They are not states of one model.
    """
    if not states or len(states) != len(weights) or min(weights) < 0 or not sum(weights):
        raise ValueError(f"{len(states)} states and {len(weights)} weights")
    first = states[0]
    for state in states:
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in first.items()}:
            raise ValueError("these are states of different models")
    mean = {}
    for name, tensor in first.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            total += state[name].double() * weight
        mean[name] = (total / sum(weights)).to(tensor.dtype)
    return mean


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """BLAKE2b-256 of names, shapes and numbers, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().contiguous().numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


class BlockStore(Protocol):
    """What is needed of a ``FeatureStore``; one with ``prefetch`` reads of peers, too."""

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]: ...
    def put(self, entries: Mapping[bytes, Entry]) -> None: ...


class States:
    """States of parts in the mesh's memory. ``like``: names and shapes, all float32."""

    def __init__(self, store: BlockStore, like: Mapping[str, Tensor]) -> None:
        self._store = store
        self._shapes = {name: tensor.shape for name, tensor in sorted(like.items())}
        self._n = sum(tensor.numel() for tensor in like.values())

    def keep(self, state: Mapping[str, Tensor], cost_s: float) -> str:
        """Its digest. ``cost_s``: what training it took, which is what losing it would cost."""
        digest = digest_of_state(state)
        rows = self._rows(torch.cat([state[name].detach().reshape(-1) for name in self._shapes]))
        keys = self._keys(digest)
        entries = {
            key: Entry(_RAW.encode(rows[at * _BLOCK_ROWS : (at + 1) * _BLOCK_ROWS]), cost_s / len(keys))
            for at, key in enumerate(keys)
        }
        self._store.put(entries)
        return digest

    def ask(self, digest: str) -> None:
        """Have it read of peers, as far as it is not here; returns at once."""
        prefetch = getattr(self._store, "prefetch", None)
        if prefetch is not None:
            prefetch(self._keys(digest))

    def may_come(self, digest: str) -> bool:
        """Whether some of it is still on its way."""
        waiting = getattr(self._store, "waiting", None)
        return waiting is not None and bool(waiting(self._keys(digest)))

    def find(self, digest: str) -> dict[str, Tensor] | None:
        """``None``: it is not (all) here, or not what its digest says."""
        parts = []
        for entry in self._store.get(self._keys(digest)):
            if entry is None:
                return None
            try:
                parts.append(_RAW.decode(entry.encoded, _BLOCK_WIDTH))
            except DecodeError:
                return None
        flat = torch.cat(parts).reshape(-1) if parts else torch.zeros(0)
        if flat.numel() < self._n:
            return None
        state, start = {}, 0
        for name, shape in self._shapes.items():
            state[name] = flat[start : start + shape.numel()].reshape(shape).clone()
            start += shape.numel()
        return state if digest_of_state(state) == digest else None

    def _keys(self, digest: str) -> list[bytes]:
        n_blocks = max(1, -(-self._n // (_BLOCK_ROWS * _BLOCK_WIDTH)))
        return [
            hashlib.blake2b(f"{digest} {at}".encode(), digest_size=32, person=b"edgemesh-state").digest()
            for at in range(n_blocks)
        ]

    def _rows(self, flat: Tensor) -> Tensor:
        """Shapes: (rows, _BLOCK_WIDTH), zeros after the end."""
        n_rows = max(1, -(-len(flat) // _BLOCK_WIDTH))
        padded = torch.zeros(n_rows * _BLOCK_WIDTH)
        padded[: len(flat)] = flat
        return padded.reshape(n_rows, _BLOCK_WIDTH)
