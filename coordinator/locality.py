"""Where the feature maps of tuning jobs are: what earlier jobs said they read, and who claims to have it.

    Outcome(features) ──learn──▶ newest of each identity ──work──▶ what the next such job amounts to
                                       │ sample keys
    catalogues ──────claims────────────┴──shares──▶ of it on each node: there, and to be fetched

Nothing here is durable. Another coordinator knows what the settled records say that it finds on disks (ten
minutes' worth), and what ends later; jobs on other records it prices as if their features were nowhere.
Claims may be wrong (a catalogue is a Bloom filter, and behind); then a job takes longer than thought, which
the corrections of the cost model learn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from coordinator.cluster import Node
from coordinator.policy.nodes import Share
from coordinator.policy.rates import FETCH_BYTES_PER_S, Rates
from coordinator.policy.work import Work, epochs_of
from mesh.ids import NodeId
from mesh.messages import FeaturesHeld, Submit
from mesh.messages.tune import TuneSpec, features_identity

__all__ = ["REFRESH_S", "Claims", "Locality", "nobody_claims"]

Claims = Callable[[NodeId, bytes], bool]
"""Whether the node says that it has the block of this key."""

REFRESH_S: Final = 2.0
"""How long shares hold while a job waits. Catalogues are told every half second."""

_IDENTITIES_MAX: Final = 256  # 4 kB each with its keys
_PROFILES_MAX: Final = 4
_NODES_MAX: Final = 4096  # as in coordinator.cluster
_QUESTIONS_MAX: Final = 4096
"""Asked of catalogues for one job: 32 of each of 128 nodes, fewer of each of more; 20 ms at 5 µs each."""
_KEYS_LEAST: Final = 4
_FRESH_S: Final = 5.0
"""So long after a job the node that did it has its features, whatever its catalogue says: it is behind."""
_MOST: Final = 0.5
"""A job is run in another node's profile where so much of its features is held."""
_WEIGHT: Final = 0.3
"""Of the latest fetch in what is learned of a link."""
_NOTHING: Final[Share] = (0.0, 0.0)
_FETCH_LEAST_BYTES: Final = 100_000
"""A smaller fetch says more of the delay than of the link."""


def nobody_claims(node: NodeId, key: bytes) -> bool:
    """Of a mesh without a common memory."""
    return False


@dataclass(frozen=True, slots=True)
class _Known:
    """What one job read."""

    held: FeaturesHeld
    model: str | None
    node: NodeId | None
    at: float
    keys: tuple[bytes, ...]


