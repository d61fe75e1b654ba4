"""What this machine knows of its adapters beyond their files, in one JSON file that several processes share.

    shelf     name -> which version lies in the adapters' directory now
    kept      versions whose files are here, the older ones too
    removed   names that the whole mesh has given up, up to a version, for a while
    declined  names that were removed on this machine only, up to a version

When something was last used is a date of this machine's calendar, good enough to choose what leaves first.
How long a removal is remembered is not: a device without a battery may have any date.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mesh.agreement.versions import Rank, rank_of
from mesh.messages.files import AdapterHeld
from node.durable import write_durably

__all__ = ["Identity", "Index", "Kept", "Removal", "ShelfPlace", "open_index"]

log = logging.getLogger(__name__)

Identity = tuple[tuple[int, int, int], ...]
"""Of an adapter's files, each by inode, size and time of change: another means that it was replaced."""

_FORM = 1
_INDEX_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One version of one name, and the list of its files as it travels."""

    held: AdapterHeld
    files: str
    used_at: float
    """When it was last asked for, or came."""

    @property
    def key(self) -> tuple[str, str]:
        return self.held.name, self.held.digest

    @property
    def rank(self) -> Rank:
        return rank_of(self.held.version, self.held.digest)


@dataclass(frozen=True, slots=True)
class ShelfPlace:
    digest: str
    identity: Identity


@dataclass(frozen=True, slots=True)
class Removal:
    version: int
    left_s: float
    """How long it is still remembered, in time that this machine is on."""


@dataclass(slots=True)
class Index:
    shelf: dict[str, ShelfPlace] = field(default_factory=dict)
    kept: dict[tuple[str, str], Kept] = field(default_factory=dict)
    """By name and digest."""
    removed: dict[str, Removal] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)
    aged_at: float = 0.0
    """On the monotonic clock of this machine, which all its processes share, and which a boot starts anew."""

    def current(self, name: str) -> Kept | None:
        """What lies on the shelf under this name."""
        place = self.shelf.get(name)
        return self.kept.get((name, place.digest)) if place is not None else None

    def is_current(self, kept: Kept) -> bool:
        place = self.shelf.get(kept.held.name)
        return place is not None and place.digest == kept.held.digest

    @property
    def text(self) -> str:
        plain = {
            "form": _FORM,
            "shelf": {name: asdict(place) for name, place in sorted(self.shelf.items())},
            "kept": [asdict(kept) for _, kept in sorted(self.kept.items())],
            "removed": {name: asdict(removal) for name, removal in sorted(self.removed.items())},
            "declined": dict(sorted(self.declined.items())),
            "aged_at": self.aged_at,
        }
        return json.dumps(plain, indent=1)

    @classmethod
    def parse(cls, text: str) -> Index:
        """
        Raises:
            ValueError, TypeError, KeyError: It is none of ours, or damaged.
        """
        plain: dict[str, Any] = json.loads(text)
        if plain["form"] != _FORM:
            raise ValueError(f"of another form: {plain['form']!r}")
        kept = [
            Kept(held=AdapterHeld(**one["held"]), files=str(one["files"]), used_at=float(one["used_at"]))
            for one in plain["kept"]
        ]
        return cls(
            shelf={
                name: ShelfPlace(str(place["digest"]), tuple(_numbers(one) for one in place["identity"]))
                for name, place in plain["shelf"].items()
            },
            kept={one.key: one for one in kept},
            removed={
                name: Removal(int(one["version"]), float(one["left_s"]))
                for name, one in plain["removed"].items()
            },
            declined={name: int(version) for name, version in plain["declined"].items()},
            aged_at=float(plain["aged_at"]),
        )


@contextmanager
def open_index(home: Path) -> Iterator[Index]:
    """The index in ``home``, for one process at a time; what was changed is durable at the end.

    A damaged one is given up: adapters get their numbers anew, as if they had just been copied here.

    Raises:
        OSError: The directory cannot be used.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / "index.json"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        index = _read(path)
        before = index.text
        yield index
        if (after := index.text) != before:
            write_durably(path, after.encode())


def _read(path: Path) -> Index:
    try:
        with path.open("rb") as file:
            return Index.parse(file.read(_INDEX_BYTES_MAX).decode())
    except FileNotFoundError:
        return Index()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s is damaged (%s): adapters here are counted anew", path, str(error)[:120])
        return Index()


def _numbers(one: list[Any]) -> tuple[int, int, int]:
    inode, size, changed = one
    return int(inode), int(size), int(changed)
