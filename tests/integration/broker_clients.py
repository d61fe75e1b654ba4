"""Clients of a hosted broker for its tests: members, strangers, the hung and the clumsy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import psutil
import pytest

from mesh.broker import mosquitto_path
from mesh.brokers.contract import (
    BrokerKind,
    BrokerSettings,
    RunningBroker,
)
from mesh.ids import MeshName
from mesh.transport.identity import Identity, MeshKey, issue

KEY = MeshKey(MeshName("home"), bytes(range(32)))
STRANGE_KEY = MeshKey(MeshName("home"), bytes(32))
ROOT = "edgemesh/home"
ACCESS = f"""
topic read {ROOT}/node/+/state
topic read {ROOT}/task/#
topic write {ROOT}/task/submit
pattern write {ROOT}/node/%u/#
pattern read {ROOT}/node/+/to/%u
pattern read {ROOT}/node/+/state
pattern readwrite {ROOT}/coordinator
pattern readwrite {ROOT}/task/#
"""
CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
SOON_S = 5.0  # nothing here takes longer on a loaded machine; what is awaited usually takes milliseconds
QUIET_S = 0.3  # how long a message that must not come is waited for, after one that must come has come

AT_ONCE = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)  # paho leaves it off, which costs 40 ms a message

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
KINDS = [pytest.param("mosquitto", marks=needs_mosquitto), "amqtt"]


def settings(kind: BrokerKind, tmp_path: Path, **changes: Any) -> BrokerSettings:
    given: dict[str, Any] = {
        "mesh": KEY.name,
        "identity": issue(KEY, "host", tmp_path / "host"),
        "access_list": ACCESS,
        "directory": tmp_path / "broker",
        "addresses": ("127.0.0.1",),
        "plain_port": 0,
        "kind": kind,
    }
    return BrokerSettings(**(given | changes))


@asynccontextmanager
async def node(
    broker: RunningBroker, tmp_path: Path, name: str, *, key: MeshKey = KEY, **more: Any
) -> AsyncIterator[aiomqtt.Client]:
    """A member: its name is in its certificate, whatever it calls itself."""
    identity = issue(key, name, tmp_path / f"client-{key.fingerprint}")
    async with member(broker, identity, identifier=more.pop("identifier", name), **more) as client:
        yield client


@asynccontextmanager
async def member(broker: RunningBroker, identity: Identity, **more: Any) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(
        "127.0.0.1",
        broker.port,
        tls_context=identity.client_context(),
        tls_insecure=True,
        socket_options=AT_ONCE,
        **{"timeout": SOON_S, **more},
    ) as client:
        yield client


@asynccontextmanager
async def anonymous(broker: RunningBroker, **more: Any) -> AsyncIterator[aiomqtt.Client]:
    assert broker.plain_port is not None
    async with aiomqtt.Client("127.0.0.1", broker.plain_port, timeout=SOON_S, **more) as client:
        yield client


async def heard(client: aiomqtt.Client, within_s: float = SOON_S) -> tuple[str, bytes, bool]:
    """Topic, payload and retain flag of the next message."""
    async with asyncio.timeout(within_s):
        async for message in client.messages:
            return str(message.topic), bytes(message.payload), bool(message.retain)
    raise AssertionError("the connection ended")


async def nothing_heard(client: aiomqtt.Client) -> None:
    with contextlib.suppress(TimeoutError):
        pytest.fail(f"heard {await heard(client, QUIET_S)}")


CLIENT = """
import sys, threading
import paho.mqtt.client as mqtt
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from mesh.transport.identity import Identity
pair = Path(sys.argv[2])
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="a")
client.tls_set_context(Identity("a", pair.parent / "ca.pem", pair, pair).client_context())
client.will_set("edgemesh/home/node/a/state", "gone", qos=1, retain=True)
client.on_connect = lambda *_: print("ready", flush=True)
client.connect("127.0.0.1", int(sys.argv[1]), keepalive=int(sys.argv[3]))
client.loop_forever()
"""


async def spawn_client(
    broker: RunningBroker, tmp_path: Path, name: str, keepalive_s: int
) -> asyncio.subprocess.Process:
    """A client in a process of its own, which may be killed or stopped."""
    pair = issue(KEY, name, tmp_path / "spawned").cert_path
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, str(broker.port), str(pair), str(keepalive_s), os.getcwd()),
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    async with asyncio.timeout(3 * SOON_S):
        assert await client.stdout.readline() == b"ready\n"
    return client


def cut(client: aiomqtt.Client) -> None:
    """End the connection as a pulled cable would, without goodbye."""
    sock = client._client.socket()
    assert sock is not None
    sock.shutdown(2)


async def greeted(port: int, context: ssl.SSLContext) -> bool:
    """Whether the broker answers a CONNECT; with TLS 1.3 a refused client learns it only then."""
    try:
        async with asyncio.timeout(SOON_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.write(CONNECT)
            answer = await reader.read(4)
            writer.transport.abort()
            return answer == b"\x20\x02\x00\x00"
    except OSError:
        return False


async def deaf_subscriber(
    broker: RunningBroker, filter_: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Subscribes at quality of service 1 as client "deaf", then neither reads nor acknowledges."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.plain_port, limit=1024)
    body = b"\x00\x01" + len(filter_).to_bytes(2, "big") + filter_.encode() + b"\x01"
    writer.write(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04deaf\x82" + bytes((len(body),)) + body)
    async with asyncio.timeout(SOON_S):
        assert await reader.readexactly(9) == b"\x20\x02\x00\x00\x90\x03\x00\x01\x01"
    return reader, writer


def handler_of(broker: RunningBroker, client_id: str) -> Any:
    return broker._router._sessions[client_id][1]  # type: ignore[attr-defined]


def a_context(tmp_path: Path) -> ssl.SSLContext:
    return issue(KEY, "somebody", tmp_path / "somebody").client_context()


def processes_of(pid: int) -> list[psutil.Process]:
    group = os.getpgid(pid)
    return [process for process in everybody() if in_group(process, group)]


def everybody() -> Iterator[psutil.Process]:
    yield from psutil.process_iter()


def in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False


async def until_gone(family: list[psutil.Process]) -> None:
    await until(lambda: not any(alive(process) for process in family))


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event: the end of somebody else's process."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
