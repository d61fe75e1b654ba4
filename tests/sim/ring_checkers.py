"""What must hold of the ring in every run, read off its history; as ``tests.sim.checkers``."""

from __future__ import annotations

from typing import Any

from mesh.cache.facts import RingChanged
from mesh.cache.ring import RingEpoch, RingSpec
from mesh.cache.sharding import RING_KEY
from mesh.core import Save
from mesh.facts import Deposed, Elected
from mesh.ids import Epoch
from tests.sim.history import History

__all__ = ["made_while_elected", "one_ring_per_epoch", "rings_only_grow"]


def _saved(what: Any) -> RingSpec | None:
    """The spec that this entry shows taken: on disk before it counts."""
    return RingSpec.read(what.record) if isinstance(what, Save) and what.key == RING_KEY else None


def rings_only_grow(history: History) -> list[str]:
    """Of each node, over restarts: what it took never goes back; of each life, neither does its view."""
    saved: dict[str, RingSpec] = {}
    seen: dict[str, RingSpec] = {}
    bad = []
    for entry in history:
        spec = _saved(entry.what)
        if spec is not None:
            if entry.node in saved and spec.rank <= saved[entry.node].rank:
                bad.append(f"{entry.at:.3f}: {entry.node} took {spec.epoch} after {saved[entry.node].epoch}")
            saved[entry.node] = spec
        elif isinstance(entry.what, RingChanged):
            spec = entry.what.view.spec
            if entry.boot in seen and spec.rank <= seen[entry.boot].rank:
                bad.append(f"{entry.at:.3f}: {entry.node} went from {seen[entry.boot].epoch} to {spec.epoch}")
            seen[entry.boot] = spec
    return bad


def one_ring_per_epoch(history: History) -> list[str]:
    """Two nodes that name the same epoch mean the same owners."""
    meant: dict[RingEpoch, RingSpec] = {}
    bad = []
    for entry in history:
        spec = _saved(entry.what)
        if spec is not None and meant.setdefault(spec.epoch, spec) != spec:
            bad.append(f"{entry.at:.3f}: {entry.node} took {spec}, which was {meant[spec.epoch]}")
    return bad


def made_while_elected(history: History) -> list[str]:
    """A ring is numbered by the node whose claim it carries, and only while that claim holds there."""
    elected: dict[str, Epoch] = {}  # by boot
    known: set[RingEpoch] = set()
    bad = []
    for entry in history:
        if isinstance(entry.what, Elected):
            elected[entry.boot] = entry.what.epoch
        elif isinstance(entry.what, Deposed):
            elected.pop(entry.boot, None)
        spec = _saved(entry.what)
        if spec is not None and spec.epoch not in known:
            known.add(spec.epoch)
            if elected.get(entry.boot) != spec.epoch.claim:
                bad.append(
                    f"{entry.at:.3f}: {entry.node} made {spec.epoch}, elected {elected.get(entry.boot)}"
                )
    return bad
