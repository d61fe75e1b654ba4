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
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from coordinator.facts import (
    AdaptersChanged,
    DrainChanged,
    EngineLost,
    EngineReady,
    FeaturesArrived,
    FeaturesProfiled,
    PauseAttempt,
    RatesMeasured,
    ResumeAttempt,
    StartAttempt,
    StopAttempt,
)
from coordinator.policy.policies import policy_named
from coordinator.stack import Cores, build_cores
from mesh.core import Fact
from mesh.driver import Driver
from mesh.errors import ConfigError, EdgemeshError
from mesh.facts import (
    AskPeers,
    BrokerRef,
    Elected,
    Followed,
    HostBroker,
    Leaving,
    LinkUp,
    OwnInfo,
    OwnReport,
    StopBroker,
    Superseded,
    UseBroker,
)
from mesh.ids import NodeId, new_boot
from mesh.journal import Journal
from mesh.messages import NodeForgotten, NodeReport, NodeState, PeerHello
from mesh.messages.node import ADAPTERS_MAX, ADDRESSES_MAX
from mesh.transport.bus import Heard
from mesh.transport.discovery import Advert, Discovery, Gone, Sighting
from mesh.transport.identity import MeshKey
from mesh.transport.interfaces import local_addresses
from mesh.transport.streams import PeerClient
from node import __version__
from node.cache.assembly import NodeCache
from node.compute.models import DEFAULT_MODEL, resolve
from node.faces.view import View, ViewBuilder
from node.fact_log import log_fact
from node.files.assembly import NodeFiles
from node.logs import say, set_up
from node.parts import broker_host_of, bus_of, info_of, server_of
from node.peers import PROBE_TIMEOUT_S, Peers
from node.profile import VitalsReader, profile
from node.settings import Settings, broker_text
from node.signals import ending_signals
from node.state import KnownBroker, NodeSlot, StateDir

if TYPE_CHECKING:
    from node.worker import ComputeWorker

__all__ = ["Agent", "serve"]

log = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
ADDRESSES_EVERY_S = 10.0  # 1 ms of a small CPU each; discovery itself looks more often
STRANGERS_MAX = 64  # warned of by name; more is somebody playing
FAREWELL_S = 3.0  # to tell the others goodbye; a broker that hangs must not keep the process
EXIT_SUPERSEDED = 2  # the operator must act; starting again would not help

_SUPERSEDED = (
    "another, newer process runs as {node}: a copied or restored state directory? "
    "Remove {path} on one of the two machines, and that one gets an id of its own"
)


async def serve(settings: Settings) -> int:
    """Run a node until a signal, ``edgemesh leave``, or a newer process under its id. Returns the exit code.

    On a terminal it shows the mesh, otherwise (or with ``--headless``) it logs to stderr. The key of
    ``settings.mesh`` is in the state directory already (see ``node.joining``).

    Raises:
        ConfigError: No key, or the state directory cannot be used.
    """
    state = StateDir(settings.state_dir)
    key = state.mesh_key(settings.mesh)
    if key is None:
        raise ConfigError(f"no key for mesh '{settings.mesh}' on this machine: join with --code CODE")
    rng = Random(int.from_bytes(os.urandom(16)))
    with state.claim_node_slot(settings.mesh, settings.name or socket.gethostname(), rng) as slot:
        agent = Agent(settings, state, key, slot, rng)
        if not agent.has_screen:
            set_up(settings.log_format, settings.log_level)
            return await agent.run()
        set_up("text", settings.log_level, sink=agent.note)
        from node.faces.tui import screen

        return await agent.run(lambda: screen(agent.view))


