"""What one coordination works on: made at an election, dropped when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.cluster import Cluster
from coordinator.copies import Copies
from coordinator.ledger import Ledger
from coordinator.store import RecordStore
from mesh.ids import Epoch, NodeId

__all__ = ["Term"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Shared by the parts of the scheduler core. Cluster and store outlive it; the ledger does not."""

    me: NodeId
    epoch: Epoch
    cluster: Cluster
    store: RecordStore
    copies: Copies
    ledger: Ledger = field(default_factory=Ledger)
