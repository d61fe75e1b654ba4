"""The virtual mesh: every task ends in exactly one way, nothing is doubled, a new coordinator loses nothing.

The checks are ``tests.virtual_checks``; planted bugs below must turn them red.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, Start
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.policies import POLICIES, Policy, policy_named
from coordinator.virtual.devices import NodeSpec, nodes_of_speeds, parse_nodes, read_mesh
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import NOTICE_S, Deed, World, dispatcher, run
from coordinator.virtual.metrics import RunMetrics
from coordinator.virtual.nodes import VirtualNode
from coordinator.virtual.workload import Mix, VirtualTask, at_load, tasks_of
from mesh.ids import TaskId
from tests.virtual_checks import broken_promises

NODES = parse_nodes("1,1,0.5,6")


def drawn(
    n_tasks: int, seed: int = 1, load: float = 1.1, nodes: Sequence[NodeSpec] = NODES, mix: Mix | None = None
) -> list[VirtualTask]:
    requests = generate(GeneratorSpec(tasks=n_tasks, burstiness=2.0), Random(seed))
    return at_load(tasks_of(requests, mix or Mix(tune=0.04), seed, nodes), nodes, load)


def history_of(
    tasks: Sequence[VirtualTask],
    policy: Policy,
    nodes: Sequence[NodeSpec] = NODES,
    failover_every_s: float | None = None,
    make: Callable[[Policy], Dispatcher] = dispatcher,
) -> tuple[list[Deed], RunMetrics]:
    history: list[Deed] = []
    metrics = run(tasks, nodes, policy, failover_every_s=failover_every_s, history=history, make=make)
    return history, metrics


# ── conservation ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*POLICIES, "fifo+drop+chunk", "edf+drop+chunk", "sjf+drop+chunk+preempt"])
def test_every_task_ends_in_exactly_one_way_under_every_policy(name: str) -> None:
    tasks = drawn(250)
    history, metrics = history_of(tasks, policy_named(name))
    assert not broken_promises(tasks, NODES, history, metrics)
    assert metrics.n_tasks == len(tasks)
    assert 0 < metrics.utilization <= 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    speeds=st.lists(st.sampled_from([0.25, 1.0, 4.0]), min_size=1, max_size=4),
    slots=st.integers(1, 4),
    load=st.sampled_from([0.7, 1.0, 3.0]),
    name=st.sampled_from(["vdf", "fifo", "edf+drop+chunk"]),
    failover_every_s=st.sampled_from([None, 20.0, 90.0]),
    leaves=st.booleans(),
)
def test_whatever_the_mesh_and_the_faults_nothing_is_lost_or_doubled(
    seed: int,
    speeds: list[float],
    slots: int,
    load: float,
    name: str,
    failover_every_s: float | None,
    leaves: bool,
) -> None:
    rng = Random(seed)
    nodes = [
        NodeSpec(
            id=node.id,
            rates=node.rates,
            slots=slots,
            joins_at=rng.choice([0.0, 20.0]) if at else 0.0,
            leaves_at=rng.uniform(30, 300) if leaves and at else float("inf"),
        )
        for at, node in enumerate(nodes_of_speeds(speeds))
    ]
    tasks = drawn(30, seed, load, nodes)
    history, metrics = history_of(tasks, policy_named(name), nodes, failover_every_s)
    assert not broken_promises(tasks, nodes, history, metrics)


def test_no_node_ever_runs_more_than_it_has_slots() -> None:
    nodes = read_mesh('[[node]]\ndevice = "pi5"\ncount = 2\n[[node]]\ndevice = "orin"\nslots = 3', "m")
    world = World(drawn(200, nodes=nodes, load=1.3), nodes, policy_named("vdf"))
    while world.step():
        for node in world.nodes.values():
            assert len(node.running) <= node.spec.slots
            assert not set(node.running) & set(node.paused)
    assert world.metrics().n_tasks == 200


def test_seeds_replay_to_the_last_bit() -> None:
    one, two = (history_of(drawn(200), policy_named("vdf"), failover_every_s=25.0) for _ in range(2))
    assert one == two
    assert history_of(drawn(200, seed=2), policy_named("vdf")) != one


def test_progress_counts_every_task_once() -> None:
    told: list[int] = []
    run(drawn(600, load=0.5), NODES, policy_named("fifo"), progress=told.append)
    assert sum(told) == 600
    assert len(told) > 1


def test_tasks_that_nobody_can_do_end_too() -> None:
    nodes = [NodeSpec(id=NODES[0].id, rates=NODES[0].rates, leaves_at=30.0)]
    tasks = drawn(40, nodes=nodes)
    history, metrics = history_of(tasks, policy_named("vdf"), nodes)
    assert not broken_promises(tasks, nodes, history, metrics)
    assert metrics.timeouts > 0.5


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["vdf", "edf+drop+chunk", "fifo"])
def test_a_failover_every_30_s_costs_less_than_5_points_and_loses_and_doubles_nothing(name: str) -> None:
    calm, stormy = [], []
    for seed in (1, 2, 3):
        tasks = drawn(400, seed, load=1.0)
        history, metrics = history_of(tasks, policy_named(name), failover_every_s=30.0)
        assert not broken_promises(tasks, NODES, history, metrics)
        assert metrics.failovers > 10
        stormy.append(metrics.timeouts)
        calm.append(run(tasks, NODES, policy_named(name)).timeouts)
    assert (sum(stormy) - sum(calm)) / 3 < 0.05


def test_a_new_coordinator_disturbs_no_running_work() -> None:
    """No attempt ends at a failover; what was running goes on to its end."""
    tasks = drawn(200)
    history, _ = history_of(tasks, policy_named("fifo"), failover_every_s=20.0)
    started = [deed.task for deed in history if deed.verb == "start"]
    assert len(started) == len(set(started))


def test_what_a_node_had_when_it_left_starts_again_elsewhere() -> None:
    stays, leaves = parse_nodes("1,1")
    nodes = [stays, NodeSpec(id=leaves.id, rates=leaves.rates, leaves_at=100.0)]
    tasks = drawn(150, nodes=nodes, load=0.7, mix=Mix(tune=0.0, tightness=(20.0, 40.0)))
    history, metrics = history_of(tasks, policy_named("fifo"), nodes)
    assert not broken_promises(tasks, nodes, history, metrics)
    lost = [deed for deed in history if deed.verb == "lost"]
    assert lost
    for deed in lost:
        again = [
            one for one in history if one.task == deed.task and one.at >= deed.at and one.verb == "start"
        ]
        assert any(one.node == stays.id and one.at >= 100.0 + NOTICE_S for one in again)


# ── the point of it all ─────────────────────────────────────────────────────────────────────────────


def test_value_density_first_misses_far_fewer_deadlines_than_first_in_first_out() -> None:
    fifo, vdf = [], []
    for seed in (1, 2, 3):
        tasks = drawn(600, seed, load=1.1, mix=Mix())
        fifo.append(run(tasks, NODES, policy_named("fifo")))
        vdf.append(run(tasks, NODES, policy_named("vdf")))
    assert sum(one.timeouts for one in vdf) < 0.5 * sum(one.timeouts for one in fifo)
    assert sum(one.value_kept for one in vdf) > sum(one.value_kept for one in fifo)


def test_another_fast_node_helps() -> None:
    tasks = drawn(300, load=1.2)
    before = run(tasks, NODES, policy_named("vdf"))
    after = run(tasks, parse_nodes("1,1,0.5,6,6"), policy_named("vdf"))
    assert after.timeouts < before.timeouts


# ── planted bugs ────────────────────────────────────────────────────────────────────────────────────


class Forgetful(Dispatcher):
    """Loses every fortieth task it is given: refused without a word."""

    n_added = 0

    def add(self, job: Job, now: float) -> None:
        self.n_added += 1
        if self.n_added % 40:
            super().add(job, now)


class Doubling(Dispatcher):
    """Says the first start of each task twice, the second time for another node."""

    said: set[TaskId]

    def decide(self, now: float) -> list[Decision]:
        decisions = super().decide(now)
        for decision in [one for one in decisions if isinstance(one, Start)]:
            others = sorted(self.nodes - {decision.node})
            decisions.append(Start(task=decision.task, node=others[0], why=decision.why))
        return decisions


class Crowding(Dispatcher):
    """Takes work for ended as soon as it starts, so that its node seems free."""

    def decide(self, now: float) -> list[Decision]:
        decisions = super().decide(now)
        for decision in decisions:
            if isinstance(decision, Start) and self.node_of(decision.task) is not None:
                self.withdraw(decision.task, now)
        return decisions

    def ended(self, task: TaskId, now: float, observed: Observed | None = None) -> None:
        return


class Grudging(Dispatcher):
    """Rejects what it has started."""

    def decide(self, now: float) -> list[Decision]:
        decisions = super().decide(now)
        started = [one for one in decisions if isinstance(one, Start)]
        return [*decisions, *(Drop(task=one.task, reason="changed its mind") for one in started[:1])]


def mutant(kind: type[Dispatcher]) -> Callable[[Policy], Dispatcher]:
    return lambda policy: kind(policy, CostModel(), DispatchConfig(explain=False))


@pytest.mark.parametrize("kind", [Doubling, Crowding, Grudging])
def test_a_dispatcher_that_doubles_crowds_or_takes_back_is_noticed(kind: type[Dispatcher]) -> None:
    tasks = drawn(120, load=1.5)
    try:
        history, metrics = history_of(tasks, policy_named("fifo"), make=mutant(kind))
    except (AssertionError, KeyError):
        return  # the loop itself cannot go on
    assert broken_promises(tasks, NODES, history, metrics)


def test_a_dispatcher_that_forgets_is_noticed() -> None:
    """What it forgot expires in the end, as in production: it shows as expired on an empty mesh."""
    tasks = drawn(200, load=0.2, mix=Mix(tune=0.0, error=0.0, tightness=(10.0, 20.0)))
    sound = run(tasks, NODES, policy_named("vdf"))
    broken = run(tasks, NODES, policy_named("vdf"), make=mutant(Forgetful))
    assert sound.timeouts == 0.0
    assert broken.expired == pytest.approx(5 / 200)


def test_a_loop_that_loses_what_arrives_during_an_election_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lead(self: World) -> None:
        self._unsaid.clear()
        original(self)

    original = World._lead
    monkeypatch.setattr(World, "_lead", lead)
    assert broken_by_failovers()


def test_a_loop_that_starts_running_work_again_after_an_election_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lead(self: World) -> None:
        for known in self._open.values():
            known.node = None
        original(self)

    original = World._lead
    monkeypatch.setattr(World, "_lead", lead)
    assert broken_by_failovers()


def test_a_node_that_reports_an_end_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(self: VirtualNode) -> list[object]:
        done = original(self)
        return [*done, *done]

    original = VirtualNode.ended
    monkeypatch.setattr(VirtualNode, "ended", ended)
    with pytest.raises(KeyError):
        run(drawn(50), NODES, policy_named("fifo"))


def test_value_counted_twice_is_noticed() -> None:
    tasks = drawn(100, load=0.5)
    history, metrics = history_of(tasks, policy_named("fifo"))
    assert not broken_promises(tasks, NODES, history, metrics)
    extra = [deed for deed in history if deed.verb == "end" and deed.how == "done"][:1]
    assert broken_promises(tasks, NODES, [*history, *extra], metrics)


def broken_by_failovers() -> list[str]:
    tasks = drawn(200, load=1.3)
    try:
        history, metrics = history_of(tasks, policy_named("fifo"), failover_every_s=8.0)
    except (AssertionError, KeyError) as error:
        return [repr(error)]
    return broken_promises(tasks, NODES, history, metrics)
