"""What a block of features is called: a digest of everything it depends on, and of nothing else.

A feature map at cut c depends on the weights below c, their precision, the tokens so far (the model is
causal), how the arithmetic was done, and how it is written down. It does not depend on any adapter that
starts at or above c; so no adapter is in the key, and every adapter finds what any other one left.

Tokens are hashed in blocks, each with the block before: ``H_j = hash(H_{j-1}, tokens of block j)``. Two texts
with a common beginning share the keys of all whole blocks in it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mesh.errors import ConfigError

__all__ = ["BLOCK_TOKENS", "KEY_BYTES", "FeatureSpace", "space_for"]

BLOCK_TOKENS = 64
KEY_BYTES = 32
_SCHEMA = 1
"""Counts up whenever an entry of the same key would mean something else."""


@dataclass(frozen=True, slots=True)
class FeatureSpace:
    """All features that may stand in for each other, but for their tokens."""

    backbone_digest: str
    precision: str
    """Of the weights below the cut: ``fp32``, ``int8``, …"""
    tokenizer_digest: str
    cut: int
    kind: Literal["hidden", "kv"]
    numerics: str
    """Backend, device class, type and canonical shape; see ``node.compute.features.shape``."""
    codec: str
    until: int = 0
    """Of kind ``kv``: the states are those of the layers ``cut`` to ``until`` - 1."""

    def keys(self, ids: Sequence[int]) -> list[bytes]:
        """One key for each block of ``BLOCK_TOKENS`` tokens; the last block may be shorter."""
        link = self._root()
        keys = []
        for start in range(0, len(ids), BLOCK_TOKENS):
            block = ids[start : start + BLOCK_TOKENS]
            # The number of tokens is part of what is hashed: a short block is no beginning of a longer one.
            link = _hash(link + struct.pack(f"<{len(block) + 1}I", len(block), *block))
            keys.append(link)
        return keys

    def _root(self) -> bytes:
        # JSON with sorted keys, so that no two spaces read the same by fields running into each other.
        fields = asdict(self)
        if not self.until:
            del fields["until"]  # hidden states are named as they were before there were others
        return _hash(json.dumps({"schema": _SCHEMA, **fields}, sort_keys=True).encode())


def space_for(
    adapter_first_layer: int,
    cut: int,
    *,
    backbone_digest: str,
    precision: str,
    tokenizer_digest: str,
    numerics: str,
    codec: str,
    kind: Literal["hidden", "kv"] = "hidden",
) -> FeatureSpace:
    """The space whose features may be shown to an adapter whose first changed layer that is.

    Raises:
        ConfigError: The adapter changes a layer below ``cut``: features there would not know of it.
    """
    if cut < 0 or adapter_first_layer < 0:
        raise ConfigError(f"layers count from 0, not {min(cut, adapter_first_layer)}")
    if cut > adapter_first_layer:
        raise ConfigError(
            f"features entering layer {cut} were made without the adapter, which changes layer "
            f"{adapter_first_layer} already: take features at layer {adapter_first_layer} or below, "
            f"or an adapter whose first layer is {cut} or above"
        )
    return FeatureSpace(backbone_digest, precision, tokenizer_digest, cut, kind, numerics, codec)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES, person=b"edgemesh-feature").digest()
