"""What a task asks for, counted in tokens and independent of the node that will do it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from coordinator.policy.tokens import TokenCounts
from mesh.ids import NodeId
from mesh.messages import Submit
from mesh.messages.task import TaskKind
from mesh.messages.tune import TuneSpec

__all__ = [
    "ANYTHING",
    "KINDS",
    "NEED_ALL_LAYERS",
    "PATIENCE",
    "Needs",
    "Work",
    "epochs_of",
    "needs_of",
    "size_of",
    "work_of",
]

KINDS: Final[tuple[TaskKind, ...]] = ("generate", "score", "classify", "embed", "tune", "features")

NEED_ALL_LAYERS: Final[frozenset[TaskKind]] = frozenset({"generate", "features"})

PATIENCE: Final = 6.0
"""Where others run beside it, tuning stands back while the time to its deadline is more than so many times
what is left of it; then it takes its equal share, which is a sixth of the node's time or more."""

_FILE_TOKENS: Final = 20_000
"""Of records that stay in a file on their holders: a small job, about 300 texts of a paragraph."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a node must have before it may run the task. Equal needs are scored together."""

    model: str | None = None
    adapter: str | None = None
    holders: frozenset[NodeId] = frozenset()
    """Nodes that have the data; empty: any node will do."""
    whole: bool = False
    """All layers of the model: it writes answers, or makes feature maps."""
    top_layers: int = 0
    """At least so many layers at the top."""
    profile: str = ""
    """Computes features so, and no other way; empty: as it likes."""


ANYTHING: Final = Needs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Amounts by part; ``coordinator.policy.cost`` turns them into seconds on a node.

    A node that did work with the same ``reuses`` a moment ago is spared the adapter load and the features.
    """

    kind: TaskKind = "generate"
    n_prompt_tokens: float = 0.0
    """Read before the answer: the prompt, or all texts."""
    n_tokens: float = 0.0
    """Expected length of the answer."""
    n_feature_tokens: float = 0.0
    """Tuning: tokens whose feature maps are made once."""
    n_feature_bytes: float = 0.0
    """Tuning: what the same feature maps take, for a node that fetches them; 0 where nobody knows."""
    n_tune_tokens: float = 0.0
    """Tuning: tokens times the epochs that are left."""
    n_adapter_loads: float = 0.0
    """1.0 if an adapter has to be in memory, otherwise 0.0."""
    reuses: str | None = None
    """Name of what a node may have from earlier work: an adapter, or the digest of records."""

    def __post_init__(self) -> None:
        amounts = (self.n_prompt_tokens, self.n_tokens, self.n_feature_tokens, self.n_feature_bytes)
        others = (self.n_tune_tokens, self.n_adapter_loads)
        if not all(0 <= amount < float("inf") for amount in (*amounts, *others)):
            raise ValueError(f"amounts of work must be finite and not negative, got {self}")

    def left(self, fraction: float) -> Work:
        """What remains when all but ``fraction`` (0 to 1) of the answer or of the training is done."""
        assert 0 <= fraction <= 1, f"a fraction is from 0 to 1, got {fraction}"
        return replace(
            self,
            n_prompt_tokens=self.n_prompt_tokens
            if self.kind == "generate"
            else self.n_prompt_tokens * fraction,
            n_tokens=self.n_tokens * fraction,
            n_tune_tokens=self.n_tune_tokens * fraction,
            n_feature_tokens=self.n_feature_tokens if fraction == 1 else 0.0,
            n_feature_bytes=self.n_feature_bytes if fraction == 1 else 0.0,
        )


def needs_of(submit: Submit) -> Needs:
    holders = frozenset(submit.tune.holders) if submit.tune is not None else frozenset[NodeId]()
    top_layers = (submit.tune.top_layers or 0) if submit.tune is not None else 0
    part = submit.tune.part if submit.tune is not None else None
    profile = part.profile if part is not None else ""
    return Needs(submit.model, submit.adapter, holders, submit.kind in NEED_ALL_LAYERS, top_layers, profile)


def size_of(submit: Submit) -> tuple[int, int]:
    """What is read: bytes of UTF-8, and the number of texts they make, each with its prompt."""
    prompt = sum(_n_bytes(message.content) for message in submit.messages) + _n_bytes(submit.prompt or "")
    if submit.kind == "generate":
        return prompt, 1
    n_bytes = sum(map(_n_bytes, submit.texts)) + prompt * len(submit.texts)
    if submit.tune is not None:
        n_bytes += _n_bytes(submit.tune.data or "")
        if submit.kind == "features":
            n_bytes += _n_bytes(submit.tune.eval_data or "")
    return n_bytes, len(submit.texts)


def work_of(submit: Submit, *, answer_share: float = 1.0, counts: TokenCounts | None = None) -> Work:
    """The expected amounts of a submission.

    Args:
        answer_share: How much of ``max_tokens`` answers use on average (``CostModel.answer_share``).
        counts: What is known of tokens in texts (``CostModel.counts``).
    """
    n_bytes, n_texts = size_of(submit)
    n_tokens = (counts or TokenCounts()).expected(submit.kind, n_bytes, n_texts)
    n_adapter_loads = 0.0 if submit.adapter is None else 1.0
    match submit.kind:
        case "generate":
            return Work(
                n_prompt_tokens=n_tokens,
                n_tokens=submit.max_tokens * answer_share,
                n_adapter_loads=n_adapter_loads,
                reuses=submit.adapter,
            )
        case "tune":
            tune = submit.tune
            assert tune is not None, "a tune task has its spec"
            if tune.data is None:
                n_tokens = _FILE_TOKENS
            if tune.part is not None:
                n_tokens /= tune.nodes
            return Work(
                kind="tune",
                n_feature_tokens=n_tokens,
                n_tune_tokens=n_tokens * epochs_of(tune),
                reuses=tune.data_sha256,
            )
        case "features":
            return Work(
                kind="features",
                n_feature_tokens=n_tokens if n_bytes else _FILE_TOKENS,
                reuses=submit.tune.data_sha256 if submit.tune is not None else None,
            )
        case _:
            return Work(
                kind=submit.kind,
                n_prompt_tokens=n_tokens,
                n_adapter_loads=n_adapter_loads,
                reuses=submit.adapter,
            )


def epochs_of(tune: TuneSpec) -> int:
    """How often one task goes over its records: a part does so once a round."""
    if tune.part is None:
        return tune.epochs
    return 1 if tune.part.stage == "train" else 0


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
