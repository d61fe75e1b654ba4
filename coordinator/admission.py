"""Whether to take a task at all, and if not, why and when to ask again. Pure.

Only what every node is known to be unable to do is refused here. What is uncertain (a worker still
joining, a prompt near the limit of the context) is admitted: the worker's exact check settles it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.cluster import Node, serves
from coordinator.placement import lacking_layers, listed
from mesh.messages import NodeInfo, Submit

__all__ = ["AdmissionConfig", "Admit", "Reject", "Verdict", "admit"]

# No tokenizer we know makes fewer than one token of 32 bytes of text people write (long words and runs
# of spaces reach 16), so a prompt above this many bytes per token of context cannot fit.
_BYTES_PER_TOKEN_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    open_max: int = 10_000
    """Tasks accepted and not settled: at about 2 KiB each, 20 MiB on the coordinator and on holders."""
    retry_after_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Admit:
    pass


@dataclass(frozen=True, slots=True)
class Reject:
    reason: str
    retry_after_s: float | None
    """``None``: asking again changes nothing."""


Verdict = Admit | Reject


def admit(submit: Submit, nodes: Iterable[Node], n_open: int, config: AdmissionConfig) -> Verdict:
    """Whether the mesh takes ``submit`` while ``n_open`` tasks are not settled yet."""
    if n_open >= config.open_max:
        return Reject(f"the queue is full ({n_open} tasks); try again later", config.retry_after_s)
    here = [node.info for node in nodes if node.is_present and node.info]
    computing = [info for info in here if info.slots]
    if not computing:
        return Admit()  # a worker may join before the deadline; nothing is known to be impossible
    with_model = [info for info in computing if serves(info.model, submit.model, info.also_called)]
    if not with_model:
        known = sorted({info.model for info in computing if info.model})
        return Reject(
            f"no node serves model {submit.model!r}; served here: {', '.join(known) or 'none yet'}", None
        )
    with_adapter = [info for info in with_model if submit.adapter is None or submit.adapter in info.adapters]
    if not with_adapter:
        names = sorted({name for info in with_model for name in info.adapters})
        return Reject(f"no node has adapter {submit.adapter!r}: those there are: {listed(names)}", None)
    if (lacking := lacking_layers(submit, with_adapter)) is not None and not _may_come(submit, here):
        return Reject(lacking, None)
    if not any(_may_fit(submit, info) for info in with_adapter):
        most = max(info.context_tokens or 0 for info in with_adapter)
        what = (
            f"prompt and max_tokens ({submit.max_tokens}) are" if submit.kind == "generate" else "a text is"
        )
        return Reject(f"{what} longer than the context of {most} tokens", None)
    return Admit()


def _may_come(submit: Submit, infos: Iterable[NodeInfo]) -> bool:
    """Whether a node with the model is still loading, perhaps all of it."""
    return any(
        info.model is not None and not info.slots and serves(info.model, submit.model, info.also_called)
        for info in infos
    )


def _may_fit(submit: Submit, info: NodeInfo) -> bool:
    if info.context_tokens is None:
        return True
    texts = [submit.prompt or "", *(message.content for message in submit.messages)]
    if submit.kind == "score":  # each is read by itself, after the prompt, and none may be cut
        texts.append(max(submit.texts, key=len))
    n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    n_tokens_min = max(1, n_bytes // _BYTES_PER_TOKEN_MAX)
    return n_tokens_min + (submit.max_tokens if submit.kind == "generate" else 0) <= info.context_tokens
