"""One of four nodes is killed: what is lost, and how long until every block lies with two owners again.

Real processes on loopback, equal quotas, blocks of 64 KiB; a quarter of them is written at each node, as its
compute process would. ``keys_lost`` counts blocks that neither of their two owners holds after the kill: the
copies that writers keep beyond that do not count for them. ``spread_s`` is from the first byte written until
all lie with both owners. ``repair_s`` is from ``kill -9`` on; about 10 s of
it are the verdict (5 s of silence) and the grace in which a node that restarts comes back with all it held.
What is sent then is what the dead one owned; each of the others sends its part at 40 MB/s at most.

    python -m tests.benchmarks.churn [--quick] [--json]
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mesh.cache.ring import RingEpoch, RingSpec, RingView
from mesh.ids import Epoch, MeshName, NodeId
from node.cache.verify import Verified, verify
from node.compute.features.packs import read_index, write_pack
from node.local_mesh import LocalMesh
from node.state import StateDir
from tests.benchmarks.report import Metric, Options, main

N_NODES = 4
BLOCK_BYTES = 64 << 10
PACK_BLOCKS = 128
QUOTA_BYTES = 4_000_000_000
SETTLE_S = 300.0
POLL_S = 0.5


def measure(options: Options) -> Iterator[Metric]:
    n_bytes = 64_000_000 if options.quick else 1_000_000_000
    yield from asyncio.run(_kill_one(random.Random(options.seed), n_bytes))


class Shares:
    """What lies in the nodes' directories, and who owns what. Indexes are read once per pack."""

    def __init__(self, directories: dict[NodeId, Path]) -> None:
        self._directories = directories
        self._packs: dict[Path, frozenset[bytes]] = {}

    def held(self) -> dict[NodeId, set[bytes]]:
        found: dict[NodeId, set[bytes]] = {}
        for node, directory in self._directories.items():
            keys: set[bytes] = set()
            for pack in directory.glob("*.pack"):
                if pack not in self._packs:
                    try:
                        self._packs[pack] = frozenset(read_index(pack))
                    except FileNotFoundError:
                        continue
                keys |= self._packs[pack]
            found[node] = keys
        return found

    def forget(self, node: NodeId) -> None:
        del self._directories[node]

    @staticmethod
    def view(nodes: list[NodeId]) -> RingView:
        """Owners depend on members and quotas alone, not on the number of the ring."""
        return RingView(RingSpec.of(RingEpoch(Epoch(1, nodes[0]), 1), dict.fromkeys(nodes, QUOTA_BYTES)))


async def _kill_one(rng: random.Random, n_bytes: int) -> list[Metric]:
    n_blocks = n_bytes // BLOCK_BYTES
    name = MeshName(f"bench-{secrets.token_hex(3)}")
    flags = ("--no-compute", "--feature-disk", str(QUOTA_BYTES))
    with tempfile.TemporaryDirectory() as directory:
        async with LocalMesh(Path(directory), name, flags=flags) as mesh:
            nodes = await mesh.start_many(N_NODES)
            await asyncio.gather(
                *(node.wait_for("cache_ring", 60, where=lambda event: len(event["members"]) == N_NODES)
                  for node in nodes)
            )  # fmt: skip
            homes = StateDir(Path(directory)).shares_here(name)
            shares = Shares(dict(homes))
            view = shares.view([node.id for node in nodes])
            _say(f"{N_NODES} nodes share a ring; writing {n_blocks} blocks")
            started_at = time.monotonic()
            keys = await asyncio.to_thread(_write, rng, list(homes.values()), n_blocks)
            written_s = time.monotonic() - started_at
            await _until(lambda: not _missing(shares, view, keys), "two copies of all blocks")
            spread_s = time.monotonic() - started_at

            _say(f"two copies of all after {spread_s:.1f} s")
            victim = nodes[-1]  # neither coordinator nor broker's host: what that costs is another benchmark
            victim_id = victim.id
            killed_at = time.monotonic()
            await victim.kill()
            shares.forget(victim_id)
            lost = _lost(shares, view, keys)
            after = shares.view([node.id for node in nodes if node is not victim])
            n_to_send = len(_missing(shares, after, keys))
            await _until(lambda: not _missing(shares, after, keys), "two copies of all blocks again")
            repair_s = time.monotonic() - killed_at
            left = [home for node, home in homes.items() if node != victim_id]
            damaged = sum(len(found.damaged) for found in await asyncio.to_thread(_verified, left))
    detail: dict[str, Any] = {
        "bytes": n_blocks * BLOCK_BYTES, "blocks": n_blocks, "written_s": round(written_s, 1),
        "blocks_sent_again": n_to_send, "damaged_packs": damaged,
    }  # fmt: skip
    target = "<= 30" if n_bytes >= 1_000_000_000 else None
    return [
        Metric("keys_lost", len(lost), "keys", "<= 0", 1, detail),
        Metric("spread_s", round(spread_s, 1), "s", None, 1, detail),
        Metric("repair_s", round(repair_s, 1), "s", target, 1, detail),
    ]


def _verified(homes: list[Path]) -> list[Verified]:
    return [verify(home) for home in homes]


def _write(rng: random.Random, homes: list[Path], n_blocks: int) -> list[bytes]:
    """Each node has computed its part."""
    keys = []
    for start in range(0, n_blocks, PACK_BLOCKS):
        entries = {
            rng.randbytes(32): (rng.randbytes(BLOCK_BYTES), 0.2)
            for _ in range(min(PACK_BLOCKS, n_blocks - start))
        }
        write_pack(homes[start // PACK_BLOCKS % len(homes)], entries)
        keys += list(entries)
    return keys


def _missing(shares: Shares, view: RingView, keys: list[bytes]) -> list[bytes]:
    """Those that one of their owners lacks."""
    held = shares.held()
    return [key for key in keys if not all(key in held[owner] for owner in view.owners(key))]


def _lost(shares: Shares, view: RingView, keys: list[bytes]) -> list[bytes]:
    """Those that no living owner has."""
    held = shares.held()
    return [key for key in keys if not any(key in held.get(owner, ()) for owner in view.owners(key))]


def _say(text: str) -> None:
    print(f"churn: {text}", file=sys.stderr, flush=True)


async def _until(is_so: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + SETTLE_S
    while not await asyncio.to_thread(is_so):
        if time.monotonic() >= until:
            raise TimeoutError(f"no {what} within {SETTLE_S:g} s")
        await asyncio.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main("what a death costs the mesh's memory", measure))
