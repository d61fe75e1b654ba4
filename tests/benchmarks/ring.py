"""The ring and the cores around it, by computation and on virtual time: no sockets.

keys_moved_ratio  copies of keys that change nodes when one joins, against the ideal R · K · (its share of
                  quota). A leave is the same change read backwards: the same number. Quotas are drawn from
                  1 to 16 times the least, evenly in the logarithm; the mean over joins, of the mesh size
                  where it is worse.
balance_ratio     the most bytes per unit of quota on a node, against the mean; blocks of 50 to 150 KB. The
                  worst of all rings drawn.
ring_hit_ratio    reads that hit, Zipf over more than fits: a ring of four with two copies of what there is
                  room for, against one node with the whole budget, both with the eviction of our store.
keys_lost         one of four nodes dies, R = 2, simulated by seed.
repaired_s        and until all of it, 1 GB, is there twice again, at 40 MB/s from each node.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from random import Random

import numpy as np
import numpy.typing as npt

from mesh.cache.ring import SPARE_WORTH, RingEpoch, RingSpec, RingView, arc_of
from mesh.cache.straws import N_ARCS, deal, shares
from mesh.ids import Epoch, NodeId
from node.compute.features.gdsf import Gdsf
from tests.benchmarks.report import Metric, Options, main
from tests.property.cache_world import CacheWorld

Table = npt.NDArray[np.int64]

SIZES = (8, 64)
QUOTA_SPREAD_LOG2 = 4.0
GB = 10**9


def measure(options: Options) -> Iterator[Metric]:
    rng = Random(options.seed)
    yield from placement(rng, n_joins=2 if options.quick else 12)
    yield hit_ratio(rng, n_reads=20_000 if options.quick else 300_000)
    yield from deaths(options, n_seeds=1 if options.quick else 5)
    yield speed()


# ── placement ──────────────────────────────────────────────────────────────────────────────────────────


def placement(rng: Random, n_joins: int) -> Iterator[Metric]:
    arcs = np.array([arc_of(rng.randbytes(32)) for _ in range(500_000)])
    sizes = np.array([rng.randrange(50_000, 150_000) for _ in range(len(arcs))])
    moved: dict[int, list[float]] = {}
    balance: dict[int, list[float]] = {}
    for n in SIZES:
        for turn in range(n_joins if n < 64 else max(2, n_joins // 2)):
            names = sorted(f"{rng.getrandbits(40):010x}" for _ in range(n + 1))
            quotas = [int((1 << 30) * 2 ** rng.uniform(0, QUOTA_SPREAD_LOG2)) for _ in names]
            after = deal(names, quotas).astype(np.int64)
            joiner = turn % (n + 1)
            others = [index for index in range(n + 1) if index != joiner]
            before = np.array(others)[deal([names[k] for k in others], [quotas[k] for k in others])]
            ideal = 2 * quotas[joiner] / sum(quotas)
            moved.setdefault(n, []).append(n_moved(before[:, arcs], after[:, arcs]) / len(arcs) / ideal)
            balance.setdefault(n, []).append(most_per_quota(after[:, arcs], sizes, quotas))
    worst = max(SIZES, key=lambda n: statistics.mean(moved[n]))
    yield Metric(
        "keys_moved_ratio", statistics.mean(moved[worst]), "x", "<= 1.05", len(moved[worst]),
        {f"nodes {n}": f"mean {statistics.mean(m):.4f}, max {max(m):.4f}" for n, m in moved.items()},
    )  # fmt: skip
    yield Metric(
        "balance_ratio", max(max(ratios) for ratios in balance.values()), "x", "<= 1.25", n_joins,
        {f"nodes {n}": f"mean {statistics.mean(b):.4f}, max {max(b):.4f}" for n, b in balance.items()},
    )  # fmt: skip


def n_moved(before: Table, after: Table) -> int:
    """Copies on nodes that had none before. Shapes: (2, keys) both, indices of nodes."""
    return int(sum(((copy != before[0]) & (copy != before[1])).sum() for copy in after))


def most_per_quota(owners: Table, sizes: npt.NDArray[np.int64], quotas: list[int]) -> float:
    n_bytes = sum(np.bincount(copy, weights=sizes, minlength=len(quotas)) for copy in owners)
    usable = np.array(shares(quotas))  # of a node with over half of all, what it can use
    per_unit = np.asarray(n_bytes) / usable
    return float(per_unit.max() / (np.asarray(n_bytes).sum() / usable.sum()))


# ── hits ───────────────────────────────────────────────────────────────────────────────────────────────


class Shelf:
    """One node's blocks, all of one size, as our store keeps them."""

    def __init__(self, n_blocks: int) -> None:
        self._n_blocks = n_blocks
        self.order: Gdsf[int] = Gdsf()

    def keep(self, key: int, worth: float) -> None:
        if key in self.order:
            return
        if len(self.order) >= self._n_blocks:
            least = next(iter(self.order.least()), None)
            if least is None or self.order.value(least) > self.order.value_of(1, worth):
                return
            self.order.let_go(least)
        self.order.add(key, 1, worth)


