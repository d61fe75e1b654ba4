"""The directory that is served in bulk: quota, atomic files, and a disk that is really full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.transport.bulk.blobs import Block, PutVerdict
from mesh.transport.bulk.client import BulkClient
from mesh.units import KIB, MIB
from tests.integration.bulk_world import VIEW, BulkWorld, blob_of, block_of, content_of
from tests.integration.directory_store import DirectoryStore


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tiny"
    path.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def scratch_of(root: Path) -> list[Path]:
    return list((root / "scratch").iterdir())


async def test_a_full_disk_is_a_miss_for_blobs_and_a_refusal_for_blocks(
    tiny_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_disk / "store"
    store = DirectoryStore(root, 64 * MIB, free_bytes_left=0)
    world, content = BulkWorld(tmp_path), content_of(1, 3 * MIB // 2)
    async with (
        world.serving("pi", await world.filled("pi", [content])) as pi,
        BulkClient(world.identity("asker").client_context(), lambda: VIEW) as client,
    ):
        with store.receiving(blob_of(content)) as sink:
            assert sink is not None  # there was room when it began
            (tiny_disk / "filler").write_bytes(bytes(1 * MIB))
            assert not await client.fetch(blob_of(content), [pi], sink, range_bytes=64 * KIB)
        with store.receiving(blob_of(content)) as sink:
            assert sink is None
        assert PutVerdict.NO_ROOM in await store.put([block_of(seed, 300 * KIB) for seed in range(5)])
        assert scratch_of(root) == []
        assert any(
            "disk is full" in record.message or "cannot write" in record.message for record in caplog.records
        )
        (tiny_disk / "filler").unlink()
        with store.receiving(blob_of(b"small")) as sink:
            assert sink is not None and await sink.write(0, b"small") and await sink.is_right()


async def test_the_quota_counts_what_is_there_and_what_is_arriving(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, 1000, free_bytes_left=0)
    with store.receiving(blob_of(bytes(600))) as one, store.receiving(blob_of(bytes(500))) as two:
        assert one is not None and two is None
        assert await store.put([block_of(1, 500)]) == [PutVerdict.NO_ROOM]
        assert await store.put([block_of(2, 300)]) == [PutVerdict.STORED]
        assert store.n_bytes == 600 + 332
    assert store.n_bytes == 332  # it never came whole
    assert DirectoryStore(tmp_path, 1000).n_bytes == 332  # counted again at the start
    assert store.remove_block(block_of(2, 300).key) and not store.remove_block(block_of(2, 300).key)
    assert store.n_bytes == 0


async def test_what_was_being_written_when_the_power_went_is_swept_away(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, MIB, free_bytes_left=0)
    (tmp_path / "scratch" / "half").write_bytes(b"x" * 500)
    blob = blob_of(b"whole")
    with store.receiving(blob) as sink:
        assert sink is not None and await sink.write(0, b"whol?")
        assert not await sink.is_right()
        assert await sink.write(4, b"e") and await sink.is_right()
        assert not await sink.write(0, b"?"), "what was checked does not change any more"
    again = DirectoryStore(tmp_path, MIB)
    assert scratch_of(tmp_path) == []
    reader = await again.open(blob.digest)
    assert reader is not None
    assert again.remove_blob(blob.digest)
    assert bytes(await reader.read(0, 10)) == b"whole"  # who reads it reads on
    reader.close()
    assert await again.open(blob.digest) is None


async def test_a_block_that_a_power_cut_shortened_or_that_is_no_block_is_a_miss(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, MIB, free_bytes_left=0)
    block = block_of(1, 100)
    await store.put([block])
    (path,) = (tmp_path / "blocks").glob("*/*")
    assert oct(path.stat().st_mode)[-3:] == "600"
    path.write_bytes(path.read_bytes()[:20])
    assert await store.get_many([block.key], MIB) == [None]
    path.unlink()
    path.mkdir()
    assert await store.get_many([block.key], MIB) == [None]


async def test_a_batch_says_what_is_here_what_is_not_and_what_did_not_fit(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, MIB, free_bytes_left=0)
    small, large = block_of(1, 100), block_of(2, 1000)
    await store.put([small, large, large])
    absent = content_of(3, 32)
    found = await store.get_many([large.key, absent, small.key], 500)
    assert found == [1000, None, Block(small.key, small.digest, small.payload)]
