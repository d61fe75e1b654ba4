"""A set of digests in few bits: never denies what is in it, claims what is not in at most one case of a
hundred.

Bloom, CACM 1970; two hashes for all probes: Kirsch and Mitzenmacher, 2006. Keys are digests already, so the
hashes are parts of them, mixed with a salt: with another salt, other keys are claimed wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = [
    "BITS_MAX",
    "BITS_MIN",
    "FALSE_POSITIVES_MAX",
    "FILL_MAX",
    "SALT_MAX",
    "capacity",
    "contains",
    "probes",
]

N_PROBES = 7
_BITS_PER_KEY = 10
FALSE_POSITIVES_MAX = 0.01
"""At capacity (1 - exp(-7/10))**7 = 0.8 %."""
FILL_MAX = 0.53
"""At capacity half of the bits are set, 1 - exp(-7/10) = 0.503, within 0.016 in the smallest filter. A
filter with more than this claims what it should not."""
BITS_MIN = 1 << 12
BITS_MAX = 1 << 21
"""256 KiB for 209,715 keys: with blocks of 100 KB each, 21 GB; from 64 nodes, 16 MiB in memory."""
SALT_MAX = 2**32 - 1


def capacity(n_bits: int) -> int:
    """How many keys a filter takes before it is wrong too often."""
    return n_bits // _BITS_PER_KEY


def probes(key: bytes, n_bits: int, salt: int) -> Iterator[int]:
    """The bits of a key, all different. ``n_bits`` is a power of two."""
    start, step = _lanes(key, salt)
    for _ in range(N_PROBES):
        yield start & n_bits - 1
        start += step


def contains(bits: bytes | bytearray, key: bytes, salt: int) -> bool:
    """Whether all bits of a key are set: ``probes`` with nothing in between, because lookups are many."""
    mask = 8 * len(bits) - 1
    start, step = _lanes(key, salt)
    for _ in range(N_PROBES):
        position = start & mask
        if not bits[position >> 3] >> (position & 7) & 1:
            return False
        start += step
    return True


def _lanes(key: bytes, salt: int) -> tuple[int, int]:
    """Where to start and how far to step. All keys of an arc begin alike, so the first bytes are not used."""
    factor = 2 * salt + 1
    lanes = int.from_bytes(key[8:24], "little")
    start = (lanes & 0xFFFFFFFFFFFFFFFF) * factor & 0xFFFFFFFFFFFFFFFF
    step = (lanes >> 64) * factor & 0xFFFFFFFFFFFFFFFF
    return start >> 32, step >> 32 | 1
