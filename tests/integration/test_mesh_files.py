"""Three machines of one mesh: a model none but the first had, an adapter made there, and its removal."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import peft
import pytest

from mesh.ids import MeshName
from node.durable import replace_directory
from node.local_mesh import LocalMesh, NodeProcess
from tests.reference.made_adapters import make_adapter
from tests.tiny import tiny_llama

pytestmark = pytest.mark.timeout(300)  # each of three nodes loads torch

SERVED_WITHIN_S = 15.0
"""A look at the directory a second, the pull, and the compute process's look every two; on a busy machine."""


def a_lora(directory: Path, model: Path) -> Path:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    return make_adapter(directory, model, config, size=0.5)


async def served(node: NodeProcess, *names: str, after: int) -> float:
    """When the node's compute process came to have exactly these adapters."""
    event = await node.wait_for("adapters", 30, after=after, where=lambda e: e["names"] == sorted(names))
    at: float = event["monotonic_s"]
    return at


async def asked(machine: LocalMesh, *arguments: str) -> Any:
    code, out, talk = await machine.run(*arguments, "--json")
    assert code == 0, talk
    return json.loads(out)


async def test_a_mesh_spreads_its_model_and_its_adapters_and_forgets_them_together(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny")
    name = MeshName(f"test-{secrets.token_hex(4)}")
    async with AsyncExitStack() as stack:
        a, b, c = [
            await stack.enter_async_context(LocalMesh(tmp_path / machine, name, flags=("--port", "0")))
            for machine in "abc"
        ]
        first = await a.start("--new", "--model", str(model))
        await first.wait_for("joined")
        code = (await a.run("token"))[1].strip()
        second = await b.start("--code", code, "--model", str(model))
        await asyncio.gather(*(node.wait_for("engine_ready", 120) for node in (first, second)))

        third = await c.start("--code", code, "--model", "mesh:tiny")
        fetched = await third.wait_for("model_from_peers", 60)
        assert set(fetched["peers"]) == {first.id, second.id}
        await third.wait_for("engine_ready", 120)

        # Made on one, served everywhere, with no restart.
        nodes = (first, second, third)
        marks = [len(node.events) for node in nodes]
        draft = a_lora(tmp_path / "draft", model)
        a.state_dir.joinpath("adapters").mkdir(exist_ok=True)
        put_at = time.monotonic()
        replace_directory(draft, a.state_dir / "adapters" / "spam")
        for node, mark in zip(nodes, marks, strict=True):
            assert await served(node, "spam", after=mark) - put_at < SERVED_WITHIN_S
        async with asyncio.timeout(SERVED_WITHIN_S):
            while set((row := (await asked(b, "adapters", "list"))[0])["nodes"]) != {n.id for n in nodes}:
                pass  # a command takes a second
        assert (row["name"], row["version"]) == ("spam", 1)

        # Removed while one is away: it does not bring it back.
        await third.stop()
        done = await asked(b, "adapters", "rm", "spam")
        assert done == {"name": "spam", "version": 1, "left_on": []}
        gone = [machine.state_dir / "adapters" / "spam" for machine in (a, b, c)]
        assert [path.exists() for path in gone] == [False, False, True]
        again = await c.start("--code", code, "--no-compute")
        await again.wait_for("adapter_removed", 30)
        assert not any(path.exists() for path in gone)
        assert await asked(c, "adapters", "list") == []
