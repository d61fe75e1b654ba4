"""A node ends when it is told to, at any moment of its life, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from mesh.errors import UnreachableError
from mesh.ids import MeshName
from node.local_mesh import LocalMesh, NodeProcess

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ENDING)
async def test_a_signal_before_the_node_is_up_ends_it_at_once_with_code_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Its key is written before it imports the rest of itself: hundreds of milliseconds to be hit in."""
    async with LocalMesh(tmp_path, MeshName("start"), flags=("--no-compute",)) as mesh:
        node = await mesh.start("--new")
        await until(lambda: (tmp_path / "meshes" / "start" / "key").exists(), "the key")
        assert await ended_by(node, number) == 0, node.tail


@pytest.mark.parametrize("number", ENDING)
async def test_a_signal_makes_a_node_say_goodbye(tmp_path: Path, number: signal.Signals) -> None:
    async with LocalMesh(tmp_path, MeshName("start"), flags=("--model", "echo")) as mesh:
        first, second = await mesh.start_many(2)
        mark = len(first.events)
        assert await ended_by(second, number) == 0, second.tail
        await first.wait_for("member", 10, after=mark, where=lambda event: event.get("standing") == "left")
        assert processes_of(tmp_path) >= {first.pid}
        assert await ended_by(first, number) == 0, first.tail
        await until(lambda: not processes_of(tmp_path), "the end of every process")


async def test_a_closed_terminal_ends_its_node_with_a_goodbye(tmp_path: Path) -> None:
    async with LocalMesh(tmp_path, MeshName("start"), flags=("--no-compute",)) as mesh:
        (other,) = await mesh.start_many(1)
        terminal, inside = os.openpty()
        node = await asyncio.create_subprocess_exec(
            # A session's first terminal to be opened becomes its own: closing it is SIGHUP.
            *("/bin/sh", "-c", 'tty=$1; shift; exec "$@" <"$tty" >"$tty" 2>&1', "sh", os.ttyname(inside)),
            *mesh.command("join", "--no-compute"),
            env={**mesh.environment, "TERM": "xterm"},
            start_new_session=True,
        )
        await other.wait_for("member", 20, where=lambda event: event.get("standing") == "alive")
        os.close(inside)
        os.close(terminal)
        await other.wait_for("member", 10, where=lambda event: event.get("standing") == "left")
        async with asyncio.timeout(8):
            assert await node.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_download_ends_with_the_node_that_wanted_it(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    async with silent_registry() as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        async with LocalMesh(tmp_path, MeshName("start")) as mesh:
            node = await mesh.start("--new")
            await node.wait_for("joined", 20)
            await until(lambda: any("pip" in " ".join(line) for line in lines(tmp_path)), "pip at work")
            node.signal(number)
            await until(lambda: not processes_of(tmp_path), "the end of every process")
    assert list(temporary.iterdir()) == [], "what it had fetched lies where the next start clears it"


_MESH_OF_ITS_OWN = """\
import asyncio, sys
from pathlib import Path
from mesh.ids import MeshName
from node.local_mesh import LocalMesh

async def main():
    async with LocalMesh(Path(sys.argv[1]), MeshName("left"), flags=("--no-compute",)) as mesh:
        await mesh.start_many(2)
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
async def test_nodes_of_a_demo_that_was_killed_end_too(tmp_path: Path) -> None:
    demo = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _MESH_OF_ITS_OWN, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert demo.stdout is not None
    async with asyncio.timeout(30):
        assert await demo.stdout.readline() == b"up\n"
    demo.kill()
    await demo.wait()
    await until(lambda: not processes_of(tmp_path), "the end of every process")


# ── pieces ──────────────────────────────────────────────────────────────────────────────────────────


async def ended_by(node: NodeProcess, number: signal.Signals) -> int:
    """The exit code; a node that does not end in 8 s fails the test."""
    node.signal(number)
    async with asyncio.timeout(8):
        return await node._process.wait()


@asynccontextmanager
async def silent_registry() -> AsyncIterator[str]:
    """Takes connections and never answers, like a registry behind a broken line."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/simple"


def lines(state_dir: Path) -> list[list[str]]:
    return [psutil.Process(pid).cmdline() for pid in processes_of(state_dir)]


def processes_of(state_dir: Path) -> set[int]:
    """Everything alive that a node of this state directory started, however far removed."""
    found = set()
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("EDGEMESH_STATE_DIR") == str(state_dir)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:  # gone meanwhile, or somebody else's
            continue
    return found


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ends_at:
            raise UnreachableError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.01)
