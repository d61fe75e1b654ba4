"""``edgemesh cache`` on real nodes: what one computes lies twice; people see it, check it, clear it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mesh.transport.bulk.blobs import Block
from node.cli.cache import _plain, _put
from node.compute.features.packs import read_index, write_pack
from node.local_mesh import LocalMesh
from tests.integration.cache_nodes import some_blocks, soon
from tests.integration.meshes import local_mesh

QUOTA_FLAGS = ("--feature-disk", "50MB")


async def shown(mesh: LocalMesh, *arguments: str) -> Any:
    code, out, err = await mesh.run("cache", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


async def test_blocks_of_one_node_lie_twice_and_are_shown_checked_repaired_and_cleared(
    tmp_path: Path,
) -> None:
    blocks = some_blocks(0, 60, 5000)
    async with local_mesh(tmp_path, 3, *QUOTA_FLAGS) as mesh:
        await asyncio.gather(
            *(
                node.wait_for("cache_ring", 20, where=lambda event: len(event["members"]) == 3)
                for node in mesh.nodes
            )
        )
        homes = shares_in(tmp_path)
        write(homes[0], blocks)
        # The writer keeps what others own until it needs the room; each block lies with both its owners.
        await soon(lambda: sum(map(n_blocks, homes)) >= 120 and all(map(n_blocks, homes)), "two copies", 30)
        view = await shown(mesh)
        async with asyncio.timeout(30):  # reports come every few seconds
            while sum(row["report"]["blocks"] for row in view["nodes"]) < 120:
                view = await shown(mesh)
        assert view["replicas"] == 2
        assert sum(row["share"] for row in view["nodes"]) == pytest.approx(1, abs=0.01)
        assert sum(row["report"]["blocks"] for row in view["nodes"]) >= 120
        assert all(0 < row["report"]["held_bytes"] < 50_000_000 for row in view["nodes"])

        damage(packs_in(homes[1])[0])
        code, out, err = await mesh.run("cache", "verify")
        assert code == 1 and "damaged" in out and "--repair" in err
        (damaged,) = [row for row in await shown(mesh, "verify", "--repair") if row["damaged"]]
        assert damaged["damaged"][0]["removed"]
        assert Path(damaged["damaged"][0]["pack"]) not in packs_in(homes[1])

        cleared = await shown(mesh, "clear", "--everywhere")
        assert [row["held_bytes"] for row in cleared] == [0, 0, 0]
        assert not any(map(packs_in, homes))


def test_a_mesh_without_a_ring_and_a_node_that_says_nothing_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mesh.ids import NodeId
    from node.cache.asking import CacheRow, CacheView

    row = CacheRow(node=NodeId("old"), state="offline", share=0.0, report=None)
    view = CacheView(epoch=None, replicas=0, rows=(row,))
    _put(view, is_json=False)
    out = capsys.readouterr().out
    assert "no ring" in out and "old (offline)" in out and "reads only" in out
    assert _plain(view)["nodes"][0]["report"] is None


def shares_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("meshes/*/nodes/*/features"))


def packs_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.pack"))


def n_blocks(directory: Path) -> int:
    return sum(len(read_index(pack)) for pack in packs_in(directory))


def write(directory: Path, blocks: Sequence[Block]) -> None:
    write_pack(directory, {block.key: (block.payload, 0.2) for block in blocks})


def damage(pack: Path) -> None:
    content = bytearray(pack.read_bytes())
    content[-100] ^= 1
    pack.write_bytes(content)
