"""Two machines of one mesh: a model only the first had, an adapter made there, and its removal."""

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
from node.local_mesh import LocalMesh
from tests.reference.made_adapters import make_adapter
from tests.tiny import tiny_llama

pytestmark = pytest.mark.timeout(300)  # each of two nodes loads torch

SERVED_WITHIN_S = 15.0
"""A look at the directory a second, the pull, and the compute process's look every two; on a busy machine."""


def a_lora(directory: Path, model: Path) -> Path:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    return make_adapter(directory, model, config, size=0.5)


async def asked(machine: LocalMesh, *arguments: str) -> Any:
    code, out, talk = await machine.run(*arguments, "--json")
    assert code == 0, talk
    return json.loads(out)


async def test_a_mesh_spreads_its_model_and_its_adapters_and_forgets_them_together(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny")
    name = MeshName(f"test-{secrets.token_hex(4)}")
    async with AsyncExitStack() as stack:
        a, b = [
            await stack.enter_async_context(LocalMesh(tmp_path / machine, name, flags=("--port", "0")))
            for machine in "ab"
        ]
        first = await a.start("--new", "--model", str(model))
        await first.wait_for("joined")
        code = (await a.run("token"))[1].strip()
        second = await b.start("--code", code, "--model", "mesh:tiny")  # waits until somebody serves it
        fetched = await second.wait_for("model_from_peers", 120)
        assert fetched["peers"] == [first.id]
        await second.wait_for("engine_ready", 120)

        # Made on one, served on the other, with no restart.
        draft = a_lora(tmp_path / "draft", model)
        (a.state_dir / "adapters").mkdir(exist_ok=True)
        mark, put_at = len(second.events), time.monotonic()
        replace_directory(draft, a.state_dir / "adapters" / "spam")
        served = await second.wait_for(
            "adapters", 30, after=mark, where=lambda event: event["names"] == ["spam"]
        )
        assert served["monotonic_s"] - put_at < SERVED_WITHIN_S
        async with asyncio.timeout(SERVED_WITHIN_S):
            while len((row := (await asked(b, "adapters", "list"))[0])["nodes"]) < 2:
                pass  # a command takes a second
        assert (row["name"], row["version"], set(row["nodes"])) == ("spam", 1, {first.id, second.id})

        # Removed while one is away: it does not bring it back.
        await second.stop()
        done = await asked(a, "adapters", "rm", "spam")
        assert done == {"name": "spam", "version": 1, "left_on": []}
        paths = [machine.state_dir / "adapters" / "spam" for machine in (a, b)]
        assert [path.exists() for path in paths] == [False, True]
        again = await b.start("--code", code, "--no-compute")
        await again.wait_for("adapter_removed", 30)
        assert not any(path.exists() for path in paths)
        assert await asked(b, "adapters", "list") == []
