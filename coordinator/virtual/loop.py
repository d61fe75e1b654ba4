"""One run: tasks arrive, the real dispatcher decides, virtual nodes do what it says, on virtual time.

As in production, work is stopped at its deadline and a task that nobody could start by then is expired; all
else (order, rejection, giving way) is the dispatcher's.

Coordinators may fail: from the death until a new one is elected nothing is decided, while nodes go on with
what they have. The new one starts from what is durable: acknowledged tasks, and what nodes say they run.
What the old one had learned of costs is gone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, Literal

from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Drop, Job, NodeView, Pause, Resume, Start
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.policies import Policy
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.metrics import End, How, RunMetrics, measured
from coordinator.virtual.nodes import Attempt, VirtualNode
from coordinator.virtual.workload import VirtualTask
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

__all__ = ["ELECTION_S", "NOTICE_S", "Deed", "World", "dispatcher", "run"]

ELECTION_S: Final = 2.0
"""From a coordinator's death until its successor decides: see docs/failure-semantics.md."""
NOTICE_S: Final = 5.0
"""From a node's leaving without a word until its work is placed elsewhere."""
REFUSED_S: Final = 1.0
"""How long a node that refused a task is not asked again."""
_PROGRESS_EVERY: Final = 256  # tasks

Verb = Literal["arrive", "start", "pause", "gave_way", "resume", "lost", "end"]


@dataclass(frozen=True, slots=True)
class Deed:
    """One line of a run's history, for whoever checks it."""

    at: float
    verb: Verb
    task: TaskId
    node: NodeId | None = None
    how: How | None = None


class _On(IntEnum):
    """What a time in the queue is for. At one instant lower ones come first: work done just in time
    counts."""

    NODE = 0
    JOIN = 1
    LEAVE = 2
    NOTICE = 3
    DEATH = 4
    ELECTION = 5
    DEADLINE = 6


@dataclass(slots=True)
class _Open:
    """A task that has not ended."""

    task: VirtualTask
    job: Job
    """As the coordinator knows it, with what is left of its work."""
    left: float = 1.0
    """True share of the work that is to be done by the next attempt."""
    node: NodeId | None = None
    used_s: float = 0.0


def dispatcher(policy: Policy) -> Dispatcher:
    """As the coordinator has it, without explanations for people."""
    return Dispatcher(policy, CostModel(), DispatchConfig(explain=False))


def run(
    tasks: Sequence[VirtualTask],
    nodes: Sequence[NodeSpec],
    policy: Policy,
    *,
    failover_every_s: float | None = None,
    progress: Callable[[int], None] | None = None,
    history: list[Deed] | None = None,
    make: Callable[[Policy], Dispatcher] = dispatcher,
) -> RunMetrics:
    """Run until every task has ended.

    Args:
        tasks: In order of arrival.
        progress: Called now and then with how many more tasks have ended.
        history: Everything that happened is appended.
        make: A coordinator's dispatcher; called again at every failover.
    """
    world = World(tasks, nodes, policy, failover_every_s=failover_every_s, make=make, history=history)
    told = 0
    while world.step():
        if progress is not None and len(world.ends) - told >= _PROGRESS_EVERY:
            progress(len(world.ends) - told)
            told = len(world.ends)
    if progress is not None:
        progress(len(world.ends) - told)
    return world.metrics()


