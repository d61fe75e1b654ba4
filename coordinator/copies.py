"""Which other nodes have a task on disk, and how a second copy comes about.

An open task needs one up-to-date copy besides the coordinator's; a settled one as well, and every node
that has the open version is told of the settlement, so that no old disk brings the task back to life.
``Hold`` is repeated until ``Held``, every second time at the next candidate, so a holder that does not
answer delays an acknowledgement by seconds, not for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.cluster import Cluster
from coordinator.ledger import Ledger
from coordinator.task import Task, record_of
from mesh.core import FOREVER, Effect, Send
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import Hold

__all__ = ["Copies", "CopiesConfig", "rendezvous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesConfig:
    hold_every_s: float = 1.0
    repairs_per_s: float = 200.0
    """When a holder dies its records are copied anew no faster: at 4 KiB a record, 0.8 MB/s."""
    stale_told_max: int = 8
    """Nodes told of one settlement at once; more than a few had the task only after many failovers."""


def rendezvous(task: TaskId, nodes: list[NodeId]) -> list[NodeId]:
    """``nodes`` in this task's own order of preference (highest random weight, Thaler 1998).

    When one node goes, only the tasks it held move.
    """
    return sorted(nodes, key=lambda node: hashlib.blake2b(f"{task}\0{node}".encode(), digest_size=8).digest())


class Copies:
    def __init__(self, cluster: Cluster, config: CopiesConfig) -> None:
        self._cluster = cluster
        self._config = config

    @property
    def is_alone(self) -> bool:
        """No second node exists that could hold anything."""
        return not self._cluster.others

    def is_safe(self, task: Task) -> bool:
        """The present version is on a second disk, or there is no second node."""
        return any(task.copies.values()) or self.is_alone

    def attend(self, task: Task, epoch: Epoch, now: float) -> list[Effect]:
        """Send ``Hold`` if it is time; sets when to look again."""
        if task.hold_at > now:
            return []
        targets = self._targets(task)
        if not targets:
            task.hold_at = FOREVER
            return []
        task.holds_sent += 1
        task.hold_at = now + self._config.hold_every_s
        for node in targets:
            task.copies.setdefault(node, False)  # it may have it from now on, whether or not Held arrives
        hold = Hold(epoch=epoch, record=record_of(task, epoch, now))
        return [Send(node, hold) for node in targets]

    def held(self, task: Task, by: NodeId) -> None:
        """``by`` has the present version on disk."""
        task.copies[by] = True
        task.holds_sent = 0
        if not self._targets(task):
            task.hold_at = FOREVER

    def gone(self, node: NodeId, ledger: Ledger, now: float) -> None:
        """A node is dead or left: what only it held is copied elsewhere, at a limited rate."""
        self._repair(ledger, now, lambda task: task.copies.pop(node, None) is not None)

    def came(self, ledger: Ledger, now: float) -> None:
        """A node appeared: what has no second copy gets one."""
        self._repair(ledger, now, lambda task: task.hold_at == FOREVER)

    def _repair(self, ledger: Ledger, now: float, is_touched: Callable[[Task], bool]) -> None:
        at = now
        for task in ledger:
            if is_touched(task) and not any(task.copies.values()):
                task.hold_at = min(task.hold_at, at)
                ledger.arm(task, task.hold_at)
                at += 1 / self._config.repairs_per_s

    def _targets(self, task: Task) -> list[NodeId]:
        has_copy = any(task.copies.values())
        if task.is_open:
            return [] if has_copy else self._next(task, self._cluster.holders)
        stale = sorted(n for n, fresh in task.copies.items() if not fresh and self._cluster.is_present(n))
        stale = stale[: self._config.stale_told_max]
        if has_copy or (stale and task.holds_sent < 2):
            return stale
        return stale + self._next(task, [node for node in self._cluster.holders if node not in stale])

    def _next(self, task: Task, candidates: list[NodeId]) -> list[NodeId]:
        """Each candidate twice, then the one after it."""
        ranked = rendezvous(task.id, candidates)
        return [ranked[task.holds_sent // 2 % len(ranked)]] if ranked else []
