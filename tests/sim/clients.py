"""Clients as they should be: they name their tasks, ask again until answered, remember what they heard."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from random import Random
from typing import Any

from mesh import topics
from mesh.ids import TaskId
from mesh.messages import CancelTask, NodeState, Submit, TaskReply, TaskResult, TaskStatus, TuneSpec
from tests.sim.history import ClientHeard, Entry
from tests.sim.network import BACKOFF_S, SITE, Broker, Connection
from tests.sim.world import World

__all__ = ["Asked", "SimClient", "clients_of"]

ASK_AGAIN_S = 1.5
TUNE_EVERY = 5
URGENT_EVERY = 6  # worth enough that others stand still for them


@dataclass(slots=True)
class Asked:
    """One task of one client."""

    submit: Submit
    is_acknowledged: bool = False
    is_over: bool = False


class SimClient:
    is_node = False

    def __init__(self, world: World, name: str, seed: int | str) -> None:
        self.world = world
        self.name = name
        self.place = name
        self.connection: Connection | None = None
        self.is_connecting = False
        self.tasks: dict[TaskId, Asked] = {}
        self._rng = Random(f"{seed}/{name}")
        world.network.connect(self)

    # ── what the network asks ───────────────────────────────────────────────────────────────────────

    def uses(self) -> str | None:
        """The site's broker; where there is none, the one that some running node uses."""
        if SITE in self.world.network.brokers:
            return SITE
        lives = [host.life for host in self.world.hosts.values() if host.life is not None]
        return next((life.broker_name for life in lives if life.connection is not None), None)

    def is_running(self) -> bool:
        return True

    def is_stopped(self) -> bool:
        return False

    def hears(self, row: str, key: Hashable) -> bool:
        return key == self._reply_to if row == "REPLY" else key in self.tasks

    def will(self) -> NodeState | None:
        return None

    def on_link_up(self, broker: Broker) -> None:
        pass

    def on_link_down(self, host_is_dead: bool) -> None:
        self.world.network.connect(self, self._rng.uniform(*BACKOFF_S))

    def on_message(self, message: Any, sender: str) -> None:
        said = message.body if isinstance(message, TaskReply) else message
        if not isinstance(said, TaskStatus | TaskResult) or said.task not in self.tasks:
            return
        entry = Entry(self.world.now, self.name, "", "", ClientHeard(self.name, said))
        self.world.history.append(entry)
        if self.world.is_traced:
            print(f"{entry.at:9.3f} {self.name} <- {said}")
        asked = self.tasks[said.task]
        if isinstance(said, TaskResult) or said.state == "rejected":
            asked.is_over = True
        else:
            asked.is_acknowledged = True

    # ── what it does ────────────────────────────────────────────────────────────────────────────────

    @property
    def _reply_to(self) -> str:
        return f"reply/{self.name}"

    def submit_over(self, length_s: float, n_tasks: int) -> None:
        """Submit ``n_tasks`` at random moments; some get a deadline, some are cancelled."""
        for index in range(n_tasks):
            rng = self._rng
            work: dict[str, Any] = {"prompt": f"task {index}"}
            if index % TUNE_EVERY == 3:
                work = {"kind": "tune", "tune": TuneSpec(adapter=f"{self.name}-{index}", data="{}")}
            submit = Submit(
                id=TaskId(f"{self.name}-{index}"),
                **work,
                value=20.0 if index % URGENT_EVERY == 1 else 1.0,
                deadline_s=rng.uniform(2, 30) if rng.random() < 0.25 else None,
                reply_to=self._reply_to if rng.random() < 0.3 else None,
            )
            at = self.world.now + rng.uniform(0, length_s)
            self.world.queue.at(at, self._ask, submit)
            if rng.random() < 0.15:
                self.world.queue.at(at + rng.uniform(0, 6), self._cancel, submit.id)

    def _ask(self, submit: Submit) -> None:
        assert submit.id is not None
        asked = self.tasks.setdefault(submit.id, Asked(submit))
        if not asked.is_acknowledged and not asked.is_over:
            self.world.network.publish(self, topics.SUBMIT, None, submit)
            self.world.queue.after(ASK_AGAIN_S, self._ask, submit)

    def _cancel(self, task: TaskId) -> None:
        self.world.network.publish(self, topics.CANCEL, task, CancelTask(task=task))

    @property
    def is_content(self) -> bool:
        """Everything it was promised has come."""
        return all(asked.is_over for asked in self.tasks.values() if asked.is_acknowledged)


def clients_of(world: World, n_clients: int, n_tasks: int, length_s: float) -> list[SimClient]:
    clients = [SimClient(world, f"client-{index}", world.seed) for index in range(n_clients)]
    for client in clients:
        client.submit_over(length_s, n_tasks)
    return clients
