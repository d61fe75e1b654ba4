"""Facts that cores and shells of one process tell one another (see ``mesh.core.Notify``)."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.ids import Epoch, NodeId
from mesh.messages import NodeInfo, NodeReport, NodeStanding, PeerHello

__all__ = [
    "AskPeers",
    "BrokerFailed",
    "BrokerHosted",
    "BrokerRef",
    "Deposed",
    "Elected",
    "Followed",
    "HostBroker",
    "HostRefused",
    "Leaving",
    "LinkDown",
    "LinkUp",
    "MemberChanged",
    "MemberRefused",
    "OwnInfo",
    "OwnReport",
    "OwnStanding",
    "PeerHeard",
    "PeerSilent",
    "StopBroker",
    "Superseded",
    "UseBroker",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerRef:
    """One broker the mesh could use. ``outranks`` is the rule by which two brokers become one."""

    epoch: int
    """Grows with every broker the mesh starts; 0 for the site's own, which never competes."""
    host: NodeId | None
    """The node that hosts it; ``None`` for the site's own."""
    addresses: tuple[str, ...]
    port: int
    tls: bool = True
    username: str | None = None
    password: str | None = None

    def outranks(self, other: BrokerRef) -> bool:
        """The newer broker wins; of two born at once, the one on the node whose id sorts first."""
        return (-self.epoch, self.host or "") < (-other.epoch, other.host or "")


@dataclass(frozen=True, slots=True)
class LinkUp:
    """This node is connected to a broker and subscribed. ``broker_epoch`` tells brokers apart.

    Every core publishes again whatever it keeps retained: nothing may exist only in the broker.
    """

    broker_epoch: int
    host: NodeId | None
    """The node that hosts this broker; ``None`` for the site's own broker."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection to the broker is gone. Silence now says nothing about the others."""

    host_is_dead: bool = False
    """The broker's host refused connections (not merely slow): its node is gone as well."""


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A node's standing changed. ``incarnation`` tells its lives apart."""

    node: NodeId
    standing: str
    """``alive``, ``suspect``, ``dead`` or ``left`` (``mesh.agreement.membership.Standing``)."""
    incarnation: int


@dataclass(frozen=True, slots=True)
class Elected:
    """This node coordinates from now on, under ``epoch``."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Deposed:
    """This node no longer coordinates; ``epoch`` is the one that ended."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Followed:
    """This node recognises the coordinator of ``epoch`` (another node)."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another process runs under this node's id and is newer; this process must stop."""

    boot: str


# ── between hosting and the shell that probes peers and runs the broker ─────────────────────────────


@dataclass(frozen=True, slots=True)
class PeerHeard:
    """Shell to hosting: a peer answered a probe of its data plane, at ``address``."""

    hello: PeerHello
    address: str


@dataclass(frozen=True, slots=True)
class HostRefused:
    """Hosting to membership: the process that hosted the broker is gone, so no last will came for it."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class PeerSilent:
    """Shell to hosting: a peer said goodbye, or did not answer at any of its addresses."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class AskPeers:
    """Hosting to shell: probe these peers now (``PeerHeard`` or ``PeerSilent`` follows for each)."""

    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class HostBroker:
    """Hosting to shell: start a broker here; ``BrokerHosted`` or ``BrokerFailed`` follows."""

    epoch: int


@dataclass(frozen=True, slots=True)
class BrokerHosted:
    """Shell to hosting: the broker listens."""

    broker: BrokerRef


@dataclass(frozen=True, slots=True)
class BrokerFailed:
    """Shell to hosting: it did not start, or it ended by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopBroker:
    """Hosting to shell: everybody moved to a better one."""


@dataclass(frozen=True, slots=True)
class UseBroker:
    """Hosting to shell: connect (or move) to this broker."""

    broker: BrokerRef


@dataclass(frozen=True, slots=True)
class MemberRefused:
    """The member table is full: ``node`` and further newcomers are not known here until one is forgotten."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Leaving:
    """Shell to cores: this process says goodbye. A coordinator resigns; membership announces ``left``."""


@dataclass(frozen=True, slots=True)
class OwnInfo:
    """Shell to membership: what this node is has changed; the others must hear it."""

    info: NodeInfo


@dataclass(frozen=True, slots=True)
class OwnReport:
    """Shell to membership, about once a second: how this node is doing."""

    report: NodeReport


@dataclass(frozen=True, slots=True)
class OwnStanding:
    """Shell to membership: this node drains, takes work again, or leaves."""

    state: NodeStanding
