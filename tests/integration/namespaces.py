"""A switch and hosts on it, as network namespaces: real interfaces, real multicast, no way out.

    with Lan() as lan:
        pi = lan.host("pi", "10.77.0.1/24")
        process = pi.start([sys.executable, "-m", ...])

Needs root and iproute2; ``why_not()`` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from itertools import count
from types import TracebackType
from typing import Self

_SERIAL = count(1)


def why_not() -> str | None:
    """Why no namespaces can be made here, or ``None`` if they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    probe = f"em{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip() or 'not permitted'}"
    try:
        bridge = ["ip", "-n", probe, "link", "add", "br0", "type", "bridge"]
        return None if subprocess.run(bridge, capture_output=True).returncode == 0 else "no bridges"
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False)


class Host:
    """One namespace with a loopback and, unless ``is_cabled`` is false, ``eth0`` on the switch."""

    def __init__(self, lan: Lan, name: str) -> None:
        self.lan = lan
        self.name = name
        self.namespace = f"{lan.prefix}-{name}"
        self.processes: list[subprocess.Popen[str]] = []

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, *words], check=True, capture_output=True, text=True)

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """Run a command on this host; it is killed with the LAN at the latest."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.processes.append(process)
        return process


class Lan:
    """A bridge in a namespace of its own, so the machine's own network is not touched."""

    def __init__(self) -> None:
        self.prefix = f"em{os.getpid()}x{next(_SERIAL)}"
        self._switch = f"{self.prefix}-switch"
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        _run("ip", "netns", "add", self._switch)
        # With snooping the bridge would first learn who listens; a plain switch floods.
        words = ["link", "add", "br0", "up", "type", "bridge", "mcast_snooping", "0"]
        _run("ip", "-n", self._switch, *words)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._hosts.values():
            for process in host.processes:
                process.kill()
                process.communicate()
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", host.namespace)
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "netns", "del", self._switch)

    def host(
        self, name: str, address: str | None = None, *, is_cabled: bool = True, has_loopback: bool = True
    ) -> Host:
        """A new host. ``address=None`` leaves it with IPv6 link-local only."""
        host = self._hosts[name] = Host(self, name)
        _run("ip", "netns", "add", host.namespace)
        # Duplicate address detection would make every test wait two seconds.
        host_conf = "/proc/sys/net/ipv6/conf/default/accept_dad"
        _run("ip", "netns", "exec", host.namespace, "sh", "-c", f"echo 0 > {host_conf}")
        if has_loopback:
            host.ip("link", "set", "lo", "up")
        if is_cabled:
            self.plug(host, address)
        return host

    def plug(self, host: Host, address: str | None = None) -> None:
        """Give the host its ``eth0``, connected and up."""
        veth = f"link add eth0 netns {host.namespace} type veth peer name p-{host.name} netns {self._switch}"
        _run("ip", *veth.split())
        _run("ip", "-n", self._switch, "link", "set", f"p-{host.name}", "master", "br0", "up")
        if address is not None:
            host.ip("address", "add", address, "dev", "eth0")
        host.ip("link", "set", "eth0", "up")

    def drop_multicast(self) -> None:
        """What many Wi-Fi access points do: only unicast and broadcast reach the other stations."""
        for name in self._hosts:
            _run("bridge", "-n", self._switch, "link", "set", "dev", f"p-{name}", "mcast_flood", "off")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
