"""Plays the tasks of a virtual workload on a real mesh, in real time, and tells how each ended.

What comes back is what the simulator gives of a run, so that both are compared by the same metrics. Times are
those of a client: from saying the task to hearing its result, the way through the mesh included.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from coordinator.virtual.metrics import End, How, RunMetrics, measured
from coordinator.virtual.workload import VirtualTask
from mesh.ids import TaskId
from mesh.messages import Submit, TaskResult, TaskStatus
from tests.traffic import Traffic

__all__ = ["metrics_of", "play"]

_HOWS: dict[str, How] = {"done": "done", "rejected": "rejected", "expired": "expired"}
GRACE_S = 15.0
"""After the last deadline: expired work is stopped within a step and told within a heartbeat."""


async def play(
    client: Traffic, tasks: Sequence[VirtualTask], submit_of: Callable[[VirtualTask], Submit], *, name: str
) -> tuple[list[End], dict[TaskId, TaskResult]]:
    """Say each task when it arrives, and wait for all ends; at most until the last deadline is over.

    Args:
        client: It has said nothing of this ``name`` before.
        tasks: In order of arrival; the first one's time is now.
        submit_of: The body, without id, value and deadline.
        name: Begins the ids, to keep runs on one mesh apart.

    Returns:
        The ends in the order of ``tasks``, and the results there are by the ids in them.

    Raises:
        AssertionError: A task has no end, which must not happen.
    """
    submits = [
        replace(
            submit_of(task),
            id=TaskId(f"{name}-{task.id}"),
            value=task.value,
            deadline_s=task.deadline_at - task.arrives_at,
        )
        for task in tasks
    ]
    began_at, first_at = time.monotonic(), tasks[0].arrives_at
    said_at: list[float] = []
    for task, submit in zip(tasks, submits, strict=True):
        await asyncio.sleep(began_at + task.arrives_at - first_at - time.monotonic())
        said_at.append(time.monotonic())
        client.submit(submit)
    ids = [submit.id for submit in submits if submit.id is not None]
    over_at = began_at + max(task.deadline_at for task in tasks) - first_at + GRACE_S
    await client.wait(
        lambda: all(_end_of(client, one) for one in ids), over_at - time.monotonic(), "every task has ended"
    )
    ends = [_end(client, task, one, at - began_at) for task, one, at in zip(tasks, ids, said_at, strict=True)]
    results = {one: client.results[one][-1] for one in ids if client.results[one]}
    return [replace(end, ended_at=end.ended_at - began_at) for end in ends], results


def metrics_of(ends: Sequence[End]) -> RunMetrics:
    """Of a real run: what only the simulator can see is 0."""
    return measured(ends, busy_s={}, present_s={}, wasted_s=0.0, pauses=0, failovers=0)


def _end_of(client: Traffic, task: TaskId) -> TaskResult | TaskStatus | None:
    """A task that was refused at once has no result."""
    if client.results[task]:
        return client.results[task][-1]
    statuses = client.statuses[task]
    return statuses[-1] if statuses and statuses[-1].state == "rejected" else None


def _end(client: Traffic, task: VirtualTask, name: TaskId, said_s: float) -> End:
    end = _end_of(client, name)
    assert end is not None
    return End(
        task=name,
        kind=task.work.kind,
        value=task.value,
        arrived_at=said_s,
        deadline_at=said_s + task.deadline_at - task.arrives_at,
        ended_at=client.ended_at.get(name, client.acknowledged_at[name]),
        how=_HOWS.get(end.state, "lost"),
        reason=end.reason or "",
    )
