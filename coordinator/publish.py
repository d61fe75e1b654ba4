"""What clients hear about a task, as effects. Pure."""

from __future__ import annotations

from coordinator.task import Task, result_of, status_of
from mesh.core import Broadcast, Effect
from mesh.ids import Epoch, TaskId
from mesh.messages import Submit, TaskEvent, TaskReply, TaskStatus, Unacceptable

__all__ = ["acknowledge", "announce", "conclude", "event", "refusal", "refuse", "repeat"]


def announce(task: Task, epoch: Epoch, now: float) -> list[Effect]:
    """The task's state, retained."""
    return [Broadcast(status_of(task, epoch, now))]


def acknowledge(task: Task, epoch: Epoch, now: float) -> list[Effect]:
    """The task is durable: the mesh has promised to end it."""
    status = status_of(task, epoch, now)
    replies = [
        TaskReply(reply_to=to, correlation=correlation, body=status) for to, correlation in task.replies
    ]
    return [Broadcast(status), *map(Broadcast, replies)]


def conclude(task: Task, epoch: Epoch, now: float) -> list[Effect]:
    """The end of the task: the result first, so that whoever sees the final status finds it."""
    result = result_of(task)
    replies = [
        TaskReply(reply_to=to, correlation=correlation, body=result) for to, correlation in task.replies
    ]
    return [Broadcast(result), Broadcast(status_of(task, epoch, now)), *map(Broadcast, replies)]


def repeat(task: Task, submit: Submit, epoch: Epoch, now: float) -> list[Effect]:
    """The same submission came again: the same answer, also to where it wants it this time."""
    status = status_of(task, epoch, now)
    effects: list[Effect] = (
        [Broadcast(status)] if task.is_open else [Broadcast(result_of(task)), Broadcast(status)]
    )
    if submit.reply_to is not None:
        body = status if task.is_open else result_of(task)
        effects.append(
            Broadcast(TaskReply(reply_to=submit.reply_to, correlation=submit.correlation, body=body))
        )
    return effects


def refusal(task: TaskId, reason: str, epoch: Epoch) -> TaskStatus:
    return TaskStatus(
        task=task, state="rejected", reason=reason, node=None, attempt=0, epoch=epoch, durable_on=0
    )


def refuse(
    said: Submit | Unacceptable, task: TaskId, reason: str, epoch: Epoch, *, on_topic: bool
) -> list[Effect]:
    """No, and why. ``on_topic=False`` where the task's topics belong to another submission."""
    status = refusal(task, reason, epoch)
    effects: list[Effect] = [Broadcast(status)] if on_topic else []
    if said.reply_to is not None:
        effects.append(
            Broadcast(TaskReply(reply_to=said.reply_to, correlation=said.correlation, body=status))
        )
    return [*effects, event(f"rejected: {reason}", task)]


def event(text: str, task: TaskId | None = None) -> Effect:
    return Broadcast(TaskEvent(text=text, task=task))
