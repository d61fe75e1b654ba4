"""Jobs of several nodes: which parts are made when, and that each ends once whatever happens on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest

from coordinator.admission import AdmissionConfig
from coordinator.scheduler import SchedulerConfig
from coordinator.task import digest_of
from mesh.ids import TaskId
from mesh.messages import (
    AdapterCard,
    Assign,
    CancelTask,
    FeaturesHeld,
    Outcome,
    Output,
    Submit,
    TaskProgress,
    TuneSpec,
)
from mesh.messages.tune import TunePart
from tests.unit.task_world import World, answer_of, mesh

PROFILE = "fp32 some numerics"
SPEC = TuneSpec(adapter="a", data='{"text": "x", "label": "y"}\n' * 50, epochs=2, nodes=2)
JOB = TaskId("job")


def part_of(assign: Assign) -> TunePart:
    assert assign.submit.tune is not None and assign.submit.tune.part is not None, "jobs themselves never run"
    return assign.submit.tune.part


def work(assign: Assign) -> Outcome:
    """As ``node.compute.tune.part_job`` ends: a state follows from what it started from."""
    part = part_of(assign)
    held = FeaturesHeld(top_layers=3, profile=PROFILE, n_tokens=0, n_bytes=0)
    if part.stage == "begin":
        return answer_of(assign, output=Output(features=held))
    what = f"{part.index} {part.round} {part.starts} {part.profile} {part.threads}"
    digest = hashlib.sha256(what.encode()).hexdigest()
    if part.stage == "train":
        return answer_of(assign, output=Output(state=digest, features=held))
    card = AdapterCard(
        name="a", digest=digest, method="lora", top_layers=3, first_layer=2, bytes=1, task="classify"
    )
    return answer_of(assign, output=Output(adapter=card))


def submitted(n: int, spec: TuneSpec = SPEC, **settings: object) -> World:
    world = mesh(n, **{"answer": work, "service_s": 1.0, **settings})
    world.say(Submit(kind="tune", tune=spec, id=JOB, value=3.0))
    return world


def adapter(world: World) -> str:
    """A new coordinator says what was settled a moment ago once more: the same."""
    first, *others = world.results(JOB)
    assert all(other.output == first.output for other in others)
    assert first.state == "done" and first.output is not None and first.output.adapter is not None
    return first.output.adapter.digest


def ran(world: World) -> Counter[tuple[str, int, int]]:
    return Counter((p.stage, p.round, p.index) for _, _, a in world.started for p in [part_of(a)])


ALL = {
    ("begin", 0, 0), ("train", 0, 0), ("train", 0, 1), ("train", 1, 0), ("train", 1, 1), ("merge", 2, 0),
}  # fmt: skip


# ── the way ─────────────────────────────────────────────────────────────────────────────────────────


def test_rounds_follow_one_another_and_the_parts_of_one_run_at_once() -> None:
    world = submitted(3).run(10.0)
    assert set(ran(world)) == ALL and set(ran(world).values()) == {1}
    rounds: dict[int, list[tuple[float, str]]] = {}
    for at, node, assign in world.started:
        part = part_of(assign)
        if part.stage == "train":
            rounds.setdefault(part.round, []).append((at, node))
            assert (part.profile, assign.submit.tune.top_layers) == (PROFILE, 3)  # type: ignore[union-attr]
            assert len(part.starts) == (2 if part.round else 0)
            assert assign.submit.value == 3.0
    for begun in rounds.values():
        assert len({node for _, node in begun}) == 2, "each on a node of its own"
        assert max(at for at, _ in begun) - min(at for at, _ in begun) < 0.5
    adapter(world)
    assert world.states(JOB)[-1] == "done"


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_adapter_is_the_same_however_many_nodes_there_are(n: int) -> None:
    assert adapter(submitted(n, slots=1).run(30.0)) == adapter(submitted(3).run(30.0))


def test_a_job_takes_no_slot_from_its_parts() -> None:
    """One node with one slot, and two jobs of four parts each."""
    world = submitted(1, replace(SPEC, nodes=4), slots=1)
    world.say(Submit(kind="tune", tune=replace(SPEC, nodes=4, adapter="b"), id=TaskId("other")))
    world.run(60.0)
    assert world.states(JOB)[-1] == world.states("other")[-1] == "done"


def test_the_client_hears_how_many_parts_of_which_round_are_done() -> None:
    world = submitted(3).run(10.0)
    told = [one for one in world.heard(TaskProgress) if isinstance(one, TaskProgress) and one.task == JOB]
    assert [one.fraction for one in told] == sorted(one.fraction for one in told)
    assert any("epoch 2 of 2 on 2 nodes: 1 parts are done" in one.text for one in told)
    assert [one.seq for one in told] == list(range(1, len(told) + 1))


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────


def test_a_node_that_dies_costs_a_part_and_changes_nothing() -> None:
    quiet = adapter(submitted(3).run(30.0))
    world = submitted(3).run(1.7)  # parts of round 0 run
    victim = next(node for _, node, a in reversed(world.started) if node != "n0")
    world.kill(victim)
    world.run(0.5)
    world.bury(victim)
    world.run(30.0)
    assert adapter(world) == quiet
    assert max(ran(world).values()) == 2


@pytest.mark.parametrize("after_s", [0.2, 1.3, 1.8, 2.6, 3.4, 4.4])
def test_another_coordinator_goes_on_with_the_round_that_it_finds(after_s: float) -> None:
    quiet = adapter(submitted(3).run(30.0))
    world = submitted(3).run(after_s)
    world.kill("n0")
    world.run(0.3)
    world.elect("n1")
    world.bury("n0")
    world.run(60.0)
    assert adapter(world) == quiet
    assert sum(ran(world).values()) <= len(ALL) + 3, "nothing is begun again that was done"


def test_a_round_that_began_long_ago_is_found_by_what_its_parts_start_from() -> None:
    """Settled parts are forgotten after ten minutes; an open one knows the states before it."""
    world = submitted(2, service_s=400.0).run(1000.0)  # begin and round 0 are long over
    world.elect("n1")
    world.run(4000.0)
    assert adapter(world) == adapter(submitted(3).run(30.0))


def test_states_that_are_lost_are_made_again_and_the_rest_is_not() -> None:
    lost: list[TaskId] = []

    def losing(assign: Assign) -> Outcome:
        part = part_of(assign)
        if part.round == 1 and part.stage == "train" and not lost:
            lost.append(assign.task)
            return answer_of(assign, output=Output(lacking=[1]))
        return work(assign)

    world = submitted(3, answer=losing).run(30.0)
    assert adapter(world) == adapter(submitted(3).run(30.0))
    counts = ran(world)
    assert counts["train", 0, 1] == 2 and counts["train", 0, 0] == 1 and counts["begin", 0, 0] == 1


def test_a_mesh_that_keeps_no_states_is_told_so() -> None:
    def forgetful(assign: Assign) -> Outcome:
        part = part_of(assign)
        return answer_of(assign, output=Output(lacking=[0, 1])) if part.starts else work(assign)

    world = submitted(2, answer=forgetful).run(120.0)
    assert world.states(JOB)[-1] == "failed"
    (result,) = world.results(JOB)
    assert "--feature-disk" in (result.reason or "")
    assert len(world.started) < 40


def test_a_part_that_is_refused_ends_the_job_with_its_reason() -> None:
    def bad(assign: Assign) -> Outcome:
        is_part = part_of(assign).stage == "train"
        return answer_of(assign, state="rejected", reason="line 7 is bad") if is_part else work(assign)

    world = submitted(2, answer=bad).run(20.0)
    (result,) = world.results(JOB)
    assert result.state == "rejected" and "line 7 is bad" in (result.reason or "")
    assert "part 1 of 2" in (result.reason or "") or "part 2 of 2" in (result.reason or "")


def test_who_cancels_the_job_cancels_its_parts() -> None:
    world = submitted(3, service_s=5.0).run(7.0)
    world.say(CancelTask(task=JOB))
    world.run(10.0)
    assert world.states(JOB)[-1] == "cancelled"
    parts = {assign.task for _, _, assign in world.started}
    assert len(parts) == 3
    assert {world.states(part)[-1] for part in parts} == {"done", "cancelled"}
    n = len(world.started)
    world.run(60.0)
    assert len(world.started) == n, "nothing more is begun"


def test_parts_end_with_the_time_of_their_job() -> None:
    world = mesh(2, answer=work, service_s=5.0)
    world.say(Submit(kind="tune", tune=SPEC, id=JOB, deadline_s=8.0))
    world.run(60.0)
    assert world.states(JOB)[-1] == "expired"
    assert all(not host.running for host in world.up)
    assert len(world.started) <= 3


def test_a_part_whose_job_nobody_knows_is_ended() -> None:
    world = mesh(1, answer=work)
    part = TunePart(parent=TaskId("nobody"), stage="train")
    world.say(Submit(kind="tune", tune=replace(SPEC, part=part), id=TaskId("orphan")))
    world.run(5.0)
    assert world.states("orphan")[-1] == "cancelled" and not world.started


def test_parts_that_find_the_queue_full_are_tried_again() -> None:
    config = SchedulerConfig(admission=AdmissionConfig(open_max=3))
    answer = lambda assign: work(assign) if assign.submit.tune else answer_of(assign)  # noqa: E731
    world = submitted(1, config=config, slots=1, service_s=3.0, answer=answer).run(0.1)
    world.say(Submit(prompt="hi", id=TaskId("other")))  # the third: no room for the second part
    world.run(40.0)
    assert world.states(JOB)[-1] == "done"
    world.say(Submit(kind="tune", tune=replace(SPEC, adapter="b"), id=TaskId("late"), deadline_s=4.0))
    for number in range(2):
        world.say(Submit(prompt="hi", id=TaskId(f"filler{number}")))
    world.run(60.0)  # ends: the world does not stand still at one moment
    assert world.states("late")[-1] == "expired"


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────


def test_bodies_of_one_node_have_the_digests_they_always_had() -> None:
    """They are on disks, and clients repeat submissions across versions."""
    body = Submit(kind="tune", tune=TuneSpec(adapter="a", data="x"))
    assert digest_of(body) == "1e210bfda9f7d966eba8ca030aaffbc185674c3de4e087ff7108b0890c19c014"
    other = replace(body, tune=TuneSpec(adapter="a", data="x", nodes=2))
    assert digest_of(other) != digest_of(body)
