"""Secrets and rights on real processes: what an outsider, a client and a neighbour can see and do."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import secrets
import shlex
import stat
from pathlib import Path

import psutil
import pytest

from mesh.broker import mosquitto_path
from mesh.facts import BrokerRef
from mesh.ids import MeshName
from mesh.transport.identity import MeshKey, issue
from node.local_mesh import LocalMesh
from tests.integration.meshes import local_mesh
from tests.integration.shell_client import needs_mosquitto_clients, subscribed
from tests.integration.site_broker import free_port

DEPLOY = Path(__file__).parents[2] / "deploy" / "mosquitto"
needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")


async def test_nothing_a_node_leaves_behind_is_for_others(tmp_path: Path) -> None:
    """Not even under the most careless umask: no other user reads a prompt or puts a directory of his own
    in place of ours; and the key is in one file, and in no log, argument or variable of a process."""
    before = os.umask(0)
    try:
        async with local_mesh(tmp_path / "outer" / "state", 2, model="echo") as mesh:
            assert (await mesh.run("submit", "--wait", "hello"))[0] == 0
            assert (await mesh.run("mqtt"))[0] == 0
            code = (await mesh.run("token"))[1].strip()
            secret = code.removeprefix(f"em1-{mesh.mesh}-")[:26].encode()
            found = [tmp_path / "outer", *(tmp_path / "outer").rglob("*")]
            # A socket or a scratch file may be gone by now.
            open_to_others = [
                path for path in found if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077
            ]
            assert open_to_others == []
            with_key = [path for path in found if path.is_file() and secret in path.read_bytes()]
            assert [path.name for path in with_key] == ["key"]
            for node in mesh.nodes:
                assert secret.decode() not in node.tail
                for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                    seen = " ".join([*process.cmdline(), *process.environ().values()])
                    assert secret.decode() not in seen
    finally:
        os.umask(before)


@needs_mosquitto_clients
@pytest.mark.parametrize("kind", ["auto", "amqtt"])
async def test_what_edgemesh_mqtt_prints_asks_and_cannot_pose_as_a_node(tmp_path: Path, kind: str) -> None:
    async with local_mesh(tmp_path, 2, "--broker-kind", kind, "--no-plain", model="echo") as mesh:
        code, out, _ = await mesh.run("mqtt", "--json")
        assert code == 0
        how = json.loads(out)["tls"]
        where = shlex.split(how["publish"])[1 : shlex.split(how["publish"]).index("-q")]
        base = f"edgemesh/{mesh.mesh}"
        lease = {"v": 1, "kind": "lease", "epoch": {"term": 10**6, "node": "thief"}, "ttl_s": 9, "beat": 1}
        async with subscribed([f"{base}/#"], *where) as heard:
            for topic, body in (
                ("coordinator", lease),
                (
                    "node/shell/state",
                    {"v": 1, "node": "shell", "state": "online", "incarnation": 1, "boot": "b"},
                ),
                ("task/forged/status", {"v": 1}),
                ("task/submit", {"id": "real", "prompt": "one two"}),
            ):
                process = await asyncio.create_subprocess_exec(
                    "mosquitto_pub", *where, "-q", "1", "-r", "-t", f"{base}/{topic}", "-m", json.dumps(body)
                )
                assert await process.wait() == 0
            result = await heard.wait_for(lambda topic, p: topic.endswith("/real/result"), "the answer")
            assert result["text"] == "one two"
            assert not [topic for topic, body in heard.lines if "thief" in str(body) or "forged" in topic]
            assert not [topic for topic, _ in heard.lines if "/to/" in topic or "/node/shell/" in topic]


@needs_mosquitto
async def test_a_site_s_broker_with_the_mesh_s_certificates_serves_nodes_and_refuses_others(
    tmp_path: Path,
) -> None:
    """As deploy/mosquitto says it is set up; a wrong code is told as such, with its exit code."""
    key = MeshKey.create(f"site-{secrets.token_hex(3)}", os.urandom(32))
    port = free_port()
    there = tmp_path / "broker"
    issue(key, "broker", there)
    (there / "members.acl").write_text(
        (DEPLOY / "members.acl").read_text().replace("/home/", f"/{key.name}/")
    )
    text = (DEPLOY / "edgemesh.conf").read_text().replace("/etc/mosquitto/edgemesh", str(there))
    text = text.replace(
        "listener 8883", f"user {pwd.getpwuid(os.geteuid()).pw_name}\nlistener {port} 127.0.0.1"
    )
    (there / "site.conf").write_text(text)
    broker = await asyncio.create_subprocess_exec(
        *(str(mosquitto_path()), "-c", str(there / "site.conf")), stderr=asyncio.subprocess.DEVNULL
    )
    ref = BrokerRef(epoch=0, host=None, addresses=("127.0.0.1",), port=port, tls=True)
    try:
        flags = ("--model", "echo", "--code", key.code)
        async with LocalMesh(tmp_path / "home", key.name, flags=flags, broker=ref) as mesh:
            nodes = [await mesh.start() for _ in range(2)]
            await asyncio.gather(*(node.wait_for("joined", 30) for node in nodes))
            assert (await mesh.run("submit", "--wait", "hello"))[:2] == (0, "hello\n")
            wrong = MeshKey.create(key.name, os.urandom(32))
            async with LocalMesh(tmp_path / "else", MeshName(key.name), broker=ref) as other:
                exit_code, _, talk = await other.run("submit", "--code", wrong.code, "hello")
            assert exit_code == 3 and "join code" in talk
    finally:
        broker.kill()
        await broker.wait()
