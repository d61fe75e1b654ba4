"""Who coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh.ids import Epoch, NodeId
from mesh.messages.checks import check_count, check_positive

__all__ = ["EpochHint", "EpochSeen", "LeaseKind", "LeaseRecord"]

LeaseKind = Literal["claim", "lease", "resigned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """On the one retained coordinator topic, whose order the broker fixes for everybody.

    ``claim`` asks for an epoch, ``lease`` renews it, ``resigned`` gives it up at once.
    """

    kind: LeaseKind
    epoch: Epoch
    ttl_s: float
    beat: int
    """Counts this epoch's messages, so that the coordinator recognises its own echo."""

    def __post_init__(self) -> None:
        check_positive("ttl_s", self.ttl_s)
        check_count("beat", self.beat)
        if self.epoch.term < 1:
            raise ValueError("a lease has an epoch of term 1 or more")

    @property
    def node(self) -> NodeId:
        return self.epoch.node


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochHint:
    """To a coordinator whose epoch is older than one the sender has obeyed: claim above ``seen``."""

    seen: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSeen:
    """Durable, never sent: the highest epoch this node has claimed or obeyed."""

    epoch: Epoch
