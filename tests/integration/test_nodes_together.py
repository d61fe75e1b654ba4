"""One job on two real nodes, and the same once more with one of them killed in the middle.

Run by ``make test-long``: that parts give one adapter whoever does them, some twice, and that a round goes on
without a node, ``make test`` proves in one process (``test_tune_nodes``, ``tests/unit/test_rounds.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.ids import MeshName
from node.local_mesh import LocalMesh
from tests.integration.meshes import coordinator_of
from tests.integration.test_tune_cli import LONG_S, line_where, records, started, told
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


def tune(data: Path, adapter: str) -> list[str]:
    return [
        *("tune", "--data", str(data), "--eval", str(data), "--adapter", adapter, "--top-layers", "2"),
        *("--rank", "2", "--epochs", "3", "--nodes", "2", "--json"),
    ]


def parts_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if '"TaskProgress"' in line]


async def test_two_nodes_train_one_adapter_and_a_kill_changes_nothing_but_time(
    tmp_path: Path, tiny: Path
) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text(records(60))
    async with LocalMesh(
        tmp_path / "state", MeshName("test-nodes"), flags=("--threads", "1", "--precision", "fp32")
    ) as mesh:
        await mesh.start_many(1, "--no-compute")
        workers = [await mesh.start("--model", str(tiny)) for _ in range(2)]
        for worker in workers:
            await worker.wait_for("engine_ready", LONG_S)
        code, out, err = await mesh.run(*tune(data, "quiet"), timeout_s=LONG_S)
        assert code == 0, err
        quiet: dict[str, Any] = told(out)[1]
        card = quiet["output"]["adapter"]
        assert card["made"] == "the mean of 2 parts, after each of 3 epochs" and card["metric"] is not None
        assert any("epoch 3 of 3 on 2 nodes" in line for line in parts_of(out)), "the client hears of rounds"
        code, out, err = await mesh.run("tasks", "--json")
        assert code == 0, err
        ran_on = {worker.id for worker in workers if worker.id in out}
        assert len(ran_on) == 2, "each did a part"

        process = await started(mesh, *tune(data, "again"))
        await line_where(process, lambda line: "epoch 2 of 3" in line.get("text", ""))
        assert coordinator_of(mesh) is not workers[1]
        await workers[1].kill()
        result = await line_where(process, lambda line: line["type"] == "TaskResult")
        await process.wait()
        assert result["state"] == "done", result["reason"]
        assert result["output"]["adapter"]["digest"] == card["digest"]
