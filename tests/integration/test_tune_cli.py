"""Tuning as people do it: real processes, a small model with random weights, the command line and the shell.

What is learned does not matter here, and a random model learns little; that it is trained once, served at
once, survives a killed process to the bit, and ends when it is told to, does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import aiomqtt
import psutil
import pytest

from node.local_mesh import LocalMesh, NodeProcess
from tests.integration.meshes import local_mesh
from tests.tiny import WORDS, tiny_llama

pytestmark = pytest.mark.timeout(300)  # each starts a node with torch in it, one of them twice

LONG_S = 110.0  # a bound on waiting, not a wait: torch alone takes a loaded machine ten seconds
LABELS = ("land", "sea")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", layers=4)


def records(n: int) -> str:
    """Two labels, each with words of its own."""
    lines = []
    for k in range(n):
        words = WORDS[k % 2 * 10 :][:10]
        text = " ".join(words[(k + j * (k // 5 + 1)) % 10] for j in range(6))
        lines.append(json.dumps({"text": f"{text} w{20 + k % 60}", "label": LABELS[k % 2]}))
    return "\n".join(lines) + "\n"


def tune(data: Path, adapter: str, *more: str) -> list[str]:
    return [
        "tune",
        "--data",
        str(data),
        "--adapter",
        adapter,
        "--top-layers",
        "2",
        "--rank",
        "2",
        "--json",
        *more,
    ]


def told(out: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What ``tune --json`` printed: progress, and the result."""
    *progress, result = [json.loads(line) for line in out.splitlines()]
    assert {one["type"] for one in progress} <= {"TaskProgress"} and result["type"] == "TaskResult"
    return progress, result


async def compute_child(node: NodeProcess) -> psutil.Process:
    """The process that a node's model is in, once there is one."""
    async with asyncio.timeout(LONG_S):
        while True:
            for child in psutil.Process(node.pid).children():
                if "node.compute" in child.cmdline():
                    return child
            await asyncio.sleep(0.05)


