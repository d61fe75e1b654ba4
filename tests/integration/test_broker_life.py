"""How a hosted broker starts, stops and dies; and the example for a site's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import signal
import socket
import sys
from pathlib import Path

import aiomqtt
import pytest

from mesh.broker import mosquitto_path, start_broker
from mesh.brokers import mosquitto_broker
from mesh.brokers.access import AccessList, anonymous_lines
from mesh.brokers.contract import (
    BrokerKind,
    BrokerStartError,
    RunningBroker,
)
from mesh.brokers.probe import accepts_clients
from mesh.errors import ConfigError
from mesh.ids import MeshName
from mesh.topics import access_list
from mesh.transport.identity import issue
from tests.integration.broker_clients import (
    KEY,
    ROOT,
    SOON_S,
    a_context,
    needs_mosquitto,
    node,
    nothing_heard,
    processes_of,
    settings,
    spawn_client,
    until_gone,
)

# -- start and stop


async def test_stopping_frees_the_ports_and_ends_the_clients(kind: BrokerKind, tmp_path: Path) -> None:
    first = await start_broker(settings(kind, tmp_path))
    _reader, writer = await asyncio.open_connection("127.0.0.1", first.port, ssl=a_context(tmp_path))
    before = asyncio.all_tasks()
    await first.stop()
    await first.stop()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", first.port)
    writer.transport.abort()
    again = await start_broker(settings(kind, tmp_path, port=first.port, plain_port=first.plain_port))
    assert (again.port, again.plain_port) == (first.port, first.plain_port)
    await again.stop()
    leaked = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not leaked


async def test_a_stop_fires_no_wills(kind: BrokerKind, tmp_path: Path) -> None:
    """Who still hears something must not hear that the others died: they will be at the next broker."""
    running = await start_broker(settings(kind, tmp_path))
    with contextlib.suppress(aiomqtt.MqttError):
        async with node(running, tmp_path, "b") as b:
            await b.subscribe(f"{ROOT}/node/+/state", qos=1)
            client = await spawn_client(running, tmp_path, "a", keepalive_s=30)
            await running.stop()
            try:
                await nothing_heard(b)
            finally:
                client.kill()
                await client.wait()


async def test_a_taken_port_is_said_at_once(kind: BrokerKind, broker: RunningBroker, tmp_path: Path) -> None:
    with pytest.raises(BrokerStartError, match=r"cannot listen on 127\.0\.0\.1 port"):
        await start_broker(settings(kind, tmp_path / "second", port=broker.port))


async def test_several_addresses_share_one_port(kind: BrokerKind, tmp_path: Path) -> None:
    running = await start_broker(settings(kind, tmp_path, addresses=("127.0.0.1", "127.0.0.2")))
    try:
        for address in ("127.0.0.1", "127.0.0.2"):
            _reader, writer = await asyncio.open_connection(address, running.port, ssl=a_context(tmp_path))
            writer.transport.abort()
    finally:
        await running.stop()


async def test_without_a_plain_port_there_is_none(kind: BrokerKind, tmp_path: Path) -> None:
    running = await start_broker(settings(kind, tmp_path, plain_port=None))
    assert running.plain_port is None
    await running.stop()


async def test_a_bad_access_list_is_refused_with_its_line(kind: BrokerKind, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: 'topics read x'"):
        await start_broker(settings(kind, tmp_path, access_list="topic read a\ntopics read x\n"))


async def test_a_node_that_hosts_nothing_loads_no_broker() -> None:
    loaded = "import sys, mesh.broker; sys.exit('amqtt' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", loaded)
    async with asyncio.timeout(3 * SOON_S):
        assert await process.wait() == 0


@needs_mosquitto
async def test_auto_takes_mosquitto_where_it_is_and_amqtt_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_broker(settings("auto", tmp_path))  # type: ignore[arg-type]
    assert running.kind == "mosquitto"
    await running.stop()
    monkeypatch.setattr("mesh.broker.mosquitto_path", lambda: None)
    running = await start_broker(settings("auto", tmp_path))  # type: ignore[arg-type]
    assert running.kind == "amqtt"
    await running.stop()
    with pytest.raises(BrokerStartError, match="not installed"):
        await start_broker(settings("mosquitto", tmp_path))


async def test_auto_falls_back_if_mosquitto_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "mosquitto"
    broken.write_text("#!/bin/sh\necho Error: this is no broker >&2\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr("mesh.broker.mosquitto_path", lambda: str(broken))
    with pytest.raises(BrokerStartError, match="exit code 3; Error: this is no broker"):
        await start_broker(settings("mosquitto", tmp_path))
    running = await start_broker(settings("auto", tmp_path))  # type: ignore[arg-type]
    assert running.kind == "amqtt"
    await running.stop()


@needs_mosquitto
async def test_a_free_port_that_is_snatched_away_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        taken = thief.getsockname()[1]
        answers = iter([taken, taken + 1])
        looked = mosquitto_broker._free_port
        monkeypatch.setattr(
            mosquitto_broker,
            "_free_port",
            lambda addresses, wanted: next(answers, 0) or looked(addresses, wanted),
        )
        running = await start_broker(settings("mosquitto", tmp_path))
        assert running.port not in (0, taken)
        await running.stop()


@needs_mosquitto
async def test_the_death_of_mosquitto_is_told_with_its_reason(tmp_path: Path) -> None:
    running = await start_broker(settings("mosquitto", tmp_path))
    family = processes_of(running.pid)  # type: ignore[attr-defined]
    os.kill(running.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    async with asyncio.timeout(SOON_S):
        assert "SIGKILL" in await running.died()
    await running.stop()
    await until_gone(family)


@needs_mosquitto
async def test_mosquitto_dies_with_its_parent_even_by_kill_9(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOST, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(3 * SOON_S):
        family = processes_of(int(await parent.stdout.readline()))
    assert len(family) >= 2, "Mosquitto and its watcher"
    parent.kill()
    await parent.wait()
    await until_gone(family)


HOST = """
import asyncio, sys
from pathlib import Path
from tests.integration.test_brokers import settings, start_broker
async def main():
    broker = await start_broker(settings("mosquitto", Path(sys.argv[1])))
    print(broker.pid, flush=True)
    await broker.died()
