"""The adapters of one directory by name: loaded when asked for, held within a budget of bytes.

    <directory>/<name>/adapter_config.json, adapter_model.safetensors [, edgemesh.json]

A name is a path on disk; what is served under it is whatever was there when it was last asked for. A new
adapter moved over an old one is noticed by its files' identity, and a sequence that runs keeps the object
it began with: nothing here changes an adapter, names only come to point at another.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mesh.errors import ConfigError
from mesh.messages import AdapterCard
from node.compute.adapters.card import CONFIG_FILE, WEIGHTS_FILE, Card, read_card
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.files import load_adapter
from node.compute.backbone.deltas import Adapter, AdapterRows

__all__ = ["Shelf"]

log = logging.getLogger(__name__)

# A name is a directory and travels in topics and requests (see ``mesh.messages.checks.check_id``).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A listing is sent to the whole mesh; more directories than this are somebody's mistake.
_NAMES_MAX = 4096

_Identity = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class _Held:
    """An adapter in memory, and how many hold it there."""

    adapter: Adapter
    identity: _Identity
    n_pins: int = 0


class Shelf:
    """Not for several threads: it belongs to the loop that computes."""

    def __init__(
        self,
        directory: Path,
        backbone_facts: BackboneFacts,
        budget_bytes: int,
        *,
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.budget_bytes = budget_bytes
        self._facts = backbone_facts
        self._device = device
        self._clock = clock
        self._loaded: OrderedDict[str, _Held] = OrderedDict()  # least recently used first
        # Replaced while in use: they answer no new request, and leave with their last sequence.
        self._leaving: list[_Held] = []
        self._seen = self._look()

    # ── names ───────────────────────────────────────────────────────────────────────────────────────

    def names(self) -> list[str]:
        """Directories that hold an adapter, as of the last ``refresh``; one may yet be refused by ``get``."""
        return sorted(self._seen)

    def refresh(self) -> bool:
        """Look at the directory again: whether an adapter came, went or was replaced."""
        seen = self._look()
        changed = seen != self._seen
        self._seen = seen
        for name in [name for name, held in self._loaded.items() if seen.get(name) != held.identity]:
            self._drop(name, "it was replaced or removed")
        return changed

    def card(self, name: str) -> AdapterCard:
        """What a listing shows; of an adapter without a card, what can be told once it is loaded.

        Raises:
            ConfigError: There is none of this name, or it is damaged.
        """
        path = self._path(name)
        card = read_card(path)
        if card is not None:
            return card.listing()
        adapter = self.get(name)
        top_layers = adapter.n_layers - adapter.first_layer
        return Card(
            name=name,
            digest=adapter.digest,
            method="peft",
            task="classify" if adapter.head else "generate",
            first_layer=adapter.first_layer,
            top_layers=top_layers,
            labels=adapter.head.labels if adapter.head else (),
            bytes=adapter.n_bytes,
        ).listing()

    # ── adapters ────────────────────────────────────────────────────────────────────────────────────

    @property
    def held_bytes(self) -> int:
        """Memory of all loaded adapters, replaced ones that still run included."""
        return sum(held.adapter.n_bytes for held in (*self._loaded.values(), *self._leaving))

    def loaded(self) -> list[str]:
        """Names in memory, the least recently used first."""
        return list(self._loaded)

    def get(self, name: str) -> Adapter:
        """The adapter called ``name``, loaded if need be.

        Raises:
            ConfigError: There is none, it cannot be served, or it finds no room beside those in use.
        """
        path = self._path(name)
        identity = _identity(path)
        held = self._loaded.get(name)
        if held is not None and held.identity == identity:
            self._loaded.move_to_end(name)
            return held.adapter
        started = self._clock()
        adapter, identity = self._load(path, identity)
        if held is not None:
            self._drop(name, "it was replaced")
        self._make_room(adapter)
        self._loaded[name] = _Held(adapter, identity)
        self._seen[name] = identity
        log.info("adapter loaded name=%s bytes=%d s=%.3f", name, adapter.n_bytes, self._clock() - started)
        return adapter

    def pin(self, name: str) -> Adapter:
        """``get``, and keep it in memory until ``unpin`` was called as often.

        Raises:
            ConfigError: As ``get``.
        """
        adapter = self.get(name)
        self._loaded[name].n_pins += 1
        return adapter

    def unpin(self, adapter: Adapter | str) -> None:
        """The one ``pin`` gave; by name, the oldest of that name that is still pinned."""
        pinned = [held for held in (*self._leaving, *self._loaded.values()) if held.n_pins]
        mine = [held for held in pinned if adapter in (held.adapter, held.adapter.name)]
        assert mine, "what was not pinned cannot be unpinned"
        mine[0].n_pins -= 1
        if not mine[0].n_pins and mine[0] in self._leaving:
            self._leaving.remove(mine[0])
            AdapterRows.forget(mine[0].adapter)

    # ── room ────────────────────────────────────────────────────────────────────────────────────────

    def _load(self, path: Path, identity: _Identity) -> tuple[Adapter, _Identity]:
        """One version of the adapter, even if another is moved over it meanwhile."""
        while True:
            failed: ConfigError | None = None
            try:
                adapter = load_adapter(path, self._facts, bytes_max=self.budget_bytes, device=self._device)
            except ConfigError as error:
                failed = error
            before, identity = identity, _identity(path)
            if identity == before:
                if failed is not None:
                    raise failed
                return adapter, identity

    def _make_room(self, adapter: Adapter) -> None:
        free = [name for name, held in self._loaded.items() if not held.n_pins]
        while self.held_bytes + adapter.n_bytes > self.budget_bytes and free:
            self._drop(free.pop(0), "its room was needed")
        if self.held_bytes + adapter.n_bytes > self.budget_bytes:
            raise ConfigError(
                f"no room for adapter {adapter.name!r} ({adapter.n_bytes / 1e6:,.1f} MB): those in use hold "
                f"{self.held_bytes / 1e6:,.1f} of {self.budget_bytes / 1e6:,.1f} MB; try again when they are "
                "done, or raise the budget for adapters"
            )

    def _drop(self, name: str, why: str) -> None:
        held = self._loaded.pop(name)
        if held.n_pins:
            self._leaving.append(held)
        else:
            AdapterRows.forget(held.adapter)
        log.info("adapter dropped name=%s bytes=%d why=%r", name, held.adapter.n_bytes, why)

    # ── the directory ───────────────────────────────────────────────────────────────────────────────

    def _path(self, name: str) -> Path:
        """Raises:
        ConfigError: No adapter is called so; the text lists those there are.
        """
        path = self.directory / name
        if not _NAME.fullmatch(name) or not (path / CONFIG_FILE).is_file():
            there = ", ".join(self.names()[:20]) or "none"
            raise ConfigError(f"no adapter is called {name[:64]!r}; in {self.directory} there are: {there}")
        return path

    def _look(self) -> dict[str, _Identity]:
        found: dict[str, _Identity] = {}
        try:
            with os.scandir(self.directory) as entries:
                for entry in entries:
                    if len(found) >= _NAMES_MAX:
                        log.warning(
                            "more than %d adapters in %s: the rest is ignored", _NAMES_MAX, self.directory
                        )
                        break
                    if _NAME.fullmatch(entry.name) and (Path(entry.path) / CONFIG_FILE).is_file():
                        found[entry.name] = _identity(Path(entry.path))
        except FileNotFoundError:
            return {}  # nothing was tuned or copied here yet
        return found


def _identity(path: Path) -> _Identity:
    """What changes when one of the files is replaced: inode, size and time of change, never read bytes."""
    found = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = (path / name).stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
