"""A node that holds the top of the model, and one that holds all: what the first lacks, the second makes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from mesh.ids import MeshName
from node.local_mesh import LocalMesh
from tests.integration.cache_nodes import soon
from tests.integration.test_tune_cli import LONG_S, Shell, records, told
from tests.tiny import tiny_llama
from tests.tuning import job, memory, run, source, spec

pytestmark = pytest.mark.timeout(400)

FLAGS = ("--threads", "1", "--precision", "fp32")
# It gives nothing to the mesh's memory, so whatever it has, it has fetched.
TOP = ("--hold", "top", "--top-layers", "2", "--feature-disk", "0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", layers=4)


def uncached(tiny: Path, work: Path, data: Path, seed: int) -> str:
    """The digest of the same adapter, from features computed here and now by a whole model."""
    wish = spec(data=data.read_text(), task="classify", top_layers=2, rank=2, epochs=2, seed=seed, batch=16)
    tuning = job(tiny, work, wish, maps_factory=source(tiny, memory()))
    run(tuning)
    assert tuning.result is not None
    return tuning.result.digest


async def asked(mesh: LocalMesh, *arguments: str) -> tuple[int, Any, str]:
    code, out, err = await mesh.run(*arguments, "--json", timeout_s=LONG_S)
    lines = out.strip().splitlines()
    return code, json.loads(lines[-1]) if lines else None, err


async def test_it_tunes_and_reads_texts_from_maps_that_others_make_and_leaves_answers_to_them(
    tmp_path: Path, tiny: Path
) -> None:
    warmed, fresh = tmp_path / "warmed.jsonl", tmp_path / "fresh.jsonl"
    warmed.write_text(records(40))
    fresh.write_text(records(60))
    async with LocalMesh(tmp_path / "state", MeshName("test-hold-top"), flags=FLAGS) as mesh:
        (host,) = await mesh.start_many(1, "--no-compute")
        hosted = await host.wait_for("broker_hosted", LONG_S)
        strong = await mesh.start("--model", str(tiny))
        weak = await mesh.start("--model", str(tiny), *TOP)
        for node in (strong, weak):
            await node.wait_for("engine_ready", LONG_S)

        _, nodes, _ = await asked(mesh, "nodes")
        about = {row["node"]: row for row in nodes}
        assert "the top 2 of 4 layers only" in about[weak.id]["precision_reason"]

        # Warmed ahead of need; then the strong node takes no work, and the job finds all in the mesh.
        code, done, err = await asked(mesh, "features", "--data", str(warmed), "--top-layers", "2")
        assert code == 0, err
        held = done["output"]["features"]
        assert (done["node"], held["n_computed"]) == (strong.id, held["n_tokens"])
        assert (await mesh.run("drain", strong.id))[0] == 0
        tuned = [
            *("tune", "--data", str(warmed), "--adapter", "warm", "--top-layers", "2", "--rank", "2"),
            *("--epochs", "2", "--seed", "5", "--json"),
        ]
        code, out, err = await mesh.run(*tuned, timeout_s=LONG_S)
        assert code == 0, err
        result = told(out)[1]
        assert result["node"] == weak.id
        digest = result["output"]["adapter"]["digest"]
        assert digest == uncached(tiny, tmp_path / "a", warmed, 5), "to the bit"
        assert (await mesh.run("drain", strong.id, "--resume"))[0] == 0

        # On request: nobody has the features of these records; the job is for the weak node alone.
        base = f"edgemesh/{mesh.mesh}/task"
        async with aiomqtt.Client("127.0.0.1", hosted["plain_port"]) as client:
            await client.subscribe(f"{base}/+/result", qos=1)
            await client.subscribe(f"{base}/here/status", qos=1)
            shell = Shell(client, base)
            wish = {"adapter": "asked", "task": "classify", "top_layers": 2, "rank": 2, "epochs": 2}
            wish |= {"data": fresh.read_text(), "holders": [weak.id], "seed": 6}
            result = await shell.ends("on-request", kind="tune", tune=wish)
            assert (result["state"], result["node"]) == ("done", weak.id), result["reason"]
            assert result["output"]["adapter"]["digest"] == uncached(tiny, tmp_path / "b", fresh, 6)

            # Answers go to who can write them; texts under an adapter to either, with one result.
            answer = await shell.ends("answer", prompt="w1 w2", max_tokens=4)
            assert (answer["state"], answer["node"]) == ("done", strong.id), answer["reason"]
            texts = {"kind": "classify", "adapter": "asked", "texts": ["w1 w2 w3", "w11 w12"]}
            there = await shell.ends("there", **texts)
            assert there["state"] == "done", there["reason"]
            assert (await mesh.run("drain", strong.id))[0] == 0
            # Other texts: their features are nowhere, and nobody makes them before the strong node resumes.
            waits = asyncio.create_task(shell.ends("here", **texts))
            begun = ("assigned", "running")
            await soon(
                lambda: any(one["state"] in begun for one in shell.heard.get("here/status", ())),
                "the attempt on the weak node",
                LONG_S,
            )
            assert (await mesh.run("drain", strong.id, "--resume"))[0] == 0
            here = await waits
            assert here["state"] == "done", here["reason"]
            assert here["output"]["labels"] == there["output"]["labels"]

            # Alone, it refuses what it cannot do, with the reason.
            await strong.stop()
            async with asyncio.timeout(LONG_S):  # until the others know that it has left
                code = -1
                while code != 5:
                    code, _, err = await mesh.run("run", "w1 w2", "--deadline", "5", timeout_s=LONG_S)
            assert "needs a node that holds the whole model" in err
