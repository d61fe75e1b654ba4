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
from logging import getLogger

from mesh.brokers.contract import BrokerSettings, BrokerStartError, RunningBroker

__all__ = ["mosquitto_path", "start_broker"]

_log = getLogger(__name__)


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
