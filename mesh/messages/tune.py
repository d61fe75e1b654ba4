"""What a tuning task asks for and how it is getting on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from mesh.ids import NodeId, TaskId
from mesh.messages.checks import (
    check_count,
    check_fraction,
    check_id,
    check_positive,
    check_seconds,
    check_text,
)

__all__ = ["INLINE_DATA_BYTES_MAX", "TaskProgress", "TunePart", "TuneSpec", "TuneTask", "features_identity"]

TuneTask = Literal["classify", "chat", "complete"]

# A submission and an answer share one frame with room to spare (see ``mesh.wire``). Larger data stays a
# file on the nodes that hold it.
INLINE_DATA_BYTES_MAX = 192 * 1024


NODES_MAX = 64
"""Parts of one job; beyond some tens, averaging costs more than the further node brings."""
_STATE_DIGITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePart:
    """Which step of a job that is trained on several nodes a task is; made by the coordinator.

    ::

        begin ──▶ train 0, 1, … N-1 (round 0) ──▶ train 0, 1, … (round 1) ──▶ … ──▶ merge

    Every step of a round starts from the mean of the states that the steps of the round before have left.
    """

    parent: TaskId
    stage: Literal["begin", "train", "merge"]
    """``begin`` chooses the layers and settles how features are computed; ``merge`` makes the adapter."""
    index: int = 0
    """Which of the ``TuneSpec.nodes`` parts of the records this one trains on."""
    round: int = 0
    profile: str = ""
    """How features are computed, the same for all parts; empty for ``begin``."""
    threads: int = 1
    """Of every part, wherever it is: sums are split among threads, and their number is part of the result."""
    starts: list[str] = field(default_factory=list)
    """Digests of the states of the round before, in the order of parts; empty in round 0."""

    def __post_init__(self) -> None:
        check_id("parent", self.parent)
        check_count("index", self.index, NODES_MAX - 1)
        check_count("round", self.round, 10_000)
        check_count("threads", self.threads, 1024, least=1)
        check_text("profile", self.profile, 512)
        if len(self.starts) > NODES_MAX:
            raise ValueError(f"at most {NODES_MAX} starts")
        for start in self.starts:
            if not (len(start) == _STATE_DIGITS and set(start) <= set("0123456789abcdef")):
                raise ValueError(f"starts must be {_STATE_DIGITS} hexadecimal digits each")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSpec:
    """Train one adapter. The same spec on the same data and backbone gives the same adapter, to the bit.

    The records are JSON lines: ``{"text", "label"}`` to classify, ``{"prompt", "completion"}`` to
    complete, ``{"messages"}`` to chat. They are either in ``data`` or, larger, in a file that ``holders``
    keep under ``data_sha256``.
    """

    adapter: str
    """The name under which it is served afterwards."""
    task: TuneTask = "classify"
    data: str | None = None
    data_sha256: str | None = None
    eval_data: str | None = None
    """Records that are never trained on: each epoch says how the adapter does on them."""
    eval_sha256: str | None = None
    holders: list[NodeId] = field(default_factory=list)
    """Nodes that have the files; empty if the data travel with the task."""
    skip_bad: bool = False
    """Leave out lines that cannot be read instead of refusing the job."""
    method: str = "lora"
    """A PEFT method, such as lora, dora, ia3, loha, oft or vera; a wrong one is told all there are."""
    top_layers: int | None = None
    """How many layers at the top are adapted; ``None``: chosen by a short trial (``auto``)."""
    targets: list[str] = field(default_factory=list)
    """Linear modules to adapt, such as ``q_proj``; empty: the method's default."""
    rank: int = 8
    alpha: float | None = None
    """LoRA's scale is ``alpha / rank``; ``None``: twice the rank."""
    epochs: int = 5
    learning_rate: float | None = None
    """``None``: the method's default."""
    batch: int = 16
    seed: int = 0
    max_tokens: int = 512
    """A longer record is cut at this many tokens."""
    feature_error: float = 0.0
    """Largest relative error accepted in a feature map; 0 = exact (raw)."""
    nodes: int = 1
    """Into so many parts the records are split, each trained on a node of its own where there are enough; the
    states are averaged after each epoch. Another number gives another adapter."""
    part: TunePart | None = None
    """Only of tasks that a coordinator makes for a job of several ``nodes``."""

    def __post_init__(self) -> None:
        check_adapter_name("adapter", self.adapter)
        if (self.data is None) == (self.data_sha256 is None):
            raise ValueError("give the records either in 'data' or by 'data_sha256', and not both")
        if self.eval_data is not None and self.eval_sha256 is not None:
            raise ValueError("give 'eval_data' or 'eval_sha256', not both")
        for name in ("data", "eval_data"):
            check_text(name, getattr(self, name), INLINE_DATA_BYTES_MAX)
        for name in ("data_sha256", "eval_sha256"):
            _check_sha256(name, getattr(self, name))
        if len(self.holders) > 256:
            raise ValueError("at most 256 holders")
        for holder in self.holders:
            check_id("holders", holder)
        if not 0 < len(self.method) <= 32:
            raise ValueError("method must be the name of a PEFT method, such as 'lora'")
        if self.top_layers is not None:
            check_count("top_layers", self.top_layers, 1024, least=1)
        if len(self.targets) > 32 or any(not 0 < len(name) <= 64 for name in self.targets):
            raise ValueError("targets takes at most 32 names of modules, such as 'q_proj'")
        check_count("rank", self.rank, 1024, least=1)
        check_positive("alpha", self.alpha)
        check_count("epochs", self.epochs, 10_000, least=1)
        check_positive("learning_rate", self.learning_rate)
        check_count("batch", self.batch, 4096, least=1)
        check_count("seed", self.seed, 2**63 - 1)
        check_count("max_tokens", self.max_tokens, 32_768, least=1)
        if not 0 <= self.feature_error < 1:
            raise ValueError(f"feature_error must be from 0 (exact) to below 1, got {self.feature_error}")
        check_count("nodes", self.nodes, NODES_MAX, least=1)
        if self.part is not None and self.part.index >= self.nodes:
            raise ValueError(f"part {self.part.index} of {self.nodes}")


