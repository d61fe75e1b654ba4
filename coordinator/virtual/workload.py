"""From bare requests to tasks: what each is worth, when it is due, which are tuning jobs; scaled to a load.

Lengths and times come from a trace or a generator. What no trace has is drawn from a ``Mix``:

value      1, 3 or 10 (60 %, 30 %, 10 % of the tasks): most things are everyday, few matter much. A tuning job
           is worth ``tune_value`` times as much: somebody waits for it for long.
deadline   of a request: ``patience_s`` plus its service time on the best node, alone, times a factor drawn
           log-uniformly from ``tightness``; of a tuning job: the same with ``tune_tightness``. So everything
           could be done in time by somebody, were it alone in the mesh and the estimates right.
           A mesh with more nodes is compared under the deadlines of the mesh without them.
adapter    one of ``adapters``, the k-th with a weight of 1 / k ** ``skew``
truth      what the work takes is log-normal around what is expected, ``error`` the standard deviation of the
           logarithm: the one about whom nobody tells the scheduler.

Every task is drawn from a random source of its own (seed and position), so that a shorter run has the same
first tasks and changing one share leaves the other draws alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from coordinator.policy.cost import amounts_of
from coordinator.policy.rates import Rates
from coordinator.policy.work import Work
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.traces import Request
from mesh.ids import TaskId
from mesh.messages.checks import check_count, check_fraction, check_positive, check_seconds

__all__ = ["Mix", "VirtualTask", "at_load", "offered_load", "service_s", "tasks_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What is drawn for each request; every field is a key of ``edgemesh sim --mix``."""

    values: tuple[tuple[float, float], ...] = ((1.0, 0.6), (3.0, 0.3), (10.0, 0.1))
    """(value, share of the tasks); shares sum to 1."""
    patience_s: float = 2.0
    tightness: tuple[float, float] = (1.5, 18.0)
    tune: float = 0.02
    """Share of the tasks that are tuning jobs."""
    tune_tokens: float = 40_000.0
    """Of a tuning job's records; the median. 40,000 are 500 texts of a paragraph."""
    tune_spread: float = 0.5
    tune_epochs: int = 3
    tune_value: float = 10.0
    tune_tightness: tuple[float, float] = (1.8, 12.0)
    adapters: int = 20
    skew: float = 1.0
    error: float = 0.3

    def __post_init__(self) -> None:
        if not self.values or not math.isclose(math.fsum(share for _, share in self.values), 1, abs_tol=1e-6):
            raise ValueError(f"the shares of values must sum to 1, got {self.values}")
        for value, share in self.values:
            check_positive("a value", value)
            check_fraction("the share of a value", share)
        check_seconds("patience_s", self.patience_s)
        for name in ("tightness", "tune_tightness"):
            low, high = getattr(self, name)
            if not 0 < low <= high < float("inf"):
                raise ValueError(f"{name} must be two factors above 0, the lower first, got {low}, {high}")
        check_fraction("tune", self.tune)
        check_positive("tune_tokens", self.tune_tokens)
        check_positive("tune_value", self.tune_value)
        check_count("tune_epochs", self.tune_epochs, 1000, least=1)
        check_count("adapters", self.adapters, 100_000)
        for name in ("tune_spread", "skew", "error"):
            if not 0 <= getattr(self, name) <= 5:
                raise ValueError(f"{name} must be from 0 to 5, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class VirtualTask:
    """One task as it arrives at the coordinator, and the truth about it that only virtual nodes know."""

    id: TaskId
    arrives_at: float
    deadline_at: float
    value: float
    work: Work
    """What the coordinator expects."""
    true_factor: float
    """What the work takes / what ``work`` says, on every node."""


def tasks_of(
    requests: Sequence[Request], mix: Mix, seed: int, nodes: Sequence[NodeSpec]
) -> list[VirtualTask]:
    """One task for each request, in the same order and at the same times.

    Args:
        requests: In order of time.
        seed: Of all that is drawn.
        nodes: The best of them is the measure of deadlines.
    """
    adapters = _adapters(mix)
    kinds = list(dict.fromkeys(node.rates for node in nodes))
    return [_task(k, request, mix, adapters, seed, kinds) for k, request in enumerate(requests)]


def _task(
    k: int, request: Request, mix: Mix, adapters: Sequence[float], seed: int, kinds: Sequence[Rates]
) -> VirtualTask:
    rng = Random(f"{seed}/{k}")  # seeded by text: the same on every machine and version
    # Always the same number of draws in the same order, whatever they decide.
    tune_draw, value_draw, slack_draw, adapter_draw = (rng.random() for _ in range(4))
    size_draw, error_draw = rng.gauss(), rng.gauss()
    value = _of_shares(mix.values, value_draw)
    if tune_draw < mix.tune:
        n_tokens = mix.tune_tokens * math.exp(mix.tune_spread * size_draw)
        work = Work(kind="tune", n_feature_tokens=n_tokens, n_tune_tokens=n_tokens * mix.tune_epochs)
        value *= mix.tune_value
        deadline_s = _best_s(work, kinds) * _log_uniform(mix.tune_tightness, slack_draw)
    else:
        adapter = _adapter(adapters, adapter_draw)
        work = Work(
            n_prompt_tokens=float(request.n_prompt_tokens),
            n_tokens=float(request.n_tokens),
            n_adapter_loads=0.0 if adapter is None else 1.0,
            reuses=adapter,
        )
        deadline_s = mix.patience_s + _best_s(work, kinds) * _log_uniform(mix.tightness, slack_draw)
    return VirtualTask(
        id=TaskId(f"t{k:07d}"),  # in order of arrival, as far as ties are decided by it
        arrives_at=request.at_s,
        deadline_at=request.at_s + deadline_s,
        value=value,
        work=work,
        # Its mean is 1 whatever the spread: a load stays the load it is called.
        true_factor=math.exp(mix.error * error_draw - mix.error**2 / 2),
    )


def service_s(work: Work, rates: Rates) -> float:
    """Seconds the work takes by these rates, with nothing beside it and nothing to reuse."""
    return math.fsum(amount * unit_s for amount, unit_s in zip(amounts_of(work), rates.unit_s, strict=True))


def _best_s(work: Work, kinds: Sequence[Rates]) -> float:
    return min(service_s(work, rates) for rates in kinds)


def _log_uniform(bounds: tuple[float, float], draw: float) -> float:
    low, high = bounds
    return low * math.exp(math.log(high / low) * draw)


def _of_shares(values: Sequence[tuple[float, float]], draw: float) -> float:
    for value, share in values:
        draw -= share
        if draw < 0:
            return value
    return values[-1][0]


def _adapters(mix: Mix) -> list[float]:
    """Cumulative shares of the adapters, the most popular first."""
    weights = [k**-mix.skew for k in range(1, mix.adapters + 1)]
    total, sums = math.fsum(weights), list[float]()
    for weight in weights:
        sums.append((sums[-1] if sums else 0.0) + weight / total)
    return sums


def _adapter(sums: Sequence[float], draw: float) -> str | None:
    if not sums:
        return None
    return f"adapter-{min(bisect_left(sums, draw), len(sums) - 1) + 1}"


# ── load ────────────────────────────────────────────────────────────────────────────────────────────


def offered_load(tasks: Sequence[VirtualTask], nodes: Sequence[NodeSpec]) -> float:
    """Work that arrives / work the nodes could do while it arrives; 1 = just as much.

    Each node counts with the share of the tasks it could do alone in that time, its slots full; nodes that
    come and go count for the time they are there.

    Raises:
        ValueError: All tasks arrive at one instant, or no node is there.
    """
    span_s = tasks[-1].arrives_at - tasks[0].arrives_at
    capacity = capacity_per_s(tasks, nodes, span_s)
    if span_s <= 0 or capacity <= 0:
        raise ValueError("a load needs tasks that arrive over a length of time, and a node that is there")
    return len(tasks) / span_s / capacity


def capacity_per_s(tasks: Sequence[VirtualTask], nodes: Sequence[NodeSpec], span_s: float) -> float:
    """Jobs like these, a second, that all nodes could do together, each with its slots full."""
    known: dict[tuple[Rates, int], float] = {}  # a thousand nodes are a few kinds of device
    for node in nodes:
        if (kind := (node.rates, node.slots)) not in known:
            known[kind] = len(tasks) / math.fsum(_batched_s(tasks, node))
    return math.fsum(_share_of_time(node, span_s) * known[node.rates, node.slots] for node in nodes)


def _batched_s(tasks: Sequence[VirtualTask], node: NodeSpec) -> Iterator[float]:
    """Node seconds of each task where answers share every step with ``slots - 1`` others."""
    rates, n = node.rates, node.slots
    decode_share = (1 + (n - 1) * rates.row_cost) / n
    for task in tasks:
        alone_s = service_s(task.work, rates)
        yield alone_s - (1 - decode_share) * task.work.n_tokens / rates.decode_tokens_per_s


def _share_of_time(node: NodeSpec, span_s: float) -> float:
    return max(0.0, min(node.leaves_at, span_s) - node.joins_at) / span_s if span_s > 0 else 0.0


def at_load(tasks: Sequence[VirtualTask], nodes: Sequence[NodeSpec], load: float) -> list[VirtualTask]:
    """The same tasks with the times between arrivals stretched so that they offer ``load`` to ``nodes``.

    Deadlines move along: the time each task has is unchanged.

    Raises:
        ValueError: As ``offered_load``.
    """
    first_s = tasks[0].arrives_at
    stretch = offered_load(tasks, nodes) / load
    return [
        replace(
            task,
            arrives_at=(at := (task.arrives_at - first_s) * stretch),
            deadline_at=at + (task.deadline_at - task.arrives_at),
        )
        for task in tasks
    ]