def hit_ratio(rng: Random, n_reads: int) -> Metric:
    n_keys, budget = 20_000, 5_000
    ratios: dict[str, float] = {}
    hits: dict[str, str] = {}
    quotas = {NodeId(f"n{index}"): 1 << 30 for index in range(4)}
    view = RingView(RingSpec.of(RingEpoch(Epoch(1, NodeId("n0")), 1), quotas))
    digests = [hashlib.blake2b(key.to_bytes(8, "little"), digest_size=32).digest() for key in range(n_keys)]
    owners = [view.owners(digest) for digest in digests]
    for skew in (0.8, 1.0, 1.2):
        weights = list(itertools.accumulate(1 / (rank + 1) ** skew for rank in range(n_keys)))
        reads = [bisect.bisect(weights, rng.random() * weights[-1]) for _ in range(n_reads)]
        warm = n_reads // 4
        found = {
            "one": replay_one(reads, warm, budget),
            "ring": replay_ring(reads, warm, budget, owners, SPARE_WORTH),
            "spares worth as much": replay_ring(reads, warm, budget, owners, 1.0),
        }
        ratios[f"{skew}"] = found["ring"] / found["one"]
        hits[f"zipf {skew}"] = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    return Metric("ring_hit_ratio", min(ratios.values()), "x", ">= 0.95", len(ratios), hits)


def replay_one(reads: list[int], warm: int, budget: int) -> float:
    shelf, n_hits = Shelf(budget), 0
    for turn, key in enumerate(reads):
        if key in shelf.order:
            shelf.order.use(key)
            n_hits += turn >= warm
        else:
            shelf.keep(key, 1.0)
    return n_hits / (len(reads) - warm)


def replay_ring(
    reads: list[int], warm: int, budget: int, owners: list[tuple[NodeId, ...]], spare_worth: float
) -> float:
    """The reader asks the first owner, then the second; what nobody has is computed and offered to both."""
    shelves = {node: Shelf(budget // 4) for pair in owners for node in pair}
    n_hits = 0
    for turn, key in enumerate(reads):
        first, second = (shelves[node] for node in owners[key])
        if key in first.order or key in second.order:
            n_hits += turn >= warm
            holder = first if key in first.order else second
            holder.order.use(key)
            if holder is second:
                first.keep(key, 1.0)  # the sweep would bring it there
        else:
            first.keep(key, 1.0)
            second.keep(key, spare_worth)
    return n_hits / (len(reads) - warm)


# ── deaths ─────────────────────────────────────────────────────────────────────────────────────────────


def deaths(options: Options, n_seeds: int) -> Iterator[Metric]:
    lost, repaired_s = [], []
    for seed in range(options.seed, options.seed + n_seeds):
        quotas = {NodeId(f"n{index}"): GB for index in range(4)}
        world = CacheWorld(quotas, seed, 40e6)
        world.run(6.0)
        keys = world.put(250, n_bytes=2_000_000)  # 1 GB with both copies: the dead node held a quarter
        world.run(20.0)
        assert all(world.copies(key) >= 2 for key in keys)
        world.kill(world.rng.choice(sorted(quotas)))
        died_at = world.now
        lost.append(sum(world.copies(key) == 0 for key in keys))
        while any(world.copies(key) < 2 for key in keys) and world.now < died_at + 120:
            world.run(1.0)
        repaired_s.append(world.now - died_at)
    detail = {"repaired_s": f"max {max(repaired_s):.0f}, of which 10 s verdict and grace"}
    yield Metric("keys_lost", sum(lost), "keys", "<= 0", n_seeds, detail)
    yield Metric("repaired_s", max(repaired_s), "s (virtual)", "<= 30", n_seeds)


# ── speed ──────────────────────────────────────────────────────────────────────────────────────────────


def speed() -> Metric:
    view = RingView(
        RingSpec.of(RingEpoch(Epoch(1, NodeId("a")), 1), {NodeId(f"n{k}"): (k + 1) << 30 for k in range(8)})
    )
    keys = [hashlib.blake2b(k.to_bytes(8, "little"), digest_size=32).digest() for k in range(100_000)]
    began = time.process_time()
    for key in keys:
        view.owners(key)
    owners_us = (time.process_time() - began) / len(keys) * 1e6
    began = time.process_time()
    deal([f"n{k}" for k in range(8)], [(k + 1) << 30 for k in range(8)])
    dealt_ms = (time.process_time() - began) * 1000
    return Metric("owners_us", owners_us, "us", None, 1, {"deal 8 nodes ms": round(dealt_ms), "arcs": N_ARCS})


if __name__ == "__main__":
    sys.exit(main("the ring: keys moved, balance, hits, losses", measure))
