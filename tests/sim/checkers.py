"""What must hold, read off the history of a run. No checker knows how the system does it.

Each returns the violations as sentences; an empty list is a pass. ``tests/sim/mutants.py`` plants a bug
for each of them that must turn it red.
"""

from __future__ import annotations

from typing import Any

from coordinator.facts import StartAttempt
from mesh.agreement.fence import FENCE_KEY
from mesh.core import Save, Send
from mesh.facts import Deposed, Elected, Followed, LinkUp
from mesh.ids import EPOCH_ZERO, Epoch, TaskId
from mesh.messages import Assign, Held, LeaseRecord, Outcome, TaskRecord, TaskResult
from tests.sim.history import ClientHeard, History

__all__ = [
    "commands_obeyed_in_order",
    "epochs_only_grow",
    "one_coordinator_per_term",
    "one_life_per_epoch",
]


def one_life_per_epoch(history: History) -> list[str]:
    """No epoch is claimed twice, so none is won twice: not by two nodes, not by two lives of one node."""
    owner: dict[Epoch, tuple[str, str]] = {}
    bad = []
    for entry in history:
        is_claim = isinstance(entry.what, LeaseRecord) and entry.what.kind == "claim"
        if is_claim or isinstance(entry.what, Elected):
            life = (entry.node, entry.boot)
            first = owner.setdefault(entry.what.epoch, life)
            if first != life:
                verb = "claimed" if is_claim else "won"
                bad.append(f"{entry.at:.3f}: {entry.what.epoch} {verb} by {life}, before by {first}")
    return bad


def one_coordinator_per_term(history: History) -> list[str]:
    """Of nodes that read the whole election on one broker, at most one wins a term.

    A node whose link broke may have missed the first claim for good: the broker retains only the latest
    record, perhaps a lower one. Such a node may win the same term under its own name; the fence puts the
    two epochs in order. So this holds for winners connected since before either claimed.
    """
    linked_at: dict[str, float] = {}
    claimed_at: dict[tuple[str, Epoch], float] = {}
    winners: dict[tuple[str, int], list[tuple[str, float, float]]] = {}
    bad = []
    for at, node, boot, broker, what in history:
        if isinstance(what, LinkUp):
            linked_at[node] = at
        elif isinstance(what, LeaseRecord):
            claimed_at[boot, what.epoch] = at
        elif isinstance(what, Elected) and broker:
            mine = (node, linked_at[node], claimed_at[boot, what.epoch])
            for other in winners.setdefault((broker, what.epoch.term), []):
                if other[0] != node and max(mine[1], other[1]) < min(mine[2], other[2]):
                    bad.append(
                        f"{at:.3f}: term {what.epoch.term} on broker {broker} won by {other[0]} and {node}"
                    )
            winners[broker, what.epoch.term].append(mine)
    return bad


def epochs_only_grow(history: History) -> list[str]:
    """Of each node, over restarts: what it saved, won and followed never goes back."""
    saved: dict[str, Epoch] = {}
    won: dict[str, Epoch] = {}
    followed: dict[str, Epoch] = {}
    bad = []
    for entry in history:
        what = entry.what
        if isinstance(what, Save) and what.key == FENCE_KEY and what.record is not None:
            if what.record.epoch <= saved.get(entry.node, EPOCH_ZERO):
                bad.append(
                    f"{entry.at:.3f}: {entry.node} saved {what.record.epoch} after {saved[entry.node]}"
                )
            saved[entry.node] = what.record.epoch
        elif isinstance(what, Elected):
            before = max(won.get(entry.node, EPOCH_ZERO), followed.get(entry.node, EPOCH_ZERO))
            if what.epoch <= before:
                bad.append(f"{entry.at:.3f}: {entry.node} won {what.epoch} after {before}")
            won[entry.node] = what.epoch
        elif isinstance(what, Followed):
            before = max(won.get(entry.node, EPOCH_ZERO), followed.get(entry.node, EPOCH_ZERO))
            if what.epoch < before:
                bad.append(f"{entry.at:.3f}: {entry.node} followed {what.epoch} after {before}")
            followed[entry.node] = what.epoch
    return bad


def obeyed_epoch(what: Any) -> Epoch | None:
    """The epoch of the command that this entry shows obeyed: an attempt started, a record held."""
    if isinstance(what, StartAttempt):
        return what.assign.epoch
    if isinstance(what, Send) and isinstance(what.message, Held):
        return what.message.epoch
    return None


