"""Where waiting tasks go."""

from __future__ import annotations

import itertools
from dataclasses import replace
from time import perf_counter

from coordinator.cluster import Node
from coordinator.placement import Waiting, least_loaded, why_waiting
from mesh.ids import NodeId, TaskId
from mesh.messages import Submit, TuneSpec
from tests.unit.task_world import info, report


def node(name: str, *, slots: int = 2, ready: bool = True, **fields: object) -> Node:
    return Node(
        id=NodeId(name),
        standing="alive",
        info=info(name, slots=slots, **fields),  # type: ignore[arg-type]
        report=report(name, ready=ready),
    )


def waiting(n: int, **fields: object) -> list[Waiting]:
    return [Waiting(task=TaskId(f"t{i}"), submit=Submit(prompt="hi", **fields)) for i in range(n)]  # type: ignore[arg-type]


def where(placements: list) -> list[str]:  # type: ignore[type-arg]
    return [placement.node for placement in placements]


def test_tasks_spread_over_nodes_in_proportion_to_their_slots() -> None:
    placed = where(least_loaded(waiting(6), [node("a", slots=2), node("b", slots=4)], {}))
    assert (placed.count("a"), placed.count("b")) == (2, 4)


def test_what_runs_already_counts() -> None:
    assert where(least_loaded(waiting(1), [node("a"), node("b")], {NodeId("a"): 1})) == ["b"]


def test_nothing_is_placed_beyond_the_slots() -> None:
    assert len(least_loaded(waiting(9), [node("a"), node("b")], {NodeId("a"): 2})) == 2


def test_who_waits_is_told_why_in_the_nodes_own_words() -> None:
    loading = node("a", ready=False)
    assert loading.report is not None
    loading = replace(loading, report=replace(loading.report, activity="loading tiny (43%)"))
    task = Submit(prompt="hi")
    assert why_waiting(task, [loading]) == "no node can start it yet (a: loading tiny (43%))"
    assert why_waiting(task, [loading, node("b")]) is None
    assert why_waiting(task, []) == "no node can start it yet"
    crowd = [replace(loading, id=NodeId(f"n{k:04}")) for k in range(1000)]
    assert "and 997 more" in (told := why_waiting(task, crowd) or "") and len(told) < 1000


def test_ties_go_to_the_larger_node_and_then_by_id_whatever_the_order_of_nodes() -> None:
    nodes = [node("b"), node("a"), node("c", slots=3)]
    answers = {
        tuple(where(least_loaded(waiting(2), list(order), {}))) for order in itertools.permutations(nodes)
    }
    assert answers == {("c", "a")}


def test_a_task_that_fits_nowhere_does_not_hold_up_the_next() -> None:
    tasks = [*waiting(1, model="other"), Waiting(task=TaskId("next"), submit=Submit(prompt="hi"))]
    assert [p.task for p in least_loaded(tasks, [node("a")], {})] == ["next"]


def test_a_node_that_refused_a_moment_ago_is_left_out() -> None:
    task = Waiting(task=TaskId("t"), submit=Submit(prompt="hi"), avoid=frozenset({NodeId("a")}))
    assert where(least_loaded([task], [node("a"), node("b")], {})) == ["b"]
    assert least_loaded([task], [node("a")], {}) == []


def test_adapter_and_readiness_are_needed() -> None:
    nodes = [node("a"), node("b", adapters=("german",), ready=False), node("c", adapters=("german",))]
    assert where(least_loaded(waiting(1, adapter="german"), nodes, {})) == ["c"]


def test_every_placement_says_why() -> None:
    (placement,) = least_loaded(waiting(1), [node("a")], {NodeId("a"): 1})
    assert placement.reason == "1 of 2 slots taken"


def test_a_thousand_tasks_on_sixteen_nodes_are_placed_within_a_tick() -> None:
    tasks, nodes = waiting(1000), [node(f"n{i:02}", slots=64) for i in range(16)]
    best_s = float("inf")
    for _ in range(3):
        began = perf_counter()
        assert len(least_loaded(tasks, nodes, {})) == 1000
        best_s = min(best_s, perf_counter() - began)
    assert best_s < 0.1, f"{best_s} s"


def tune(*holders: str) -> Submit:
    spec = TuneSpec(adapter="a", data_sha256="0" * 64, holders=[NodeId(name) for name in holders])
    return Submit(kind="tune", tune=spec)


def test_a_tuning_task_goes_where_its_data_are() -> None:
    nodes = [node("a", slots=4), node("b"), node("c")]
    for holders, goes in ((("c", "d"), ["c"]), ((), ["a"]), (("d",), [])):
        assert where(least_loaded([Waiting(task=TaskId("t"), submit=tune(*holders))], nodes, {})) == goes


def test_who_waits_for_data_or_an_adapter_is_told_which() -> None:
    nodes = [node("a", adapters=("german", "poet")), node("b", adapters=("poet",))]
    assert why_waiting(Submit(prompt="hi", adapter="french"), nodes) == (
        "no node has adapter 'french': those there are: german, poet"
    )
    assert why_waiting(Submit(prompt="hi", adapter="poet"), nodes) is None
    assert why_waiting(Submit(prompt="hi", adapter="x"), [node("a")]) == (
        "no node has adapter 'x': those there are: none"
    )
    many = [node("a", adapters=tuple(f"a{k:04}" for k in range(1000)))]
    assert "and 980 more" in (why_waiting(Submit(prompt="hi", adapter="x"), many) or "")
    assert why_waiting(tune("d", "e"), nodes) == "its data are on d, e, and none of these can compute now"
    assert why_waiting(tune("b"), nodes) is None


def test_a_node_with_the_adapter_that_still_loads_is_waited_for() -> None:
    nodes = [node("a"), node("b", adapters=("poet",), ready=False)]
    told = why_waiting(Submit(prompt="hi", adapter="poet"), nodes)
    assert told is not None and told.startswith("no node can start it yet (b: ")
