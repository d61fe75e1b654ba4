"""Who could do a task, and what the coordinator's books and the dispatcher's make of it together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.cluster import Cluster, Node
from coordinator.explanations import Explanations
from coordinator.ledger import Ledger
from coordinator.placement import why_waiting
from coordinator.placing import Placing
from coordinator.policy.cost import CostModel
from coordinator.policy.decisions import Drop, Start
from coordinator.policy.dispatch import DispatchConfig
from coordinator.policy.policies import policy_named
from coordinator.task import Task, digest_of
from mesh.facts import MemberChanged
from mesh.ids import EPOCH_ZERO, NodeId, TaskId
from mesh.messages import NodeRates, Outcome, Submit, TuneSpec
from tests.unit.task_world import info, report


def node(name: str, *, slots: int = 2, ready: bool = True, **fields: object) -> Node:
    return Node(
        id=NodeId(name),
        standing="alive",
        info=info(name, slots=slots, **fields),  # type: ignore[arg-type]
        report=report(name, ready=ready),
    )


class Books:
    """A ledger, a cluster and what decides over them; the test says what happened."""

    def __init__(self, *nodes: Node, policy: str = "vdf") -> None:
        self.ledger, self.cluster = Ledger(), Cluster(NodeId("me"))
        for one in nodes:
            assert one.info is not None and one.report is not None
            self.cluster.change(MemberChanged(one.id, "alive", 1))
            self.cluster.see(one.info)
            self.cluster.see(one.report)
        self.cost = CostModel()
        self.placing = Placing(
            ledger=self.ledger,
            cluster=self.cluster,
            policy=policy_named(policy),
            cost=self.cost,
            explanations=Explanations(),
            config=DispatchConfig(),
        )

    def add(self, name: str, submit: Submit | None = None, *, at: float = 0.0, **fields: object) -> Task:
        submit = submit or Submit(prompt="hi", **fields)  # type: ignore[arg-type]
        task = Task(
            id=TaskId(name),
            submit=submit,
            digest=digest_of(submit),
            accepted_at=at,
            deadline_at=at + submit.deadline_s if submit.deadline_s else float("inf"),
            is_acknowledged=True,
        )
        self.ledger.add(task)
        return task

    def decide(self, now: float = 0.0, *, with_recovered: bool = True) -> list[Start | Drop]:
        """As the coordinator does: what is decided is done."""
        decisions = self.placing.decide(now, with_recovered=with_recovered)
        for decision in decisions:
            task = self.ledger.get(decision.task)
            assert task is not None
            if isinstance(decision, Start):
                with self.ledger.changing(task):
                    task.assign(decision.node, task.attempt + 1, EPOCH_ZERO, now)
            else:
                self.end(task, "rejected", now)
        return decisions  # type: ignore[return-value]

    def where(self, now: float = 0.0) -> dict[str, str]:
        return {start.task: start.node for start in self.decide(now) if isinstance(start, Start)}

    def end(self, task: Task, state: str, now: float, **fields: object) -> None:
        outcome = Outcome(
            state=state, text="", finish_reason=None, reason=None, node=task.node, attempt=1,
            epoch=EPOCH_ZERO, **fields,  # type: ignore[arg-type]
        )  # fmt: skip
        with self.ledger.changing(task):
            task.settle(outcome, now)

    def requeue(self, task: Task, avoid: dict[str, float]) -> None:
        with self.ledger.changing(task):
            task.avoid = {NodeId(name): until for name, until in avoid.items()}
            task.requeue()


def test_tasks_spread_over_equal_nodes() -> None:
    books = Books(node("a"), node("b"))
    for k in range(4):
        books.add(f"t{k}")
    assert sorted(books.where().values()) == ["a", "a", "b", "b"]


def test_what_another_coordinator_started_counts() -> None:
    books = Books(node("a"), node("b"))
    adopted = books.add("adopted")
    with books.ledger.changing(adopted):
        adopted.run(NodeId("a"), 1, EPOCH_ZERO, 0.0)
    books.add("t")
    assert books.where() == {"t": "b"}


def test_nothing_is_placed_beyond_the_slots() -> None:
    books = Books(node("a"), node("b", slots=1))
    for k in range(9):
        books.add(f"t{k}")
    assert sorted(books.where().values()) == ["a", "a", "b"]
    assert books.where() == {}


def test_a_faster_node_attracts_the_work_and_when_it_leaves_the_work_goes_elsewhere() -> None:
    rates = NodeRates(prefill_tokens_per_s=1000.0, decode_tokens_per_s=100.0, row_cost=0.1)
    fast = node("fast")
    assert fast.info is not None
    fast = replace(fast, info=replace(fast.info, rates=rates))
    books = Books(node("slow"), fast)
    task = books.add("t")
    assert books.where() == {"t": "fast"}
    books.cluster.change(MemberChanged(NodeId("fast"), "dead", 1))
    books.requeue(task, {})
    assert books.where() == {"t": "slow"}


def test_what_no_node_can_do_in_time_is_rejected_with_the_numbers() -> None:
    rates = NodeRates(prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0, row_cost=0.1)
    rated = node("a")
    assert rated.info is not None
    books = Books(replace(rated, info=replace(rated.info, rates=rates)))
    books.add("late", max_tokens=123, deadline_s=8.0)
    (drop,) = books.decide()
    assert drop == Drop(task=TaskId("late"), reason="best node needs 12.3 s, 8.0 s left")
    submit = Submit(prompt="hi", max_tokens=123, deadline_s=8.0)
    assert books.placing.hopeless(submit, 8.0, 0.0) == "best node needs 12.3 s, 8.0 s left"
    assert books.placing.hopeless(submit, 13.0, 0.0) is None
    lenient = Books(replace(rated, info=replace(rated.info, rates=rates)), policy="fifo")
    assert lenient.placing.hopeless(submit, 8.0, 0.0) is None


def test_a_node_that_never_told_its_rates_gets_work_and_nothing_is_refused_for_a_guess() -> None:
    books = Books(node("a"))
    books.add("t", max_tokens=2000, deadline_s=1.0)
    assert books.where() == {"t": "a"}


def test_what_answers_take_is_learned_and_estimates_become_good_enough_to_refuse() -> None:
    books = Books(node("a", slots=1))
    for k in range(20):
        task = books.add(f"t{k}", max_tokens=100, at=10.0 * k)
        assert books.where(10.0 * k) == {f"t{k}": "a"}
        books.end(task, "done", 10.0 * k + 5, n_tokens=50, n_prompt_tokens=10, service_s=5.0)
    books.decide(200.0)
    (error,) = books.cost.errors().values()
    assert error.n == 20 and error.p50 < 0.25
    books.add("late", max_tokens=100, at=200.0, deadline_s=4.0)
    (drop,) = books.decide(200.0)
    assert isinstance(drop, Drop) and drop.reason == "best node needs 5.0 s, 4.0 s left"


def test_a_task_that_ran_into_its_deadline_is_a_lesson_too() -> None:
    books = Books(node("a", slots=1))
    task = books.add("t", max_tokens=10)
    assert books.where(0.0) == {"t": "a"}
    before = books.cost.correction("generate", NodeId("a"))
    books.end(task, "expired", 1000.0, service_s=1000.0)
    books.decide(1000.0)
    assert books.cost.correction("generate", NodeId("a")) == pytest.approx(2 * before)


def test_recovered_tasks_wait_until_those_who_may_know_more_have_told() -> None:
    books = Books(node("a"))
    books.add("t").is_recovered = True
    assert books.decide(with_recovered=False) == []
    assert books.decide(with_recovered=True) != []


def test_recovered_tasks_that_wait_already_are_held_back_again_when_a_node_owes_its_answer() -> None:
    books = Books(node("a", ready=False))
    books.add("t").is_recovered = True
    assert books.decide() == []
    books.cluster.see(report("a"))
    assert books.decide(with_recovered=False) == []
    assert books.decide() != []


def test_what_is_cancelled_or_over_its_deadline_is_not_started() -> None:
    books = Books(node("a"))
    cancelled = books.add("cancelled")
    cancelled.cancel_at = 9.0
    books.ledger.touch(cancelled)
    books.add("late", deadline_s=1.0)
    assert books.decide(1.0) == []


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


def tune(*holders: str) -> Submit:
    spec = TuneSpec(adapter="a", data_sha256="0" * 64, holders=[NodeId(name) for name in holders])
    return Submit(kind="tune", tune=spec)


def test_a_task_that_fits_nowhere_does_not_hold_up_the_next() -> None:
    books = Books(node("a"))
    books.add("other", model="other")
    books.add("next")
    assert books.where() == {"next": "a"}


def test_a_node_that_refused_a_moment_ago_is_left_out() -> None:
    books = Books(node("a"), node("b", ready=False))
    task = books.add("t")
    assert books.where() == {"t": "a"}
    books.requeue(task, {"a": 5.0})
    assert books.where(1.0) == {}
    assert books.where(5.0) == {"t": "a"}


def test_adapter_and_readiness_are_needed() -> None:
    books = Books(node("a"), node("b", adapters=("german",), ready=False), node("c", adapters=("german",)))
    books.add("t", adapter="german")
    assert books.where() == {"t": "c"}


def test_a_node_that_gets_the_adapter_or_becomes_ready_is_noticed() -> None:
    books = Books(node("a"), node("b", ready=False))
    books.add("t", adapter="german")
    assert books.where() == {}
    books.cluster.see(info("b", adapters=("german",)))
    assert books.where() == {}
    books.cluster.see(report("b"))
    assert books.where() == {"t": "b"}


def test_every_start_says_why_with_the_numbers() -> None:
    books = Books(node("a"), node("b", slots=1, ready=False))
    books.add("t", max_tokens=10)
    (start,) = books.decide()
    assert isinstance(start, Start)
    assert start.why.words.startswith("on a: 1.0 s expected, no deadline, value density 0.99")
    taken, other = start.why.candidates
    assert (taken.node, taken.why_not) == ("a", None)
    assert (other.node, other.why_not) == ("b", "takes no work now")
    assert abs(sum(taken.parts.values()) - taken.service_s) < 1e-9


def test_a_tuning_task_goes_where_its_data_are() -> None:
    for holders, goes in ((("c", "d"), ["c"]), ((), ["a"]), (("d",), [])):
        books = Books(node("a"), node("b"), node("c"))
        books.add("t", tune(*holders))
        assert list(books.where().values()) == goes, holders


def test_a_second_tuning_task_waits_for_another_node_and_inference_goes_beside_the_first() -> None:
    books = Books(node("a", slots=4))
    books.add("first", tune("a"))
    assert books.where() == {"first": "a"}
    books.add("second", tune("a", "b"))
    books.add("answer")
    assert books.where() == {"answer": "a"}
    books.cluster.change(MemberChanged(NodeId("b"), "alive", 1))
    books.cluster.see(info("b"))
    books.cluster.see(report("b"))
    assert books.where() == {"second": "b"}


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
