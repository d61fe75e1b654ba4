"""Facts about the mesh's memory, between the core that knows it (``mesh.cache.sharding``) and its shell."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.cache.ring import RingSpec, RingView
from mesh.ids import NodeId
from mesh.messages import CatalogueWhole

__all__ = [
    "CatalogueFetched",
    "CatalogueRefused",
    "DrawView",
    "FetchCatalogue",
    "HeldChanged",
    "RingChanged",
    "ViewDrawn",
]


@dataclass(frozen=True, slots=True)
class HeldChanged:
    """Shell to core: this node's store holds these keys now, and has let go of those."""

    added: tuple[bytes, ...] = ()
    dropped: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class DrawView:
    """Core to shell: draw this view, in a thread (20 ms a member); ``ViewDrawn`` follows.

    A later one replaces an earlier: of several that wait, only the last need be drawn.
    """

    spec: RingSpec


@dataclass(frozen=True, slots=True)
class ViewDrawn:
    """Shell to core: the view that was asked for."""

    view: RingView


@dataclass(frozen=True, slots=True)
class RingChanged:
    """Core to shell: from now on this view says where blocks belong."""

    view: RingView


@dataclass(frozen=True, slots=True)
class FetchCatalogue:
    """Core to shell: get this node's whole catalogue from its data plane; ``CatalogueFetched`` follows."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class CatalogueFetched:
    """Shell to core: what came; ``None``: the node did not answer, or not with a catalogue."""

    node: NodeId
    whole: CatalogueWhole | None


@dataclass(frozen=True, slots=True)
class CatalogueRefused:
    """Core to shell, for the log: the node claims more than it may, or there is no room for one more."""

    node: NodeId
