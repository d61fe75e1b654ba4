"""Decisions about a task in words: what ``edgemesh task show`` prints. Pure."""

from __future__ import annotations

from mesh.messages import CandidateNode, TaskDecision, TaskExplanation
from mesh.messages.task import TERMINAL_STATES
from mesh.units import seconds_text

__all__ = ["candidate_rows", "head_line", "nothing_line", "number_line", "verb_line"]

_VERBS = {
    "start": "started on {node}",
    "drop": "rejected",
    "pause": "paused on {node}",
    "resume": "carried on, on {node}",
    "wait": "waits",
}


def head_line(told: TaskExplanation) -> str:
    """What the task is and how it stands."""
    if told.state is None:
        return f"{told.task}  not known to {told.epoch.node}, which coordinates"
    parts = [told.task, told.kind or "", told.state]
    if told.node is not None:
        parts.append(f"on {told.node} (attempt {told.attempt})")
    if told.value is not None:
        parts.append(f"value {told.value:g}")
    if told.budget_s is not None and told.state not in TERMINAL_STATES:
        parts.append(f"{seconds_text(told.budget_s)} left")
    if told.reason:
        parts.append(told.reason)
    return "  ".join(part for part in parts if part)


def nothing_line(told: TaskExplanation) -> str | None:
    """What to say where there is no decision to tell of, or not all of them."""
    if told.decisions:
        n_older = told.n_decisions - sum(decision.verb != "wait" for decision in told.decisions)
        return f"({n_older} older decisions are no longer kept)" if n_older > 0 else None
    if told.state is None:
        return "It ended some time ago, was rejected before it was taken in, or was never submitted here."
    if told.state == "rejected":
        return "It was refused before it was taken in; no node was chosen."
    if told.node is not None:
        return (
            "An earlier coordinator decided it: reasons are kept in memory only and are gone with it. "
            f"{told.epoch.node} tells what it decides from here on."
        )
    return f"{told.epoch.node} has decided nothing yet; what an earlier coordinator decided is not kept."


def verb_line(decision: TaskDecision) -> str:
    """What was decided, when and why."""
    when = "now" if decision.verb == "wait" else f"{seconds_text(decision.age_s)} ago"
    what = _VERBS[decision.verb].format(node=decision.node)
    words = decision.words.removeprefix(f"on {decision.node}: ")  # said once is enough
    return f"{when}  {what}: {words}" if words else f"{when}  {what}"


def number_line(decision: TaskDecision) -> str | None:
    """The numbers that decided; ``None`` where there are none."""
    parts: list[str] = []
    if decision.density is not None:
        parts.append(f"density {decision.density:.3g}/s")
    if decision.laxity_s is not None:
        parts.append(f"slack {_seconds(decision.laxity_s)}")
    elif decision.density is not None:
        parts.append("no deadline")
    if decision.score is not None:
        parts.append(f"score {decision.score:.3g}")
    if decision.service_s is not None:
        cost = ""
        if decision.cost_s is not None and abs(decision.cost_s - decision.service_s) > 1e-3:
            cost = f" (costs others {_seconds(decision.cost_s)})"
        parts.append(f"takes {_seconds(decision.service_s)}{cost}")
    if decision.n_waiting is not None:
        parts.append(f"{decision.n_waiting} others waiting")
    if decision.policy is not None:
        parts.append(f"policy {decision.policy}")
    return " · ".join(parts) or None


def candidate_rows(decision: TaskDecision) -> list[tuple[str, str, str, str, str]]:
    """A line for each node: mark, name, seconds, what they are made of, and why not this one."""
    rows = [_candidate_row(candidate) for candidate in decision.candidates]
    n_more = decision.n_candidates - len(decision.candidates)
    if decision.candidates and n_more > 0:
        rows.append(("", f"… {n_more} more", "", "", ""))
    return rows


def _candidate_row(candidate: CandidateNode) -> tuple[str, str, str, str, str]:
    parts = " + ".join(
        f"{name.replace('_', ' ')} {_seconds(seconds)}"
        for name, seconds in candidate.parts.items()
        if seconds >= 0.0005
    )
    if candidate.features:
        shares = ", ".join(f"{n:,.0f} {what}" for what, n in candidate.features.items() if n >= 0.5)
        parts = f"{parts}{' · ' if parts else ''}features: {shares or 'none'}"
    takes = "–" if candidate.service_s is None else _seconds(candidate.service_s)
    return ("→" if candidate.why_not is None else "", candidate.node, takes, parts, candidate.why_not or "")


def _seconds(seconds: float) -> str:
    """Decisions are about hundredths of seconds, and slack may be negative."""
    return f"{seconds:.2f} s" if abs(seconds) < 10 else f"{seconds:.1f} s"
