"""What was decided about each task and why, the newest of it: what ``edgemesh task show`` tells.

In memory only, and for people: nothing is decided by it. Bounds: ``tasks_max`` tasks with at most
``DECISIONS_MAX`` decisions each, about 2 kB a decision with its candidates.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Final

from coordinator.policy.decisions import Decision, Drop, Pause, Resume, Start, Why
from mesh.ids import NodeId, TaskId
from mesh.messages import CandidateNode, TaskDecision
from mesh.messages.explain import CANDIDATES_MAX, DECISIONS_MAX, PARTS_MAX, WORDS_BYTES_MAX, DecisionVerb

__all__ = ["Explanations", "Noted", "told"]

_TASKS_MAX = 2048  # 4 MB with one decision each; a task of a real mesh has one or two

_VERBS: Final[Mapping[type[Decision], DecisionVerb]] = {
    Start: "start",
    Drop: "drop",
    Pause: "pause",
    Resume: "resume",
}


@dataclass(frozen=True, slots=True)
class Noted:
    """A decision and when it was made."""

    decision: Decision
    at: float


@dataclass(slots=True)
class _Story:
    newest: deque[Noted]
    n: int = 0


class Explanations:
    """One a coordinator; times are its own monotonic clock's."""

    def __init__(self, tasks_max: int = _TASKS_MAX) -> None:
        self._tasks_max = tasks_max
        self._stories: OrderedDict[TaskId, _Story] = OrderedDict()  # the one that changed last is last

    def __len__(self) -> int:
        return len(self._stories)

    def note(self, task: TaskId, decision: Decision, now: float) -> None:
        story = self._stories.get(task)
        if story is None:
            story = self._stories[task] = _Story(deque(maxlen=DECISIONS_MAX - 1))  # and one that is asked for
            if len(self._stories) > self._tasks_max:
                self._stories.popitem(last=False)
        self._stories.move_to_end(task)
        story.newest.append(Noted(decision, now))
        story.n += 1

    def forget(self, task: TaskId) -> None:
        """Nobody will ask about it any more."""
        self._stories.pop(task, None)

    def clear(self) -> None:
        """This node coordinates no longer."""
        self._stories.clear()

    def of(self, task: TaskId) -> tuple[Noted, ...]:
        """The newest decisions about the task, the oldest of them first."""
        story = self._stories.get(task)
        return tuple(story.newest) if story is not None else ()

    def n_of(self, task: TaskId) -> int:
        """How many there were."""
        story = self._stories.get(task)
        return story.n if story is not None else 0


def told(noted: Noted, now: float) -> TaskDecision:
    """The decision as clients read it."""
    decision, age_s = noted.decision, max(0.0, now - noted.at)
    verb = _VERBS[type(decision)]
    if isinstance(decision, Drop):
        return TaskDecision(verb=verb, age_s=age_s, words=_cut(decision.reason))
    return told_why(decision.why, verb, decision.node, age_s)


def told_why(why: Why, verb: DecisionVerb, node: NodeId | None, age_s: float) -> TaskDecision:
    """Numbers that are no numbers (a score of minus infinity) are left out: JSON has none."""
    return TaskDecision(
        verb=verb,
        age_s=age_s,
        words=_cut(why.words),
        node=node,
        policy=why.policy,
        score=_finite(why.score),
        density=_finite(why.density),
        laxity_s=_finite(why.laxity_s),
        cost_s=_seconds(why.cost_s),
        service_s=_seconds(why.service_s),
        n_waiting=why.n_waiting,
        candidates=[
            CandidateNode(
                node=candidate.node,
                service_s=_seconds(candidate.service_s),
                why_not=None if candidate.why_not is None else _cut(candidate.why_not),
                parts={
                    name: seconds
                    for name, s in list(candidate.parts.items())[:PARTS_MAX]
                    if (seconds := _seconds(s)) is not None
                },
                features=asdict(candidate.features) if candidate.features is not None else {},
            )
            for candidate in why.candidates[:CANDIDATES_MAX]
        ],
        n_candidates=max(why.n_candidates, len(why.candidates)),
    )


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and isfinite(number) else None


def _seconds(number: float | None) -> float | None:
    found = _finite(number)
    return None if found is None else max(0.0, found)


def _cut(words: str) -> str:
    """Within what a message may hold; UTF-8 takes at most four bytes a character."""
    return words if len(words) <= WORDS_BYTES_MAX // 4 else words[: WORDS_BYTES_MAX // 4 - 1] + "…"
