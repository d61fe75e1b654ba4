"""Names that mean something: which node, which mesh, which task, which epoch.

Ids appear in topics, certificates and file names, so they are lower-case DNS labels: no separator of
MQTT (``/ + #``), of a file system or of a shell can hide in one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import NewType

__all__ = ["Boot", "Epoch", "MeshName", "NodeId", "TaskId", "is_id", "new_boot", "new_node_id", "new_task_id"]

NodeId = NewType("NodeId", str)
"""Lasts as long as the node's state directory; never reused for another node."""

Boot = NewType("Boot", str)
"""Drawn at random by every process start: tells two lives, or two clones, of one node apart."""

MeshName = NewType("MeshName", str)
TaskId = NewType("TaskId", str)

ID_LENGTH_MAX = 63  # the length of a DNS label, so that a node id can be an mDNS instance name
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """The number of a lease grant, and the fencing token every coordinator command carries.

    The claimant's name is part of it, so two sides of a split network that reach the same ``term``
    still hold different epochs, and every receiver can put any two in order. ``term`` is durable
    and only grows on each node.
    """

    term: int
    node: NodeId

    def __post_init__(self) -> None:
        if not 0 <= self.term < 2**53:  # 2**53: exact in JSON readers that use doubles
            raise ValueError(f"term must be from 0 to 2**53 - 1, got {self.term}")
        if self.term and not is_id(self.node):
            raise ValueError(f"epoch of an impossible node {self.node!r}")

    def __str__(self) -> str:
        return f"{self.term}@{self.node}" if self.term else "0"


EPOCH_ZERO = Epoch(0, NodeId(""))
"""Older than every claim: nobody has coordinated yet."""


def is_id(text: str) -> bool:
    """Whether ``text`` may stand in a topic, a certificate name and a file name."""
    return len(text) <= ID_LENGTH_MAX and _ID.fullmatch(text) is not None


def new_node_id(hostname: str, rng: Random) -> NodeId:
    """A readable id such as ``pi-4-3f9a2c``: the host's own name and 24 random bits."""
    slug = re.sub(r"[^a-z0-9]+", "-", hostname.lower()).strip("-")[:40].strip("-") or "node"
    return NodeId(f"{slug}-{rng.getrandbits(24):06x}")


def new_boot(rng: Random) -> Boot:
    return Boot(f"{rng.getrandbits(32):08x}")


def new_task_id(rng: Random) -> TaskId:
    return TaskId(f"t-{rng.getrandbits(48):012x}")
