"""A process that is no node and talks to the mesh: what the commands stand on.

It finds a broker, connects over mutual TLS, and follows when the mesh moves to another one. Nothing is
lost by that: a submission is repeated under its id until it is acknowledged and again after every
reconnect, and everything it waits for is retained or said again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import SystemRandom

from mesh.core import Message
from mesh.errors import ConfigError, DecodeError, EdgemeshError, UnreachableError, WrongKeyError
from mesh.facts import BrokerRef, LinkDown, LinkUp
from mesh.ids import NodeId, TaskId, new_boot
from mesh.messages import (
    CancelTask,
    Drain,
    ExplainTask,
    LeaseRecord,
    NodeState,
    PeerHello,
    Submit,
    TaskExplanation,
    TaskProgress,
    TaskResult,
    TaskStatus,
    TaskTokens,
)
from mesh.packets import client_filters
from mesh.topics import (
    COORDINATOR,
    COSTS,
    EVENT,
    INFO,
    METRICS,
    PROGRESS,
    RESULT,
    STATE,
    STATUS,
    STREAM,
    WHY,
    Topic,
)
from mesh.transport.bus import Heard
from mesh.transport.identity import Identity, MeshKey, wrong_key
from mesh.transport.mqtt import MqttBus
from node import __version__
from node.faces.view import View, ViewBuilder
from node.joining import known_key
from node.settings import HostPort, Settings, broker_text
from node.state import KnownBroker, StateDir

__all__ = [
    "MeshClient",
    "cancel_task",
    "connected",
    "drain_nodes",
    "explain_task",
    "find_broker",
    "snapshot",
    "submit",
    "watch",
]

CLIENT_NAME = "client"
"""The common name in the certificate of every command; the MQTT client id adds a random part."""

PROBE_S = 0.7  # a TCP and TLS handshake takes 10 ms on a LAN, 100 ms to a busy Pi
SCAN_S = 2.0
SEARCH_S = 10.0  # as long as a mesh may take to move to another broker
SEARCH_PAUSE_S = 0.3
ASKED_MAX = 8  # nodes asked which broker they use; one good answer is enough

ACK_EVERY_S = 1.0
ACK_TIMEOUT_S = 20.0  # a broker's and a coordinator's death one after the other take up to 15 s
SILENCE_S = 20.0  # a coordinator beats every second
RESULT_AFTER_STATUS_S = 3.0  # they are published together
REJECTED_AGAIN_S = 0.5  # a rejection has no result; but an older one of this id may be what is retained

News = TaskStatus | TaskTokens | TaskProgress | TaskResult


# ── finding the broker ──────────────────────────────────────────────────────────────────────────────


async def find_broker(settings: Settings, state: StateDir) -> KnownBroker:
    """The broker of the mesh, proven to answer and to be of this mesh.

    Looks at ``--broker``, then at what the nodes of this machine wrote down, then around by mDNS and at
    the ``--seed``s, where nodes are asked over mutual TLS which broker they use.

    Raises:
        ConfigError: No key of this mesh here.
        WrongKeyError: A mesh of this name is here, with another key.
        UnreachableError: Nobody answers; the text says how to start or reach a mesh.
    """
    if settings.broker is not None:
        if not await _answers(settings.broker, _site_identity(settings, state)):
            where = broker_text(settings.broker)
            raise UnreachableError(f"nobody answers at {where}: is that broker running, and its port open?")
        return KnownBroker(settings.broker)
    key = known_key(settings, state)
    identity = state.client_identity(key, CLIENT_NAME)
    until = time.monotonic() + SEARCH_S
    while True:
        known = state.read_broker(settings.mesh)
        if known is not None and await _answers(known.ref, identity):
            return known
        found = await _ask_around(settings, key, identity)
        if found is not None and await _answers(found, identity):
            return KnownBroker(found)
        if time.monotonic() > until:
            raise UnreachableError(
                f"nodes of mesh '{settings.mesh}' are here, but none has a broker that answers: if it uses "
                "the site's own broker, name it with --broker URL; else look at the log of `edgemesh join`"
            )
        await asyncio.sleep(SEARCH_PAUSE_S)


def _site_identity(settings: Settings, state: StateDir) -> Identity | None:
    """This machine's, unless there is no key here, or the site's broker trusts by user name."""
    if settings.broker is None or settings.broker.username is not None:
        return None
    try:
        return state.client_identity(known_key(settings, state), CLIENT_NAME)
    except ConfigError:
        return None


async def _answers(broker: BrokerRef, identity: Identity | None) -> bool:
    """Whether one of its addresses takes connections and, given an ``identity``, are of its mesh.

    Raises:
        WrongKeyError: It answers, and is of another mesh.
    """
    context = identity.client_context() if identity is not None and broker.tls else None
    tries = [asyncio.create_task(_knock(address, broker.port, context)) for address in broker.addresses]
    refusal: WrongKeyError | None = None
    try:
        for next_done in asyncio.as_completed(tries):
            answer = await next_done
            if answer is True:
                return True
            refusal = answer or refusal
    finally:
        for one in tries:
            one.cancel()
        await asyncio.gather(*tries, return_exceptions=True)
    if refusal is not None:
        raise refusal
    return False


async def _knock(address: str, port: int, context: ssl.SSLContext | None) -> bool | WrongKeyError | None:
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(address, port, ssl=context)
    except (OSError, TimeoutError) as error:
        return wrong_key(error, f"the broker at {HostPort(address, port)}")
    writer.transport.abort()
    return True


async def _ask_around(settings: Settings, key: MeshKey, identity: Identity) -> BrokerRef | None:
    """What the nodes in sight and the seeds say; ``None`` if they are there and have no broker yet.

    Raises:
        WrongKeyError: Only strangers of this name are here.
        UnreachableError: Nobody is here.
    """
    from mesh.transport.discovery import scan
    from mesh.transport.streams import PeerClient

    sightings = await scan(settings.mesh, SCAN_S, settings.interfaces)
    ours = [sighting for sighting in sightings if sighting.advert.fingerprint == key.fingerprint]
    hellos: list[PeerHello] = []
    refusal: WrongKeyError | None = None
    async with PeerClient(identity.client_context()) as client:
        places: list[tuple[Sequence[str], int]] = [
            (one.addresses, one.advert.port) for one in ours[:ASKED_MAX]
        ]
        places += [((seed.host,), seed.port) for seed in settings.seeds[:ASKED_MAX]]
        answers = await asyncio.gather(
            *(client.probe(addresses, port, timeout_s=PROBE_S) for addresses, port in places),
            return_exceptions=True,
        )
    for answer in answers:
        if isinstance(answer, WrongKeyError):
            refusal = answer
        elif isinstance(answer, UnreachableError | DecodeError):
            continue  # the others may answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            hellos.append(answer[0])
    if not hellos:
        if refusal is not None:
            raise refusal
        if sightings and not ours:
            raise WrongKeyError(
                f"the mesh '{settings.mesh}' in sight has fingerprint {sightings[0].advert.fingerprint}, "
                f"this machine's key {key.fingerprint}: run `edgemesh token` there and join here with --code"
            )
        raise UnreachableError(
            f"no node of mesh '{settings.mesh}' answers: start one with `edgemesh join`, or, where multicast "
            "is blocked, name one with --seed HOST:PORT"
        )
    refs = [
        BrokerRef(
            epoch=hello.broker_epoch,
            host=hello.broker_host,
            addresses=tuple(hello.broker_addresses),
            port=hello.broker_port,
        )
        for hello in hellos
        if hello.broker_host is not None and hello.broker_addresses and hello.broker_connected
    ]
    return min(refs, key=lambda ref: (-ref.epoch, ref.host or ""), default=None)


# ── the connection ──────────────────────────────────────────────────────────────────────────────────


class MeshClient:
    """A link to the mesh that mends itself; made by ``connected``."""

    def __init__(self, bus: MqttBus, settings: Settings, state: StateDir) -> None:
        self._bus = bus
        self._settings = settings
        self._state = state
        self._running = asyncio.create_task(bus.run(), name="client.bus")
        self._following = asyncio.create_task(self._follow(), name="client.follow")

    @property
    def broker(self) -> BrokerRef | None:
        return self._bus.broker

    @property
    def is_linked(self) -> bool:
        return self._bus.is_linked

    @property
    def trouble(self) -> str | None:
        """Why there is no link now, in words."""
        return self._bus.trouble

    def publish(self, message: Message, to: NodeId | None = None) -> None:
        self._bus.publish(message, to=to)

    async def next(self, timeout_s: float) -> Heard | LinkUp | LinkDown | None:
        """The next message or change of the link; ``None`` when the time is over."""
        getting = asyncio.create_task(self._bus.next(), name="client.next")
        try:
            await asyncio.wait(
                {getting, self._running}, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED
            )
            if getting.done():
                return getting.result()
            if self._running.done():
                self._running.result()  # raises what broke it
                raise UnreachableError("the connection to the mesh was closed")
            return None
        finally:
            if not getting.done():
                getting.cancel()
                await asyncio.gather(getting, return_exceptions=True)

    async def close(self) -> None:
        """Send what waits, say goodbye, and end."""
        self._following.cancel()
        await asyncio.gather(self._following, return_exceptions=True)
        await self._bus.close()
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    async def _follow(self) -> None:
        """While the link is down, look where the mesh is now."""
        while True:
            await asyncio.sleep(1.0)
            if self._bus.is_linked or self._settings.broker is not None:
                continue
            with contextlib.suppress(EdgemeshError):  # nobody yet: look again; the caller's patience decides
                self._bus.use((await find_broker(self._settings, self._state)).ref)


@asynccontextmanager
async def connected(
    settings: Settings, state: StateDir, rows: Sequence[Topic], *, task: TaskId | None = None
) -> AsyncIterator[MeshClient]:
    """A client that hears ``rows`` (of one ``task``). Linked or about to be: wait for ``LinkUp``.

    Raises:
        ConfigError, WrongKeyError, UnreachableError: As ``find_broker``.
    """
    known = await find_broker(settings, state)

    def tls(broker: BrokerRef) -> ssl.SSLContext:
        try:
            return state.client_identity(known_key(settings, state), CLIENT_NAME).broker_context(broker)
        except ConfigError:
            if broker.host is not None:
                raise
            return ssl.create_default_context()  # no key: trusted like a web site

    bus = MqttBus(
        mesh=settings.mesh,
        me=NodeId(CLIENT_NAME),
        boot=new_boot(SystemRandom()),
        filters=client_filters(settings.mesh, rows, task=task),
        tls=tls,
    )
    bus.use(known.ref)
    client = MeshClient(bus, settings, state)
    try:
        yield client
    finally:
        await client.close()


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────


async def submit(client: MeshClient, request: Submit) -> AsyncIterator[News]:
    """Submit and follow one task: statuses as they change, tokens or progress, and at last the result.

    ``client`` hears ``TASK_ROWS`` of ``request.id``. Ends after the result, or
    after a final status whose result does not come.

    Raises:
        UnreachableError: Nobody acknowledges, or the mesh falls silent.
    """
    assert request.id is not None, "an id makes the submission repeatable"
    started_at = heard_at = asked_at = time.monotonic()
    coordinator: NodeId | None = None
    acknowledged = False
    last: tuple[object, ...] | None = None
    ends_at = float("inf")
    is_linked = False
    while (now := time.monotonic()) < ends_at:
        if not acknowledged and now > started_at + ACK_TIMEOUT_S:
            raise UnreachableError(_unacknowledged(client, coordinator, is_linked))
        if now > heard_at + SILENCE_S:
            why = client.trouble or "no coordinator beats"
            raise UnreachableError(
                f"the mesh has been silent for {SILENCE_S:.0f} s ({why}). "
                f"The task is safe: `edgemesh tasks {request.id}` shows its end once the mesh is back"
            )
        if is_linked and not acknowledged and now >= asked_at:
            client.publish(request)
            asked_at = now + ACK_EVERY_S
        wait_s = min(ends_at, heard_at + SILENCE_S, asked_at if not acknowledged else float("inf")) - now
        match await client.next(max(0.01, wait_s)):
            case LinkUp():
                is_linked = True
                if acknowledged:
                    client.publish(request)  # what was said meanwhile is said again
                asked_at = min(asked_at, time.monotonic())
            case LinkDown():
                is_linked = False
            case Heard(message=LeaseRecord() as lease):
                heard_at = time.monotonic()
                coordinator = lease.node if lease.kind == "lease" else None
            case Heard(message=TaskStatus() as status):
                heard_at = time.monotonic()
                acknowledged = True
                if status.state == "rejected":
                    ends_at = min(ends_at, heard_at + REJECTED_AGAIN_S)
                elif status.is_final:
                    ends_at = heard_at + RESULT_AFTER_STATUS_S
                else:
                    ends_at = float("inf")
                if last != (status.state, status.attempt, status.node):
                    last = (status.state, status.attempt, status.node)
                    yield status
            case Heard(message=(TaskTokens() | TaskProgress()) as piece):
                heard_at = time.monotonic()
                acknowledged = True
                yield piece
            case Heard(message=TaskResult() as result):
                yield result
                return
            case _:
                pass


TASK_ROWS = (STATUS, STREAM, PROGRESS, RESULT, COORDINATOR)
"""What ``submit`` needs to hear."""


def _unacknowledged(client: MeshClient, coordinator: NodeId | None, is_linked: bool) -> str:
    if not is_linked:
        return f"no link to a broker for {ACK_TIMEOUT_S:.0f} s: {client.trouble or 'it does not answer'}"
    if coordinator is None:
        return "the broker answers, but no node coordinates: `edgemesh nodes` shows who is there"
    return f"{coordinator} coordinates, but did not take the task in {ACK_TIMEOUT_S:.0f} s: look at its log"


async def cancel_task(
    client: MeshClient, task: TaskId, timeout_s: float = 5.0
) -> TaskStatus | TaskResult | None:
    """Ask for the task's end; its final word, or ``None`` if none came in time.

    Repeats itself: a coordinator may change at this moment.
    """
    async with contextlib.aclosing(_repeated(client, CancelTask(task=task), timeout_s)) as heard:
        async for message in heard:
            match message:
                case TaskStatus(task=other) if other == task and message.is_final:
                    return message
                case TaskResult(task=other) if other == task:
                    return message
                case _:
                    pass
    return None


async def _repeated(
    client: MeshClient, question: CancelTask | ExplainTask, timeout_s: float
) -> AsyncGenerator[Message]:
    """Ask again and again, and tell what is heard meanwhile, until the time is over or the caller content."""
    until = time.monotonic() + timeout_s
    asked_at = 0.0
    is_linked = client.is_linked
    while (now := time.monotonic()) < until:
        if is_linked and now >= asked_at:
            client.publish(question)
            asked_at = now + ACK_EVERY_S
        match await client.next(min(until, max(asked_at, now + 0.05)) - now):
            case LinkUp():
                is_linked = True
            case LinkDown():
                is_linked = False
            case Heard(message=message):
                yield message
            case _:
                pass


EXPLAIN_ROWS = (WHY, COORDINATOR, STATUS)
"""What ``explain_task`` needs to hear."""


async def explain_task(client: MeshClient, task: TaskId, timeout_s: float = 10.0) -> TaskExplanation:
    """What the coordinator decided about the task, and why. Asks again until somebody answers.

    Raises:
        UnreachableError: Nobody does; the text says what is missing.
    """
    coordinator: NodeId | None = None
    status: TaskStatus | None = None  # retained; of a task that was refused it is all there is
    async with contextlib.aclosing(_repeated(client, ExplainTask(task=task), timeout_s)) as heard:
        async for message in heard:
            match message:
                case LeaseRecord(node=node, kind=kind):
                    coordinator = node if kind == "lease" else None
                case TaskStatus(task=other) if other == task:
                    status = message
                case TaskExplanation(task=other) if other == task:
                    if message.state is not None or status is None:
                        return message
                    return replace(message, state=status.state, reason=status.reason, kind=status.kind,
                                   value=status.value, node=status.node, attempt=status.attempt)  # fmt: skip
                case _:
                    pass
    if not client.is_linked:
        raise UnreachableError(f"no link to a broker: {client.trouble or 'it does not answer'}")
    if coordinator is None:
        raise UnreachableError("no node coordinates now: `edgemesh nodes` shows who is there")
    raise UnreachableError(f"{coordinator} coordinates, but does not explain: it may run an older version")


# ── looking ─────────────────────────────────────────────────────────────────────────────────────────

VIEW_ROWS = (STATE, INFO, METRICS, COORDINATOR, COSTS, STATUS, STREAM, PROGRESS, RESULT, EVENT)


async def snapshot(settings: Settings, state: StateDir, seconds: float = 2.5) -> View:
    """The mesh as it is now: as soon as every online node has reported, at the latest after ``seconds``.

    Raises:
        ConfigError, WrongKeyError, UnreachableError: As ``find_broker``, or the broker lets nobody in.
    """
    async with connected(settings, state, VIEW_ROWS) as client:
        builder = _builder(settings, state)
        until = time.monotonic() + ACK_TIMEOUT_S
        while (now := time.monotonic()) < until:
            event = await client.next(until - now)
            _feed(builder, client, event)
            if isinstance(event, LinkUp):
                until = time.monotonic() + seconds
            view = builder.view(time.monotonic())
            if view.link == "up" and _is_complete(view):
                return view
        view = builder.view(time.monotonic())
        if view.link != "up":
            raise UnreachableError(f"no link to the broker: {client.trouble or 'it does not answer'}")
        return view


def _is_complete(view: View) -> bool:
    online = [row for row in view.nodes if row.state in ("online", "draining")]
    return view.coordinator is not None and bool(online) and all(row.heard_s is not None for row in online)


async def watch(settings: Settings, state: StateDir, every_s: float = 1.0) -> AsyncGenerator[View, None]:
    """A picture every ``every_s`` seconds, until the caller stops.

    Raises:
        ConfigError, WrongKeyError, UnreachableError: As ``find_broker``.
    """
    async with connected(settings, state, VIEW_ROWS) as client:
        builder = _builder(settings, state)
        due_at = time.monotonic() + every_s
        while True:
            _feed(builder, client, await client.next(due_at - time.monotonic()))
            if time.monotonic() >= due_at:
                due_at += every_s
                yield builder.view(time.monotonic())


def _builder(settings: Settings, state: StateDir) -> ViewBuilder:
    try:
        fingerprint: str | None = known_key(settings, state).fingerprint
    except ConfigError:  # the site's own broker needs no key of ours
        fingerprint = None
    return ViewBuilder(mesh=settings.mesh, version=__version__, fingerprint=fingerprint)


def _feed(builder: ViewBuilder, client: MeshClient, event: Heard | LinkUp | LinkDown | None) -> None:
    now = time.monotonic()
    match event:
        case Heard(message=message, sender=sender):
            builder.apply(message, sender, now)
        case LinkUp() | LinkDown():
            broker = client.broker
            builder.use_broker(broker_text(broker) if broker else None, broker.host if broker else None)
            builder.learn(event, now)
        case None:
            pass


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────


async def drain_nodes(
    settings: Settings,
    state: StateDir,
    nodes: Sequence[NodeId],
    *,
    on: bool,
    leave: bool,
    timeout_s: float = 10.0,
) -> list[tuple[NodeId, str]]:
    """Tell nodes to drain, resume or leave; what each then says of itself.

    Raises:
        UnreachableError: A node does not answer, or is not in the mesh.
        ConfigError, WrongKeyError: As ``find_broker``.
    """
    wanted = ("draining", "left", "offline") if on else ("online",)
    said: dict[NodeId, str] = {}
    async with connected(settings, state, (STATE,)) as client:
        until = time.monotonic() + timeout_s
        asked_at = float("inf")
        while (now := time.monotonic()) < until:
            if now >= asked_at:
                for node in nodes:
                    if said.get(node) not in wanted:
                        client.publish(Drain(on=on, leave=leave), to=node)
                asked_at = now + ACK_EVERY_S
            match await client.next(min(until, asked_at) - now):
                case LinkUp():
                    asked_at = time.monotonic()
                case LinkDown():
                    asked_at = float("inf")
                case Heard(message=NodeState() as told) if told.node in nodes:
                    said[told.node] = told.state
                case _:
                    pass
            if all(said.get(node) in wanted for node in nodes):
                break
    silent = [node for node in nodes if said.get(node) not in wanted]
    if silent:
        raise UnreachableError(f"no answer from {', '.join(silent)}: `edgemesh nodes` shows who is there")
    return [(node, said[node]) for node in nodes]
