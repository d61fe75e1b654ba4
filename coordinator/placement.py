"""Which waiting task goes to which node now. Pure, deterministic, and behind the scheduler core.

``least_loaded`` is the first policy: tasks in order of arrival, each to the node with the smallest share
of its slots taken. Another policy is another function of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.cluster import Node, serves
from mesh.ids import NodeId, TaskId
from mesh.messages import Submit

__all__ = ["Placement", "Policy", "Waiting", "least_loaded", "listed", "why_waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A task that could start now."""

    task: TaskId
    submit: Submit
    avoid: frozenset[NodeId] = frozenset()
    """Nodes that refused or failed it a moment ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    task: TaskId
    node: NodeId
    reason: str


_WORDS_OF_MAX = 3  # nodes quoted: each says up to 200 bytes
_NAMES_MAX = 20

Policy = Callable[[Iterable[Waiting], Sequence[Node], Mapping[NodeId, int]], list[Placement]]
"""(waiting tasks in order, nodes, attempts that run on each node) -> what to start now."""


def least_loaded(
    waiting: Iterable[Waiting], nodes: Sequence[Node], in_flight: Mapping[NodeId, int]
) -> list[Placement]:
    """Ties go to the node with more slots, then to the one whose id sorts first.

    Cost: one pass over the waiting tasks until no slot is free, times the nodes with a free slot.
    """
    free = {node.id: node for node in nodes if node.may_start and in_flight.get(node.id, 0) < node.slots}
    taken = {node: in_flight.get(node, 0) for node in free}
    placements: list[Placement] = []
    for task in waiting:
        if not free:
            break
        able = [node for node in free.values() if node.id not in task.avoid and _is_able(node, task.submit)]
        if not able:
            continue
        best = min(able, key=lambda node: (taken[node.id] / node.slots, -node.slots, node.id))
        placements.append(
            Placement(task=task.task, node=best.id, reason=f"{taken[best.id]} of {best.slots} slots taken")
        )
        taken[best.id] += 1
        if taken[best.id] >= best.slots:
            del free[best.id]
    return placements


def why_waiting(submit: Submit, nodes: Iterable[Node]) -> str | None:
    """Why nobody can start it now, in the nodes' own words; ``None`` if somebody can, slots aside."""
    known = list(nodes)
    if any(node.may_start and _is_able(node, submit) for node in known):
        return None
    if (lacking := _what_lacks(submit, known)) is not None:
        return lacking
    idle = [node for node in known if node.is_present and not node.may_start]
    said = [f"{node.id}: {node.report.activity}" for node in sorted(idle, key=_id_of) if node.report]
    others = f" and {len(said) - _WORDS_OF_MAX} more" if len(said) > _WORDS_OF_MAX else ""
    words = f" ({'; '.join(said[:_WORDS_OF_MAX])}{others})" if said else ""
    return f"no node can start it yet{words}"


def _what_lacks(submit: Submit, nodes: Iterable[Node]) -> str | None:
    """What no node has that is here; ``None`` where waiting for one to be ready is enough."""
    here = [node for node in nodes if node.is_present and node.info is not None and node.slots]
    names = sorted({name for node in here if node.info for name in node.info.adapters})
    if here and submit.adapter is not None and submit.adapter not in names:
        return f"no node has adapter {submit.adapter!r}: those there are: {listed(names)}"
    holders = submit.tune.holders if submit.tune is not None else []
    if holders and not any(node.id in holders for node in here):
        return f"its data are on {listed(holders)}, and none of these can compute now"
    return None


def listed(names: Sequence[str]) -> str:
    """Some names in a sentence."""
    more = f" and {len(names) - _NAMES_MAX} more" if len(names) > _NAMES_MAX else ""
    return (", ".join(names[:_NAMES_MAX]) or "none") + more


def _id_of(node: Node) -> NodeId:
    return node.id


def _is_able(node: Node, submit: Submit) -> bool:
    info = node.info
    return (
        info is not None
        and serves(info.model, submit.model, info.also_called)
        and (submit.adapter is None or submit.adapter in info.adapters)
        and (submit.tune is None or not submit.tune.holders or node.id in submit.tune.holders)
    )
