"""Adapters go where they are wanted and stay away where they were removed; models come from peers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.digests import Buffer, digest_of
from mesh.ids import NodeId
from mesh.messages import PullAdapter, RemoveAdapter
from mesh.messages.files import ModelHeld
from mesh.transport.bulk.blobs import Holder
from mesh.transport.bulk.client import BulkClient
from mesh.transport.bulk.store import BlobReader
from mesh.units import MIB
from node.compute.models import read_manifest, resolve
from node.files.blobs import FileBlobs, WithFiles
from node.files.model_files import ModelFiles, ModelSeeker, list_model
from tests.integration.bulk_world import VIEW, BulkWorld, content_of
from tests.integration.files_world import FilesWorld, until


@pytest.fixture
def world(tmp_path: Path) -> FilesWorld:
    return FilesWorld(tmp_path)


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────


async def test_what_one_node_makes_the_others_serve_within_seconds_and_the_next_version_too(
    world: FilesWorld,
) -> None:
    a, b, c = (world.node(name) for name in "abc")
    async with world.joined(a), world.joined(b), world.joined(c):
        for weights in (b"first", b"second"):
            a.put("spam", weights)
            await until(lambda: a.weights("spam") == b.weights("spam") == c.weights("spam"))
        assert [node.look().shelf["spam"].version for node in (a, b, c)] == [2, 2, 2]
        assert [node.look().shelf["spam"].is_own for node in (a, b, c)] == [True, False, False]


async def test_two_that_train_one_name_at_once_end_with_the_same_version(world: FilesWorld) -> None:
    a, b, c = (world.node(name) for name in "abc")
    a.put("spam", b"of a")
    b.put("spam", b"of b")
    theirs = {a.weights("spam"), b.weights("spam")}
    async with world.joined(a), world.joined(b), world.joined(c):
        await until(lambda: a.weights("spam") == b.weights("spam") == c.weights("spam") is not None)
        assert a.weights("spam") in theirs
        digests = {node.look().shelf["spam"].digest for node in (a, b, c)}
        assert digests == {max(held.digest for held in (*a.look().adapters, *b.look().adapters))}
        assert len(a.look().adapters) + len(b.look().adapters) > 2, (
            "the other one is kept as an older version"
        )


async def test_a_removal_reaches_who_was_away_and_is_not_undone_by_it(world: FilesWorld) -> None:
    a, b, c = (world.node(name) for name in "abc")
    async with world.joined(a), world.joined(b):
        async with world.joined(c):
            a.put("spam", b"1")
            await until(lambda: c.weights("spam") is not None and b.weights("spam") is not None)
        world.ask(a, RemoveAdapter(name="spam", version=1))
        await until(lambda: a.weights("spam") is None and b.weights("spam") is None)
        async with world.joined(c):
            await until(lambda: c.weights("spam") is None)
            await until(lambda: any(one.name == "spam" for one in c.look().removed))
            assert (a.weights("spam"), b.weights("spam")) == (None, None)
            c.put("spam", b"2")
            await until(lambda: a.weights("spam") == c.weights("spam") == b.weights("spam") is not None)
            assert a.look().shelf["spam"].version == 2, "made after the removal: another adapter"


async def test_a_removal_lives_on_in_those_who_heard_it_when_its_node_is_gone(world: FilesWorld) -> None:
    a, b, c = (world.node(name) for name in "abc")
    async with world.joined(c):
        c.put("spam", b"1")
        await until(lambda: len(c.look().adapters) == 1)
    async with world.joined(b):
        async with world.joined(a):
            world.ask(a, RemoveAdapter(name="spam", version=1))
            await until(lambda: any(one.name == "spam" for one in b.look().removed))
        world.retained.pop(a.id)
        async with world.joined(c):
            await until(lambda: c.weights("spam") is None)


async def test_what_is_on_demand_comes_when_asked_for_and_the_quota_holds(world: FilesWorld) -> None:
    a, b = world.node("a"), world.node("b", quota_bytes=500)
    async with world.joined(a), world.joined(b, replicas="demand"):
        for name in ("one", "two", "three"):
            a.put(name, name.encode() * 20)
        await until(lambda: len(b.versions.newest) == 3)
        for name in ("one", "two", "three"):
            held = b.versions.newest[name].held
            assert held is not None and b.weights(name) is None
            world.ask(b, PullAdapter(name=name, digest=held.digest))
            await until(lambda: b.weights(name) == a.weights(name))  # noqa: B023
        assert b.weights("one") is None, "it was unused for longest"
        assert sum(held.bytes for held in b.look().adapters) <= 500


async def test_what_no_node_here_has_is_told_to_who_asked(world: FilesWorld) -> None:
    a = world.node("a")
    async with world.joined(a):
        world.ask(a, PullAdapter(name="spam", digest="9" * 64))
        await until(lambda: bool(world.retained.get(a.id) and world.retained[a.id].pulls))
        assert "no node that is here has" in str(world.retained[a.id].pulls[0].trouble)


async def test_an_older_version_can_be_had_beside_the_newest(world: FilesWorld) -> None:
    a, b = world.node("a"), world.node("b")
    async with world.joined(a), world.joined(b):
        a.put("spam", b"1")
        await until(lambda: b.weights("spam") is not None)
        first, digest = a.weights("spam"), a.look().shelf["spam"].digest
        a.put("spam", b"2")
        await until(lambda: b.weights("spam") == a.weights("spam") != first)
        world.ask(b, PullAdapter(name="spam", digest=digest, save_as="spam-v1"))
        await until(lambda: b.weights("spam-v1") == first and a.weights("spam-v1") == first)
        assert b.look().shelf["spam"].version == 2


class _Lying(FileBlobs):
    """Gives other bytes than were asked for, of the right length."""

    async def open(self, digest: bytes) -> BlobReader | None:
        reader = await super().open(digest)
        return _Flipped(reader) if reader is not None else None


class _Flipped:
    def __init__(self, reader: BlobReader) -> None:
        self._reader = reader
        self.size = reader.size

    async def read(self, start: int, n_bytes: int) -> Buffer:
        return bytes(byte ^ 1 for byte in bytes(await self._reader.read(start, n_bytes)))

    def close(self) -> None:
        self._reader.close()


async def test_a_peer_that_gives_wrong_bytes_changes_nothing_here(
    world: FilesWorld, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = world.node("a"), world.node("b")
    a.blobs = _Lying()
    with caplog.at_level(logging.WARNING):
        async with world.joined(a), world.joined(b):
            a.put("spam", b"1")
            await until(lambda: "adapter_not_pulled" in caplog.text)
            assert b.weights("spam") is None and b.look().shelf == {}
    assert "wrong digest" in caplog.text
    assert list((b.library.home / "partial").glob("*")) == []


async def test_a_hostile_list_of_files_is_refused_before_a_byte_is_written(
    world: FilesWorld, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = world.node("a"), world.node("b")
    evil = json.dumps(
        {"files": [{"digest": "11" * 32, "name": "../../evil.json", "size": 1}]}, sort_keys=True,
        separators=(",", ":"),
    ).encode()  # fmt: skip
    async with world.joined(a), world.joined(b):
        a.put("spam", b"1")
        await until(lambda: b.weights("spam") is not None)
        a.blobs.put("evil", {digest_of(evil): evil})
        held = a.look().shelf["spam"]
        lie = replace(held, version=9, digest=digest_of(evil).hex(), manifest_bytes=len(evil))
        said = replace(world.retained[a.id], adapters=[lie])
        with caplog.at_level(logging.WARNING):
            b.versions.receive(said, a.id, 0.0)
            assert b.distribution is not None
            b.distribution.changed()
            await until(lambda: "files_refused" in caplog.text and "adapter_not_pulled" in caplog.text)
    assert not list(world.directory.rglob("evil.json")) and b.weights("spam") == a.weights("spam")


# ── models ──────────────────────────────────────────────────────────────────────────────────────────

MODEL = "org/tiny"
WEIGHTS_BYTES = 20 * MIB


def put_model(models_dir: Path, seed: int = 1) -> ModelFiles:
    """As ``prepare`` leaves one; its weights are noise, since nobody loads them here."""
    source = resolve(MODEL)
    home = models_dir / source.slug
    home.mkdir(parents=True)
    weights = content_of(seed, WEIGHTS_BYTES)
    contents = {"model.safetensors": weights, "config.json": b"{}", "tokenizer.json": b"[]"}
    for name, content in contents.items():
        (home / name).write_bytes(content)
    manifest = {
        "name": MODEL, "display": MODEL, "source": f"hub:{MODEL}", "source_sha256": None,
        "weights_sha256": hashlib.sha256(weights).hexdigest(), "weight_bytes": len(weights),
        "file_bytes": {name: len(content) for name, content in contents.items()},
    }  # fmt: skip
    (home / "manifest.json").write_text(json.dumps(manifest))
    (home / "speeds.json").write_text("{}")  # of that machine, nobody else's business
    files = list_model(MODEL, models_dir)
    assert files is not None
    return files


class _Counting(FileBlobs):
    """Notes how many bytes it gave; may break off, once at each of these offsets.

    After ``away_after`` bytes it is away for a while: the next requests find nothing.
    """

    def __init__(self, breaks_at: Iterator[int] | None = None, away_after: int = 1 << 60) -> None:
        super().__init__()
        self.n_bytes = 0
        self.breaks = set(breaks_at or ())
        self._away_after = away_after
        self.n_missed = 0

    async def open(self, digest: bytes) -> BlobReader | None:
        if self.n_bytes >= self._away_after and self.n_missed < 3:
            self.n_missed += 1
            return None
        reader = await super().open(digest)
        return _Counted(self, reader) if reader is not None else None


class _Counted:
    def __init__(self, blobs: _Counting, reader: BlobReader) -> None:
        self._blobs = blobs
        self._reader = reader
        self.size = reader.size

    async def read(self, start: int, n_bytes: int) -> Buffer:
        for at in [at for at in self._blobs.breaks if start <= at < start + n_bytes]:
            self._blobs.breaks.discard(at)
            raise OSError("the cable was pulled")
        content = await self._reader.read(start, n_bytes)
        self._blobs.n_bytes += len(content)
        await asyncio.sleep(0.002)  # a peer over a link: so that both get a share
        return content

    def close(self) -> None:
        self._reader.close()


class ModelWorld:
    """A machine without the model, and peers that have it."""

    def __init__(self, directory: Path) -> None:
        self.bulk = BulkWorld(directory)
        self.models_dir = directory / "models"
        self.said: list[str] = []
        self.offers: dict[NodeId, ModelHeld] = {}

    async def seek(
        self, stack: AsyncExitStack, peers: Mapping[str, tuple[ModelFiles, FileBlobs]]
    ) -> Path | None:
        holders: dict[NodeId, Holder] = {}
        for name, (files, blobs) in peers.items():
            blobs.put("model", files.blobs)
            store = WithFiles(self.bulk.store(name), blobs)
            holders[NodeId(name)] = await stack.enter_async_context(self.bulk.serving(name, store))
            self.offers.setdefault(NodeId(name), files.held)
        context = self.bulk.identity("seeker").client_context()
        bulk = await stack.enter_async_context(BulkClient(context, lambda: VIEW))
        seeker = ModelSeeker(
            MODEL, self.models_dir, offers=lambda: self.offers.items(), is_joined=lambda: True,
            holder=holders.get, bulk=bulk, waits_s=(0.1, 0.1),
        )  # fmt: skip
        await seeker.seek(lambda text, fraction: self.said.append(text))
        home = self.models_dir / resolve(MODEL).slug
        return home if read_manifest(home) is not None else None


@pytest.fixture
def models(tmp_path: Path) -> ModelWorld:
    return ModelWorld(tmp_path)


async def test_a_model_comes_from_both_peers_in_ranges_whole_and_right(
    models: ModelWorld, tmp_path: Path
) -> None:
    files, a, b = put_model(tmp_path / "there"), _Counting(), _Counting()
    async with AsyncExitStack() as stack:
        home = await models.seek(stack, {"a": (files, a), "b": (files, b)})
    assert home is not None
    there = tmp_path / "there" / home.name
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (home / name).read_bytes() == (there / name).read_bytes()
    assert not (home / "speeds.json").exists()
    assert min(a.n_bytes, b.n_bytes) > WEIGHTS_BYTES / 8, Counter(a=a.n_bytes, b=b.n_bytes)
    assert "from 2 peers" in " ".join(models.said) and not list(models.models_dir.glob(".*.fetching"))
    mine = list_model(MODEL, models.models_dir)
    assert mine is not None and mine.held == files.held, "and can be given on"


async def test_a_fetch_goes_on_after_its_connections_broke(models: ModelWorld, tmp_path: Path) -> None:
    files = put_model(tmp_path / "there")
    blobs = _Counting(iter(range(MIB, WEIGHTS_BYTES, 3 * MIB)))
    async with AsyncExitStack() as stack:
        assert await models.seek(stack, {"a": (files, blobs)}) is not None
    assert not blobs.breaks, "it did break"
    assert blobs.n_bytes < 1.6 * WEIGHTS_BYTES, "what had arrived was not fetched again"


async def test_a_fetch_goes_on_when_the_only_holder_is_back(models: ModelWorld, tmp_path: Path) -> None:
    files, blobs = put_model(tmp_path / "there"), _Counting(away_after=WEIGHTS_BYTES // 2)
    async with AsyncExitStack() as stack:
        assert await models.seek(stack, {"a": (files, blobs)}) is not None
    assert blobs.n_missed == 3 and blobs.n_bytes < 1.4 * WEIGHTS_BYTES, "what it had was not fetched again"


async def test_who_lies_is_found_out_and_the_others_bring_it(models: ModelWorld, tmp_path: Path) -> None:
    files = put_model(tmp_path / "there")
    async with AsyncExitStack() as stack:
        home = await models.seek(stack, {"liar": (files, _Lying()), "honest": (files, _Counting())})
    assert home is not None and read_manifest(home) is not None


async def test_where_only_liars_are_there_is_no_model_and_the_registry_is_next(
    models: ModelWorld, tmp_path: Path
) -> None:
    files = put_model(tmp_path / "there")
    async with AsyncExitStack() as stack:
        assert await models.seek(stack, {"liar": (files, _Lying())}) is None
    assert not (models.models_dir / resolve(MODEL).slug).exists()


async def test_weights_other_than_those_offered_are_not_used(models: ModelWorld, tmp_path: Path) -> None:
    files = put_model(tmp_path / "there")
    models.offers[NodeId("a")] = replace(files.held, weights_sha256="0" * 64)
    async with AsyncExitStack() as stack:
        assert await models.seek(stack, {"a": (files, FileBlobs())}) is None
    assert not (models.models_dir / resolve(MODEL).slug).exists()


async def test_where_peers_disagree_the_files_of_most_are_taken_and_it_is_said(
    models: ModelWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = put_model(tmp_path / "one"), put_model(tmp_path / "other", seed=2)
    async with AsyncExitStack() as stack:
        peers = {"a": (one, FileBlobs()), "b": (other, FileBlobs()), "c": (other, FileBlobs())}
        home = await models.seek(stack, peers)
    assert home is not None and (manifest := read_manifest(home)) is not None
    assert manifest.weights_sha256 == other.held.weights_sha256
    assert "model_disagreement" in caplog.text


async def test_a_model_made_from_another_source_is_not_taken_for_ours(
    models: ModelWorld, tmp_path: Path
) -> None:
    files = put_model(tmp_path / "there")
    models.offers[NodeId("a")] = replace(files.held, source="")
    async with AsyncExitStack() as stack:
        assert await models.seek(stack, {"a": (files, FileBlobs())}) is None
