"""The MQTT topic API as a shell user meets it: ``mosquitto_pub`` in, ``mosquitto_sub`` out."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from node.local_mesh import LocalMesh
from tests.integration.meshes import local_mesh
from tests.integration.shell_client import needs_mosquitto_clients, publish, subscribed

pytestmark = needs_mosquitto_clients

GOOD = {"prompt": "one two three"}
BAD: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{prompt: hello", "JSON"),
    "not an object": (b"[1, 2]", "object"),
    "an empty prompt": ({"prompt": "   "}, "prompt is empty"),
    "neither prompt nor messages": ({"max_tokens": 5}, "prompt"),
    "both prompt and messages": ({**GOOD, "messages": [{"role": "user", "content": "x"}]}, "not both"),
    "an unknown model": ({**GOOD, "model": "gpt-17"}, "gpt-17"),
    "an unknown adapter": ({**GOOD, "adapter": "poet"}, "poet"),
    "a negative deadline": ({**GOOD, "deadline_s": -1}, "deadline_s"),
    "a value of zero": ({**GOOD, "value": 0}, "value"),
    "a value that is no number": (b'{"prompt": "x", "value": NaN}', "NaN"),
    "a text where a number belongs": ({**GOOD, "max_tokens": "many"}, "max_tokens"),
    "an unknown field": ({**GOOD, "max_token": 5}, "max_token"),
    "a prompt longer than the context": ({"prompt": "word " * 5000, "max_tokens": 10}, "5000"),
    "a reply topic inside the mesh": ({**GOOD, "reply_to": "edgemesh/x/coordinator"}, "reply_to"),
    "an id with a slash": ({**GOOD, "id": "a/b"}, "id"),
    "nesting without end": (b'{"prompt": "x", "stop": ' + b"[" * 3000 + b"]" * 3000 + b"}", ""),
}


async def plain(mesh: LocalMesh) -> list[str]:
    """Arguments that reach the broker without TLS, from this machine only."""
    for node in mesh.running:
        for event in node.events:
            if event["event"] == "broker_hosted":
                return ["-h", "127.0.0.1", "-p", str(event["plain_port"])]
    raise AssertionError("nobody hosts a broker")


@pytest.mark.parametrize("kind", ["auto", "amqtt"])
async def test_bad_input_is_rejected_with_a_reason_and_harms_nobody(tmp_path: Path, kind: str) -> None:
    async with local_mesh(tmp_path, 2, "--broker-kind", kind, model="echo") as mesh:
        base = f"edgemesh/{mesh.mesh}"
        to = await plain(mesh)
        async with subscribed(
            [f"{base}/task/+/status", f"{base}/task/+/result", f"{base}/client/#"],
            *to,
        ) as heard:
            for number, (name, (body, reason)) in enumerate(BAD.items()):
                payload = json.dumps(body).encode() if isinstance(body, dict) else body
                await publish(f"{base}/task/submit", payload, *to)
                said = await heard.wait_until(
                    lambda n=number: [
                        p for t, p in heard.lines if t.endswith("/status") and p["state"] == "rejected"
                    ][n:],
                    name,
                )
                assert reason in said[0]["reason"], f"{name}: {said[0]['reason']}"
            body = {**GOOD, "id": "after-all-that", "reply_to": f"{base}/client/me/good"}
            await publish(f"{base}/task/submit", json.dumps(body).encode(), *to)
            done = await heard.wait_for(
                lambda topic, p: topic.endswith("after-all-that/result"), "the answer to a good task"
            )
            assert (done["state"], done["text"]) == ("done", "one two three")
            assert all(node.is_running for node in mesh.nodes)


@pytest.mark.parametrize("kind", ["auto", "amqtt"])
async def test_a_task_from_the_shell_is_acknowledged_streamed_answered_and_remembered(
    tmp_path: Path, kind: str
) -> None:
    async with local_mesh(tmp_path, 2, "--broker-kind", kind, model="echo:50") as mesh:
        base = f"edgemesh/{mesh.mesh}"
        to = await plain(mesh)
        async with subscribed(
            [f"{base}/task/+/{what}" for what in ("status", "stream", "result")], *to
        ) as heard:
            body = json.dumps({"prompt": " ".join(f"w{k}" for k in range(40)), "id": "mine"}).encode()
            await publish(f"{base}/task/submit", body, *to)
            acknowledged = await heard.wait_for(lambda t, p: t.endswith("mine/status"), "the acknowledgement")
            assert (acknowledged["state"], acknowledged["durable_on"]) == ("queued", 2)
            done = await heard.wait_for(lambda t, p: t.endswith("mine/result"), "the result")
            pieces = [p for t, p in heard.lines if t.endswith("mine/stream")]
            assert len(pieces) > 1 and [p["seq"] for p in pieces] == list(range(len(pieces)))
            assert "".join(p["text"] for p in pieces) == done["text"]
            await heard.wait_for(lambda t, p: t.endswith("mine/status") and p["state"] == "done", "done")
            states = [p["state"] for t, p in heard.lines if t.endswith("mine/status")]
            assert states[0] == "queued" and states[-1] == "done" and "running" in states, states

            n_before = len(heard.lines)
            await publish(f"{base}/task/submit", body, *to)  # the same task again: no second run
            await heard.wait_for(
                lambda t, p: any(line[0].endswith("mine/result") for line in heard.lines[n_before:]),
                "it is said again",
            )
            assert not any(t.endswith("mine/stream") for t, _ in heard.lines[n_before:])

        async with subscribed([f"{base}/task/mine/result"], *to) as late:
            assert (
                await late.wait_for(lambda t, p: t.endswith("mine/result"), "the retained result")
            ) == done


async def test_the_same_id_with_another_body_is_refused_and_the_first_task_stays_as_it_was(
    tmp_path: Path,
) -> None:
    async with local_mesh(tmp_path, 2, model="echo") as mesh:
        base = f"edgemesh/{mesh.mesh}"
        to = await plain(mesh)
        async with subscribed(
            [f"{base}/task/+/result", f"{base}/task/+/status", f"{base}/client/#"],
            *to,
        ) as heard:
            await publish(f"{base}/task/submit", b'{"prompt": "first", "id": "one"}', *to)
            await heard.wait_for(lambda t, p: t.endswith("one/result"), "the first result")
            second = {"prompt": "second", "id": "one", "reply_to": f"{base}/client/me"}
            await publish(f"{base}/task/submit", json.dumps(second).encode(), *to)
            refusal = await heard.wait_for(lambda t, p: t.endswith("client/me"), "the refusal")
            assert refusal["state"] == "rejected" and "id" in refusal["reason"]
            results = [p for t, p in heard.lines if t.endswith("one/result")]
            assert {p["text"] for p in results} == {"first"}


async def test_a_task_can_be_cancelled_by_an_empty_message(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 2, model="echo:5") as mesh:
        base = f"edgemesh/{mesh.mesh}"
        to = await plain(mesh)
        async with subscribed([f"{base}/task/+/result", f"{base}/task/+/stream"], *to) as heard:
            body = json.dumps({"prompt": "w " * 200, "id": "long"}).encode()
            await publish(f"{base}/task/submit", body, *to)
            await heard.wait_for(lambda t, p: t.endswith("long/stream"), "the first tokens")
            await publish(f"{base}/task/long/cancel", b"", *to)
            result = await heard.wait_for(lambda t, p: t.endswith("long/result"), "the end")
            assert result["state"] == "cancelled"


async def test_a_deadline_that_passes_ends_the_task_as_expired(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 2, "--policy", "fifo", model="echo:5") as mesh:  # refuses nothing
        base = f"edgemesh/{mesh.mesh}"
        to = await plain(mesh)
        async with subscribed([f"{base}/task/+/result"], *to) as heard:
            body = json.dumps({"prompt": "w " * 200, "id": "late", "deadline_s": 1.5}).encode()
            await publish(f"{base}/task/submit", body, *to)
            result = await heard.wait_for(lambda t, p: t.endswith("late/result"), "the end", 8.0)
            assert result["state"] == "expired"


async def test_what_no_node_can_do_in_time_is_rejected_with_the_numbers(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 2, model="echo:5") as mesh:
        base = f"edgemesh/{mesh.mesh}"
        to = await plain(mesh)
        async with subscribed([f"{base}/task/+/status"], *to) as heard:
            body = {"prompt": "w " * 200, "id": "late", "deadline_s": 1.5, "max_tokens": 200}
            await publish(f"{base}/task/submit", json.dumps(body).encode(), *to)
            status = await heard.wait_for(lambda t, p: t.endswith("late/status"), "the answer", 8.0)
            assert status["state"] == "rejected"
            assert re.fullmatch(r"best node needs \d+\.\d s, 1\.\d s left", status["reason"])


async def test_mqtt_5_request_and_response_need_no_field_in_the_body(tmp_path: Path) -> None:
    from mesh.broker import mosquitto_path

    if mosquitto_path() is None:
        pytest.skip("needs Debian's mosquitto package: amqtt speaks MQTT 3.1.1 only")
    async with local_mesh(tmp_path, 1, "--broker-kind", "mosquitto", model="echo") as mesh:
        to = await plain(mesh)
        process = await asyncio.create_subprocess_exec(
            "mosquitto_rr", *to, "-V", "5", "-q", "1", "-W", "15", "-t", f"edgemesh/{mesh.mesh}/task/submit",
            "-e", f"edgemesh/{mesh.mesh}/client/rr", "-m", '{"prompt": "hello there"}',
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        first = json.loads(out)
        assert first["state"] in ("queued", "done") and first["task"]