class Locality:
    """One a node; times are its own monotonic clock's."""

    def __init__(self, claims: Claims = nobody_claims) -> None:
        self._claims = claims
        self._known: OrderedDict[str, dict[tuple[str | None, str], _Known]] = OrderedDict()
        """By identity, then by model and profile; the one that was told last is last."""
        self._log_bytes_per_s: OrderedDict[NodeId, float] = OrderedDict()

    def learn(
        self, submit: Submit, held: FeaturesHeld, node: NodeId | None, model: str | None, at: float
    ) -> list[str]:
        """A job ended ``at`` some time; the names (``name_of``) under which its features are known now."""
        self._learn_fetch(held, node)
        if not held.sample_keys or not held.n_tokens or not held.n_bytes:
            return []
        keys = tuple(bytes.fromhex(key) for key in held.sample_keys)
        spec = submit.tune
        assert spec is not None, "it has records"
        specs = [spec] if held.top_layers < 1 else [replace(spec, top_layers=held.top_layers)]
        if spec.top_layers is None and submit.kind == "tune":
            specs.append(spec)  # who leaves the number of layers open is expected to get the same
        names = [name_of(one) for one in specs]
        for name in names:
            profiles = self._known.setdefault(name, {})
            before = profiles.get((model, held.profile))
            if before is not None and before.at > at:
                continue  # from a record of an earlier coordinator's
            profiles.pop((model, held.profile), None)
            profiles[model, held.profile] = _Known(held, model, node, at, keys)
            if len(profiles) > _PROFILES_MAX:
                del profiles[next(iter(profiles))]
            self._known.move_to_end(name)
        while len(self._known) > _IDENTITIES_MAX:
            self._known.popitem(last=False)
        return names

    def work(self, submit: Submit, work: Work) -> Work:
        """``work`` with what is known of the job's features; unchanged where nothing is."""
        if submit.tune is None or not work.n_feature_tokens:
            return work
        name = name_of(submit.tune)
        profiles = self._known.get(name)
        if profiles is None:
            return work
        held = next(reversed(profiles.values())).held
        epochs = epochs_of(submit.tune) if work.n_tune_tokens else 0
        return replace(
            work,
            n_feature_tokens=float(held.n_tokens),
            n_feature_bytes=float(held.n_bytes),
            n_tune_tokens=float(held.n_tokens * epochs),
            reuses=name,
        )

    def shares(
        self, work: Work, nodes: Iterable[tuple[Node, Rates]], now: float
    ) -> dict[NodeId, Share] | None:
        """Of the features of ``work`` on each node: there, and to be fetched. ``None``: nothing is known.

        ``nodes``: all that are present, whether they compute or only keep. What would take longer to fetch
        than to compute is not fetched.
        """
        profiles = self._known.get(work.reuses or "")
        if profiles is None or not work.n_feature_bytes:
            return None
        there = list(nodes)
        n_keys = max(_KEYS_LEAST, _QUESTIONS_MAX // max(1, len(there)))
        found: dict[NodeId, Share] = {}
        for known in profiles.values():
            for node_id, share in self._shares_of(known, work, there, n_keys, now).items():
                found[node_id] = max(found.get(node_id, _NOTHING), share, key=lambda one: (sum(one), one))
        return found

    def fetch_bytes_per_s(self, node: NodeId) -> float:
        """How fast it has fetched features lately; a guess before it has."""
        learned = self._log_bytes_per_s.get(node)
        return FETCH_BYTES_PER_S if learned is None else math.exp(learned)

    # ── parts ───────────────────────────────────────────────────────────────────────────────────────

    def _shares_of(
        self, known: _Known, work: Work, nodes: list[tuple[Node, Rates]], n_keys: int, now: float
    ) -> dict[NodeId, Share]:
        """Of one job's features, on the nodes that could use them."""
        keys = known.keys[:: -(-len(known.keys) // n_keys)]
        has: dict[NodeId, list[bool]] = {}
        for node, _ in nodes:
            is_fresh = node.id == known.node and now - known.at <= _FRESH_S
            has[node.id] = [is_fresh or self._claims(node.id, key) for key in keys]
        anywhere = [any(column) for column in zip(*has.values(), strict=True)]
        held_share = sum(anywhere) / len(keys)
        found: dict[NodeId, Share] = {}
        for node, rates in nodes:
            info = node.info
            if info is None or info.model != known.model:
                continue
            computes = info.holds == "all" and info.features_profile in (None, known.held.profile)
            if not computes and held_share < _MOST:
                continue  # it would read, or have others make, features of its own profile
            near = sum(has[node.id]) / len(keys)
            far = held_share - near
            fetch_s = work.n_feature_bytes / rates.fetch_bytes_per_s
            if computes and fetch_s > work.n_feature_tokens / rates.features_tokens_per_s:
                far = 0.0
            found[node.id] = (near, far)
        return found

    def _learn_fetch(self, held: FeaturesHeld, node: NodeId | None) -> None:
        if node is None or not held.n_tokens or held.fetch_s <= 0:
            return
        n_bytes = held.n_bytes * min(1.0, held.n_fetched / held.n_tokens)
        if n_bytes < _FETCH_LEAST_BYTES:
            return
        latest = math.log(n_bytes / held.fetch_s)
        before = self._log_bytes_per_s.pop(node, None)
        self._log_bytes_per_s[node] = latest if before is None else before + _WEIGHT * (latest - before)
        if len(self._log_bytes_per_s) > _NODES_MAX:
            self._log_bytes_per_s.popitem(last=False)


def name_of(spec: TuneSpec) -> str:
    """What ``Work.reuses`` calls the features that the spec reads."""
    return f"features {features_identity(spec)}"
