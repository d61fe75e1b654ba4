"""Which of this machine's addresses other devices could use.

A laptop shows ten addresses and one of them works: container bridges, tunnels and cables that are not
plugged in look like networks. We leave out those that never lead to another device, advertise all the
others, and let the receiver find out by asking (``mesh.transport.streams.PeerClient.probe``).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import ifaddr

from mesh.messages.node import ADDRESSES_MAX

__all__ = ["LOOPBACK", "Interface", "chosen_interfaces", "local_addresses", "missing_names"]

LOOPBACK = "127.0.0.1"

# Bridges and cables of containers and virtual machines, and tunnels: the addresses behind them are the
# same on every machine (172.17.0.1) or lead to no neighbour. Naming one in ``interfaces`` brings it back.
_SKIPPED = (
    "docker*", "veth*", "br-*", "tun*", "utun*", "virbr*", "podman*", "cni*", "lxcbr*", "lxdbr*", "ifb*",
    "lo", "lo0",
)  # fmt: skip

_LINUX_SIOCGIFFLAGS = 0x8913  # netdevice(7)
_IFF_UP, _IFF_RUNNING = 0x1, 0x40


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface that is up, with the addresses other devices may try."""

    name: str
    index: int | None
    """The kernel's number for it; scopes IPv6 link-local addresses."""
    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...]
    """Link-local ones carry their scope (``fe80::1%2``), which means something on this machine only."""


def chosen_interfaces(named: Sequence[str] | None = None) -> tuple[Interface, ...]:
    """Interfaces to speak on: the ``named`` ones (names or addresses), else all real ones.

    Cost: one ``getifaddrs`` call, about 0.4 ms. Empty if there is no network at all.
    """
    chosen = []
    for interface in _all_interfaces():
        if named is None:
            if not any(fnmatchcase(interface.name, pattern) for pattern in _SKIPPED):
                chosen.append(interface)
        elif interface.name in named:
            chosen.append(interface)
        else:
            ipv4 = tuple(address for address in interface.ipv4 if address in named)
            ipv6 = tuple(address for address in interface.ipv6 if _without_scope(address) in named)
            if ipv4 or ipv6:
                chosen.append(Interface(interface.name, interface.index, ipv4, ipv6))
    return tuple(chosen)


def local_addresses(named: Sequence[str] | None = None, *, link_local: bool = True) -> tuple[str, ...]:
    """Addresses to listen on and to tell others; loopback alone if there is no other.

    The likeliest to work come first: IPv4, then global IPv6, then IPv6 link-local. ``link_local=False``
    leaves the latter out: their scope means nothing to another machine.
    """
    interfaces = chosen_interfaces(named)
    ipv4 = [address for interface in interfaces for address in interface.ipv4]
    ipv6 = [address for interface in interfaces for address in interface.ipv6]
    wide = [address for address in ipv6 if "%" not in address]
    narrow = [address for address in ipv6 if "%" in address] if link_local else []
    return tuple(dict.fromkeys([*ipv4, *wide, *narrow]))[:ADDRESSES_MAX] or (LOOPBACK,)


def missing_names(named: Sequence[str] | None) -> tuple[str, ...]:
    """Those of ``named`` that no interface has now: a typo, or a network that is not up yet."""
    here = {interface.name for interface in _all_interfaces()}
    here |= {_without_scope(address) for i in _all_interfaces() for address in (*i.ipv4, *i.ipv6)}
    return tuple(name for name in named or () if name not in here)


def _all_interfaces() -> list[Interface]:
    found = []
    for adapter in ifaddr.get_adapters():
        name = str(adapter.nice_name)
        if not _is_running(name):
            continue
        ipv4, ipv6 = [], []
        for ip in adapter.ips:
            if isinstance(ip.ip, str):
                ipv4.append(ip.ip)
                continue
            address = ipaddress.IPv6Address(ip.ip[0].split("%")[0])
            if address.is_link_local:
                ipv6.append(f"{address}%{adapter.index}")
            elif not address.is_loopback:  # 127.0.0.1 is enough of a loopback
                ipv6.append(str(address))
        if ipv4 or ipv6:
            found.append(Interface(name, adapter.index, tuple(ipv4), tuple(ipv6)))
    return found


def _is_running(name: str) -> bool:
    """Whether the interface is up and its cable or radio link is there; other systems list only such."""
    if sys.platform != "linux":
        return True
    import fcntl  # not on Windows

    request = struct.pack("16sH14x", name.encode()[:15], 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            flags = struct.unpack_from("16sH", fcntl.ioctl(control, _LINUX_SIOCGIFFLAGS, request))[1]
        except OSError:  # it went away between the two calls
            return False
    return bool(flags & _IFF_UP and flags & _IFF_RUNNING)


def _without_scope(address: str) -> str:
    return address.partition("%")[0]