def commands_obeyed_in_order(history: History) -> list[str]:
    """A node that has obeyed, followed or won an epoch obeys no lower one, over restarts too."""
    highest: dict[str, Epoch] = {}
    bad = []
    for entry in history:
        what = entry.what
        epoch = obeyed_epoch(what)
        if epoch is not None and epoch < highest.get(entry.node, EPOCH_ZERO):
            bad.append(f"{entry.at:.3f}: {entry.node} obeyed {epoch} after {highest[entry.node]}: {what}")
        if epoch is None and isinstance(what, Elected | Followed):
            epoch = what.epoch
        if epoch is not None and epoch > highest.get(entry.node, EPOCH_ZERO):
            highest[entry.node] = epoch
    return bad


def acknowledged(history: History) -> dict[TaskId, float]:
    """When a client first read that the mesh has its task."""
    tasks: dict[TaskId, float] = {}
    for entry in history:
        if isinstance(entry.what, ClientHeard):
            said = entry.what.message
            if said.state not in ("rejected",):
                tasks.setdefault(said.task, entry.at)
    return tasks


def results_heard(history: History) -> dict[TaskId, list[TaskResult]]:
    """The different results clients read of each task, in order."""
    results: dict[TaskId, list[TaskResult]] = {}
    for entry in history:
        if isinstance(entry.what, ClientHeard) and isinstance(entry.what.message, TaskResult):
            heard = results.setdefault(entry.what.message.task, [])
            if entry.what.message not in heard:
                heard.append(entry.what.message)
    return results


def every_acknowledged_task_has_a_result(history: History) -> list[str]:
    """To be asked after healing."""
    results = results_heard(history)
    return [
        f"{task} was acknowledged at {at:.3f} and has no result"
        for task, at in acknowledged(history).items()
        if task not in results
    ]


def one_result_per_task(history: History) -> list[str]:
    """Promised where at most one node was down, stopped or cut off at a time."""
    return [
        f"{task} has {len(heard)} results: {heard}"
        for task, heard in results_heard(history).items()
        if len(heard) > 1
    ]


def disks_agree(disks: dict[str, dict[str, Any]]) -> list[str]:
    """To be asked after healing: all nodes that know a task know it ended, and the same end."""
    ends: dict[TaskId, dict[str, Outcome | None]] = {}
    for node, disk in disks.items():
        for record in disk.values():
            if isinstance(record, TaskRecord):
                ends.setdefault(record.task, {})[node] = record.outcome
    return [
        f"{task}: {known}"
        for task, known in ends.items()
        if None in known.values() or any(end != next(iter(known.values())) for end in known.values())
    ]


def settled_stays_settled(history: History) -> list[str]:
    """A coordinator assigns no task that it settled; a disk never forgets an end for an open record.

    An assignment of a task whose deadline has passed is a violation, too.
    """
    ended: dict[tuple[str, str, TaskId], float] = {}
    on_disk: dict[tuple[str, TaskId], bool] = {}
    bad = []
    for at, node, boot, _, what in history:
        if isinstance(what, Save) and isinstance(what.record, TaskRecord):
            task = what.record.task
            if what.record.outcome is not None:
                ended[node, boot, task] = at
                on_disk[node, task] = True
            elif on_disk.get((node, task)):
                bad.append(f"{at:.3f}: {node} saved {task} as open after its end")
        elif isinstance(what, Send) and isinstance(what.message, Assign):
            if (node, boot, what.message.task) in ended:
                bad.append(f"{at:.3f}: {node} assigned {what.message.task} after it settled it")
            if what.message.budget_s is not None and what.message.budget_s <= 0:
                bad.append(f"{at:.3f}: {node} assigned {what.message.task} after its deadline")
    return bad


def acting_overlaps(history: History) -> list[tuple[float, Epoch, Epoch]]:
    """Moments at which a node won while another still acted. Allowed (fencing makes it harmless); counted."""
    acting: dict[str, Epoch] = {}
    overlaps = []
    for entry in history:
        if isinstance(entry.what, Elected):
            overlaps += [
                (entry.at, epoch, entry.what.epoch) for node, epoch in acting.items() if node != entry.node
            ]
            acting[entry.node] = entry.what.epoch
        elif isinstance(entry.what, Deposed) or entry.what == "killed":
            acting.pop(entry.node, None)
    return overlaps
