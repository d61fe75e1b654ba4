"""Prefixes over the whole way but the bus: packs, shares, catalogues, TLS, the link, two engines."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from node.compute.features.link import MeshLink
from node.compute.features.store import LocalStore
from node.compute.model_engine import ModelEngine
from node.compute.serve.arrivals import Source
from node.compute.serve.prefix_disk import PrefixDisk
from node.compute.serve.shared_prefixes import SharedPrefixes
from tests.integration.cache_nodes import CacheMesh, CacheNode, soon
from tests.serving_world import World, drive
from tests.unit.shared_world import keys_of, prompt

QUOTA = 20_000_000
# A device slow enough that fetching is worth it whatever this machine does meanwhile.
ROW_S = 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), ["top"])


def engine_of(world: World, name: str, source: Source, disk: PrefixDisk | None = None) -> ModelEngine:
    keys = keys_of(world)
    return world.engine(share=lambda p: SharedPrefixes(p, keys, [(name, source)], disk, row_s=ROW_S))


async def read_by(node: CacheNode, world: World, text: str, adapter: str | None) -> None:
    """The node's compute process reads ``text`` and writes down what others may use."""
    disk = PrefixDisk(LocalStore(node.directory / "features", 0, QUOTA))
    engine = engine_of(world, "disk", disk, disk)
    for submit in ({"prompt": "?", "adapter": "top"}, {"prompt": text, "adapter": adapter}):
        await asyncio.to_thread(drive, engine, {"a": submit})
    await asyncio.to_thread(disk.close)


@asynccontextmanager
async def linked(node: CacheNode) -> AsyncIterator[MeshLink]:
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(node.cache.serve_link(ours))
    link = MeshLink(theirs)
    try:
        yield link
    finally:
        await asyncio.to_thread(link.close)
        await serving


@pytest.mark.parametrize("adapter", [None, "top"])
async def test_a_prefix_that_a_peer_has_read_is_fetched_and_the_answer_is_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str | None
) -> None:
    text, ids = prompt(world, 1, 400), world.tokens.plain(prompt(world, 1, 400))
    asked = {"prompt": text + "what?", "adapter": adapter}
    last = keys_of(world).parts(keys_of(world).groups[1], ids)[-1].key
    async with CacheMesh(tmp_path, {"reader": QUOTA, "asker": 0}, monkeypatch) as mesh:
        await read_by(mesh["reader"], world, text, adapter)
        reads = mesh["asker"].cache.reads
        await soon(lambda: reads.claimed([last]) == [True], "catalogue")
        async with linked(mesh["asker"]) as link:
            engine = engine_of(world, "mesh", link)
            ended = (await asyncio.to_thread(drive, engine, {"b": asked}))["b"]
    assert ended.text == world.alone(**asked).text
    assert engine.shared is not None and engine.shared.n_fetched_tokens == 384
    n_parts = 6 * (3 if adapter is None else 2 + 1)
    assert reads.stats.peers.hits == n_parts


async def test_a_peer_that_is_gone_without_a_word_costs_a_moment_and_no_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, ids = prompt(world, 2, 400), world.tokens.plain(prompt(world, 2, 400))
    asked = {"prompt": text + "what?"}
    last = keys_of(world).parts(keys_of(world).groups[2], ids)[-1].key
    async with CacheMesh(tmp_path, {"reader": QUOTA, "asker": 0}, monkeypatch) as mesh:
        await read_by(mesh["reader"], world, text, None)
        await soon(lambda: mesh["asker"].cache.reads.claimed([last]) == [True], "catalogue")
        await mesh.nodes.pop("reader").stop()
        async with linked(mesh["asker"]) as link:
            engine = engine_of(world, "mesh", link)
            ended = (await asyncio.to_thread(drive, engine, {"b": asked}))["b"]
    assert ended.text == world.alone(**asked).text
    assert engine.shared is not None and engine.shared.n_fetched_tokens == 0
