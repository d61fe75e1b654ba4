"""Feature maps that one node makes for another: asked for once, linked to their task, never in the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.ahead import AheadConfig
from coordinator.facts import FeaturesNeeded
from coordinator.scheduler import SchedulerConfig
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import (
    Assign,
    CancelTask,
    FeaturesHeld,
    FeaturesReady,
    FeaturesSpec,
    FeaturesWanted,
    NodeInfo,
    NodeRates,
    Outcome,
    Output,
    Submit,
    TaskStatus,
    TuneSpec,
)
from tests.unit.task_world import World, answer_of, info

HELD = FeaturesHeld(top_layers=4, profile="fp32 there", n_tokens=9, n_bytes=99, n_computed=9)


def rates(features: float) -> NodeRates:
    return NodeRates(
        prefill_tokens_per_s=features,
        decode_tokens_per_s=10,
        row_cost=0.2,
        features_tokens_per_s=features,
        tune_tokens_per_s=features,
    )


def top(name: str) -> NodeInfo:
    return replace(info(name), holds="top", top_layers=4)


def answered(assign: Assign) -> Outcome:
    is_features = assign.submit.kind == "features"
    return answer_of(assign, output=Output(features=HELD) if is_features else None)


def tell(world: World, *infos: NodeInfo) -> None:
    for about in infos:
        for host in world.up:
            world._feed(host, lambda h, m=about: h.stack.receive(m, m.node, world.now))


def world_of(*infos: NodeInfo, coordinator: str, **fields: Any) -> World:
    world = World(answer=answered, **fields).start(*(about.node for about in infos))
    tell(world, *infos)
    world.elect(coordinator)
    return world.run(2.0)


def tune(name: str, **fields: Any) -> Submit:
    spec = {"adapter": "spam", "data": "{}", "top_layers": 4, **fields.pop("spec", {})}
    return Submit(id=TaskId(name), kind="tune", tune=TuneSpec(**spec), **fields)


def needs(world: World, node: str, task: str, round: int = 0) -> None:
    (attempt,) = [key for key in world.hosts[NodeId(node)].running if key[0] == task]
    spec = FeaturesSpec(top_layers=4, parent=TaskId(task))
    world.learn(node, FeaturesNeeded(TaskId(task), attempt[1], round, spec))


def made(world: World) -> list[Assign]:
    return [assign for _, _, assign in world.started if assign.submit.kind == "features"]


def nodes_of(world: World, assigns: Iterable[Assign]) -> list[str]:
    wanted = {assign.task for assign in assigns}
    return [node for _, node, assign in world.started if assign.task in wanted]


def weak_job(world: World, name: str = "job", **fields: Any) -> World:
    """A job runs on the node that holds the top only; from now on attempts are short."""
    world.service_s = 300.0
    world.say(tune(name, **fields))
    world.run(0.5)
    assert (name, 1) in world.hosts[NodeId("weak")].running
    world.service_s = 0.5
    return world


def test_a_request_becomes_a_task_on_a_node_with_all_layers_and_its_end_reaches_the_worker() -> None:
    world = world_of(top("weak"), info("boss", slots=0), coordinator="boss")
    weak_job(world, value=7.0, deadline_s=60.0)
    world.start("strong")
    world.run(0.5)
    needs(world, "weak", "job")
    world.run(2.0)
    (assign,) = made(world)
    assert nodes_of(world, [assign]) == ["strong"]
    assert assign.submit.value == 7.0 and assign.submit.features is not None
    assert assign.submit.features.parent == "job"
    assert assign.budget_s is not None and assign.budget_s <= 60.0
    assert [(node, fact.made, fact.reason) for node, fact in world.arrived] == [("weak", HELD, None)]


def test_asking_again_and_again_makes_one_task_and_a_new_round_another() -> None:
    world = world_of(top("weak"), info("boss", slots=0), coordinator="boss", repeat=0.5)
    weak_job(world)
    world.start("strong").run(0.5)
    world.service_s = 10.0  # longer than the worker's repetitions
    needs(world, "weak", "job")
    world.run(9.0)
    assert len({assign.task for assign in made(world)}) == 1 and not world.arrived
    world.run(10.0)
    assert len(world.arrived) == 1
    needs(world, "weak", "job", round=1)
    world.run(15.0)
    assert len({assign.task for assign in made(world)}) == 2 and len(world.arrived) == 2


def test_nobody_holds_the_whole_model_and_the_worker_hears_that_at_once() -> None:
    world = world_of(top("weak"), info("boss", slots=0), coordinator="boss")
    tell(world, replace(info("boss", slots=0), model=None))
    weak_job(world)
    needs(world, "weak", "job")
    world.run(0.5)
    ((_, fact),) = world.arrived
    assert fact.made is None and "needs a node that holds the whole model" in (fact.reason or "")
    assert not made(world)


def test_records_that_only_weak_nodes_have_cannot_be_read_elsewhere() -> None:
    world = world_of(top("weak"), info("strong"), coordinator="strong")
    weak_job(world, spec={"data": None, "data_sha256": "a" * 64, "holders": ["weak"]})
    needs(world, "weak", "job")
    world.run(0.5)
    ((_, fact),) = world.arrived
    assert fact.made is None and "its records are on weak" in (fact.reason or "")


@pytest.mark.parametrize("lost_before_answer", [True, False])
def test_a_new_coordinator_goes_on_with_the_same_task(lost_before_answer: bool) -> None:
    world = world_of(top("weak"), info("boss", slots=0), info("next", slots=0), coordinator="boss")
    weak_job(world)
    world.start("strong").run(0.5)
    world.service_s = 3.0
    needs(world, "weak", "job")
    world.run(1.0 if lost_before_answer else 2.5)
    world.kill("boss")
    world.elect("next")
    world.bury("boss")
    world.run(10.0)
    assert len({assign.task for assign in made(world)}) == 1
    assert [fact.made for _, fact in world.arrived] == [HELD]


def test_what_is_made_for_a_task_ends_with_it() -> None:
    world = world_of(top("weak"), info("boss", slots=0), coordinator="boss")
    weak_job(world)
    world.start("strong").run(0.5)
    world.service_s = 100.0
    needs(world, "weak", "job")
    world.run(1.0)
    (assign,) = made(world)
    world.say(CancelTask(task=TaskId("job")))
    world.run(3.0)
    assert world.states(assign.task)[-1] == "cancelled"
    assert not world.hosts[NodeId("strong")].running


def test_who_is_not_the_jobs_worker_asks_in_vain() -> None:
    world = world_of(top("weak"), replace(top("liar"), slots=0), info("boss", slots=0), coordinator="boss")
    weak_job(world, "other")
    world.start("strong").run(0.5)
    wanted = FeaturesWanted(
        task=TaskId("other"), attempt=1, round=0, spec=FeaturesSpec(top_layers=4, parent=TaskId("other"))
    )
    boss = world.hosts[NodeId("boss")]
    world._feed(boss, lambda h: h.stack.receive(wanted, NodeId("liar"), world.now))
    world.run(2.0)
    assert not made(world)


def test_the_word_of_a_coordinator_that_is_over_is_not_believed() -> None:
    world = world_of(top("weak"), info("boss", slots=0), coordinator="boss")
    weak_job(world)
    world.service_s = 100.0
    world.start("strong").run(0.5)
    needs(world, "weak", "job")
    weak = world.hosts[NodeId("weak")]
    stale = FeaturesReady(epoch=Epoch(0, NodeId("old")), task=TaskId("job"), attempt=1, round=0, made=HELD)
    world._feed(weak, lambda h: h.stack.receive(stale, NodeId("old"), world.now))
    other_round = replace(stale, epoch=Epoch(world.term, NodeId("boss")), round=3)
    world._feed(weak, lambda h: h.stack.receive(other_round, NodeId("boss"), world.now))
    assert not world.arrived


# ── ahead of need ───────────────────────────────────────────────────────────────────────────────────


def slow_and_fast(**fields: Any) -> World:
    slow = replace(info("slow"), rates=rates(20), features_profile="fp32 same")
    fast = replace(info("fast", slots=0), rates=rates(400), features_profile="fp32 same")
    world = world_of(slow, fast, coordinator="fast", **fields)
    world.service_s = 300.0
    world.say(tune("job", value=5.0, deadline_s=200.0))
    world.run(1.5)
    assert ("job", 1) in world.hosts[NodeId("slow")].running
    world.service_s = 50.0
    return world


def now_idle(world: World, **changes: Any) -> None:
    about: dict[str, Any] = {"rates": rates(400), "features_profile": "fp32 same", **changes}
    tell(world, replace(info("fast"), **about))


def test_an_idle_fast_node_makes_maps_for_a_job_on_a_slow_one_at_little_value() -> None:
    world = slow_and_fast()
    now_idle(world)
    world.run(5.0)
    (assign,) = made(world)
    spec = assign.submit.features
    assert nodes_of(world, [assign]) == ["fast"]
    assert spec is not None and spec.is_ahead and spec.parent == "job"
    assert assign.submit.value < 0.01 and assign.budget_s is not None and assign.budget_s <= 200.0


@pytest.mark.parametrize(
    "changes",
    [
        {"rates": rates(40)},  # not much faster
        {"features_profile": "int8 other"},  # the job could not read them
        {"holds": "top", "top_layers": 4},
        {"model": "test/other"},
    ],
    ids=["as slow", "other numerics", "top only", "other model"],
)
def test_a_node_that_could_not_help_is_not_asked(changes: dict[str, Any]) -> None:
    world = slow_and_fast()
    now_idle(world, **changes)
    world.run(10.0)
    assert not made(world)


def test_a_node_with_anything_to_do_makes_nothing_ahead() -> None:
    world = slow_and_fast()
    now_idle(world)
    world.say(Submit(id=TaskId("talk"), prompt="hi"))
    world.run(10.0)
    ran_on = [node for _, node, assign in world.started if assign.task == "talk"]
    assert (ran_on == ["fast"]) != bool(made(world))


def test_one_job_is_helped_once() -> None:
    world = slow_and_fast()
    world.service_s = 0.5
    now_idle(world)
    world.run(30.0)
    assert len(made(world)) == 1


def test_a_bound_of_none_at_once_makes_none() -> None:
    world = slow_and_fast(config=SchedulerConfig(ahead=AheadConfig(at_once_max=0)))
    now_idle(world)
    world.run(10.0)
    assert not made(world)


def test_it_is_dropped_when_the_job_ends() -> None:
    world = slow_and_fast()
    now_idle(world)
    world.run(5.0)
    (assign,) = made(world)
    world.say(CancelTask(task=TaskId("job")))
    world.run(3.0)
    assert world.states(assign.task)[-1] == "cancelled"


def test_what_is_made_ahead_answers_who_asks_later() -> None:
    world = slow_and_fast()
    world.service_s = 6.0
    now_idle(world)
    world.run(3.0)
    needs(world, "slow", "job")
    world.run(10.0)
    assert len({assign.task for assign in made(world)}) == 1
    assert [fact.made for _, fact in world.arrived] == [HELD]


def test_statuses_of_groundwork_name_their_kind() -> None:
    world = slow_and_fast()
    now_idle(world)
    world.run(5.0)
    (assign,) = made(world)
    kinds = {status.kind for status in world.heard(TaskStatus, assign.task)}
    assert kinds == {"features"}
