"""A broker this node hosts: Mosquitto as a child process where it is installed, else amqtt in process.

Both keep the same promises, held by the same tests (``tests/integration/test_brokers.py``):

* the TLS listener admits members only, and the certificate's common name is the client's name;
* a client says and hears what the access list allows its name;
* the plain listener exists on 127.0.0.1 only, for clients without a name (``mosquitto_pub``, scripts);
* a client that hangs is dropped after 1.5 times its keepalive and its last will fires (Mosquitto 2.0 looks
  every 5 s, so up to 5 s later there: the mesh's own reports notice a death sooner);
* order within a topic, quality of service 0 and 1, retained messages, last wills, take-over;
* every queue is bounded, and nobody's bytes harm anybody else;
* the broker ends with this process, however this process ends.

Nothing else may be relied upon: sessions and retained messages die with the broker.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Literal, Protocol

from mesh.errors import ConfigError
from mesh.identity import Identity
from mesh.ids import MeshName

__all__ = [
    "INFLIGHT_MAX",
    "PACKET_BYTES_MAX",
    "QUEUED_BYTES_MAX",
    "QUEUED_MAX",
    "BrokerKind",
    "BrokerSettings",
    "BrokerStartError",
    "RunningBroker",
    "mosquitto_path",
    "start_broker",
]

_log = getLogger(__name__)

BrokerKind = Literal["mosquitto", "amqtt"]

# Mosquitto 2.1's own default: what passes here passes on a site's broker. Bulk bytes travel by mesh.streams.
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


async def start_broker(settings: BrokerSettings) -> RunningBroker:
    """Start the kind asked for; ``auto`` takes Mosquitto if it is installed *and* starts, else amqtt.

    Raises:
        BrokerStartError: The port is taken, the address is not ours, or Mosquitto is asked for and absent.
    """
    if settings.kind in ("auto", "mosquitto"):
        executable = mosquitto_path()
        if executable is not None:
            # Imported here: a node that hosts nothing must not pay for either broker.
            from mesh.brokers.mosquitto_broker import start_mosquitto

            try:
                return await start_mosquitto(settings, executable)
            except BrokerStartError as error:
                if settings.kind == "mosquitto":
                    raise
                _log.warning("broker_fallback kind=amqtt reason=%r", str(error))
        elif settings.kind == "mosquitto":
            raise BrokerStartError(
                "mosquitto is not installed: install it (apt install mosquitto) or use amqtt"
            )
    from mesh.brokers.amqtt_broker import start_amqtt

    return await start_amqtt(settings)


def mosquitto_path() -> str | None:
    """Where the ``mosquitto`` program is. Debian puts it in /usr/sbin, which users do not search."""
    return shutil.which("mosquitto") or shutil.which(
        "mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
    )