class Agent:
    """The parts of one process. Made once, run once."""

    def __init__(
        self, settings: Settings, state: StateDir, key: MeshKey, slot: NodeSlot, rng: Random
    ) -> None:
        self.has_screen = not settings.headless and sys.stdin.isatty() and sys.stdout.isatty()
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
        self._vitals = VitalsReader()
        device = profile()
        self._model = (settings.model or DEFAULT_MODEL) if settings.compute else None
        model_name = resolve(self._model).name if self._model is not None else None
        identity = slot.identity(key)
        self._files = NodeFiles(self.node, settings, state, self._model)
        self._cache = NodeCache(
            me=self.node,
            identity=identity,
            directory=slot.features_dir,
            quota_bytes=settings.feature_disk,
            cores=lambda: self.cores,
            peers=lambda: self._peers,
            info=lambda: self._info,
            learn=lambda fact: self._driver.learn(fact),
            publish=lambda message: self.bus.publish(message),
            files=self._files.blobs,
        )
        self._server = server_of(settings, identity, self._hello, self._cache.server.routes())
        self._client = PeerClient(identity.client_context())
        self._info = info_of(slot, device, model_name, settings.feature_disk)
        self._me = NodeState(node=self.node, state="online", incarnation=slot.incarnation, boot=self._boot)
        self.cores: Cores = build_cores(
            me=self._me,
            info=self._info,
            records=records,
            rng=rng,
            now=time.monotonic(),
            external=settings.broker,
            policy=policy_named(settings.policy),
        )
        self.bus = bus_of(
            settings,
            identity,
            self._me,
            will=lambda: replace(self.cores.membership.state, state="offline"),
            hears_all=self.has_screen,
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
        self._broker_host = broker_host_of(settings, identity, slot, learn=self._driver.learn)
        self._worker: ComputeWorker | None = None
        if self._model is not None:
            from node.worker import ComputeWorker, load_of  # a node without compute does without

            self._worker = ComputeWorker(
                load_of(self._model, settings, state, slot.features_dir),
                learn=self._driver.learn,
                serve_link=self._cache.serve_link,
                prepare=self._files.seek_model,
            )
        self._files.connect(
            versions=self.cores.versions, bulk=self._cache.client, where=self._cache.where,
            incarnation=lambda: self.cores.membership.state.incarnation,
            is_joined=lambda: self._has_joined, learn=self._driver.learn,
        )  # fmt: skip
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

    def note(self, text: str) -> None:
        """A log line, shown among the view's events while there is a screen instead of a log."""
        self._view.event(text, time.monotonic())

    def stop(self) -> None:
        """Say goodbye and end. Running attempts are handed back to the mesh."""
        self._stop.set()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, screen: Callable[[], Coroutine[None, None, None]] | None = None) -> int:
        """Live until told to stop. ``screen`` shows the mesh meanwhile and returns when the user quits."""
        self._started_at = time.monotonic()
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
        for number in ending_signals():
            loop.add_signal_handler(number, self.stop)
        try:
            async with self._cache, self._server, self._client:
                self._change_info(port=self._server.port, addresses=self._addresses())
                async with Discovery(self._advert(), self._settings.interfaces) as self._discovery:
                    await self._live(screen)
        finally:
            self._journal.close()
        say(log, "stopped", "stopped")
        return self._exit_code

    async def _live(self, screen: Callable[[], Coroutine[None, None, None]] | None) -> None:
        """Everything that runs side by side, until ``stop``; then down in order."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._driver.run(), name="driver"),
                group.create_task(self.bus.run(), name="bus"),
                group.create_task(self._peers.run(), name="peers"),
                group.create_task(self._cache.run(), name="cache"),
                group.create_task(self._files.run(), name="files"),
                group.create_task(self._watch_discovery(), name="discovery"),
                group.create_task(self._announce(), name="announce"),
                group.create_task(self._report(), name="report"),
                group.create_task(self._watch_addresses(), name="addresses"),
            ]
            broker = group.create_task(self._broker_host.run(), name="broker_host")
            if self._worker is not None:
                tasks.append(group.create_task(self._worker.run(), name="worker"))
            if screen is not None:
                shown = group.create_task(screen(), name="screen")
                shown.add_done_callback(lambda done: self.stop())
                tasks.append(shown)
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
                await self.bus.close(farewell=[NodeForgotten(node=self.node)])
        except TimeoutError:
            log.warning("the broker did not take our goodbye in time; the others will notice by themselves")
        hosted = self.cores.hosting.hosted
        if hosted is not None:
            self._state.forget_broker(self._settings.mesh, hosted)

    # ── facts ───────────────────────────────────────────────────────────────────────────────────────

    def _on_heard(self, heard: Heard) -> None:
        self._cache.on_heard(heard)
        if self.has_screen:
            self._view.apply(heard.message, heard.sender, time.monotonic())

    def _on_fact(self, fact: Fact) -> None:
        """What the cores, or the shell itself, say happened: who must do something about it?"""
        self._view.learn(fact, time.monotonic())
        log_fact(log, fact, self.node)
        self._cache.on_fact(fact)
        self._files.on_fact(fact)
        match fact:
            case AskPeers(nodes=nodes):
                self._peers.ask(nodes)
            case HostBroker(epoch=epoch):
                self._broker_host.start(epoch)
            case StopBroker():
                self._broker_host.stop()
            case UseBroker(broker=broker):
                self._use_broker(broker)
            case StartAttempt() | StopAttempt() | PauseAttempt() | ResumeAttempt() | FeaturesArrived():
                if self._worker is not None:
                    self._worker.carry_out(fact)
            case EngineReady():
                self._files.engine_is_ready(self._worker.weights_sha256 if self._worker is not None else "")
                device = self._worker.device if self._worker is not None else "none"
                self._change_info(
                    model=fact.model, also_called=list(fact.also_called), slots=fact.slots,
                    context_tokens=fact.context_tokens, device=device or "cpu",
                    precision=fact.precision or None, precision_reason=fact.precision_reason or None,
                    adapters=list(fact.adapters[:ADAPTERS_MAX]), rates=fact.rates, can_pause=fact.can_pause,
                    features_profile=fact.features_profile, top_layers=fact.top_layers,
                    holds="all" if fact.top_layers is None else "top",
                )  # fmt: skip
            case AdaptersChanged(names=names):
                self._change_info(adapters=list(names[:ADAPTERS_MAX]))
            case RatesMeasured(rates=rates):
                self._change_info(rates=rates)
            case FeaturesProfiled(profile=profile):
                self._change_info(features_profile=profile)
            case EngineLost():
                self._change_info(slots=0)
            case DrainChanged(leave=leave):
                self._draining_to_leave = leave
            case Superseded():
                say(
                    log, "superseded", _SUPERSEDED.format(node=self.node, path=self._slot.path), logging.ERROR
                )
                self._exit_code = EXIT_SUPERSEDED
                self.stop()
            case LinkUp():
                self._remember_broker()
                self._advert_changed.set()
            case Elected(epoch=epoch) | Followed(epoch=epoch):
                self._join(epoch.node)
            case _:
                pass

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
            node=self.node, boot=self._boot, incarnation=self.cores.membership.state.incarnation,
            mesh=self._settings.mesh, port=self._server.port, addresses=self._info.addresses,
            broker_epoch=broker.epoch if broker else 0, broker_host=broker.host if broker else None,
            broker_addresses=list(broker.addresses) if broker else [],
            broker_port=broker.port if broker else 0,
            broker_connected=broker is not None and hosting.is_linked, peers=self._peers.vouched,
        )  # fmt: skip

    def _advert(self) -> Advert:
        hosting = self.cores.hosting
        broker = hosting.broker if hosting.is_linked else None
        return Advert(
            mesh=self._settings.mesh, fingerprint=self._key.fingerprint, node=self.node, boot=self._boot,
            incarnation=self.cores.membership.state.incarnation, port=self._server.port,
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
            elif news.advert.node == self.node:
                if news.advert.boot != self._boot:
                    await self._meet_namesake(news)
            elif news.advert.fingerprint == self._key.fingerprint:
                self._peers.sighted(news.advert.node, news.addresses, news.advert.port)
            elif news.advert.mesh == self._settings.mesh and len(strangers) < STRANGERS_MAX:
                self._warn_of(news.advert, strangers)

    async def _meet_namesake(self, sighting: Sighting) -> None:
        """Our id with another boot: an old record of ours, a forgery, or a copied state directory. Ask it.

        The two have never met on a broker: each takes the other's answers for its own.
        """
        try:
            hello, _ = await self._client.probe(
                sighting.addresses, sighting.advert.port, expect=self.node, timeout_s=PROBE_TIMEOUT_S
            )
        except EdgemeshError:
            return  # nobody of this mesh is there
        if (hello.incarnation, hello.boot) > (self.cores.membership.state.incarnation, self._boot):
            self._driver.learn(Superseded(hello.boot))

    def _warn_of(self, stranger: Advert, warned: set[str]) -> None:
        if stranger.node in warned:
            return
        warned.add(stranger.node)
        say(
            log,
            "other_mesh",
            f"{stranger.node} is in another mesh that is also called '{stranger.mesh}' (key "
            f"{stranger.fingerprint}, ours is {self._key.fingerprint}). To bring it here, "
            "run `edgemesh token` on this machine and join there with --code",
            logging.WARNING,
            peer=stranger.node,
            fingerprint=stranger.fingerprint,
        )

    # ── what this node is and does ──────────────────────────────────────────────────────────────────

    def _change_info(self, **changes: object) -> None:
        self._info = replace(self._info, **changes)  # type: ignore[arg-type]
        self._driver.learn(OwnInfo(self._info))

    async def _watch_addresses(self) -> None:
        """A cable, a lease or a network comes or goes: the others read of it in this node's info."""
        while True:
            await asyncio.sleep(ADDRESSES_EVERY_S)
            addresses = self._addresses()
            if addresses != self._info.addresses:
                self._change_info(addresses=addresses)

    async def _report(self) -> None:
        """Every second: proof of life. Also notices when a draining node has become idle."""
        while True:
            worker = self._worker
            running = self.cores.worker.n_running
            vitals = self._vitals.read(worker.pid if worker is not None else None)
            self._driver.learn(
                OwnReport(
                    NodeReport(
                        node=self.node, incarnation=self._slot.incarnation, ready=self.cores.worker.may_start,
                        activity=self._activity(running), running=running, cpu_percent=vitals.cpu_percent,
                        memory_free_bytes=vitals.memory_free_bytes, rss_bytes=vitals.rss_bytes,
                        tokens_per_s=worker.tokens_per_s if worker is not None else 0.0,
                        temperature_c=vitals.temperature_c,
                    )
                )
            )  # fmt: skip
            if self._draining_to_leave and self.cores.worker.is_idle:
                self.stop()
            await asyncio.sleep(REPORT_EVERY_S)

    def _addresses(self) -> list[str]:
        return list(local_addresses(self._settings.interfaces, link_local=False))[:ADDRESSES_MAX]

    def _activity(self, running: int) -> str:
        if self._worker is None:
            return "no compute: relays and coordinates"
        if self.cores.worker.is_draining:
            return f"draining, {running} to finish" if running else "drained"
        if not self._worker.is_ready:
            return self._worker.activity
        return self._worker.activity if running else "idle"
