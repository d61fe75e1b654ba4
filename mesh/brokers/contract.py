"""What every kind of hosted broker is: its settings, its bounds, and how it is handled while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mesh.errors import ConfigError
from mesh.ids import MeshName
from mesh.transport.identity import Identity

__all__ = [
    "CLIENTS_MAX",
    "INFLIGHT_MAX",
    "PACKET_BYTES_MAX",
    "QUEUED_BYTES_MAX",
    "QUEUED_MAX",
    "BrokerKind",
    "BrokerSettings",
    "BrokerStartError",
    "RunningBroker",
]

BrokerKind = Literal["mosquitto", "amqtt"]

# Mosquitto 2.1's own default: what passes here passes on a site's broker. Bulk bytes do not travel by broker.
PACKET_BYTES_MAX = 2_000_000
# Per client, not yet sent: Mosquitto's default count. At 1 KB a message it is a second of a busy mesh.
QUEUED_MAX = 1000
# Per client as well; a thousand packets of the largest size would be 2 GB on a Raspberry Pi.
QUEUED_BYTES_MAX = 16 * 1024 * 1024
# Sent and not acknowledged, per client; Mosquitto's default.
INFLIGHT_MAX = 20
CLIENTS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """What a hosted broker needs to know."""

    mesh: MeshName
    identity: Identity
    """This node's; clients see it as the broker's certificate."""
    access_list: str
    """Mosquitto's format. ``topic`` lines before the first ``user`` are all the plain listener offers."""
    directory: Path
    """For the generated configuration; made if absent."""
    addresses: tuple[str, ...] = ("0.0.0.0",)
    """Where the TLS listener binds, all on the same port."""
    port: int = 0
    """0: a free one."""
    plain_port: int | None = None
    """Listener on 127.0.0.1 without TLS for anonymous clients; 0: a free one, ``None``: none."""
    kind: Literal["auto", "mosquitto", "amqtt"] = "auto"

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ValueError("a broker needs at least one address to listen on")


class BrokerStartError(ConfigError):
    """The broker could not start here, and trying again the same way would not help."""


class RunningBroker(Protocol):
    """A broker that accepted a client of this mesh before ``start_broker`` returned."""

    @property
    def kind(self) -> BrokerKind: ...

    @property
    def port(self) -> int:
        """Of the TLS listener."""

    @property
    def plain_port(self) -> int | None:
        """Of the listener on 127.0.0.1, if there is one."""

    async def stop(self) -> None:
        """Close all connections and free the ports. May be called twice."""

    async def died(self) -> str:
        """Return the reason if the broker ends by itself; wait for ever if it is stopped."""
