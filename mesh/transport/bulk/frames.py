"""The bytes of batches: keys in, framed blocks out; blocks in, verdicts out.

    read    request   key (32) …                                  one after the other, nothing else
            answer    status (1) size (4) digest (32) … │ payload …   one row per key, in order
    put     request   count (2) │ key (32) digest (32) size (4) … │ payload …
            answer    verdict (1) …

A reader knows from the table how much follows, before it takes any of it. Numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from mesh.digests import Buffer
from mesh.errors import DecodeError
from mesh.transport.bulk.blobs import BATCH_BYTES_MAX, BLOCK_BYTES_MAX, KEY_BYTES, KEYS_MAX, Block, PutVerdict

__all__ = [
    "COUNT_BYTES",
    "OFFER_BYTES",
    "ROW_BYTES",
    "BlockStatus",
    "Offer",
    "Row",
    "decode_count",
    "decode_keys",
    "decode_offers",
    "decode_rows",
    "decode_verdicts",
    "encode_keys",
    "encode_offers",
    "encode_rows",
]

_ROW = struct.Struct(">BI32s")
_OFFER = struct.Struct(">32s32sI")
_COUNT = struct.Struct(">H")
ROW_BYTES = _ROW.size
OFFER_BYTES = _OFFER.size
COUNT_BYTES = _COUNT.size
_NO_DIGEST = bytes(32)


class BlockStatus(IntEnum):
    FOUND = 0
    MISSING = 1
    LEFT = 2
    """Held, and too large for what is left of the batch: ask again, with room for its size."""


@dataclass(frozen=True, slots=True)
class Row:
    """What an answer says of one key. The ``digest`` of a block that does not follow is zero."""

    status: BlockStatus
    size: int = 0
    digest: bytes = _NO_DIGEST


@dataclass(frozen=True, slots=True)
class Offer:
    """A block before its payload: what a peer wants stored."""

    key: bytes
    digest: bytes
    size: int


def encode_keys(keys: Sequence[bytes]) -> bytes:
    assert 0 < len(keys) <= KEYS_MAX and all(len(key) == KEY_BYTES for key in keys), "the asker cuts batches"
    return b"".join(keys)


def decode_keys(content: Buffer) -> list[bytes]:
    """Raises: DecodeError: not one to ``KEYS_MAX`` whole keys."""
    n_keys, rest = divmod(len(content), KEY_BYTES)
    if rest or not 0 < n_keys <= KEYS_MAX:
        raise DecodeError(f"a batch has 1 to {KEYS_MAX} keys of {KEY_BYTES} bytes, got {len(content)} bytes")
    return [bytes(content[start : start + KEY_BYTES]) for start in range(0, len(content), KEY_BYTES)]


def encode_rows(rows: Sequence[Row]) -> bytes:
    return b"".join(_ROW.pack(row.status, row.size, row.digest) for row in rows)


def decode_rows(content: Buffer, n_keys: int, n_payload_bytes: int) -> list[Row]:
    """The table of an answer to ``n_keys`` keys that announces ``n_payload_bytes`` after it.

    Raises:
        DecodeError: Rows do not fit the question, one another, or the announced length.
    """
    if len(content) != n_keys * ROW_BYTES:
        raise DecodeError(f"a table of {len(content)} bytes for {n_keys} keys")
    rows = []
    for code, size, digest in _ROW.iter_unpack(content):
        try:
            status = BlockStatus(code)
        except ValueError:
            raise DecodeError(f"a block cannot be {code}") from None
        if size > (0 if status is BlockStatus.MISSING else BLOCK_BYTES_MAX):
            raise DecodeError(f"a {status.name.lower()} block of {size} bytes")
        rows.append(Row(status, size, digest))
    n_bytes = sum(row.size for row in rows if row.status is BlockStatus.FOUND)
    if n_bytes != n_payload_bytes:
        raise DecodeError(f"a table for {n_bytes} bytes before {n_payload_bytes} bytes")
    return rows


def encode_offers(blocks: Sequence[Block]) -> bytes:
    assert 0 < len(blocks) <= KEYS_MAX, "the asker cuts batches"
    return _COUNT.pack(len(blocks)) + b"".join(
        _OFFER.pack(block.key, block.digest, len(block.payload)) for block in blocks
    )


def decode_count(content: Buffer) -> int:
    """Raises: DecodeError: not a number of blocks that one batch may hold."""
    if len(content) != COUNT_BYTES:
        raise DecodeError("a batch without its count")
    (count,) = _COUNT.unpack(content)
    if not 0 < count <= KEYS_MAX:
        raise DecodeError(f"a batch has 1 to {KEYS_MAX} blocks, not {count}")
    return int(count)


def decode_offers(content: Buffer, n_payload_bytes: int) -> list[Offer]:
    """Raises: DecodeError: sizes are out of bounds or do not add up to what follows."""
    if not content or len(content) % OFFER_BYTES:
        raise DecodeError(f"a table of {len(content)} bytes")
    offers = [Offer(*row) for row in _OFFER.iter_unpack(content)]
    n_bytes = sum(offer.size for offer in offers)
    if any(offer.size > BLOCK_BYTES_MAX for offer in offers) or n_bytes > BATCH_BYTES_MAX:
        raise DecodeError("a batch that is larger than one may be")
    if n_bytes != n_payload_bytes:
        raise DecodeError(f"a table for {n_bytes} bytes before {n_payload_bytes} bytes")
    return offers


def decode_verdicts(content: Buffer, n_blocks: int) -> list[PutVerdict]:
    """Raises: DecodeError: not one verdict per block."""
    if len(content) != n_blocks:
        raise DecodeError(f"{len(content)} verdicts on {n_blocks} blocks")
    try:
        return [PutVerdict(code) for code in content]
    except ValueError as error:
        raise DecodeError(str(error)) from None
