"""Which feature maps to make before anybody asks for them, and where. Pure.

A tuning job that waits, or runs on a device much slower than an idle one, is going to need feature maps. A
node with nothing to do makes them meanwhile, and the job finds them in the mesh. What is made so must cost
nobody anything: only a node without any task gets it, one at a time, and it gives way to everything else.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from coordinator.cluster import Cluster, Node, serves
from coordinator.ledger import Ledger
from coordinator.policy.rates import rates_of
from coordinator.task import Task
from mesh.ids import NodeId, TaskId
from mesh.messages import FeaturesSpec, NodeInfo, Submit

__all__ = ["AheadConfig", "ahead", "model_of", "order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadConfig:
    at_once_max: int = 8
    """Tasks ahead of need in the whole mesh."""
    after_s: float = 1.0
    """A job that waits for less starts by itself."""
    look_every_s: float = 2.0
    looked_at_max: int = 256
    """Open tasks looked at each time, the oldest first."""
    times_faster: float = 3.0
    """The idle node makes feature maps so many times faster, at least, than the node that runs the job."""
    value: float = 1e-3
    """Of what the job is worth: everything else comes first."""


def ahead(
    ledger: Ledger,
    cluster: Cluster,
    known: Container[TaskId],
    n_running: int,
    now: float,
    config: AheadConfig,
) -> list[tuple[Task, NodeId]]:
    """Jobs whose feature maps shall be made now, and by whom.

    ``known``: jobs that have been helped before; ``n_running``: tasks ahead of need that are open.
    """
    room = config.at_once_max - n_running
    if room <= 0:
        return []
    idle = [node for node in cluster if _is_idle(node, ledger)]
    if not idle:
        return []
    idle.sort(key=lambda node: (-_pace(node.info), node.id))
    chosen: list[tuple[Task, NodeId]] = []
    for task in _jobs(ledger, now, config):
        if room <= 0 or not idle:
            break
        if task.id in known:
            continue
        helper = next((node for node in idle if _helps(node, task, cluster, config)), None)
        if helper is not None:
            idle.remove(helper)
            chosen.append((task, helper.id))
            room -= 1
    return chosen


def model_of(task: Task, cluster: Cluster) -> str | None:
    """Whose layers a task is going to use: those of the node it is on, else of the model it asks for."""
    runner = cluster.get(task.node).info if task.node is not None else None
    return runner.model if runner is not None else task.submit.model


def order(task: Task, node: Node, now: float, config: AheadConfig, child: TaskId) -> Submit:
    """The features task ``child`` for the job ``task``, on ``node`` and nowhere else."""
    tune = task.submit.tune
    assert tune is not None and tune.top_layers is not None, "chosen by ahead()"
    left_s = task.deadline_at - now
    return Submit(
        kind="features",
        tune=replace(tune, holders=[node.id]),
        features=FeaturesSpec(top_layers=tune.top_layers, parent=task.id, is_ahead=True),
        id=child,
        model=node.info.model if node.info is not None else None,
        value=task.submit.value * config.value,
        deadline_s=left_s if left_s < float("inf") else None,
        stream=False,
    )


def _jobs(ledger: Ledger, now: float, config: AheadConfig) -> Iterable[Task]:
    """Tuning jobs whose number of layers is known, in order of acceptance."""
    found = [
        task
        for task in ledger
        if task.is_open
        and task.is_acknowledged
        and not task.is_cancelling
        and task.submit.tune is not None
        and task.submit.kind == "tune"
        and task.submit.tune.top_layers is not None
        and task.accepted_at + config.after_s <= now < task.deadline_at
    ]
    found.sort(key=lambda task: (task.accepted_at, task.digest, task.id))
    return found[: config.looked_at_max]


def _is_idle(node: Node, ledger: Ledger) -> bool:
    """It could do anything at once, and has nothing to do, as far as the ledger and itself know."""
    info, report = node.info, node.report
    is_free = node.may_start and report is not None and not report.running and not ledger.in_flight[node.id]
    return is_free and info is not None and info.holds == "all" and _pace(info) > 0


def _pace(info: NodeInfo | None) -> float:
    """Tokens/s through the layers below the cut; 0 where it makes no feature maps."""
    if info is None or (info.rates is not None and info.rates.features_tokens_per_s is None):
        return 0.0
    return rates_of(info).features_tokens_per_s


def _helps(helper: Node, task: Task, cluster: Cluster, config: AheadConfig) -> bool:
    tune, info = task.submit.tune, helper.info
    assert tune is not None and info is not None
    if not serves(info.model, model_of(task, cluster), info.also_called):
        return False
    if tune.holders and helper.id not in tune.holders:
        return False  # it has not the records
    if task.node is None:
        return True
    runner = cluster.get(task.node).info
    if runner is None or runner.holds == "top":
        return False  # it says itself what it lacks
    is_same = info.features_profile is not None and info.features_profile == runner.features_profile
    return is_same and _pace(info) >= config.times_faster * _pace(runner)
