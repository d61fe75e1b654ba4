"""Makes what connects a node to the others, as its settings say: data plane, bus, broker, own info."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mesh.brokers.contract import BrokerSettings
from mesh.core import Fact
from mesh.messages import NodeInfo, NodeState, PeerHello
from mesh.packets import node_filters
from mesh.topics import COSTS, EVENT, PROGRESS, RESULT, STATUS, STREAM, access_list
from mesh.transport.identity import Identity
from mesh.transport.interfaces import local_addresses
from mesh.transport.mqtt import MqttBus
from mesh.transport.streams import DEFAULT_PORT, PeerServer, RouteDef
from mesh.wire import PROTOCOL_MAX, PROTOCOL_MIN
from node import __version__
from node.broker_host import BrokerHost
from node.profile import Profile
from node.settings import Settings
from node.state import NodeSlot

__all__ = ["broker_host_of", "bus_of", "info_of", "server_of"]


def info_of(slot: NodeSlot, device: Profile, model: str | None, cache_bytes: int) -> NodeInfo:
    """Before anything is known but the machine: no addresses, no engine."""
    return NodeInfo(
        node=slot.node, incarnation=slot.incarnation, hostname=device.hostname, version=__version__,
        protocol_min=PROTOCOL_MIN, protocol_max=PROTOCOL_MAX, addresses=[], port=0,
        system=device.system, device="none", n_cpus=device.n_cpus,
        memory_bytes=device.memory_bytes, model=model, adapters=[], slots=0,
        cache_bytes=cache_bytes,
    )  # fmt: skip


def server_of(
    settings: Settings, identity: Identity, hello: Callable[[], PeerHello], routes: Iterable[RouteDef]
) -> PeerServer:
    return PeerServer(
        identity.server_context(),
        hello,
        hosts=local_addresses(settings.interfaces) if settings.interfaces else None,
        port=settings.port or DEFAULT_PORT,
        routes=routes,
    )


def bus_of(
    settings: Settings,
    identity: Identity,
    me: NodeState,
    *,
    will: Callable[[], NodeState],
    hears_all: bool,
) -> MqttBus:
    """``hears_all``: for the terminal view, which shows the work of the whole mesh."""
    rows = [STATUS, STREAM, PROGRESS, RESULT, EVENT, COSTS] if hears_all else []
    return MqttBus(
        mesh=settings.mesh,
        me=me.node,
        boot=me.boot,
        filters=[*node_filters(settings.mesh, me.node), *(row.filter(settings.mesh) for row in rows)],
        will=will,
        tls=identity.broker_context,
    )


def broker_host_of(
    settings: Settings, identity: Identity, slot: NodeSlot, *, learn: Callable[[Fact], None]
) -> BrokerHost:
    return BrokerHost(
        me=slot.node,
        settings=BrokerSettings(
            mesh=settings.mesh,
            identity=identity,
            plain_port=settings.plain_port if settings.plain else None,
            directory=slot.path / "broker",
            kind=settings.broker_kind,
            access_list=access_list(settings.mesh),
        ),
        listen=lambda: _listen_addresses(settings),
        advertised=lambda: local_addresses(settings.interfaces, link_local=False),
        learn=learn,
    )


def _listen_addresses(settings: Settings) -> tuple[str, ...]:
    """Everywhere, so that a network that comes later is served too; or where the operator said."""
    here = local_addresses(settings.interfaces)
    if settings.interfaces:
        return here
    return ("0.0.0.0", "::") if any(":" in address for address in here) else ("0.0.0.0",)
