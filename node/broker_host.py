"""Runs the mesh's broker on this node while ``mesh.agreement.hosting`` wants one here."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import replace

from mesh.broker import start_broker
from mesh.brokers.contract import BrokerSettings, RunningBroker
from mesh.core import Fact
from mesh.errors import EdgemeshError
from mesh.facts import BrokerFailed, BrokerHosted, BrokerRef
from mesh.ids import NodeId
from node.logs import say

__all__ = ["BrokerHost"]

log = logging.getLogger(__name__)

MQTT_PORT = 1883  # what mosquitto_pub uses unless told otherwise


class BrokerHost:
    """At most one broker at a time. ``learn`` receives ``BrokerHosted`` and ``BrokerFailed``.

    Args:
        settings: What to start.
        listen: The addresses to listen on, asked at every start.
        advertised: The addresses peers reach this node by.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        settings: BrokerSettings,
        listen: Callable[[], tuple[str, ...]],
        advertised: Callable[[], tuple[str, ...]],
        learn: Callable[[Fact], None],
    ) -> None:
        self._me = me
        self._settings = settings
        self._listen = listen
        self._advertised = advertised
        self._learn = learn
        self._broker: RunningBroker | None = None
        self._epochs: asyncio.Queue[int | None] = asyncio.Queue()

    @property
    def plain_port(self) -> int | None:
        """The unencrypted loopback port while a broker runs here."""
        return self._broker.plain_port if self._broker is not None else None

    def start(self, epoch: int) -> None:
        self._epochs.put_nowait(epoch)

    def stop(self) -> None:
        self._epochs.put_nowait(None)

    async def run(self) -> None:
        """Start and stop as told, until cancelled; the broker is stopped on the way out."""
        try:
            async with asyncio.TaskGroup() as group:
                watch: asyncio.Task[None] | None = None
                while True:
                    epoch = await self._epochs.get()
                    if watch is not None:
                        watch.cancel()
                        watch = None
                    await self._stop_now()
                    if epoch is not None and await self._start_now(epoch):
                        watch = group.create_task(self._watch(), name="broker_host.watch")
        finally:
            await self._stop_now()

    async def _start_now(self, epoch: int) -> bool:
        settings = replace(self._settings, addresses=self._listen())
        if settings.plain_port == 0 and _is_free(MQTT_PORT):
            settings = replace(settings, plain_port=MQTT_PORT)
        if settings.plain_port and not _is_free(settings.plain_port):
            text = f"port {settings.plain_port} is taken; the plain listener takes another: see --plain-port"
            say(log, "plain_port_taken", text, logging.WARNING, plain_port=settings.plain_port)
            settings = replace(settings, plain_port=0)
        try:
            self._broker = await start_broker(settings)
        except (EdgemeshError, OSError) as error:
            say(log, "broker_failed", f"cannot host the broker: {error}", logging.WARNING)
            self._learn(BrokerFailed(str(error)))
            return False
        ref = BrokerRef(epoch=epoch, host=self._me, addresses=self._advertised(), port=self._broker.port)
        say(
            log,
            "broker_hosted",
            f"hosting the mesh's broker ({self._broker.kind}, port {ref.port}, broker epoch {epoch})",
            kind=self._broker.kind,
            port=ref.port,
            plain_port=self._broker.plain_port,
            broker_epoch=epoch,
        )
        self._learn(BrokerHosted(ref))
        return True

    async def _watch(self) -> None:
        assert self._broker is not None
        reason = await self._broker.died()
        self._broker = None
        say(log, "broker_failed", f"the broker on this node ended: {reason}", logging.WARNING)
        self._learn(BrokerFailed(reason))

    async def _stop_now(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            await broker.stop()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
