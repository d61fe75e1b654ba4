"""The picture of the mesh that admission and placement decide by: who is here, what each node can do.

Built from what nodes publish (``NodeInfo``, ``NodeReport``, ``NodeState``) and from what membership
believes (``MemberChanged``). Membership alone says who is alive; a node's own word says what it can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mesh.facts import MemberChanged
from mesh.ids import NodeId
from mesh.messages import NodeForgotten, NodeInfo, NodeReport, NodeState

__all__ = ["Cluster", "Node", "serves"]

# Membership keeps full tables to about 1,000 nodes; four times that many names is somebody's mistake.
_NODES_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node as the coordinator sees it."""

    id: NodeId
    standing: str = "unknown"
    """As membership says; ``unknown`` until it says anything."""
    incarnation: int = -1
    info: NodeInfo | None = None
    report: NodeReport | None = None
    is_draining: bool = False

    @property
    def is_present(self) -> bool:
        """Alive as far as anybody knows: a suspect is counted until it is declared dead."""
        return self.standing in ("alive", "suspect")

    @property
    def slots(self) -> int:
        return self.info.slots if self.info else 0

    @property
    def may_start(self) -> bool:
        """Able to take an attempt now, slots aside."""
        is_ready = self.report is not None and self.report.ready
        return self.standing == "alive" and is_ready and not self.is_draining and self.slots > 0


def serves(model: str | None, wanted: str | None, also_called: Iterable[str] = ()) -> bool:
    """Whether a node with ``model``, which may have more names, may answer a task that wants ``wanted``.

    Names match without regard to case and with or without the hub's owner part.

    >>> serves("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct")
    True
    """
    if wanted is None:
        return True
    if model is None:
        return False
    return any(_is_name_of(name.casefold(), wanted.casefold()) for name in (model, *also_called))


def _is_name_of(have: str, want: str) -> bool:
    return (
        have == want
        or ("/" not in want and have.rpartition("/")[2] == want)
        or have == want.rpartition("/")[2]
    )


class Cluster:
    """All nodes known. The node itself counts as alive whatever membership says of it."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._nodes: dict[NodeId, Node] = {me: Node(id=me, standing="alive", incarnation=0)}
        self._changed: dict[NodeId, None] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, node: NodeId) -> Node:
        return self._nodes.get(node) or Node(id=node)

    def is_present(self, node: NodeId) -> bool:
        return self.get(node).is_present

    @property
    def others(self) -> list[NodeId]:
        """Nodes besides this one that are not known to be gone, in the order of their ids."""
        return sorted(node.id for node in self if node.is_present and node.id != self._me)

    @property
    def holders(self) -> list[NodeId]:
        """Nodes besides this one that can be trusted with a copy now, in the order of their ids."""
        return sorted(node.id for node in self if node.standing == "alive" and node.id != self._me)

    def watch(self) -> dict[NodeId, None]:
        """Every node known, and from now on whoever changes: the one reader takes out what it has seen."""
        self._changed = dict.fromkeys(self._nodes)
        return self._changed

    def see(self, message: NodeInfo | NodeReport | NodeState | NodeForgotten) -> None:
        """Take in what a node says of itself; an earlier life's words are dropped."""
        node = self.get(message.node)
        match message:
            case NodeForgotten():
                if not node.is_present:
                    self._nodes.pop(message.node, None)
                    self._changed[message.node] = None
            case NodeInfo():
                if node.info is None or message.incarnation >= node.info.incarnation:
                    self._put(replace(node, info=message))
            case NodeReport():
                if node.report is None or message.incarnation >= node.report.incarnation:
                    self._put(replace(node, report=message))
            case NodeState():
                if message.incarnation >= node.incarnation:
                    self._put(replace(node, is_draining=message.state == "draining"))

    def change(self, fact: MemberChanged) -> Node:
        """Take in what membership says; the node as it was before comes back."""
        before = self.get(fact.node)
        if fact.node != self._me and fact.incarnation >= before.incarnation:
            self._put(replace(before, standing=fact.standing, incarnation=fact.incarnation))
        return before

    def _put(self, node: Node) -> None:
        if node.id not in self._nodes and len(self._nodes) >= _NODES_MAX:
            gone = next((known.id for known in self if not known.is_present), None)
            if gone is None:
                return
            del self._nodes[gone]
            self._changed[gone] = None
        self._nodes[node.id] = node
        self._changed[node.id] = None
