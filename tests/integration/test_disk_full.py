"""A node whose disk is full, on real processes and a real (tiny) file system."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.transport.identity import MeshKey
from node.local_mesh import LocalMesh

LETTERS = 100_000  # of a prompt: what SQLite has allocated already is used up after a few


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tiny"
    path.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


async def test_a_node_with_a_full_disk_falls_silent_the_others_go_on_and_it_comes_back(
    tiny_disk: Path, tmp_path: Path
) -> None:
    key = MeshKey.create(f"disk-{secrets.token_hex(3)}", os.urandom(32))
    flags = ("--model", "echo", "--code", key.code)
    async with (
        LocalMesh(tmp_path / "big", key.name, flags=flags) as others,
        LocalMesh(tiny_disk / "state", key.name, flags=flags) as small,
    ):
        full = await small.start()  # first, so that it coordinates and hosts the broker
        await full.wait_for("elected", 30)
        rest = [await others.start() for _ in range(2)]
        await asyncio.gather(*(node.wait_for("engine_ready", 30) for node in [full, *rest]))
        assert (await others.run("submit", "--wait", "before"))[:2] == (0, "before\n")

        filler = tiny_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(65536)):
                    pass
            except OSError:
                pass
        for _ in range(60):
            word = secrets.token_hex(LETTERS // 2)
            code, said, talk = await others.run("submit", "--wait", "--max-tokens", "1", word)
            assert (code, said) == (0, f"{word}\n"), talk
            if any("silent until" in event["text"] for event in full.events):
                break
        else:
            pytest.fail("its disk never became full")
        assert full.is_running

        filler.unlink()
        async with asyncio.timeout(30):
            while not any("speaks again" in event["text"] for event in full.events):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert (await small.run("submit", "--wait", "after"))[:2] == (0, "after\n")
        assert all(node.is_running for node in [full, *rest])