def features_identity(spec: TuneSpec) -> str:
    """32 hexadecimal digits: specs with the same ones read the same features, given the same backbone.

    Which texts, how they become tokens, and at what cut they are read; nothing of how they are learned from.
    """
    whole: dict[str, object] = {
        "data": spec.data_sha256 or _sha256_of(spec.data),
        "eval": spec.eval_sha256 or _sha256_of(spec.eval_data),
        "task": spec.task,
        "max_tokens": spec.max_tokens,
        "skip_bad": spec.skip_bad,
        "is_activated": spec.method == "alora",  # its invocation is among the tokens
        "top_layers": spec.top_layers,
        "feature_error": spec.feature_error,
    }
    if spec.part is not None and spec.part.stage == "train":
        whole["part"] = [spec.part.index, spec.nodes, spec.seed]  # the seed splits the records
    canonical = json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def _sha256_of(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """How far a tuning attempt is. QoS 0: the next one replaces it, the result is complete.

    ``seq`` counts from 0 within one attempt. A new ``attempt`` carries on where the last one saved its
    state, so ``fraction`` may go back a little, and does not start over.
    """

    task: TaskId
    attempt: int
    seq: int
    phase: Literal["reading", "features", "choosing", "training", "saving"]
    fraction: float
    """Of the whole task, 0 to 1."""
    epoch: int = 0
    """Epochs completed."""
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    """Mean of the last steps."""
    metric: float | None = None
    """Accuracy (classify) or loss (chat, complete) on the evaluation records after the last epoch."""
    eta_s: float | None = None
    cache_hits: int = 0
    """Feature-map blocks found rather than computed."""
    cache_misses: int = 0
    text: str = ""
    """The same for people, such as why this number of layers was chosen."""

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_fraction("fraction", self.fraction)
        check_seconds("eta_s", self.eta_s)
        check_text("text", self.text, 2000)


def check_adapter_name(field: str, name: str) -> None:
    """Adapter names are directory names on every system and parts of topics.

    Raises:
        ValueError: It is none.
    """
    check_id(field, name)


def _check_sha256(name: str, value: str | None) -> None:
    if value is not None and not (len(value) == 64 and set(value) <= set("0123456789abcdef")):
        raise ValueError(f"{name} must be 64 hexadecimal digits")
