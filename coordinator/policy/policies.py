"""The policies by name: each says of every (waiting task, node with room) how much it should go first.

A policy is a function ``Scene -> scores`` of shape (n, m); the highest score goes first, ``-inf`` means not
here now. Scores are compared within one decision only. The dispatcher does the rest in the same way for all:
ties, capacity, deadlines (``drop``), giving way (``chunk``, ``preempt``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from coordinator.policy.cost import PredictionError
from coordinator.policy.density import Floats, laxity_s, slack_discount, value_density
from coordinator.policy.foresight import (
    RecentTask,
    expected,
    expected_soon,
    kept,
    kept_of_few,
    mean_of,
    worth,
)

__all__ = ["DEFAULT_POLICY", "POLICIES", "Policy", "Recent", "Scene", "policy_named"]

Bools = NDArray[np.bool_]


@dataclass(kw_only=True)  # frozen, it would take as long to make as to score two tasks
class Scene:
    """What one decision is made from, during it; not to be changed.

    n waiting tasks, m nodes with room, M nodes in all.
    """

    now: float
    value: Floats
    """(n,) As submitted, times the age factor of tasks without a deadline."""
    deadline_at: Floats
    """(n,) Real, or virtual for tasks without one."""
    is_virtual: Bools
    """(n,) The deadline is virtual: missing it is no failure."""
    arrived_at: Floats
    """(n,)"""
    cost_s: Floats
    """(n, m) Node seconds the task takes from others: service time, or marginal in a batch."""
    finish_s: Floats
    """(n, m) From now to its end if started now; infinite where it cannot run."""
    mean_s: Floats
    """(m,) Mean cost of the waiting tasks on each node: the yardstick of slack."""
    best_s: Floats
    """(n,) Service time on the fastest node that has what the task needs, with room or without."""
    open_nodes: NDArray[np.intp]
    """(m,) Which of the M nodes have room."""
    room_in_s: Callable[[], Floats]
    """() -> (M,): seconds until each node is expected to have room; 0 with room now. Tuning that gives way
    counts for one chunk."""
    capacity: Callable[[], Floats]
    """() -> (M,): work done per second, the fastest node with one task alone doing 1; 0 if not ready."""
    recent: Callable[[], Recent]
    """() -> the last tasks that came, whatever became of them: what is likely to come next."""
    all_finish_s: Callable[[], Floats]
    """() -> (n, M): ``finish_s`` on every node as if it were idle. Costs n * M: asked for when needed."""

    @cached_property
    def laxity_s(self) -> Floats:
        """(n, m) Seconds to spare if started now on the node."""
        return laxity_s(self.deadline_at[:, None], self.now, self.finish_s)


@dataclass(frozen=True, kw_only=True)
class Recent:
    """The last tasks with a deadline, oldest first; every array is (h,)."""

    arrived_at: Floats
    deadline_at: Floats
    value: Floats
    best_s: Floats
    """As estimated when the task came."""
    in_order: Sequence[RecentTask] | None = None
    """The same, sorted; ``None``: not at hand."""

    @cached_property
    def mean_value(self) -> float | None:
        """``None`` if there are none."""
        return mean_of(self.value)


Score = Callable[[Scene], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A rule of order, and which of the common rules go with it."""

    name: str
    score: Score
    drop: bool = False
    """Reject what no node can finish in time, and start nothing where it cannot finish in time."""
    chunk: bool = False
    """Running fine-tuning gives way between chunks to what scores higher."""
    preempt: bool = False
    """Running generation gives way between tokens to at least twice its density."""
    preempts_late: bool = False
    """With ``preempt``: only for a newcomer that would end too late after the runner."""
    keeps: Callable[[Scene], Bools] | None = None
    """(n,) Which tasks may start at all now; the rest wait. For policies that select before they order. Asked
    once a decision about all waiting tasks, with (n, 1) costs: on the best node, alone."""
    fill: bool = False
    """What ``keeps`` refuses starts, by value density, where a node would be idle otherwise."""
    margin: float = 1.0
    """With ``drop``: starts only where ``margin`` times the estimate ends in time. What is estimated to end
    just in time is late half of the time."""
    gambles: bool = False
    """What can keep the margin nowhere any more starts where it ends in time without: for nodes that would be
    idle otherwise."""
    place: Literal["first_end", "score"] = "first_end"
    """The node of a task among those with room: where it ends first, or where it scores highest."""


# ── one function per policy ─────────────────────────────────────────────────────────────────────────

SLACK_K: Final = 2.0
"""Look-ahead in mean service times; 1.5 to 4.5 in the literature on ATC, 2 measured best here."""


def vdf(scene: Scene) -> Floats:
    """Value density, discounted by the time there is to spare."""
    density = value_density(scene.value[:, None], scene.cost_s)
    return density * slack_discount(scene.laxity_s, scene.mean_s, SLACK_K)


def vdf_plain(scene: Scene) -> Floats:
    """Value density alone."""
    return value_density(scene.value[:, None], scene.cost_s)


def edf(scene: Scene) -> Floats:
    """Earliest deadline first."""
    return _everywhere(-scene.deadline_at, scene)


def fifo(scene: Scene) -> Floats:
    """In order of arrival."""
    return _everywhere(-scene.arrived_at, scene)


def sjf(scene: Scene) -> Floats:
    """Shortest job first."""
    return -scene.cost_s


def hvf(scene: Scene) -> Floats:
    """Highest value first."""
    return _everywhere(scene.value, scene)


def llf(scene: Scene) -> Floats:
    """Least laxity first."""
    return -scene.laxity_s


