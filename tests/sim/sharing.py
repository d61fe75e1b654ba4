"""Nodes that share their memory: stores that change, views that take time to draw, catalogues to be fetched.

Blocks themselves do not move here (``tests.property.test_cache_churn`` moves them): this is about who knows
what of the ring and of one another's stores, whatever happens to processes, links and brokers.
"""

from __future__ import annotations

import hashlib
from array import array
from random import Random
from typing import TYPE_CHECKING, Any

from mesh.cache.facts import CatalogueFetched, DrawView, FetchCatalogue, HeldChanged, ViewDrawn
from mesh.cache.ring import RingSpec, RingView
from mesh.cache.sharding import Sharding
from mesh.core import Core, Fact
from mesh.ids import NodeId

if TYPE_CHECKING:
    from tests.sim.engine import EngineShell
    from tests.sim.world import Life, World

__all__ = ["SharingShell", "quotas_of", "sharding_of", "sharing_disagreements"]

DRAW_S = 0.02  # a member
FETCH_TIMEOUT_S = 1.0
CHANGE_EVERY_S = (0.2, 4.0)
KEYS_MAX = 200


def quotas_of(n_nodes: int) -> dict[str, int]:
    """Unequal ones, and every fifth node gives nothing."""
    return {f"node-{index}": index % 5 * 2**30 for index in range(1, n_nodes)} | {"node-0": 2**30}


class PlainView(RingView):
    """A view without its table: no test of the control plane asks for owners, and drawing costs 20 ms."""

    def __init__(self, spec: RingSpec) -> None:
        self.spec = spec
        self.quotas = dict(spec.quotas)
        self._names = tuple(self.quotas)
        self._first = self._second = array("H")


class SharingShell:
    """Around another shell: what ``node.cache`` does for the sharding core."""

    def __init__(self, seed: int | str, inner: EngineShell) -> None:
        self._inner = inner
        self._random = Random(f"sharing/{seed}")
        self.held: dict[str, set[bytes]] = {}
        """By node: what its disk holds, over its lives."""
        self._n_keys = 0
        self.is_changing = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # ``stall``, ``crash`` and ``lose`` of those that have them

    def on_start(self, life: Life) -> None:
        self._inner.on_start(life)
        life.world.queue.after(self._random.uniform(0.01, 0.5), self._open, life)

    def on_end(self, life: Life) -> None:
        self._inner.on_end(life)

    def on_fact(self, life: Life, fact: Fact) -> None:
        self._inner.on_fact(life, fact)
        match fact:
            case DrawView(spec=spec):
                wait_s = DRAW_S * len(spec.quotas)
                life.world.queue.after(wait_s, life.learn, ViewDrawn(PlainView(spec)))
            case FetchCatalogue(node=node):
                self._fetch(life, node)
            case _:
                pass

    def _fetch(self, life: Life, node: NodeId) -> None:
        world = life.world
        target = world.hosts[node].life
        if target is None or target.is_stopped() or not world.network.is_reachable(life.place, target.place):
            world.queue.after(FETCH_TIMEOUT_S, life.learn, CatalogueFetched(node, None))
            return
        delay_s = 3 * self._random.expovariate(1.0) * world.faults.delay_s_mean
        whole = sharding_of(target.core).whole()
        world.queue.after(delay_s, life.learn, CatalogueFetched(node, whole))

    # ── the store ───────────────────────────────────────────────────────────────────────────────────

    def _open(self, life: Life) -> None:
        if life.is_alive:
            life.learn(HeldChanged(added=tuple(sorted(self.held.setdefault(life.name, set())))))
            self._change_later(life)

    def _change_later(self, life: Life) -> None:
        life.world.queue.after(self._random.uniform(*CHANGE_EVERY_S), self._change, life)

    def _change(self, life: Life) -> None:
        if not life.is_alive or not self.is_changing:
            return
        held = self.held[life.name]
        dropped = self._random.sample(sorted(held), self._random.randint(0, len(held) // 2))
        added = [self._new_key() for _ in range(self._random.randint(0, KEYS_MAX // 10))]
        held.difference_update(dropped)
        held.update(added)
        life.learn(HeldChanged(added=tuple(added), dropped=tuple(dropped)))
        self._change_later(life)

    def _new_key(self) -> bytes:
        self._n_keys += 1
        return hashlib.blake2b(self._n_keys.to_bytes(8, "little"), digest_size=32).digest()


def sharding_of(core: Core) -> Sharding:
    return next(part for part in core._cores if isinstance(part, Sharding))  # type: ignore[attr-defined]


def sharing_disagreements(world: World, quotas: dict[str, int]) -> list[str]:
    """What is not yet as it should be once all is well: one ring of those who give, and true catalogues."""
    cores = {node: sharding_of(core) for node, core in world.cores().items()}
    wanted = tuple((NodeId(node), quotas[node]) for node in sorted(cores) if quotas[node])
    bad = []
    for node, core in cores.items():
        if (core.spec.quotas if core.spec else ()) != wanted:
            bad.append(f"{node} has the ring {core.spec}, here are {wanted}")
        elif wanted and (core.spec is None or core.epoch != core.spec.epoch):
            bad.append(f"{node} looks by {core.epoch}, and knows of {core.spec}")
        for other, its in cores.items():
            whole = its.whole()
            if (
                other != node
                and whole.version
                and core.catalogues.version(other)
                != (
                    whole.life,
                    whole.version,
                )
            ):
                bad.append(
                    f"{node} has {core.catalogues.version(other)} of {other}, which is at {whole.version}"
                )
    ranks = {core.spec.rank for core in cores.values() if core.spec}
    return bad or ([f"nodes go by {len(ranks)} rings"] if len(ranks) > 1 else [])