class World:
    """The state of a run between two instants."""

    def __init__(
        self,
        tasks: Sequence[VirtualTask],
        nodes: Sequence[NodeSpec],
        policy: Policy,
        *,
        failover_every_s: float | None = None,
        make: Callable[[Policy], Dispatcher] = dispatcher,
        history: list[Deed] | None = None,
    ) -> None:
        self.now = 0.0
        self.ends: list[End] = []
        self._tasks = tasks
        self._n_arrived = 0
        self._policy = policy
        self._make = make
        self._dispatcher = make(policy)
        self._is_led = True
        self._decided_at = -FOREVER
        self._open: dict[TaskId, _Open] = {}
        self._unheard: list[TaskId] = []
        """Done while nobody coordinated: their nodes tell the next coordinator."""
        self._unsaid: list[VirtualTask] = []
        """Arrived while nobody coordinated: their clients say them again."""
        self._history = history
        self._failover_every_s = failover_every_s
        self._n_failovers = 0
        self._n_pauses = 0
        self._wasted_s = 0.0
        self.nodes: dict[NodeId, VirtualNode] = {}
        self._gone: set[NodeId] = set()
        self._noticed: set[NodeId] = set()
        """Nodes that the coordinator takes for present."""
        self._specs = {spec.id: spec for spec in nodes}
        self._queue: list[tuple[float, int, str, int]] = []
        for spec in nodes:
            self._at(spec.joins_at, _On.JOIN, spec.id)
            self._at(spec.leaves_at, _On.LEAVE, spec.id)
        if failover_every_s is not None:
            self._at(failover_every_s, _On.DEATH)

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> bool:
        """Go to the next instant and do all that happens then; ``False`` when every task has ended."""
        if self._n_arrived == len(self._tasks) and not self._open and not self._unsaid:
            return False
        at = self._next_at()
        if at == FOREVER:  # nobody is left who could do anything
            for task in [*self._open]:
                self._end(task, "lost", "no node is left")
            return True
        self.now = at
        while self._queue and self._queue[0][0] <= at:
            _, on, name, version = heapq.heappop(self._queue)
            self._happen(_On(on), name, version)
        while self._n_arrived < len(self._tasks) and self._tasks[self._n_arrived].arrives_at <= at:
            self._arrive(self._tasks[self._n_arrived])
            self._n_arrived += 1
        if self._is_led:
            self._decide()
        return True

    def _next_at(self) -> float:
        while self._queue and self._is_stale(*self._queue[0][1:]):
            heapq.heappop(self._queue)
        at = self._queue[0][0] if self._queue else FOREVER
        if self._n_arrived < len(self._tasks):
            at = min(at, self._tasks[self._n_arrived].arrives_at)
        # A time that is over cannot be woken at; the deadline itself is in the queue.
        if self._is_led and (wake_at := self._dispatcher.wake_at) > self._decided_at:
            at = min(at, wake_at)
        return max(at, self.now)

    def _is_stale(self, on: int, name: str, version: int) -> bool:
        """Nothing would happen then."""
        if on == _On.NODE:
            return self.nodes[NodeId(name)].version != version
        return on == _On.DEADLINE and TaskId(name) not in self._open

    def _at(self, at: float, on: _On, name: str = "", version: int = 0) -> None:
        if at < FOREVER:
            heapq.heappush(self._queue, (at, int(on), name, version))

    def _happen(self, on: _On, name: str, version: int) -> None:
        match on:
            case _On.NODE:
                node = self.nodes[NodeId(name)]
                if node.version == version:
                    self._work(node)
            case _On.JOIN:
                self._join(self._specs[NodeId(name)])
            case _On.LEAVE:
                self._leave(self.nodes[NodeId(name)])
            case _On.NOTICE:
                self._notice(NodeId(name))
            case _On.DEATH:
                self._die()
            case _On.ELECTION:
                self._lead()
            case _On.DEADLINE:
                self._expire(TaskId(name))

    # ── tasks ───────────────────────────────────────────────────────────────────────────────────────

    def _arrive(self, task: VirtualTask) -> None:
        self._at(task.deadline_at, _On.DEADLINE, task.id)
        self._note("arrive", task.id)
        if self._is_led:
            self._accept(task)
        else:
            self._unsaid.append(task)

    def _accept(self, task: VirtualTask) -> None:
        """From here on it is acknowledged and durable."""
        job = Job(
            task=task.id,
            work=task.work,
            value=task.value,
            arrived_at=task.arrives_at,
            deadline_at=task.deadline_at,
        )
        self._open[task.id] = _Open(task, job)
        if task.deadline_at <= self.now:
            self._end(task.id, "expired", "its deadline passed before anybody took it")
        else:
            self._dispatcher.add(job, self.now)

    def _expire(self, task: TaskId) -> None:
        """Its deadline is now: nodes stop it, the coordinator settles it."""
        if (known := self._open.get(task)) is None or task in self._unheard:
            return
        observed = None
        if known.node is not None:
            node = self.nodes[known.node]
            attempt = node.stop(task, self.now)
            self._take_off(attempt)
            self._look(node)
            if attempt is not None:
                observed = Observed(service_s=attempt.ran_s, is_whole=False)
        if self._is_led:
            self._dispatcher.ended(task, self.now, observed)
        self._end(task, "expired", "its deadline passed")

    def _end(self, task: TaskId, how: How, reason: str = "") -> None:
        known = self._open.pop(task)
        end = End(
            task=task,
            kind=known.task.work.kind,
            value=known.task.value,
            arrived_at=known.task.arrives_at,
            deadline_at=known.task.deadline_at,
            ended_at=self.now,
            how=how,
            reason=reason,
        )
        self.ends.append(end)
        if not end.is_in_time:
            self._wasted_s += known.used_s
        self._note("end", task, known.node, how)

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def _work(self, node: VirtualNode) -> None:
        """Something is due on the node: work ends, goes over to its answer, or gives way."""
        node.advance(self.now)
        for attempt in node.gave_way():
            self._give_way(attempt)
        for attempt in node.ended():
            self._done(attempt)
        self._look(node)

    def _done(self, attempt: Attempt) -> None:
        task = attempt.task.id
        self._take_off(attempt)
        if self._is_led:
            self._dispatcher.ended(task, self.now, Observed(service_s=attempt.ran_s))
            self._end(task, "done")
        else:
            self._unheard.append(task)

    def _give_way(self, attempt: Attempt) -> None:
        """A tuning job is paused: what it has done is kept, and it may go on anywhere."""
        known = self._open[attempt.task.id]
        self._take_off(attempt)
        self._note("gave_way", attempt.task.id, known.node)
        share = attempt.left_of_training
        known.left *= attempt.left
        known.job = replace(known.job, work=known.job.work.left(share))
        known.node = None
        if self._is_led and attempt.task.id in self._dispatcher:
            self._dispatcher.requeue(attempt.task.id, self.now, left=share)
        elif self._is_led:  # it was told to by an earlier coordinator
            self._dispatcher.add(known.job, self.now)

    def _take_off(self, attempt: Attempt | None) -> None:
        if attempt is not None:
            self._open[attempt.task.id].used_s += attempt.used_s

    def _look(self, node: VirtualNode) -> None:
        """Come back when something is due there."""
        self._at(node.next_at(), _On.NODE, node.spec.id, node.version)

    def _join(self, spec: NodeSpec) -> None:
        node = self.nodes[spec.id] = VirtualNode(spec, self.now)
        self._noticed.add(spec.id)
        if self._is_led:
            self._dispatcher.put_node(_view(node))

    def _leave(self, node: VirtualNode) -> None:
        self._gone.add(node.spec.id)
        for attempt in node.clear(self.now):
            self._take_off(attempt)
            self._note("lost", attempt.task.id, node.spec.id)
        self._at(self.now + NOTICE_S, _On.NOTICE, node.spec.id)

    def _notice(self, node: NodeId) -> None:
        """What the gone node had starts again elsewhere."""
        self._noticed.discard(node)
        if self._is_led:
            self._dispatcher.drop_node(node)
        for known in self._open.values():
            if known.node == node:
                known.node = None
                if self._is_led:
                    self._dispatcher.add(known.job, self.now)

    # ── coordinators ────────────────────────────────────────────────────────────────────────────────

    def _decide(self) -> None:
        self._decided_at = self.now
        refused: set[TaskId] = set()
        for decision in self._dispatcher.decide(self.now):
            match decision:
                case Start(task=task, node=name, after=after) if after in refused:
                    self._dispatcher.requeue(task, self.now, avoid={name: self.now + REFUSED_S})
                case Start(task=task, node=name):
                    self._start(task, name)
                case Drop(task=task, reason=reason):
                    self._end(task, "rejected", reason)
                case Pause(task=task, node=name) if self.nodes[name].may_pause(task):
                    self._n_pauses += 1
                    self._note("pause", task, name)
                    node = self.nodes[name]
                    node.pause(task, self.now)
                    self._look(node)
                case Pause(task=task):
                    refused.add(task)
                case Resume(task=task, node=name):
                    self._note("resume", task, name)
                    node = self.nodes[name]
                    node.resume(task, self.now)
                    self._look(node)

    def _start(self, task: TaskId, name: NodeId) -> None:
        known, node = self._open[task], self.nodes[name]
        known.node = name
        self._note("start", task, name)
        if name in self._gone:
            self._note("lost", task, name)  # nobody is there to take it
            return
        node.start(known.task, known.left, self.now)
        self._look(node)

    def _die(self) -> None:
        self._is_led = False
        self._n_failovers += 1
        self._at(self.now + ELECTION_S, _On.ELECTION)

    def _lead(self) -> None:
        """A new coordinator: it knows what is on disks, and hears what nodes run and have done."""
        assert self._failover_every_s is not None
        self._is_led = True
        self._decided_at = -FOREVER
        self._dispatcher = self._make(self._policy)
        for name in sorted(self._noticed):
            self._dispatcher.put_node(_view(self.nodes[name]))
        for task in self._unheard:
            self._end(task, "done")
        self._unheard = []
        for known in self._open.values():
            if known.node is None:
                self._dispatcher.add(known.job, self.now)
            elif not self.nodes[known.node].is_giving_way(known.task.id):
                self._dispatcher.running(known.job, known.node, self.now)
        for node in self.nodes.values():  # who pauses for whom, the old one alone knew
            for task in node.resume_all(self.now):
                self._note("resume", task, node.spec.id)
            self._look(node)
        for unsaid in self._unsaid:
            self._accept(unsaid)
        self._unsaid = []
        self._at(self.now - ELECTION_S + self._failover_every_s, _On.DEATH)

    # ── ─────────────────────────────────────────────────────────────────────────────────────────────

    def _note(self, verb: Verb, task: TaskId, node: NodeId | None = None, how: How | None = None) -> None:
        if self._history is not None:
            self._history.append(Deed(self.now, verb, task, node, how))

    def metrics(self) -> RunMetrics:
        """Of a run that is over."""
        first_s = self._tasks[0].arrives_at
        present_s: dict[str, float] = {
            name: node.spec.slots
            * max(0.0, min(node.spec.leaves_at, self.now) - max(node.spec.joins_at, first_s))
            for name, node in self.nodes.items()
        }
        return measured(
            self.ends,
            busy_s={name: node.busy_s for name, node in self.nodes.items()},
            present_s=present_s,
            wasted_s=self._wasted_s,
            pauses=self._n_pauses,
            failovers=self._n_failovers,
        )


def _view(node: VirtualNode) -> NodeView:
    spec = node.spec
    return NodeView(id=spec.id, rates=spec.rates, slots=spec.slots, tunes_beside=spec.slots > 1)