asyncio.run(main())
"""


# -- the example for a site's own broker


DEPLOY = Path(__file__).parents[2] / "deploy" / "mosquitto"


def test_the_access_lists_for_a_site_are_those_of_the_topic_table() -> None:
    """If this fails, a row of ``mesh.topics`` changed: put the lines it prints into deploy/mosquitto."""

    def rules(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    current = access_list(MeshName("home"))
    assert rules((DEPLOY / "members.acl").read_text()) == rules(current)
    assert rules((DEPLOY / "strangers.acl").read_text()) == rules(anonymous_lines(current))
    AccessList(current)


@needs_mosquitto
async def test_mosquitto_serves_a_mesh_with_the_example_for_a_site(tmp_path: Path) -> None:
    there = tmp_path / "there"
    issue(KEY, "broker", there)
    for name in ("members.acl", "strangers.acl"):
        (there / name).write_text((DEPLOY / name).read_text())
    (there / "nobody.passwd").write_text("")
    ports = free_ports(2)
    text = (DEPLOY / "edgemesh.conf").read_text().replace("/etc/mosquitto/edgemesh", str(there))
    text = re.sub(r"(?m)^# (?=listener|allow_|password_file|acl_file)", "", text)
    text = text.replace("listener 8883", f"listener {ports[0]} 127.0.0.1").replace("1883", str(ports[1]))
    config = tmp_path / "site.conf"
    config.write_text(f"user {pwd.getpwuid(os.geteuid()).pw_name}\n{text}")
    process = await asyncio.create_subprocess_exec(
        *(str(mosquitto_path()), "-c", str(config)), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        for port, context in ((ports[0], a_context(tmp_path)), (ports[1], None)):
            async with asyncio.timeout(SOON_S):
                while not await accepts_clients("127.0.0.1", port, context, SOON_S):
                    assert process.returncode is None, "the example does not start"
                    await asyncio.sleep(0.01)
        with pytest.raises(aiomqtt.MqttError):
            async with aiomqtt.Client("127.0.0.1", ports[1], username="a", timeout=SOON_S):
                pytest.fail("a name that is only said was believed")
    finally:
        process.kill()
        await process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
