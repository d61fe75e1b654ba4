"""What one node computed no other computes again: the whole way but for processes and the broker.

Engine, store, link, catalogues, TLS and packs on disk are real; the nodes live in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from node.compute.features.link import MeshLink
from tests.integration.cache_nodes import CacheMesh, soon
from tests.integration.test_tune_variants import Node, read
from tests.tiny import tiny_llama
from tests.tuning import class_lines

QUOTA = 16_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@contextlib.asynccontextmanager
async def link_of(mesh: CacheMesh, name: str) -> AsyncIterator[MeshLink]:
    """The compute process's end of that node's link."""
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(mesh[name].cache.serve_link(ours))
    link = MeshLink(theirs)
    try:
        yield link
    finally:
        await asyncio.to_thread(link.close)
        await serving


async def made_by_the_first(mesh: CacheMesh, model: Path, work: Path, wish: dict[str, Any]) -> Node:
    """Node ``a`` has tuned on these records, and ``reader`` has heard what it keeps of that."""
    packs = str(mesh["a"].directory / "features")
    first = Node(model, work, "fp32", maps_dir=packs, feature_disk_bytes=QUOTA)
    _, held = read(await asyncio.to_thread(first.tune, seed=1, **wish))
    assert held.n_computed == held.n_tokens
    keys = list(first.memory.store.catalogue().keys)
    await soon(lambda: all(mesh["reader"].cache.reads.claimed(keys)), "word of all blocks", 30)
    return first


@pytest.mark.parametrize(("codec", "error"), [("raw", 0.0), ("int8", 0.1)])
async def test_a_second_node_computes_no_features_and_trains_the_same_adapter(
    codec: str, error: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = {"feature_error": error}
    if codec == "int8":
        # Records by the thousand would fill the cache and be rounded; these are few, so it is said here.
        monkeypatch.setattr("node.compute.features.codec._ROOMY", 0.0)
    uncached, expected = read(
        await asyncio.to_thread(Node(model, tmp_path / "3", "fp32").tune, seed=2, **wish)
    )
    assert expected.codec == codec
    async with CacheMesh(tmp_path, {"a": QUOTA, "reader": 0}, monkeypatch) as mesh:
        await made_by_the_first(mesh, model, tmp_path / "1", wish)
        async with link_of(mesh, "reader") as link:
            second = Node(model, tmp_path / "2", "fp32", link)
            made, held = read(await asyncio.to_thread(second.tune, seed=2, **wish))
        assert (held.n_fetched, held.n_computed, held.codec) == (held.n_tokens, 0, codec)
        assert mesh["reader"].cache.reads.stats.peers.hits > 0
    assert made == uncached


async def test_a_first_node_that_dies_on_the_way_changes_nothing_but_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = {"data": class_lines(150, seed=4), "epochs": 1}
    uncached, _ = read(await asyncio.to_thread(Node(model, tmp_path / "3", "fp32").tune, seed=2, **wish))
    async with CacheMesh(tmp_path, {"a": QUOTA, "reader": 0}, monkeypatch) as mesh:
        await made_by_the_first(mesh, model, tmp_path / "1", wish)
        async with link_of(mesh, "reader") as link:
            second = Node(model, tmp_path / "2", "fp32", link)
            second.begin(seed=2, **wish)
            while not second.memory.store.waiting():
                assert await asyncio.to_thread(second.go, 1) is None
            await mesh.kill("a")
            made, _ = read(await asyncio.to_thread(second.go))
    assert made == uncached