PROMISE: Final = 1.0
"""What keeping a deadline is worth in itself, in mean values; see docs/adr/0015 for what others measured."""
FORESIGHT_K: Final = 0.5
"""Shorter than ``SLACK_K``: what the plan keeps has its time reserved and may wait for it."""
_FEW_MAX: Final = 32
"""Tasks that wait, and tasks that are expected, as many as plain numbers are faster for than arrays."""
FORESIGHT_MARGIN: Final = 1.2
"""At first and at most, then by the errors made: those of 30 % (log-normal) have a median of 20 %."""


_ENOUGH: Final = 8
"""Outcomes after which an error is believed."""


def margin_after(most: float, errors: Iterable[PredictionError]) -> float:
    """The margin that estimates need which have been so far off: at most ``most``, and that at first.

    >>> margin_after(1.2, [PredictionError(n=60, p50=0.05), PredictionError(n=20, p50=0.25)])
    1.1
    """
    known = [error for error in errors if error.n]
    n = sum(error.n for error in known)
    if n < _ENOUGH:
        return most
    return round(min(most, 1.0 + sum(error.n * error.p50 for error in known) / n), 2)


def foresight(scene: Scene) -> Floats:
    """The slack-discounted density of what is kept by ``foresees``, keeping a promise counted as value."""
    worths = worth(scene.value, scene.recent().mean_value, PROMISE)
    density = value_density(worths[:, None], scene.cost_s)
    return density * slack_discount(scene.laxity_s, scene.mean_s, FORESIGHT_K)


def foresees(scene: Scene) -> Bools:
    """(n,) What is in a plan over the waiting and the expected tasks."""
    recent, pool, due_in_s = scene.recent(), _pool(scene), _due_in_s(scene)
    worths = worth(scene.value, recent.mean_value, PROMISE)
    if 0 < len(worths) <= _FEW_MAX and recent.in_order is not None:
        soon = expected_soon(scene.now, recent.in_order, float(due_in_s.max()), _FEW_MAX)
        if soon is not None:
            more = PROMISE * (recent.mean_value or 0.0)
            ahead_few = [(value + more, work_s, due_s) for value, work_s, due_s in soon]
            plan = kept_of_few(worths.tolist(), scene.best_s.tolist(), due_in_s.tolist(), ahead_few, pool)
            return np.array(plan)
    ahead = expected(
        scene.now,
        recent.arrived_at,
        recent.deadline_at,
        worth(recent.value, recent.mean_value, PROMISE),
        recent.best_s,
    )
    return kept(worths, scene.best_s, due_in_s, ahead, pool)


def fits(scene: Scene) -> Bools:
    """(n,) What is in a plan over the waiting tasks alone, by value density."""
    none = np.zeros(0)
    return kept(scene.value, scene.best_s, _due_in_s(scene), (none, none, none), _pool(scene))


def _due_in_s(scene: Scene) -> Floats:
    """A virtual deadline that has passed is one as soon as possible: age has made such a task dense."""
    due_in_s = scene.deadline_at - scene.now
    if not scene.is_virtual.any():
        return due_in_s
    soon_s = scene.room_in_s().max(initial=0.0) + scene.best_s
    return np.where(scene.is_virtual, np.maximum(due_in_s, soon_s), due_in_s)


def _pool(scene: Scene) -> tuple[Floats, Floats]:
    return scene.capacity(), scene.room_in_s()


def _everywhere(score: Floats, scene: Scene) -> Floats:
    return np.broadcast_to(score[:, None], scene.cost_s.shape)


_BASE: Final = (
    Policy(name="vdf", score=vdf, drop=True, chunk=True, preempt=True, preempts_late=True),
    Policy(name="vdf-plain", score=vdf_plain),
    Policy(name="edf", score=edf),
    Policy(name="fifo", score=fifo),
    Policy(name="sjf", score=sjf),
    Policy(name="hvf", score=hvf),
    Policy(name="llf", score=llf),
    Policy(name="robust-edf", score=edf, keeps=fits, fill=True, drop=True, chunk=True),
    Policy(
        name="foresight",
        score=foresight,
        keeps=foresees,
        fill=True,
        margin=FORESIGHT_MARGIN,
        drop=True,
        chunk=True,
        preempt=True,
        preempts_late=True,
    ),
)

POLICIES: Final[Mapping[str, Policy]] = MappingProxyType({policy.name: policy for policy in _BASE})
DEFAULT_POLICY: Final = "foresight"
"""Misses fewer deadlines than ``robust-edf`` and keeps more value than ``vdf``: docs/adr/0015."""

_RULES: Final = ("drop", "chunk", "preempt")


def policy_named(text: str) -> Policy:
    """A policy by name with rules added or taken away, such as ``edf+drop+chunk`` or ``vdf-preempt``.

    Raises:
        ValueError: There is none of this name; says which there are.
    """
    name, switches = text, dict[str, bool]()
    while (at := max(name.rfind("+"), name.rfind("-"))) > 0 and name[at + 1 :] in _RULES:
        switches.setdefault(name[at + 1 :], name[at] == "+")
        name = name[:at]
    if name not in POLICIES:
        rules = " ".join(f"+{rule} -{rule}" for rule in _RULES)
        raise ValueError(f"no policy {text!r}: there are {', '.join(POLICIES)}, each with {rules}")
    base = POLICIES[name]
    return replace(
        base,
        name=text,
        drop=switches.get("drop", base.drop),
        chunk=switches.get("chunk", base.chunk),
        preempt=switches.get("preempt", base.preempt),
    )
