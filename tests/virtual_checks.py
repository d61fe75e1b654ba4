"""What must hold in every history of the virtual mesh, whatever the policy. Independent of the loop."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.loop import Deed
from coordinator.virtual.metrics import RunMetrics
from coordinator.virtual.workload import VirtualTask

__all__ = ["broken_promises"]


def broken_promises(
    tasks: Sequence[VirtualTask], nodes: Sequence[NodeSpec], history: Sequence[Deed], metrics: RunMetrics
) -> list[str]:
    """One sentence for each promise that does not hold; nothing if all is well."""
    return [
        *_ends(tasks, history),
        *_places(nodes, history),
        *_times(tasks, history),
        *_value(tasks, history, metrics),
    ]


def _ends(tasks: Sequence[VirtualTask], history: Sequence[Deed]) -> list[str]:
    """Every task arrives once and ends once, in that order."""
    arrived = Counter(deed.task for deed in history if deed.verb == "arrive")
    ended = Counter(deed.task for deed in history if deed.verb == "end")
    broken = [f"{task.id} arrived {arrived[task.id]} times" for task in tasks if arrived[task.id] != 1]
    broken += [f"{task.id} ended {ended[task.id]} times" for task in tasks if ended[task.id] != 1]
    broken += [f"{deed.task} was lost" for deed in history if deed.verb == "end" and deed.how == "lost"]
    over: set[str] = set()
    for deed in history:
        if deed.task in over:
            broken.append(f"{deed.task}: {deed.verb} after its end")
        if deed.verb == "end":
            over.add(deed.task)
    return broken


def _places(nodes: Sequence[NodeSpec], history: Sequence[Deed]) -> list[str]:
    """No task is on two nodes at once, no node does more at once than it has slots."""
    slots = {node.id: node.slots for node in nodes}
    on: dict[str, str] = {}
    pausing: set[str] = set()
    broken: list[str] = []
    for deed in history:
        match deed.verb:
            case "start":
                if deed.task in on:
                    broken.append(f"{deed.task} started on {deed.node} while on {on[deed.task]}")
                assert deed.node is not None
                on[deed.task] = deed.node
                # Who was told to give way does so before the next one begins.
                here = sum(node == deed.node and task not in pausing for task, node in on.items())
                if here > slots[deed.node]:
                    broken.append(f"{deed.node} was given {here} tasks for {slots[deed.node]} slots")
            case "pause":
                pausing.add(deed.task)
            case "resume":
                pausing.discard(deed.task)
            case "gave_way" | "lost" | "end":
                on.pop(deed.task, None)
                pausing.discard(deed.task)
            case _:
                pass
    return broken


def _times(tasks: Sequence[VirtualTask], history: Sequence[Deed]) -> list[str]:
    """Nothing starts before it arrives or at or after its deadline; time does not go back."""
    known = {task.id: task for task in tasks}
    broken = [
        f"{deed.task} started at {deed.at}, it lives from {task.arrives_at} to {task.deadline_at}"
        for deed in history
        if deed.verb == "start" and not (task := known[deed.task]).arrives_at <= deed.at < task.deadline_at
    ]
    if any(later.at < earlier.at for earlier, later in itertools.pairwise(history)):
        broken.append("time went back")
    return broken


def _value(tasks: Sequence[VirtualTask], history: Sequence[Deed], metrics: RunMetrics) -> list[str]:
    """What is kept is the value of the tasks done in time, each counted once; timeouts are all the others."""
    known = {task.id: task for task in tasks}
    in_time = {
        deed.task
        for deed in history
        if deed.verb == "end" and deed.how == "done" and deed.at <= known[deed.task].deadline_at
    }
    kept = sum(known[task].value for task in in_time) / sum(task.value for task in tasks)
    broken: list[str] = []
    if abs(kept - metrics.value_kept) > 1e-9:
        broken.append(f"value kept is {kept}, metrics say {metrics.value_kept}")
    if abs(1 - len(in_time) / len(tasks) - metrics.timeouts) > 1e-9:
        broken.append(f"timeouts are {1 - len(in_time) / len(tasks)}, metrics say {metrics.timeouts}")
    return broken
