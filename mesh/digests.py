"""The digest by which bytes are known: in a pack, on their way between nodes, as the name of a file.

BLAKE3, 256 bits (O'Connor, Aumasson, Neves, Wilcox-O'Hearn: *BLAKE3, one function, fast everywhere*, 2020).
Every byte of a feature map passes here whenever it is stored, read or received, so its speed is felt
(ADR 0018). What is small and only needs a stable number, as a place on the ring, uses the standard library.
"""

from __future__ import annotations

from typing import TypeAlias

from blake3 import blake3

__all__ = ["DIGEST_BYTES", "Buffer", "RunningDigest", "digest_of"]

Buffer: TypeAlias = bytes | bytearray | memoryview

DIGEST_BYTES = 32


def digest_of(content: Buffer) -> bytes:
    return blake3(content).digest()


class RunningDigest:
    """``digest_of`` of what arrives in pieces."""

    def __init__(self) -> None:
        self._hasher = blake3()

    def update(self, piece: Buffer) -> None:
        self._hasher.update(piece)

    def digest(self) -> bytes:
        return self._hasher.digest()