async def started(mesh: LocalMesh, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *mesh.command(*arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=mesh.environment,
        preexec_fn=_heeds_ctrl_c,
    )


def _heeds_ctrl_c() -> None:
    """A suite that runs in the background of a script ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


async def line_where(process: asyncio.subprocess.Process, wanted: Any) -> dict[str, Any]:
    """The first JSON line of the command that is ``wanted``."""
    assert process.stdout is not None
    async with asyncio.timeout(LONG_S):
        async for line in process.stdout:
            found = json.loads(line)
            if wanted(found):
                return found  # type: ignore[no-any-return]
    raise AssertionError("the command ended before it said that")


async def test_an_adapter_is_trained_served_at_once_and_the_same_when_trained_again(
    tmp_path: Path, tiny: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(records(24))
    async with local_mesh(tmp_path / "state", 1, model=str(tiny)) as mesh:
        code, out, err = await mesh.run(
            *tune(data, "places", "--epochs", "4", "--eval", str(data)), timeout_s=LONG_S
        )
        assert code == 0, err
        progress, result = told(out)
        assert progress, "it says how far it is"
        assert [one["seq"] for one in progress] == sorted(one["seq"] for one in progress)
        fractions = [one["fraction"] for one in progress]
        assert fractions == sorted(fractions) and fractions[-1] <= 1
        card = result["output"]["adapter"]
        assert (card["name"], card["top_layers"], card["labels"]) == ("places", 2, ["land", "sea"])
        assert card["metric"] is not None

        code, out, err = await mesh.run("classify", "--adapter", "places", "w1 w2", "w11 w12", "--json")
        assert code == 0, err
        first, second = json.loads(out)
        assert first["text"] == "w1 w2" and set(first["scores"]) == set(LABELS)
        assert sum(second["scores"].values()) == pytest.approx(1, abs=1e-3)

        code, out, err = await mesh.run("adapters", "list", "--json")
        (row,) = json.loads(out)
        assert (row["name"], row["digest"], row["trouble"]) == ("places", card["digest"], None)
        code, out, err = await mesh.run("nodes", "--json")
        assert json.loads(out)[0]["adapters"] == ["places"] and json.loads(out)[0]["precision"]

        code, out, err = await mesh.run(
            *tune(data, "again", "--epochs", "4", "--eval", str(data)), timeout_s=LONG_S
        )
        progress, result = told(out)
        assert result["output"]["adapter"]["digest"] == card["digest"]
        assert max(one["cache_hits"] for one in progress) > 0, "the features are there already"


class Shell:
    """Any MQTT client on the plain port: it publishes JSON, and keeps what it hears of tasks."""

    def __init__(self, client: aiomqtt.Client, base: str) -> None:
        self._client = client
        self._base = base
        self.heard: dict[str, list[dict[str, Any]]] = {}  # by the topic below the mesh's

    async def ends(self, task: str, **body: Any) -> dict[str, Any]:
        """Submit, and listen until the result is there."""
        await self._client.publish(f"{self._base}/submit", json.dumps({"id": task, **body}), qos=1)
        async with asyncio.timeout(LONG_S):
            async for message in self._client.messages:
                if not message.payload:
                    continue  # what was retained of an earlier task is cleared
                topic = str(message.topic).removeprefix(f"{self._base}/")
                self.heard.setdefault(topic, []).append(json.loads(bytes(message.payload)))  # type: ignore[arg-type]
                if topic == f"{task}/result":
                    break
        return self.heard[f"{task}/result"][-1]


async def test_a_plain_mqtt_client_tunes_follows_and_classifies(tmp_path: Path, tiny: Path) -> None:
    async with local_mesh(tmp_path, 1, model=str(tiny)) as mesh:
        hosted = await mesh.nodes[0].wait_for("broker_hosted")
        spec = {"adapter": "places", "task": "classify", "top_layers": 1, "rank": 2, "epochs": 20}
        base = f"edgemesh/{mesh.mesh}/task"
        async with aiomqtt.Client("127.0.0.1", hosted["plain_port"]) as client:
            await client.subscribe(f"{base}/+/progress", qos=0)
            await client.subscribe(f"{base}/+/result", qos=1)
            shell = Shell(client, base)
            bad = records(3) + '{"text": "no label"}\n'
            refused = await shell.ends("bad", kind="tune", tune={**spec, "data": bad})
            assert refused["state"] == "rejected" and "line 4" in refused["reason"]

            done = await shell.ends("tune", kind="tune", tune={**spec, "data": records(24)})
            assert done["state"] == "done", done["reason"]
            said = shell.heard["tune/progress"]
            assert [one["seq"] for one in said] == list(range(len(said))) and said[-1]["epochs"] == 20
            used = await shell.ends("use", kind="classify", adapter="places", texts=["w1 w2", "w11"])
            assert len(used["output"]["labels"]) == 2 and set(used["output"]["labels"]) <= set(LABELS)


async def test_a_killed_process_costs_time_and_not_a_bit_of_the_adapter(tmp_path: Path, tiny: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(records(32))
    async with local_mesh(tmp_path / "state", 1, model=str(tiny)) as mesh:
        code, out, err = await mesh.run(*tune(data, "calm", "--epochs", "24"), timeout_s=LONG_S)
        assert code == 0, err
        digest = told(out)[1]["output"]["adapter"]["digest"]

        child = await compute_child(mesh.nodes[0])
        command = await started(mesh, *tune(data, "shot", "--epochs", "24"))
        # Progress is said four times a second, and a calm machine takes fifteen steps meanwhile, of 48.
        await line_where(command, lambda one: one.get("phase") == "training")
        child.send_signal(signal.SIGKILL)
        result = await line_where(command, lambda one: one["type"] == "TaskResult")
        await command.communicate()
        assert (result["state"], result["attempt"]) == ("done", 2), result["reason"]
        assert result["output"]["adapter"]["digest"] == digest
        assert not psutil.pid_exists(child.pid) and mesh.nodes[0].is_running


async def test_a_tuning_task_ends_at_its_deadline_and_when_its_client_has_enough(
    tmp_path: Path, tiny: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(records(32))
    async with local_mesh(tmp_path / "state", 1, model=str(tiny)) as mesh:
        code, out, err = await mesh.run(*tune(data, "late", "--epochs", "9999", "--deadline", "3"))
        assert code == 6 and "its deadline of 3" in err

        command = await started(mesh, *tune(data, "enough", "--epochs", "9999"))
        await line_where(command, lambda one: one.get("phase") == "training")
        os.kill(command.pid, signal.SIGINT)
        async with asyncio.timeout(LONG_S):
            _, talk = await command.communicate()
        assert command.returncode == 130 and "the same command goes on" in talk.decode()
        code, out, err = await mesh.run("tasks", "--json")
        assert sorted(one["state"] for one in json.loads(out)) == ["cancelled", "expired"]
        code, out, err = await mesh.run("run", "w1 w2", "--max-tokens", "3")
        assert code == 0, err
        assert json.loads((await mesh.run("adapters", "list", "--json"))[1]) == [], "half an adapter is none"
