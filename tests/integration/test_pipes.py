"""Commands in a shell's hands: pipes whose reader leaves, terminals that lack letters."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from node.local_mesh import LocalMesh
from tests.integration.meshes import local_mesh

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


async def begin(mesh: LocalMesh, *arguments: str | bytes, **environment: str) -> asyncio.subprocess.Process:
    command, last = mesh.command(*(a for a in arguments if isinstance(a, str))), arguments[-1]
    return await asyncio.create_subprocess_exec(
        *command,
        *([last] if isinstance(last, bytes) else []),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**mesh.environment, **environment},
    )


async def leave_after(process: asyncio.subprocess.Process, n_bytes: int) -> tuple[int, str]:
    """Read so much of its output, close the pipe; its exit code and what it said about that."""
    assert process.stdout is not None and process.stderr is not None
    async with asyncio.timeout(20):
        await process.stdout.readexactly(n_bytes)
        process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        said = await process.stderr.read()
        return await process.wait(), said.decode()


async def test_who_has_read_enough_of_an_answer_ends_its_task(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 1) as mesh:
        process = await begin(mesh, "run", "--id", "t-cut", " ".join(f"w{k}" for k in range(200)))
        code, said = await leave_after(process, 5)
        assert code == 1 and "Traceback" not in said
        _, out, _ = await mesh.run("tasks", "--json", "t-cut")
        assert [task["state"] for task in json.loads(out)] == ["cancelled"]


async def test_who_has_seen_enough_of_a_watch_is_not_shown_a_traceback(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 1, model="echo") as mesh:
        process = await begin(mesh, "status", "--watch", "--json")
        _, said = await leave_after(process, 5)
        assert "Traceback" not in said and "asyncgen" not in said


async def test_a_locale_without_our_letters_neither_breaks_nor_stalls_a_command(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 1, model="echo") as mesh:
        for command in ("status", "nodes", "models"):
            process = await begin(mesh, command, PYTHONIOENCODING="ascii")
            _, said = await process.communicate()
            assert process.returncode == 0, said.decode()
        process = await begin(mesh, "run", os.fsencode("grüße"), **ASCII, PYTHONIOENCODING="utf-8")
        out, said = await process.communicate()
        assert (process.returncode, out.decode()) == (0, "grüße\n"), said.decode()
        process = await begin(mesh, "run", b"\xff\xfe", **ASCII)
        _, said = await process.communicate()
        assert process.returncode == 2 and b"not UTF-8" in said
