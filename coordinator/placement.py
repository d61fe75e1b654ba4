"""Who could do a task at all, and why nobody can now. Who gets it is ``coordinator.policy``'s to say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from coordinator.cluster import Node, serves
from coordinator.policy.work import Needs, needs_of
from mesh.ids import NodeId
from mesh.messages import NodeInfo, Submit

__all__ = ["HOLDS_ALL", "has_what_it_needs", "held_layers", "lacking_layers", "listed", "why_waiting"]

HOLDS_ALL: Final = 1 << 20
"""Layers of a node that holds the whole model."""

_WORDS_OF_MAX = 3  # nodes quoted: each says up to 200 bytes
_NAMES_MAX = 20


def has_what_it_needs(
    node: NodeId,
    model: str | None,
    also_called: Iterable[str],
    adapters: Collection[str],
    needs: Needs,
    n_layers: int = HOLDS_ALL,
) -> bool:
    """Whether a node that serves ``model`` and ``adapters`` may run a task with these needs.

    ``n_layers``: how many it holds at the top, see ``held_layers``.
    """
    return (
        serves(model, needs.model, also_called)
        and (HOLDS_ALL if needs.whole else needs.top_layers) <= n_layers
        and (needs.adapter is None or needs.adapter in adapters)
        and (not needs.holders or node in needs.holders)
    )


def held_layers(info: NodeInfo) -> int:
    """How many layers of its model a node has, counted from the top."""
    return HOLDS_ALL if info.holds == "all" else info.top_layers or 0


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
    if here and (lacking := lacking_layers(submit, [node.info for node in here if node.info])) is not None:
        return lacking
    holders = submit.tune.holders if submit.tune is not None else []
    if holders and not any(node.id in holders for node in here):
        return f"its data are on {listed(holders)}, and none of these can compute now"
    return None


def lacking_layers(submit: Submit, infos: Sequence[NodeInfo]) -> str | None:
    """Why none of these nodes holds enough of the model; ``None`` if one does."""
    needs, most = needs_of(submit), max(map(held_layers, infos), default=0)
    if needs.whole and most < HOLDS_ALL:
        return (
            f"a {submit.kind} task needs a node that holds the whole model, and those here hold its top "
            f"{most} layers (--hold top): start a node with the memory for it"
        )
    if needs.top_layers > most:
        return (
            f"it adapts the top {needs.top_layers} layers, and no node holds more than {most}: ask for fewer "
            "(--top-layers), or start a node that holds the whole model"
        )
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
        node.id, info.model, info.also_called, info.adapters, needs_of(submit), held_layers(info)
    )
