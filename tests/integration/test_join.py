"""``edgemesh join`` between machines: real processes, one network namespace for each, real mDNS."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.errors import UnreachableError
from mesh.ids import MeshName
from node.local_mesh import LocalMesh
from tests.integration.meshes import local_mesh
from tests.integration.namespaces import Host, Lan, why_not

NO_LAN = why_not()
needs_lan = pytest.mark.skipif(NO_LAN is not None, reason=f"needs network namespaces: {NO_LAN}")


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as made:
        yield made


def machine(host: Host, directory: Path, mesh: MeshName) -> LocalMesh:
    """A device of its own: own state directory, own network."""
    prefix = ("ip", "netns", "exec", host.namespace)
    flags = ("--model", "echo")
    return LocalMesh(directory / host.name, mesh, flags=flags, interfaces=None, prefix=prefix)


def a_name() -> MeshName:
    return MeshName(f"test-{secrets.token_hex(4)}")


@needs_lan
async def test_a_second_machine_joins_with_nothing_but_the_code(lan: Lan, tmp_path: Path) -> None:
    name = a_name()
    pi, nano = lan.host("pi", "10.77.1.1/24"), lan.host("nano", "10.77.1.2/24")
    async with machine(pi, tmp_path, name) as first, machine(nano, tmp_path, name) as second:
        await (await first.start("--new")).wait_for("joined")
        code = (await first.run("token"))[1].strip()
        node = await second.start("--code", code)
        joined = await node.wait_for("joined")
        assert joined["coordinator"] == first.nodes[0].id, "both are in one mesh"
        await asyncio.gather(*(m.nodes[0].wait_for("engine_ready") for m in (first, second)))
        exit_code, answer, talk = await second.run("run", "hello from the other machine")
        assert (exit_code, answer.strip()) == (0, "hello from the other machine"), talk


@needs_lan
async def test_a_seed_is_enough_where_multicast_is_blocked(lan: Lan, tmp_path: Path) -> None:
    name = a_name()
    hosts = [lan.host(host, f"10.77.2.{k}/24") for k, host in enumerate(("pi", "nano", "mac"), 1)]
    lan.drop_multicast()
    machines = [machine(host, tmp_path, name) for host in hosts]
    async with machines[0] as first, machines[1] as second, machines[2] as third:
        await (await first.start("--new", "--port", "8470")).wait_for("joined")
        code = (await first.run("token"))[1].strip()
        joining = [await m.start("--code", code, "--seed", "10.77.2.1:8470") for m in (second, third)]
        for node in joining:
            assert (await node.wait_for("joined"))["coordinator"] == first.nodes[0].id
        # The seed vouches for the others: when it dies, they know where to find each other.
        marks = {node: len(node.events) for node in joining}
        await first.nodes[0].kill()
        await asyncio.gather(*(node.wait_for("link_up", 20, after=mark) for node, mark in marks.items()))


@needs_lan
async def test_a_wrong_code_is_refused_with_a_message_that_says_so(lan: Lan, tmp_path: Path) -> None:
    name = a_name()
    pi, nano = lan.host("pi", "10.77.3.1/24"), lan.host("nano", "10.77.3.2/24")
    async with machine(pi, tmp_path / "a", name) as ours, machine(nano, tmp_path / "b", name) as stranger:
        await (await ours.start("--new")).wait_for("joined")
        other = machine(nano, tmp_path / "c", name)
        async with other:
            await (await other.start("--new")).wait_for("starting")
            wrong_code = (await other.run("token"))[1].strip()
            warned = await ours.nodes[0].wait_for("other_mesh")
            assert "--code" in warned["text"], "the operator is told what to do"
        node = await stranger.start("--code", wrong_code)
        with pytest.raises(UnreachableError) as refused:
            await node.wait_for("joined", 20)
        assert "code 3" in str(refused.value)
        assert "another" in str(refused.value) or "fingerprint" in str(refused.value)
        assert wrong_code not in str(refused.value), "a code is never repeated"

        seeded = await stranger.start("--code", wrong_code, "--seed", "10.77.3.1:8470", "--new")
        with pytest.raises(UnreachableError, match="--new"):
            await seeded.wait_for("joined", 20)


async def test_a_copied_state_directory_is_noticed_and_the_older_process_stops(tmp_path: Path) -> None:
    """Two SD cards from one image: the ids are equal, so the later start wins and the other says why."""
    async with local_mesh(tmp_path / "first", 1, model="echo") as original:
        copied = shutil.copytree(tmp_path / "first", tmp_path / "second")
        async with LocalMesh(copied, original.mesh, flags=("--model", "echo")) as clone:
            newer = await clone.start()
            started_at = time.monotonic()
            seen = await original.nodes[0].wait_for("superseded", 15)
            assert seen["monotonic_s"] - started_at < 10.0
            assert str(tmp_path / "first") in seen["text"], "the operator learns which directory to remove"
            await newer.wait_for("joined")
            assert newer.id == original.nodes[0].id and newer.is_running


async def test_a_node_that_leaves_hands_its_work_over_and_is_not_missed(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 3, model="echo") as mesh:
        marks = {node: len(node.events) for node in mesh.nodes[1:]}
        left = mesh.nodes[0]
        exit_code, _, talk = await mesh.run("leave", left.id)
        assert exit_code == 0, talk
        for node, mark in marks.items():
            gone = await node.wait_for(
                "member", 10, after=mark, where=lambda e: e["member"] == left.id and e["standing"] == "left"
            )
            assert gone
        assert await left.stop() == 0
        assert (await mesh.run("run", "still here"))[1].strip() == "still here"
        nodes = (await mesh.run("nodes", "--json"))[1]
        assert left.id not in nodes, "what it had retained is cleared"


async def test_nothing_a_node_logs_contains_the_code(tmp_path: Path) -> None:
    async with local_mesh(tmp_path, 2, model="echo") as mesh:
        code = (await mesh.run("token"))[1].strip()
        secret = code.split("-", 2)[2]
        await mesh.run("run", "hello")
        for node in mesh.nodes:
            assert secret not in node.tail and secret.upper() not in node.tail


@needs_lan
async def test_two_meshes_of_one_key_become_one_when_the_cable_is_plugged_in(
    lan: Lan, tmp_path: Path
) -> None:
    """Two brokers and two coordinators, born apart: one of each is left, and work goes on."""
    name = a_name()
    pi, nano = lan.host("pi", is_cabled=False), lan.host("nano", is_cabled=False)
    async with machine(pi, tmp_path, name) as first, machine(nano, tmp_path, name) as second:
        await (await first.start("--new")).wait_for("joined")
        code = (await first.run("token"))[1].strip()
        await (await second.start("--code", code)).wait_for("joined")
        nodes = [first.nodes[0], second.nodes[0]]
        assert all(any(e["event"] == "broker_hosted" for e in node.events) for node in nodes), "one each"
        marks = {node: len(node.events) for node in nodes}
        lan.plug(pi, "10.77.4.1/24")
        lan.plug(nano, "10.77.4.2/24")
        for node, other in (nodes, reversed(nodes)):
            await node.wait_for(
                "member", 20, after=marks[node],
                where=lambda e, other=other: e["member"] == other.id and e["standing"] == "alive",
            )  # fmt: skip
        stopped = [
            asyncio.create_task(node.wait_for("broker_stopping", 15, after=marks[node])) for node in nodes
        ]
        done, waiting = await asyncio.wait(stopped, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert len(done) == 1
        for machine_ in (first, second):
            exit_code, answer, talk = await machine_.run("run", "one mesh now")
            assert (exit_code, answer.strip()) == (0, "one mesh now"), talk
        _, out, _ = await first.run("nodes", "--json")
        assert out.count('"is_coordinator": true') == 1 and out.count('"online"') == 2


@needs_lan
async def test_a_network_with_ipv6_link_local_addresses_only_is_enough(lan: Lan, tmp_path: Path) -> None:
    name = a_name()
    pi, nano = lan.host("pi"), lan.host("nano")
    async with machine(pi, tmp_path, name) as first, machine(nano, tmp_path, name) as second:
        await (await first.start("--new")).wait_for("joined")
        code = (await first.run("token"))[1].strip()
        joined = await (await second.start("--code", code)).wait_for("joined")
        assert joined["coordinator"] == first.nodes[0].id
