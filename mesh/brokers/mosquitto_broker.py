"""Mosquitto as a child process: generated configuration, readiness by a real client, death with the parent.

The child must not outlive this process, not even after ``kill -9``. A shell starts a watcher that blocks on
a pipe whose other end only this process holds, then *becomes* Mosquitto: when this process is gone the
kernel closes the pipe, and the watcher ends the broker. (``PR_SET_PDEATHSIG`` would need code between fork
and exec, which is not safe in a process with threads; it also fires when the forking *thread* ends, and
exists on Linux only.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import signal
import socket
from collections import deque
from collections.abc import Coroutine
from logging import DEBUG, ERROR, INFO, getLogger
from pathlib import Path
from typing import Any

from mesh.brokers.access import AccessList, anonymous_lines
from mesh.brokers.contract import (
    CLIENTS_MAX,
    INFLIGHT_MAX,
    PACKET_BYTES_MAX,
    QUEUED_BYTES_MAX,
    QUEUED_MAX,
    BrokerKind,
    BrokerSettings,
    BrokerStartError,
)
from mesh.brokers.probe import accepts_clients

__all__ = ["start_mosquitto"]

_log = getLogger(__name__)

# The watcher keeps only the pipe: were it to hold stderr, we would not see Mosquitto's end. For why it does
# not ask politely, see ``MosquittoBroker.stop``.
_SHELL = """
exec 3<&0 </dev/null
(exec >/dev/null 2>&1; read -r _ <&3; kill -KILL $$) &
exec 3<&-
exec "$1" -c "$2"
"""

# A busy mesh needs 10 to 30 MB. Mosquitto has no bound on retained topics, and whoever may cancel a task may
# have as many kept as there are names: the device must survive that, if need be without its broker.
_MEMORY_BYTES_MAX = 256 * 1024 * 1024

_START_TIMEOUT_S = 10.0  # 20 ms on a laptop; a Raspberry Pi 3 under load took a second
_PROBE_S = 2.0
_PORT_TRIES = 8  # another process may take a free port between our look and Mosquitto's bind
_LOG_LINES_KEPT = 20  # for the reason of a death; the rest is in the log


async def start_mosquitto(settings: BrokerSettings, executable: str) -> MosquittoBroker:
    """Start Mosquitto and return once it accepted a client of this mesh.

    Raises:
        BrokerStartError: With Mosquitto's own last words.
    """
    AccessList(settings.access_list)  # Mosquitto reports a bad line by a number in a file nobody wrote
    for chance in range(_PORT_TRIES):
        port, plain_port = _pick_ports(settings)
        broker = MosquittoBroker(settings, port, plain_port)
        try:
            await broker._start(executable)
        except BrokerStartError as error:
            may_retry = settings.port == 0 or settings.plain_port == 0
            if not (
                may_retry and chance + 1 < _PORT_TRIES and "address already in use" in str(error).lower()
            ):
                raise
        else:
            return broker
    raise AssertionError("the last try either returned or raised")


class MosquittoBroker:
    """One child process. Made by ``start_mosquitto``."""

    kind: BrokerKind = "mosquitto"

    def __init__(self, settings: BrokerSettings, port: int, plain_port: int | None) -> None:
        self.port = port
        self.plain_port = plain_port
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._last_words: deque[str] = deque(maxlen=_LOG_LINES_KEPT)
        self._watch: asyncio.Task[None] | None = None
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stopping = False

    @property
    def pid(self) -> int:
        """Of the Mosquitto process itself."""
        assert self._process is not None, "not started"
        return self._process.pid

    async def died(self) -> str:
        return await asyncio.shield(self._death)

    async def stop(self) -> None:
        self._stopping = True
        if self._process is None or self._watch is None:
            return
        # Killed, because asked politely Mosquitto publishes every client's last will before it goes, and
        # each node would hear that all others died. It keeps nothing on disk that could suffer.
        if self._process.returncode is None:
            self._kill_group()
        await asyncio.shield(self._watch)

    async def _start(self, executable: str) -> None:
        directory = self._settings.directory
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            config = _write_files(self._settings, self.port, self.plain_port)
            self._process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _SHELL, "edgemesh-broker", executable, str(config)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours to handle; and one group to end with its watcher
            )
        except OSError as error:
            raise BrokerStartError(f"cannot start mosquitto in {directory}: {error}") from error
        self._watch = asyncio.create_task(self._watch_process(self._process), name="mosquitto.watch")
        try:
            await self._until_ready()
        except BaseException:
            await self.stop()
            raise

    async def _until_ready(self) -> None:
        context = self._settings.identity.client_context()
        host = _reachable(self._settings.addresses[0])
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                pause_s = 0.005
                while not await self._answers_or_dies(accepts_clients(host, self.port, context, _PROBE_S)):
                    # Polling: Mosquitto has no other way to say that it listens. A death ends the pause.
                    await asyncio.wait([self._death], timeout=pause_s)
                    pause_s = min(0.2, pause_s * 2)
        except TimeoutError:
            raise BrokerStartError(
                f"mosquitto accepted no client at {host}:{self.port} within {_START_TIMEOUT_S:.0f} s: "
                f"{self._reason(None)}"
            ) from None

    async def _answers_or_dies(self, asking: Coroutine[None, None, bool]) -> bool:
        """The answer, unless Mosquitto dies first: whoever has the port then may keep us waiting."""
        probe = asyncio.create_task(asking, name="mosquitto.probe")
        try:
            either: list[asyncio.Future[Any]] = [probe, self._death]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                raise BrokerStartError(f"mosquitto did not start: {self._death.result()}")
            return probe.result()
        finally:
            probe.cancel()

    async def _watch_process(self, process: asyncio.subprocess.Process) -> None:
        """Forward the log until Mosquitto ends; then say why, and end its watcher."""
        assert process.stderr is not None
        # A line over the reader's 64 KiB would raise ValueError; Mosquitto cuts its own at 1 KiB.
        async for raw in process.stderr:
            line = raw.decode(errors="replace").strip()
            if line:
                self._last_words.append(line)
                _log.log(_level(line), "mosquitto %s", line)
        code = await process.wait()
        if not self._stopping:
            self._kill_group()  # the watcher is left
            self._death.set_result(self._reason(code))

    def _kill_group(self) -> None:
        """End what is left of the group. The watcher keeps the group's number from being used again."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reason(self, code: int | None) -> str:
        words = [line for line in self._last_words if _level(line) == ERROR] or list(self._last_words)[-1:]
        ending = (
            "" if code is None else f"ended by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        )
        return "; ".join([*([ending] if ending else []), *words]) or "no output"


def _write_files(settings: BrokerSettings, port: int, plain_port: int | None) -> Path:
    directory = settings.directory
    members, strangers = directory / "members.acl", directory / "strangers.acl"
    passwords = directory / "nobody.passwd"
    _write(members, settings.access_list)
    _write(strangers, anonymous_lines(settings.access_list))
    _write(passwords, "")
    identity = settings.identity
    lines = [
        "per_listener_settings true",
        # As root it would turn into the user "mosquitto", who may not read this node's files.
        f"user {pwd.getpwuid(os.geteuid()).pw_name}",
        "persistence false",
        "log_dest stderr",
        "log_timestamp false",
        *(f"log_type {kind}" for kind in ("error", "warning", "notice")),
        "connection_messages false",
        "sys_interval 0",
        "set_tcp_nodelay true",
        f"memory_limit {_MEMORY_BYTES_MAX}",
        f"max_packet_size {PACKET_BYTES_MAX}",
        f"max_queued_messages {QUEUED_MAX}",
        f"max_queued_bytes {QUEUED_BYTES_MAX}",
        f"max_inflight_messages {INFLIGHT_MAX}",
    ]
    for address in settings.addresses:
        lines += [
            f"listener {port} {address}",
            f"max_connections {CLIENTS_MAX}",
            "allow_zero_length_clientid true",
            "allow_anonymous false",
            f"cafile {identity.ca_path}",
            f"certfile {identity.cert_path}",
            f"keyfile {identity.key_path}",
            "tls_version tlsv1.2",  # the lowest accepted
            "require_certificate true",
            "use_identity_as_username true",
            f"acl_file {members}",
        ]
    if plain_port is not None:
        lines += [
            f"listener {plain_port} 127.0.0.1",
            f"max_connections {CLIENTS_MAX}",
            "allow_zero_length_clientid true",
            "allow_anonymous true",
            # Without a password file Mosquitto believes any name a client gives, with that name's rights.
            f"password_file {passwords}",
            f"acl_file {strangers}",
        ]
    config = directory / "mosquitto.conf"
    _write(config, "\n".join(["# Written by edgemesh at every start; changes are lost.", *lines, ""]))
    return config


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def _pick_ports(settings: BrokerSettings) -> tuple[int, int | None]:
    port = _free_port(settings.addresses, settings.port)
    if settings.plain_port is None:
        return port, None
    for _ in range(_PORT_TRIES):
        plain_port = _free_port(("127.0.0.1",), settings.plain_port)
        if plain_port != port:
            return port, plain_port
    raise BrokerStartError(
        f"port {port} cannot be both the TLS and the plain port: choose another --plain-port"
    )


def _free_port(addresses: tuple[str, ...], wanted: int) -> int:
    """A port that is free on every address now. The caller tries again if it is not any more."""
    for _ in range(_PORT_TRIES):
        with contextlib.ExitStack() as held:
            port = wanted
            try:
                for address in addresses:
                    family = socket.AF_INET6 if ":" in address else socket.AF_INET
                    probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Mosquitto does
                    if family == socket.AF_INET6:
                        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind((address, port))
                    probe.listen(1)  # two sockets may be bound with SO_REUSEADDR, but only one may listen
                    port = int(probe.getsockname()[1])
                return port
            except OSError as error:
                last = error
        if wanted:
            break
    raise BrokerStartError(
        f"cannot listen on {', '.join(addresses)} port {wanted or 'any'}: {last.strerror or last}"
    ) from last


def _reachable(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def _level(line: str) -> int:
    if re.match(r"error|unable|failed", line, re.IGNORECASE):
        return ERROR
    # Both are meant so: the list is the mesh's own, and whoever runs the node as root has decided that.
    expected = "does not contain '%c' or '%u'" in line or "should not be run as root" in line
    return INFO if line.startswith("Warning") and not expected else DEBUG


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
