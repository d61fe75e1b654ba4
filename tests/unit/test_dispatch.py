"""Decisions, one promise each: who starts where, who is refused, who gives way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Decision, Drop, Job, NodeView, Pause, Resume, Start
from coordinator.policy.dispatch import DispatchConfig, Dispatcher
from coordinator.policy.policies import POLICIES, Policy, Scene, edf, policy_named
from coordinator.policy.rates import Rates
from coordinator.policy.work import Needs, Work
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

TEN = Rates(prefill_tokens_per_s=1000.0, decode_tokens_per_s=10.0, tune_tokens_per_s=100.0, row_cost=0.25)
"""Ten tokens a second: a job of 30 tokens takes 3 s."""


def node(name: str, speed: float = 1.0, **fields: object) -> NodeView:
    return NodeView(id=NodeId(name), rates=TEN.scaled(speed), **fields)  # type: ignore[arg-type]


def job(name: str, seconds: float = 1.0, deadline_at: float = FOREVER, **fields: object) -> Job:
    work = fields.pop("work", Work(n_tokens=10 * seconds))
    return Job(task=TaskId(name), work=work, deadline_at=deadline_at, **fields)  # type: ignore[arg-type]


def tune(name: str, seconds: float, **fields: object) -> Job:
    return job(name, work=Work(kind="tune", n_tune_tokens=100 * seconds), **fields)


def dispatcher(*nodes: NodeView, policy: str | Policy = "vdf", **config: object) -> Dispatcher:
    rule = policy_named(policy) if isinstance(policy, str) else policy
    made = Dispatcher(rule, CostModel(), DispatchConfig(**config))  # type: ignore[arg-type]
    for view in nodes or (node("a"),):
        made.put_node(view)
    return made


def starts(decisions: list[Decision]) -> dict[str, str]:
    return {decision.task: decision.node for decision in decisions if isinstance(decision, Start)}


def add(made: Dispatcher, *jobs: Job, now: float = 0.0) -> None:
    for one in jobs:
        made.add(one, now)


# ── starting ────────────────────────────────────────────────────────────────────────────────────────


def test_the_denser_task_goes_first_and_the_other_when_there_is_room() -> None:
    made = dispatcher()
    add(made, job("long", 9.0), job("short", 1.0))
    assert starts(made.decide(0.0)) == {"short": "a"}
    assert made.decide(0.5) == []
    made.ended(TaskId("short"), 1.0)
    assert starts(made.decide(1.0)) == {"long": "a"}


def test_a_task_goes_where_it_ends_first() -> None:
    made = dispatcher(node("slow"), node("fast", 6.0))
    add(made, job("t"))
    assert starts(made.decide(0.0)) == {"t": "fast"}


def test_nothing_starts_where_it_cannot_end_in_time() -> None:
    made = dispatcher(node("slow"), node("fast", 6.0))
    add(made, job("first", 6.0, 10.0), job("second", 6.0, 3.0))
    assert starts(made.decide(0.0)) == {"second": "fast", "first": "slow"}
    add(made, job("third", 6.0, 4.0))
    assert starts(made.decide(0.1)) == {}


@pytest.mark.parametrize(
    ("seconds", "deadline_at", "reason"),
    [
        (12.3, 8.0, "best node needs 12.3 s, 8.0 s left"),
        (8.1, 8.0, "best node needs 8.1 s, 8.0 s left"),
        (0.1, 0.0, "its deadline passed before it could start"),
    ],
)
def test_hopeless_work_is_refused_with_the_numbers(seconds: float, deadline_at: float, reason: str) -> None:
    made = dispatcher(node("a"), node("b", 0.5))
    add(made, job("t", seconds, deadline_at))
    assert made.decide(0.0) == [Drop(task=TaskId("t"), reason=reason)]
    assert TaskId("t") not in made


def test_a_task_is_refused_at_the_moment_it_becomes_hopeless_and_not_before() -> None:
    made = dispatcher()
    add(made, job("runs", 60.0), job("waits", 3.0, 8.0))
    made.running(job("runs", 60.0), NodeId("a"), 0.0)
    assert made.decide(0.0) == []
    assert made.wake_at == pytest.approx(5.0)
    assert made.decide(4.9) == []
    (drop,) = made.decide(5.1)
    assert drop == Drop(task=TaskId("waits"), reason="best node needs 3.0 s, 2.9 s left")


def test_waking_at_the_moment_of_hopelessness_ends() -> None:
    """The moment itself is still in time; whoever wakes then must not be woken for ever."""
    made = dispatcher()
    made.running(job("runs", 1e6), NodeId("a"), 0.0)
    for k in range(50):
        add(made, job(f"t{k}", 0.1 + k / 7, 3.0 + k / 3))
    n_wakes = 0
    while made.wake_at < FOREVER:
        made.decide(made.wake_at)
        n_wakes += 1
        assert n_wakes < 300
    assert made.n_waiting == 0


def test_a_better_node_saves_a_task_and_its_leaving_condemns_another() -> None:
    made = dispatcher(node("a", is_ready=False))
    add(made, job("t", 12.0, 8.0))
    made.put_node(node("gpu", 6.0, is_ready=False))
    assert made.decide(0.0) == []
    assert made.drop_node(NodeId("gpu")) == []
    (drop,) = made.decide(1.0)
    assert isinstance(drop, Drop)


def test_without_any_node_nothing_is_hopeless() -> None:
    made = Dispatcher(policy_named("vdf"), CostModel())
    add(made, job("t", 12.0, 8.0))
    assert made.decide(0.0) == []
    assert isinstance(made.decide(8.0)[0], Drop)


def test_a_policy_without_drop_starts_late_work_as_it_always_did() -> None:
    made = dispatcher(policy="fifo")
    add(made, job("t", 12.0, 8.0))
    assert starts(made.decide(9.0)) == {"t": "a"}


def test_needs_avoidance_and_readiness_are_respected() -> None:
    has_poet = node("b", has=lambda needs: needs.adapter == "poet")
    made = dispatcher(node("a", has=lambda needs: needs.adapter is None), has_poet, node("c", is_ready=False))
    add(made, job("poem", needs=Needs(adapter="poet")), job("shuns", avoid={NodeId("a"): 5.0}))
    assert starts(made.decide(0.0)) == {"poem": "b"}
    assert starts(made.decide(5.0)) == {"shuns": "a"}


def test_what_a_node_did_before_it_does_sooner_again() -> None:
    """The adapter it has in memory outweighs a node that is slightly faster."""
    rates = Rates(decode_tokens_per_s=10.0, adapter_load_s=2.0)
    faster = NodeView(id=NodeId("b"), rates=rates.scaled(1.1))
    made = dispatcher(NodeView(id=NodeId("a"), rates=rates), replace(faster, is_ready=False))
    poem = Work(n_tokens=10.0, n_adapter_loads=1.0, reuses="poet")
    add(made, job("first", work=poem))
    assert starts(made.decide(0.0)) == {"first": "a"}
    made.ended(TaskId("first"), 3.0)
    made.put_node(faster)
    add(made, job("second", work=poem), now=3.0)
    assert starts(made.decide(3.0)) == {"second": "a"}


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────


def test_answers_share_steps_and_each_pays_for_its_company() -> None:
    made = dispatcher(node("a", slots=4))
    add(made, *(job(f"t{k}", 4.0) for k in range(6)))
    found = [decision.why for decision in made.decide(0.0) if isinstance(decision, Start)]
    assert [why.service_s for why in found] == pytest.approx([4.0, 5.0, 6.0, 7.0])
    assert [why.cost_s for why in found] == pytest.approx([4.0, 1.0, 1.0, 1.0])  # the marginal cost


def test_equal_nodes_share_the_work_instead_of_filling_one_batch() -> None:
    made = dispatcher(node("a", slots=4), node("b", slots=4))
    add(made, *(job(f"t{k}") for k in range(4)))
    assert sorted(starts(made.decide(0.0)).values()) == ["a", "a", "b", "b"]


def test_a_batch_that_would_make_a_task_late_is_not_joined() -> None:
    made = dispatcher(node("a", slots=4))
    add(made, job("t0", 4.0), job("tight", 4.0, 4.5))
    assert starts(made.decide(0.0)) == {"tight": "a"}
    add(made, job("later", 4.0, 5.0), now=0.1)
    assert starts(made.decide(0.1)) == {}
    made.ended(TaskId("tight"), 0.2)
    assert starts(made.decide(0.2)) == {"later": "a"}


@pytest.mark.parametrize(
    ("seconds", "value", "left_s", "policy", "expected"),
    [
        (4.0, 1.0, 900.0, "vdf", {"joins": "a"}),  # takes 1 s from the runner, which has 1 s to spare
        (8.0, 1.0, 11.0, "vdf", {}),
        (8.0, 3.0, 11.0, "vdf", {"joins": "a"}),  # worth more than the one it makes late
        (8.0, 3.0, 900.0, "vdf", {}),  # and can wait
        (8.0, 1.0, 900.0, "fifo", {"joins": "a"}),
    ],
)
def test_who_would_make_a_running_task_late_must_be_worth_more_and_urgent(
    seconds: float, value: float, left_s: float, policy: str, expected: dict[str, str]
) -> None:
    made = dispatcher(node("a", slots=4), policy=policy)
    add(made, job("runs", 10.0, 11.0))
    made.decide(0.0)
    add(made, job("joins", seconds, left_s, value=value))
    assert starts(made.decide(0.0)) == expected


def test_what_joiners_take_from_a_running_task_is_remembered() -> None:
    made = dispatcher(node("a", slots=8))
    add(made, job("runs", 10.0, 12.2))
    made.decide(0.0)
    add(made, *(job(f"j{k}", 4.0, 900.0) for k in range(4)))  # each takes 1 s; there are 2.2 to spare
    assert len(starts(made.decide(0.0))) == 2


def test_company_is_told_to_the_cost_model() -> None:
    made = dispatcher(node("a", slots=2))
    add(made, job("t0", 4.0), job("t1", 4.0))
    made.decide(0.0)
    made.ended(TaskId("t0"), 5.0, Observed(service_s=5.0))
    assert made.cost.correction("generate", NodeId("a")) == pytest.approx(1.0)


# ── ties and order ──────────────────────────────────────────────────────────────────────────────────


def test_ties_are_broken_by_deadline_then_tie_then_id_whatever_the_order_of_arrival() -> None:
    jobs = [job("b", 1.0, 90.0), job("a", 1.0, 90.0), job("c", 1.0, 80.0), job("z", 1.0, 90.0, tie=" ")]
    for order in itertools.permutations(jobs):
        made = dispatcher(policy="hvf")
        add(made, *order)
        found = []
        for now in range(4):
            found += starts(made.decide(float(now)))
            made.ended(TaskId(found[-1]), now + 0.5)
        assert found == ["c", "a", "b", "z"]


def test_equal_nodes_are_taken_in_the_order_of_their_ids_whatever_order_they_joined_in() -> None:
    for order in itertools.permutations("abc"):
        made = dispatcher(*map(node, order))
        add(made, job("t0"), job("t1"))
        assert starts(made.decide(0.0)) == {"t0": "a", "t1": "b"}


def test_many_pairs_are_placed_as_few_are_by_the_order_of_their_scores() -> None:
    nodes = [node(f"n{k:03}", 1.0 + k % 7) for k in range(200)]
    made = dispatcher(*nodes, policy="vdf-preempt")
    add(made, *(job(f"t{k:04}", 1.0 + k % 11, 100.0 + k % 13, value=1.0 + k % 5) for k in range(1500)))
    found = starts(made.decide(0.0))
    assert len(found) == 200 and len(set(found.values())) == 200
    assert made.decide(0.0) == []


# ── nobody starves ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "policy", ["vdf", "vdf-plain", "edf", "fifo", "hvf", "llf", "robust-edf", "foresight"]
)
def test_a_task_without_a_deadline_overtakes_a_steady_stream_of_denser_ones(policy: str) -> None:
    made = dispatcher(policy=policy, patience_s=5.0)
    add(made, job("patient", 4.0, value=0.01))
    now, n = 0.0, 0
    while made.node_of(TaskId("patient")) is None:
        for _ in range(2):  # twice what the node can do
            add(made, job(f"s{n}", 1.0, now + 30.0, value=10.0, arrived_at=now), now=now)
            n += 1
        for task in starts(made.decide(now)):
            if task != "patient":
                made.ended(TaskId(task), now)
        now += 1.0
        assert now < 400


# ── giving way ──────────────────────────────────────────────────────────────────────────────────────


def test_tuning_gives_way_to_urgent_inference_at_the_end_of_its_chunk() -> None:
    made = dispatcher(policy="vdf")
    add(made, tune("tune", 60.0))
    assert starts(made.decide(0.0)) == {"tune": "a"}
    add(made, job("lax", 1.0, 9000.0, value=0.01), now=1.9)
    assert made.decide(1.9) == made.decide(made.wake_at) == []
    add(made, job("urgent", 1.0, 5.0), now=2.3)
    assert made.decide(2.3) == []
    assert 2.3 < made.wake_at <= 3.0  # compared just before the end of every chunk
    pause, start = made.decide(made.wake_at)
    assert isinstance(pause, Pause) and (pause.task, pause.node) == ("tune", "a")
    assert isinstance(start, Start) and (start.task, start.after) == ("urgent", "tune")
    made.requeue(TaskId("tune"), 3.0, left=0.95)
    made.withdraw(TaskId("lax"), 3.0)
    assert made.decide(3.0) == []
    made.ended(TaskId("urgent"), 4.0)
    assert starts(made.decide(4.0)) == {"tune": "a"}


def test_paused_tuning_goes_on_anywhere_with_what_is_left() -> None:
    made = dispatcher(node("a"), node("b", is_ready=False))
    add(made, tune("tune", 60.0))
    made.decide(0.0)
    add(made, job("urgent", 1.0, 5.0), now=0.5)
    made.decide(made.wake_at)
    made.requeue(TaskId("tune"), 1.0, left=0.5)
    made.put_node(node("b"))
    (start,) = made.decide(1.0)
    assert isinstance(start, Start) and start.node == "b"
    assert start.why.service_s == pytest.approx(30.0)


def test_tuning_keeps_the_node_from_what_scores_lower_from_other_tuning_and_without_chunks() -> None:
    for policy, newcomer in (
        ("hvf+chunk", job("poor", 1.0, value=0.5)),
        ("vdf", tune("other", 1.0, value=99.0)),
        ("vdf-chunk", job("urgent", 1.0, 5.0, value=99.0)),
    ):
        made = dispatcher(policy=policy)
        add(made, tune("tune", 60.0))
        made.decide(0.0)
        add(made, newcomer, now=0.5)
        assert not [d for t in (0.5, 0.999, 1.999, 2.999) for d in made.decide(t) if isinstance(d, Pause)], (
            policy
        )


def test_an_engine_that_runs_tuning_beside_answers_is_told_nothing() -> None:
    made = dispatcher(node("a", slots=2, tunes_beside=True))
    add(made, tune("first", 60.0), tune("second", 60.0), job("answer"))
    assert starts(made.decide(0.0)) == {"first": "a", "answer": "a"}
    assert made.wake_at == FOREVER


def test_generation_gives_way_to_twice_its_density_and_goes_on_before_anything_else() -> None:
    made = dispatcher(policy="vdf+preempt")
    add(made, job("long", 60.0, 1000.0))
    made.decide(0.0)
    add(made, job("urgent", 2.0, 13.0, value=5.0), now=10.0)
    pause, start = made.decide(10.0)
    assert isinstance(pause, Pause) and isinstance(start, Start)
    assert (pause.task, start.task, start.after) == ("long", "urgent", "long")
    add(made, job("next", 2.0, 14.0, value=9.0), now=11.0)
    assert made.decide(11.0) == []  # one stands still already
    made.ended(TaskId("urgent"), 12.0)
    (resume,) = made.decide(12.0)
    assert isinstance(resume, Resume) and (resume.task, resume.node) == ("long", "a")
    assert "2.0 s" in resume.why.words


@pytest.mark.parametrize(
    ("runner_deadline_at", "value", "policy"),
    [
        (62.5, 5.0, "vdf+preempt"),  # 50 s left and 2 s of the newcomer: late by 1.5 s
        (1000.0, 5.0, "vdf-preempt"),
        (60.5, 0.00001, "vdf+preempt"),
    ],
)
def test_a_runner_that_could_not_end_in_time_or_is_dense_enough_goes_on(
    runner_deadline_at: float, value: float, policy: str
) -> None:
    made = dispatcher(policy=policy)
    add(made, job("long", 60.0, runner_deadline_at))
    made.decide(0.0)
    add(made, job("urgent", 3.0, 14.0, value=value), now=10.0)
    assert made.decide(10.0) == []


def test_a_node_that_cannot_pause_is_not_asked_to() -> None:
    made = dispatcher(node("a", can_pause=False), policy="vdf+preempt")
    add(made, job("long", 60.0, 1000.0))
    made.decide(0.0)
    add(made, job("urgent", 2.0, 13.0, value=5.0), now=10.0)
    assert made.decide(10.0) == []


def test_a_paused_task_that_ends_or_is_lost_leaves_nothing_behind() -> None:
    for end in (Dispatcher.ended, Dispatcher.withdraw):
        made = dispatcher(policy="vdf+preempt")
        add(made, job("long", 60.0, 1000.0))
        made.decide(0.0)
        add(made, job("urgent", 2.0, 13.0, value=5.0), now=10.0)
        made.decide(10.0)
        end(made, TaskId("long"), 11.0)
        end(made, TaskId("urgent"), 12.0)
        assert made.decide(12.0) == [] and made.n_running == 0


# ── selection ───────────────────────────────────────────────────────────────────────────────────────


def refuse_cheap(scene: Scene) -> object:
    return scene.value >= 2


def test_what_a_policy_does_not_keep_waits_and_fills_idle_nodes_if_it_may() -> None:
    for fill, expected in ((False, {}), (True, {"cheap": "a"})):
        rule = Policy(name="picky", score=edf, keeps=refuse_cheap, fill=fill)  # type: ignore[arg-type]
        made = dispatcher(policy=rule)
        add(made, job("cheap", 1.0, 50.0), job("dear", 1.0, 90.0, value=5.0))
        assert starts(made.decide(0.0)) == {"dear": "a"}
        made.ended(TaskId("dear"), 1.0)
        assert starts(made.decide(1.0)) == expected


def test_a_margin_forbids_starts_that_would_end_just_in_time() -> None:
    for margin, expected in ((1.0, {"t": "a"}), (1.2, {})):
        made = dispatcher(policy=Policy(name="careful", score=edf, drop=True, margin=margin))
        add(made, job("t", 9.0, 10.0))
        assert starts(made.decide(0.0)) == expected


def test_a_policy_can_look_back_at_the_latest_tasks_and_at_the_capacity_of_nodes() -> None:
    seen: list[tuple[list[float], ...]] = []

    def note(scene: Scene) -> object:
        recent = scene.recent()
        arrays = (recent.arrived_at, recent.best_s, scene.capacity(), scene.room_in_s())
        seen.append(tuple(array.tolist() for array in arrays))
        return scene.value > 0

    rule = Policy(name="looks back", score=edf, keeps=note)  # type: ignore[arg-type]
    made = dispatcher(node("a"), node("b", 0.5), node("c", is_ready=False), policy=rule)
    for k in range(300):
        add(made, job(f"t{k}", 1.0, 1000.0 + k, arrived_at=float(k)), now=float(k))
        made.withdraw(TaskId(f"t{k}"), float(k))
    add(made, job("last", 1.0, 5000.0, arrived_at=300.0), job("no deadline"), now=300.0)
    made.decide(300.0)
    ((arrived_at, best_s, capacity, room_in_s),) = seen
    assert arrived_at == [float(k) for k in range(45, 301)] and best_s == [1.0] * 256
    assert capacity == [1.0, 0.5, 0.0] and room_in_s == [0.0, 0.0, FOREVER]


# ── books ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_task_that_runs_elsewhere_is_adopted_and_never_started_again() -> None:
    made = dispatcher(node("a"), node("b"))
    add(made, job("t"))
    made.running(job("t"), NodeId("b"), 0.0)
    made.running(job("t"), NodeId("b"), 0.1)
    assert made.decide(0.2) == [] and made.node_of(TaskId("t")) == "b"


def test_a_node_that_leaves_gives_back_what_ran_there() -> None:
    made = dispatcher(node("a"), node("b", 6.0))
    add(made, job("t"))
    made.decide(0.0)
    assert made.drop_node(NodeId("b")) == ["t"]
    assert made.drop_node(NodeId("b")) == [] and made.n_running == 0
    add(made, job("t"), now=1.0)
    assert starts(made.decide(1.0)) == {"t": "a"}


def test_a_refused_start_waits_again() -> None:
    made = dispatcher(node("a"), node("b", 0.5))
    add(made, job("t"))
    assert starts(made.decide(0.0)) == {"t": "a"}
    made.requeue(TaskId("t"), 0.1, avoid={NodeId("a"): 5.0})
    assert starts(made.decide(0.1)) == {"t": "b"}


def test_nothing_is_left_of_tasks_that_are_gone() -> None:
    made = dispatcher(node("a"), node("b"))
    for k in range(3000):
        name = f"t{k}"
        needs = Needs(adapter=f"adapter {k}")
        work = Work(n_tokens=1.0, n_adapter_loads=1.0, reuses=f"adapter {k}")
        add(made, job(name, 1.0, k + 1e6, work=work, needs=needs), now=float(k))
        made.decide(float(k))
        made.ended(TaskId(name), float(k))
    assert made.n_waiting == made.n_running == 0
    assert len(made._hopeless) <= 100
    assert len(made._books.nodes.needs) <= 2 and len(made._books.nodes.reuses) <= 2
    assert len(made._books.nodes._slots[0].warm) <= 16


def test_explanations_name_the_nodes_that_were_not_taken_and_why() -> None:
    nodes = [
        node("fast", 6.0),
        node("full"),
        node("poor", has=lambda needs: False),
        node("slow", 0.1),
        node("z"),
    ]
    made = dispatcher(*nodes)
    made.running(job("runs", 5.0), NodeId("full"), 0.0)
    add(made, job("t", 6.0, 20.0))
    (start,) = made.decide(0.0)
    assert isinstance(start, Start)
    told = {one.node: one.why_not for one in start.why.candidates}
    assert told == {
        "fast": None,
        "z": "would end 5.0 s later",
        "full": "has no room for 5.0 s",
        "slow": "would end 40.0 s too late",
        "poor": "has not the model, the adapter or the data",
    }
    assert start.why.laxity_s == pytest.approx(19.0) and start.why.density == pytest.approx(1.0)
    assert (
        start.why.words == "on fast: 1.0 s expected, 19.0 s to spare, value density 1/s, nothing else waits"
    )


def test_a_waiting_task_is_told_what_its_decision_would_be_made_from() -> None:
    made = dispatcher()
    made.running(job("runs", 5.0), NodeId("a"), 0.0)
    add(made, job("t", 6.0, 20.0))
    why = made.outlook(TaskId("t"), 1.0)
    assert why is not None and why.candidates[0].why_not == "has no room for 4.0 s"
    assert made.outlook(TaskId("runs"), 1.0) is None


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nodes_that_take_no_work_and_tasks_without_deadlines_are_no_trouble(policy: str) -> None:
    """Infinities and zeros must not become what is no number: a core that raises serves nobody."""
    made = dispatcher(node("off", is_ready=False), node("a", slots=2), policy=policy)
    add(made, *(job(f"t{k}") for k in range(5)), job("due", 1.0, 9.0))
    assert len(starts(made.decide(0.0))) == 2
    made.drop_node(NodeId("a"))
    made.decide(1.0)
    made.drop_node(NodeId("off"))
    add(made, job("late", 1.0, 1.5), now=1.0)
    made.decide(2.0)
    made.put_node(node("b"))
    assert len(starts(made.decide(3.0))) == 1
