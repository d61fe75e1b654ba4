"""What travels in bulk, and the bounds both ends keep.

A *blob* is named by the digest of its bytes and may be gigabytes: it travels in ranges. A *block* is
small, is asked for by its key and carries the digest of its payload: many travel in one request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from mesh.cache.ring import RingEpoch
from mesh.digests import DIGEST_BYTES, Buffer
from mesh.errors import DecodeError
from mesh.ids import Epoch, NodeId
from mesh.units import MIB

__all__ = [
    "BATCH_BYTES_MAX",
    "BLOCK_BYTES_MAX",
    "CATALOGUE_BYTES_MAX",
    "KEYS_MAX",
    "KEY_BYTES",
    "PIECE_BYTES",
    "RANGE_BYTES_MAX",
    "VIEW_HEADER",
    "BlobRef",
    "Block",
    "Holder",
    "PutVerdict",
    "parse_view",
]

KEY_BYTES = 32
BLOCK_BYTES_MAX = 8 * MIB
"""64 tokens of keys and values below a deep cut of a 1B model in float32 are 4 MiB."""
BATCH_BYTES_MAX = 8 * MIB
"""Payload of one batch, both ways. What does not fit is said as left over and asked for again."""
KEYS_MAX = 1024
"""In one batch: 1 MB of the smallest useful blocks, and a table of 37 KiB."""
RANGE_BYTES_MAX = 16 * MIB
"""One GET of a blob. At 200 Mbit/s 0.7 s: a cut costs little, and holders share fairly."""
PIECE_BYTES = MIB // 4
"""Encrypted and sent in one go. A MiB costs twice the processor time of the sender, 64 KiB a sixth more: what
is freed in large pieces goes back to the system, and comes back page by page (ADR 0018)."""
BLOB_BYTES_MAX = 1 << 40
CATALOGUE_BYTES_MAX = MIB // 2
"""256 KiB of bits, written as text."""

VIEW_HEADER = "Edgemesh-View"
"""In every request and every answer: the newest ring view its sender knows."""

_VIEW = re.compile(r"([0-9]{1,16})(?:@([a-z0-9-]{1,63}))?/([0-9]{1,16})")


@dataclass(frozen=True, slots=True)
class BlobRef:
    """What is published of a blob. The size is part of it: nobody gets to choose how much we take."""

    digest: bytes
    size: int

    def __post_init__(self) -> None:
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, got {len(self.digest)}")
        if not 0 <= self.size <= BLOB_BYTES_MAX:
            raise ValueError(f"size must be from 0 to {BLOB_BYTES_MAX} bytes, got {self.size}")

    def __str__(self) -> str:
        return self.digest.hex()[:12]


@dataclass(frozen=True, slots=True)
class Block:
    """One entry of the cache as it travels; ``digest`` is that of ``payload``."""

    key: bytes
    digest: bytes
    payload: Buffer

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES or len(self.digest) != DIGEST_BYTES:
            raise ValueError("a block has a key and a digest of 32 bytes each")
        if len(self.payload) > BLOCK_BYTES_MAX:
            raise ValueError(f"a block has at most {BLOCK_BYTES_MAX} bytes, got {len(self.payload)}")


@dataclass(frozen=True, slots=True)
class Holder:
    """A peer that may have it, and the address at which it was last proven."""

    node: NodeId
    address: str
    port: int

    def __str__(self) -> str:
        return str(self.node)


class PutVerdict(IntEnum):
    """What became of one block that a peer wanted stored. The numbers travel."""

    STORED = 0
    HELD = 1
    """It was there already."""
    NO_ROOM = 2
    WRONG_DIGEST = 3
    """The payload is not what its digest says."""


def parse_view(text: str) -> RingEpoch:
    """What ``str(RingEpoch)`` wrote.

    Raises:
        DecodeError: It is no epoch of a ring view.
    """
    match = _VIEW.fullmatch(text)
    if match is None:
        raise DecodeError(f"no ring epoch: {text[:80]!r}")
    term, node, change = match.groups()
    try:
        return RingEpoch(Epoch(int(term), NodeId(node or "")), int(change))
    except ValueError as error:
        raise DecodeError(f"no ring epoch: {error}") from None
