"""A real node whose slots are all taken, and a task that cannot wait for one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from node.local_mesh import LocalMesh
from tests.integration.meshes import local_mesh

pytestmark = pytest.mark.timeout(180)

SLOTS = 4  # of echo


async def run(mesh: LocalMesh, task: str, n_words: int, value: float, deadline_s: float) -> dict[str, Any]:
    code, out, err = await mesh.run(
        "run", " ".join(f"w{k}" for k in range(n_words)), "--max-tokens", str(n_words), "--id", task,
        "--value", str(value), "--deadline", str(deadline_s), "--json", timeout_s=120,
    )  # fmt: skip
    assert out, (code, err)
    return dict(json.loads(out))


async def test_an_urgent_task_starts_though_all_slots_are_taken_and_nobody_loses_a_word(
    tmp_path: Path,
) -> None:
    async with local_mesh(tmp_path, 1, model="echo:10") as mesh:
        slow = [asyncio.create_task(run(mesh, f"slow-{k}", 250, 1.0, 110.0)) for k in range(SLOTS)]
        async with asyncio.timeout(60):
            while True:
                _, out, _ = await mesh.run("tasks", "--json")
                if sum(row["state"] == "running" for row in json.loads(out)) == SLOTS:
                    break
        urgent = await run(mesh, "urgent", 20, 50.0, 8.0)
        assert (urgent["state"], urgent["n_tokens"]) == ("done", 20), urgent["reason"]
        assert not any(task.done() for task in slow), "it did not wait for one of them"
        told = [json.loads((await mesh.run("task", "show", f"slow-{k}", "--json"))[1]) for k in range(SLOTS)]
        verbs = [decision["verb"] for one in told for decision in one["decisions"]]
        assert verbs.count("start") == SLOTS and verbs.count("pause") == 1, verbs
        for result in await asyncio.gather(*slow):
            assert (result["state"], result["n_tokens"], result["attempt"]) == ("done", 250, 1)
