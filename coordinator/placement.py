"""Who could do a task at all, and why nobody can now. Who gets it is ``coordinator.policy``'s to say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from coordinator.cluster import Node, serves
from coordinator.policy.work import Needs, needs_of
from mesh.ids import NodeId
from mesh.messages import Submit

__all__ = ["has_what_it_needs", "listed", "why_waiting"]

_WORDS_OF_MAX = 3  # nodes quoted: each says up to 200 bytes
_NAMES_MAX = 20


def has_what_it_needs(
    node: NodeId, model: str | None, also_called: Iterable[str], adapters: Collection[str], needs: Needs
) -> bool:
    """Whether a node that serves ``model`` and ``adapters`` may run a task with these needs."""
    return (
        serves(model, needs.model, also_called)
        and (needs.adapter is None or needs.adapter in adapters)
        and (not needs.holders or node in needs.holders)
    )


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
    return info is not None and has_what_it_needs(
        node.id, info.model, info.also_called, info.adapters, needs_of(submit)
    )
