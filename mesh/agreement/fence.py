"""The highest epoch this node has claimed or obeyed: one number, durable, that only grows.

Every core of a node that takes commands shares one ``Fence``. A command whose epoch is lower is
refused, so a coordinator that was stopped, cut off or restored from an old disk can do no harm
(Kleppmann, "How to do distributed locking", 2016: the *receiver* must check).
"""

from __future__ import annotations

from mesh.core import Effect, Save
from mesh.ids import EPOCH_ZERO, Epoch
from mesh.messages import EpochSeen

__all__ = ["FENCE_KEY", "Fence"]

FENCE_KEY = "fence"


class Fence:
    """Shared by the cores of one node; ``seen`` is what the disk says."""

    def __init__(self, seen: Epoch = EPOCH_ZERO) -> None:
        self.seen = seen

    def admits(self, epoch: Epoch) -> bool:
        return epoch >= self.seen

    def raise_to(self, epoch: Epoch) -> list[Effect]:
        """Never obey less than ``epoch`` again, over restarts too. Lower epochs change nothing."""
        if epoch <= self.seen:
            return []
        self.seen = epoch
        return [Save(FENCE_KEY, EpochSeen(epoch=epoch))]
