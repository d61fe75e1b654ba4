"""Reads every entry of a share and holds it against its digest, whether a node runs there or not.

Nodes need not be told when a damaged pack is removed: they look at their directory all the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mesh.errors import DecodeError
from node.compute.features.packs import SUFFIX, read_entries, read_index

__all__ = ["Damage", "Verified", "clear", "verify"]


@dataclass(frozen=True, slots=True)
class Damage:
    """A pack that is not what was written."""

    pack: Path
    reason: str
    n_bytes: int


@dataclass(slots=True)
class Verified:
    """What was found in a share."""

    n_packs: int = 0
    n_blocks: int = 0
    n_bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)


def verify(directory: Path, told: Callable[[Verified], None] = lambda so_far: None) -> Verified:
    """All packs of a share; ``told`` after each. What is removed meanwhile is left out.

    Raises:
        OSError: The directory cannot be read.
    """
    found = Verified()
    for pack in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            size = pack.stat().st_size
            n_blocks = 0
            for _ in read_entries(pack, list(read_index(pack).values())):
                n_blocks += 1
        except FileNotFoundError:
            continue
        except (DecodeError, OSError) as error:
            reason = str(error) if isinstance(error, DecodeError) else error.strerror or str(error)
            found.damaged.append(Damage(pack, reason, size))
        found.n_packs += 1
        found.n_blocks += n_blocks
        found.n_bytes += size
        told(found)
    return found


def clear(directory: Path) -> int:
    """Remove all packs of a share; how many bytes there were.

    Raises:
        OSError: One cannot be removed.
    """
    n_bytes = 0
    for pack in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            size = pack.stat().st_size
            pack.unlink()
        except FileNotFoundError:
            continue  # the node let go of it at the same moment
        n_bytes += size
    return n_bytes
