"""Keeps memory of batches in the process from one to the next.

glibc gives what is freed at the end of its heap back to the system above a threshold, and takes large pieces
from the system each time. Pages that come back are cleared one by one: with batches of 1 MiB that cost a
fifth of a transfer (ADR 0018). Its thresholds follow the largest piece that was ever freed (``mallopt(3)``,
M_MMAP_THRESHOLD); other C libraries do not mind.
"""

from __future__ import annotations

from mesh.transport.bulk.blobs import RANGE_BYTES_MAX

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """From now on up to twice ``RANGE_BYTES_MAX`` stay. No page of the piece itself is ever touched."""
    bytes(RANGE_BYTES_MAX)
