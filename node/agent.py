"""One edgemesh process: makes every part, connects them, and takes them down in order.

    Discovery ─▶ Peers ─▶ ┐                     ┌─▶ BrokerHost (mosquitto, amqtt)
    MqttBus  ◀──────────▶ Driver ◀─▶ cores ─────┼─▶ MqttBus.use
    Journal  ◀─────────── ┘         facts       └─▶ ComputeWorker ─▶ child process (torch)

No rule of the mesh is here: what to do comes out of the cores as facts, and ``_on_fact`` says who does it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from random import Random

from coordinator.facts import DrainChanged, EngineLost, EngineReady, StartAttempt, StopAttempt
from coordinator.stack import Cores, build_cores
from mesh.broker import BrokerSettings
from mesh.bus import Heard
from mesh.core import Fact
from mesh.discovery import Advert, Discovery, Gone
from mesh.driver import Driver
from mesh.errors import ConfigError
from mesh.facts import (
    AskPeers,
    BrokerRef,
    Deposed,
    Elected,
    Followed,
    HostBroker,
    Leaving,
    LinkDown,
    LinkUp,
    MemberChanged,
    OwnInfo,
    OwnReport,
    StopBroker,
    Superseded,
    UseBroker,
)
from mesh.identity import MeshKey
from mesh.ids import NodeId, new_boot
from mesh.interfaces import local_addresses
from mesh.journal import Journal
from mesh.messages import NodeInfo, NodeReport, NodeState, PeerHello
from mesh.messages.node import ADDRESSES_MAX
from mesh.mqtt import MqttBus
from mesh.packets import node_filters
from mesh.streams import DEFAULT_PORT, PeerClient, PeerServer
from mesh.topics import STATUS, access_list
from mesh.wire import PROTOCOL_MAX, PROTOCOL_MIN
from node import __version__
from node.broker_host import BrokerHost
from node.logs import say
from node.models import DEFAULT_MODEL
from node.peers import Peers
from node.profile import Profile
from node.settings import Settings, broker_text
from node.state import KnownBroker, NodeSlot, StateDir
from node.view import View, ViewBuilder
from node.worker import ComputeWorker

__all__ = ["Agent", "serve"]

log = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
FAREWELL_S = 3.0  # to tell the others goodbye; a broker that hangs must not keep the process
EXIT_SUPERSEDED = 6


async def serve(settings: Settings, *, screen: Callable[[Agent], asyncio.Future[None]] | None = None) -> int:
    """Run a node until a signal, ``edgemesh leave``, or a newer process under its id. Returns the exit code.

    Args:
        settings: ``settings.mesh``'s key is in the state directory (see ``node.cli.join``).
        screen: Makes the task that draws the terminal view and ends when the user quits; ``None`` for logs.

    Raises:
        ConfigError: No key, or the state directory cannot be used.
    """
    state = StateDir(settings.state_dir)
    key = state.mesh_key(settings.mesh)
    if key is None:
        raise ConfigError(f"no key for mesh '{settings.mesh}' on this machine: join with --code CODE")
    rng = Random(int.from_bytes(os.urandom(16)))
    with state.claim_node_slot(settings.mesh, settings.name or socket.gethostname(), rng) as slot:
        return await Agent(settings, state, key, slot, rng).run(screen)


class Agent:
    """The parts of one process. Made once, run once."""

    def __init__(self, settings: Settings, state: StateDir, key: MeshKey, slot: NodeSlot, rng: Random) -> None:
        self._settings = settings
        self._state = state
        self._key = key
        self._slot = slot
        self.node: NodeId = slot.node
        self._boot = new_boot(rng)
        self._journal = Journal(slot.journal_path)
        records = self._journal.load()
        known = records.get("incarnation")
        if isinstance(known, NodeState):  # it may have refuted rumours in its last life
            slot.record_incarnation(known.incarnation + 1)
        self._profile = Profile()
        self._model = (settings.model or DEFAULT_MODEL) if settings.compute else None
        identity = slot.identity(key)
        self._server = PeerServer(
            identity.server_context(),
            self._hello,
            hosts=local_addresses(settings.interfaces) if settings.interfaces else None,
            port=settings.port or DEFAULT_PORT,
        )
        self._client = PeerClient(identity.client_context())
        self._info = NodeInfo(
            node=self.node, incarnation=slot.incarnation, hostname=socket.gethostname(), version=__version__,
            protocol_min=PROTOCOL_MIN, protocol_max=PROTOCOL_MAX, addresses=[], port=0,
            system=self._profile.system, device="none", n_cpus=self._profile.n_cpus,
            memory_bytes=self._profile.memory_bytes, model=self._model, adapters=[], slots=0,
        )  # fmt: skip
        self._me = NodeState(node=self.node, state="online", incarnation=slot.incarnation, boot=self._boot)
        self.cores: Cores = build_cores(
            me=self._me,
            info=self._info,
            records=records,
            rng=rng,
            now=time.monotonic(),
            external=settings.broker,
        )
        rows = [] if settings.headless else [STATUS.filter(settings.mesh)]
        self.bus = MqttBus(
            mesh=settings.mesh,
            me=self.node,
            boot=self._boot,
            filters=[*node_filters(settings.mesh, self.node), *rows],
            will=lambda: replace(self.cores.membership.me, state="offline"),
            tls=identity.client_context(),
        )
        self._view = ViewBuilder(
            mesh=settings.mesh, version=__version__, fingerprint=key.fingerprint, me=self.node
        )
        self._driver = Driver(
            core=self.cores.stack,
            bus=self.bus,
            journal=self._journal,
            on_fact=self._on_fact,
            on_heard=self._on_heard,
        )
        self._peers = Peers(
            me=self.node,
            client=self._client,
            seeds=[(seed.host, seed.port) for seed in settings.seeds],
            learn=self._driver.learn,
        )
        self._broker_host = BrokerHost(
            me=self.node,
            settings=BrokerSettings(
                mesh=settings.mesh,
                identity=identity,
                addresses=tuple(local_addresses(settings.interfaces)) if settings.interfaces else ("0.0.0.0",),
                port=0,
                plain_port=settings.plain_port if settings.plain else None,
                directory=slot.path / "broker",
                kind=settings.broker_kind,
                access_list=access_list(settings.mesh),
            ),
            advertised=lambda: tuple(local_addresses(settings.interfaces)),
            learn=self._driver.learn,
        )
        self._worker = (
            ComputeWorker(self._model, models_dir=state.models_dir, learn=self._driver.learn)
            if self._model is not None
            else None
        )
        self._discovery: Discovery | None = None
        self._advert_changed = asyncio.Event()
        self._has_joined = False
        self._draining_to_leave = False
        self._stop = asyncio.Event()
        self._exit_code = 0

    # ── the faces ───────────────────────────────────────────────────────────────────────────────────

    def view(self) -> View:
        """What this node knows, for the terminal view."""
        return self._view.view(time.monotonic())

    def stop(self) -> None:
        """Say goodbye and end. Running attempts are handed back to the mesh."""
        self._stop.set()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, screen: Callable[[Agent], asyncio.Future[None]] | None = None) -> int:
        started_at = time.monotonic()
        self._started_at = started_at
        say(
            log,
            "starting",
            f"node {self.node} of mesh '{self._settings.mesh}' (key {self._key.fingerprint})",
            node=self.node,
            mesh=self._settings.mesh,
            incarnation=self._slot.incarnation,
            pid=os.getpid(),
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        try:
            async with self._server, self._client:
                addresses = list(local_addresses(self._settings.interfaces))[:ADDRESSES_MAX]
                self._change_info(port=self._server.port, addresses=addresses)
                async with Discovery(self._advert(), self._settings.interfaces) as self._discovery:
                    await self._live(screen)
        finally:
            self._journal.close()
        say(log, "stopped", "stopped")
        return self._exit_code

    async def _live(self, screen: Callable[[Agent], asyncio.Future[None]] | None) -> None:
        """Everything that runs side by side, until ``stop``; then down in order."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._driver.run(), name="driver"),
                group.create_task(self.bus.run(), name="bus"),
                group.create_task(self._peers.run(), name="peers"),
                group.create_task(self._watch_discovery(), name="discovery"),
                group.create_task(self._announce(), name="announce"),
                group.create_task(self._report(), name="report"),
            ]
            broker = group.create_task(self._broker_host.run(), name="broker_host")
            if self._worker is not None:
                tasks.append(group.create_task(self._worker.run(), name="worker"))
            if screen is not None:
                screen(self).add_done_callback(lambda done: self.stop())
            await self._stop.wait()
            await self._say_goodbye()
            for task in [*tasks, broker]:
                task.cancel()

    async def _say_goodbye(self) -> None:
        """Hand back what runs, resign, announce ``left``; each step may fail without keeping the process."""
        say(log, "stopping", "leaving the mesh")
        try:
            async with asyncio.timeout(FAREWELL_S):
                if self._worker is not None:
                    await self._worker.stop()
                self._driver.learn(Leaving())
                await self._driver.settled()
                await self.bus.close()
        except TimeoutError:
            log.warning("the broker did not take our goodbye in time; the others will notice by themselves")
        hosted = self.cores.hosting.hosted
        if hosted is not None:
            self._state.forget_broker(self._settings.mesh, hosted)

    # ── facts ───────────────────────────────────────────────────────────────────────────────────────

    def _on_heard(self, heard: Heard) -> None:
        self._view.apply(heard.message, heard.sender, time.monotonic())

    def _on_fact(self, fact: Fact) -> None:
        """What the cores, or the shell itself, say happened: who must do something about it?"""
        self._view.learn(fact, time.monotonic())
        match fact:
            case AskPeers(nodes=nodes):
                self._peers.ask(nodes)
            case HostBroker(epoch=epoch):
                self._broker_host.start(epoch)
            case StopBroker():
                say(log, "broker_stopping", "everybody moved to a better broker; stopping ours")
                self._broker_host.stop()
            case UseBroker(broker=broker):
                self._use_broker(broker)
            case StartAttempt() | StopAttempt():
                if self._worker is not None:
                    self._worker.carry_out(fact)
            case EngineReady(model=model, context_tokens=context_tokens, slots=slots):
                device = self._worker.device if self._worker is not None else "none"
                say(log, "engine_ready", f"{model} is loaded on {device}", model=model, device=device)
                self._change_info(
                    model=model, context_tokens=context_tokens, slots=slots, device=device or "cpu"
                )
            case EngineLost(reason=reason):
                say(log, "engine_lost", f"compute ended: {reason}", logging.WARNING, reason=reason)
                self._change_info(slots=0)
            case DrainChanged(draining=draining, leave=leave):
                self._draining_to_leave = leave
                say(log, "draining" if draining else "resumed", "finishing what runs" if draining else "resumed")
            case Superseded(boot=boot):
                say(
                    log, "superseded",
                    f"another process (boot {boot}) runs as {self.node}: a copied state directory? Remove "
                    f"{self._slot.path} on one of the two machines, and it gets an id of its own",
                    logging.ERROR,
                )  # fmt: skip
                self._exit_code = EXIT_SUPERSEDED
                self.stop()
            case _:
                self._log_fact(fact)

    def _log_fact(self, fact: Fact) -> None:
        match fact:
            case LinkUp(broker_epoch=epoch, host=host):
                say(log, "link_up", f"connected to the broker on {host or 'its own server'}",
                    broker_epoch=epoch, host=host)  # fmt: skip
                self._remember_broker()
                self._advert_changed.set()
            case LinkDown(host_is_dead=host_is_dead):
                say(log, "link_down", "lost the broker" + (": its host refuses" if host_is_dead else ""),
                    host_is_dead=host_is_dead)  # fmt: skip
            case Elected(epoch=epoch):
                say(log, "elected", f"this node coordinates (epoch {epoch})", epoch=str(epoch), term=epoch.term)
                self._join(epoch.node)
            case Deposed(epoch=epoch):
                say(log, "deposed", f"epoch {epoch} is over for this node", epoch=str(epoch))
            case Followed(epoch=epoch):
                say(log, "followed", f"{epoch.node} coordinates (epoch {epoch})", epoch=str(epoch),
                    coordinator=epoch.node, term=epoch.term)  # fmt: skip
                self._join(epoch.node)
            case MemberChanged(node=node, standing=standing, incarnation=incarnation) if node != self.node:
                standing = str(getattr(standing, "value", standing))
                say(log, "member", f"{node} is {standing}", member=node, standing=standing, incarnation=incarnation)
            case _:
                log.debug("%s", fact)

    def _join(self, coordinator: NodeId) -> None:
        if not self._has_joined:
            self._has_joined = True
            joined_s = time.monotonic() - self._started_at
            say(log, "joined", f"joined mesh '{self._settings.mesh}'; {coordinator} coordinates",
                coordinator=coordinator, joined_s=round(joined_s, 3))  # fmt: skip

    # ── broker and peers ────────────────────────────────────────────────────────────────────────────

    def _use_broker(self, broker: BrokerRef) -> None:
        if broker.host == self.node and not self._settings.interfaces:
            broker = replace(broker, addresses=("127.0.0.1", *broker.addresses))
        self._view.use_broker(broker_text(broker), broker.host)
        self.bus.use(broker)
        self._advert_changed.set()

    def _remember_broker(self) -> None:
        """For the other processes of this machine: commands, and nodes that start later."""
        broker = self.cores.hosting.broker
        if broker is not None:
            self._state.write_broker(self._settings.mesh, KnownBroker(broker, self._broker_host.plain_port))

    def _hello(self) -> PeerHello:
        hosting = self.cores.hosting
        broker = hosting.broker if hosting.broker is not None and hosting.broker.host is not None else None
        return PeerHello(
            node=self.node, boot=self._boot, incarnation=self.cores.membership.me.incarnation,
            mesh=self._settings.mesh, port=self._server.port, addresses=self._info.addresses,
            broker_epoch=broker.epoch if broker else 0, broker_host=broker.host if broker else None,
            broker_addresses=list(broker.addresses) if broker else [], broker_port=broker.port if broker else 0,
            broker_connected=broker is not None and hosting.is_linked, peers=self._peers.vouched,
        )  # fmt: skip

    def _advert(self) -> Advert:
        hosting = self.cores.hosting
        broker = hosting.broker if hosting.is_linked else None
        return Advert(
            mesh=self._settings.mesh, fingerprint=self._key.fingerprint, node=self.node, boot=self._boot,
            incarnation=self.cores.membership.me.incarnation, port=self._server.port,
            broker_epoch=broker.epoch if broker else 0, broker_host=broker.host if broker else None,
            broker_port=broker.port if broker else 0,
        )  # fmt: skip

    async def _announce(self) -> None:
        """Tell mDNS about a new broker: whoever uses an older one asks us at once."""
        while True:
            await self._advert_changed.wait()
            self._advert_changed.clear()
            assert self._discovery is not None
            await self._discovery.update(self._advert())

    async def _watch_discovery(self) -> None:
        assert self._discovery is not None
        strangers: set[str] = set()
        async for news in self._discovery.sightings():
            if isinstance(news, Gone):
                self._peers.gone(news.node)
            elif news.advert.fingerprint == self._key.fingerprint:
                self._peers.sighted(news.advert.node, news.addresses, news.advert.port)
            elif news.advert.mesh == self._settings.mesh and len(strangers) < 64:
                if news.advert.node not in strangers:
                    strangers.add(news.advert.node)
                    say(
                        log, "other_mesh",
                        f"{news.advert.node} is in another mesh that is also called '{news.advert.mesh}' "
                        f"(key {news.advert.fingerprint}, ours is {self._key.fingerprint}). To bring it here, "
                        f"run `edgemesh token` on this machine and join there with --code",
                        logging.WARNING, peer=news.advert.node, fingerprint=news.advert.fingerprint,
                    )  # fmt: skip

    # ── what this node is and does ──────────────────────────────────────────────────────────────────

    def _change_info(self, **changes: object) -> None:
        self._info = replace(self._info, **changes)  # type: ignore[arg-type]
        self._driver.learn(OwnInfo(self._info))

    async def _report(self) -> None:
        """Every second: proof of life. Also notices when a draining node has become idle."""
        while True:
            worker = self._worker
            running = self.cores.worker.n_running
            ready = worker is not None and worker.is_ready and not self.cores.worker.is_draining
            now = self._profile.now(child_pid=worker.pid if worker is not None else None)
            self._driver.learn(
                OwnReport(
                    NodeReport(
                        node=self.node, incarnation=self._slot.incarnation, ready=ready,
                        activity=self._activity(running), running=running, cpu_percent=now.cpu_percent,
                        memory_free_bytes=now.memory_free_bytes, rss_bytes=now.rss_bytes,
                        tokens_per_s=worker.tokens_per_s if worker is not None else 0.0,
                        temperature_c=now.temperature_c,
                    )
                )
            )  # fmt: skip
            if self._draining_to_leave and not running:
                self.stop()
            await asyncio.sleep(REPORT_EVERY_S)

    def _activity(self, running: int) -> str:
        if self._worker is None:
            return "no compute: relays and coordinates"
        if self.cores.worker.is_draining:
            return f"draining, {running} to finish" if running else "drained"
        if not self._worker.is_ready:
            return self._worker.activity
        return f"{running} task{'s' if running != 1 else ''}" if running else "idle"
