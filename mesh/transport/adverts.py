"""What a node tells the whole network of itself, as an mDNS TXT record, and how it is read.

Anybody on the network can read these records and forge them. So they hold nothing secret, and what is
read from them is only ever a place to ask.

    v protocol · mesh name · fp key fingerprint · boot, inc which life of the node
    be, bh, bp epoch, host and port of the broker it knows
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh.ids import Boot, MeshName, NodeId
from mesh.messages.checks import check_count, check_id
from mesh.messages.node import ADDRESSES_MAX
from mesh.wire import PROTOCOL

__all__ = ["TXT_BYTES_MAX", "TXT_READ_BYTES_MAX", "Advert", "Gone", "Sighting", "read_txt", "txt_of"]

log = logging.getLogger(__name__)

# RFC 6763 6.2 asks for 200 bytes where possible and 400 at most: with addresses it still fits one packet.
TXT_BYTES_MAX = 400
# What we read of others: a newer version may say more, a hostile one may say anything.
TXT_READ_BYTES_MAX = 1024

_FINGERPRINT = re.compile(r"[0-9a-f]{1,64}")
_NUMBER = re.compile(r"[0-9]{1,16}")  # 2**53 has 16 digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """What a node says of itself to the whole network, members or not."""

    mesh: MeshName
    fingerprint: str
    """Of the mesh key: tells meshes of one name apart."""
    node: NodeId
    boot: Boot
    incarnation: int
    port: int
    """Of the data plane."""
    addresses: tuple[str, ...] = ()
    """Empty in one's own advert: all local addresses, kept current by ``Discovery``."""
    broker_epoch: int = 0
    """0 = this node knows no broker yet."""
    broker_host: NodeId | None = None
    broker_port: int = 0

    def __post_init__(self) -> None:
        check_id("mesh", self.mesh)
        check_id("node", self.node)
        check_id("boot", self.boot)
        check_count("incarnation", self.incarnation)
        check_count("port", self.port, 65535, least=1)
        check_count("broker_epoch", self.broker_epoch)
        check_count("broker_port", self.broker_port, 65535)
        if self.broker_host is not None:
            check_id("broker_host", self.broker_host)
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise ValueError(f"fingerprint must be 1 to 64 hexadecimal digits, got {self.fingerprint[:80]!r}")
        if len(self.addresses) > ADDRESSES_MAX:
            raise ValueError(f"at most {ADDRESSES_MAX} addresses")


@dataclass(frozen=True, slots=True)
class Sighting:
    """Somebody announced this; not yet true. Ask at ``addresses`` before believing it."""

    advert: Advert
    addresses: tuple[str, ...]
    """IPv6 link-local ones carry the scope by which they were heard."""
    protocol: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Somebody said goodbye in this node's name, or its record ran out. A hint to ask it."""

    node: NodeId


def read_txt(
    node: str, port: int | None, addresses: Iterable[str], properties: Mapping[str, str | None]
) -> Sighting | None:
    """Read a service's records as a sighting; ``None`` if they are not one of ours. Never raises."""

    def number(key: str) -> int:
        text = properties.get(key) or ""
        if not _NUMBER.fullmatch(text):
            raise ValueError(f"{key} must be a number, got {text[:80]!r}")
        return int(text)

    try:
        protocol = number("v")
        advert = Advert(
            mesh=MeshName(properties.get("mesh") or ""),
            fingerprint=properties.get("fp") or "",
            node=NodeId(node),
            boot=Boot(properties.get("boot") or ""),
            incarnation=number("inc"),
            port=port or 0,
            addresses=tuple(addresses)[:ADDRESSES_MAX],
            broker_epoch=number("be"),
            broker_host=NodeId(properties["bh"] or "") if "bh" in properties else None,
            broker_port=number("bp"),
        )
    except ValueError as error:
        log.debug("not a sighting: %s", error)
        return None
    return Sighting(advert, advert.addresses, protocol)


def txt_of(advert: Advert) -> dict[str, str]:
    properties = {
        "v": str(PROTOCOL),
        "mesh": advert.mesh,
        "fp": advert.fingerprint,
        "boot": advert.boot,
        "inc": str(advert.incarnation),
        "be": str(advert.broker_epoch),
        "bp": str(advert.broker_port),
    }
    if advert.broker_host is not None:
        properties["bh"] = advert.broker_host
    n_bytes = sum(len(key) + len(text) + 2 for key, text in properties.items())
    assert n_bytes <= TXT_BYTES_MAX, f"a TXT record of {n_bytes} bytes: every field has a bound below"
    return properties
