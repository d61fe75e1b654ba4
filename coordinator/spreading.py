"""Has an adapter pulled to a node that is free, when those who have it are not.

Small adapters are everywhere by themselves. A large one is where it was made or asked for; a task that wants
it waits until a node that has it is free. Meanwhile the coordinator asks one node that could serve it, and
is free, to pull it: once that node says that it has it, the task is placed there like any other. So
placement knows nothing of pulls, and a pull that fails costs the task nothing but its hope.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from coordinator.cluster import Node
from coordinator.placement import has_what_it_needs, held_layers
from coordinator.policy.work import needs_of
from coordinator.scheduler import Mode, Scheduler
from coordinator.task import Task
from mesh.agreement.versions import Versions
from mesh.core import FOREVER, Effect, Fact, Message, Send
from mesh.ids import NodeId
from mesh.messages import NodeInfo, PullAdapter, Submit
from mesh.messages.files import AdapterHeld

__all__ = ["Spreading", "where_to_pull"]

LOOK_EVERY_S = 1.0
TASKS_MAX = 256
"""Looked at, in order of arrival."""
WAITED_S = 0.5
"""A node that has the adapter and is nearly done is quicker than any pull."""
PULL_BYTES_PER_S = 2e6
"""A poor Wi-Fi link: who would not have it before the deadline is not asked."""
AGAIN_S = 20.0
ASKED_MAX = 1024


class Spreading:
    """Acts while this node coordinates."""

    def __init__(self, scheduler: Scheduler, versions: Versions) -> None:
        self._scheduler = scheduler
        self._versions = versions
        self._look_at = 0.0
        self._asked: dict[tuple[NodeId, str], float] = {}

    @property
    def wake_at(self) -> float:
        return self._look_at if self._scheduler.mode is Mode.ACTIVE else FOREVER

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        return []

    def tick(self, now: float) -> list[Effect]:
        if self._scheduler.mode is not Mode.ACTIVE or now < self._look_at:
            return []
        self._look_at = now + LOOK_EVERY_S
        effects: list[Effect] = []
        nodes = list(self._scheduler.cluster)
        for held, submit in self._waited_for(now):
            node = where_to_pull(held, submit, nodes, self._versions)
            if node is None or now < self._asked.get((node, held.digest), 0.0):
                continue
            self._asked.pop((node, held.digest), None)
            self._asked[node, held.digest] = now + AGAIN_S
            if len(self._asked) > ASKED_MAX:
                del self._asked[next(iter(self._asked))]
            effects.append(Send(node, PullAdapter(name=held.name, digest=held.digest)))
        return effects

    def _waited_for(self, now: float) -> Iterator[tuple[AdapterHeld, Submit]]:
        """Adapters of tasks that wait and could still wait for a pull, each once."""
        seen: set[str] = set()
        for task in islice(self._scheduler.waiting(), TASKS_MAX):
            name = task.submit.adapter
            if name is None or name in seen or now - task.accepted_at < WAITED_S:
                continue
            seen.add(name)
            newest = self._versions.newest.get(name)
            held = newest.held if newest is not None else None
            if held is not None and _has_time(task, held, now):
                yield held, task.submit


def where_to_pull(
    held: AdapterHeld, submit: Submit, nodes: Iterable[Node], versions: Versions
) -> NodeId | None:
    """The node to pull ``held`` for a task; ``None`` if one that has it is free, or none could.

    A node with the top layers only is not asked: what an adapter changes may lie below them.
    """
    able = [
        (node, node.info)
        for node in nodes
        if node.may_start and node.info is not None and _could_run(submit, node.info)
    ]
    if any(held.name in info.adapters and _is_free(node) for node, info in able):
        return None
    free = [
        node
        for node, info in able
        if held.name not in info.adapters and info.holds == "all" and _is_free(node)
    ]
    fitting = [node for node in free if _base_of(node.id, versions) in _bases(held)]
    return min(fitting, key=lambda node: (_running(node), node.id)).id if fitting else None


def _could_run(submit: Submit, info: NodeInfo) -> bool:
    """Whether the node could run the task, if it had the adapter."""
    adapters = [*info.adapters, submit.adapter or ""]
    return has_what_it_needs(
        info.node, info.model, info.also_called, adapters, needs_of(submit), held_layers(info)
    )


def _has_time(task: Task, held: AdapterHeld, now: float) -> bool:
    return task.deadline_at - now > held.bytes / PULL_BYTES_PER_S + LOOK_EVERY_S


def _base_of(node: NodeId, versions: Versions) -> str | None:
    files = versions.of(node)
    return files.base if files is not None else None


def _bases(held: AdapterHeld) -> tuple[str, ...]:
    return (held.base,) if held.base is not None else ()


def _is_free(node: Node) -> bool:
    return _running(node) < node.slots


def _running(node: Node) -> int:
    return node.report.running if node.report is not None else 0
