"""A virtual node takes the true time, shares steps among answers, and gives way when it should."""

from __future__ import annotations

import pytest

from coordinator.policy.rates import Rates
from coordinator.policy.work import Work
from coordinator.virtual.devices import NodeSpec
from coordinator.virtual.nodes import Attempt, VirtualNode
from coordinator.virtual.workload import VirtualTask
from mesh.core import FOREVER
from mesh.ids import NodeId, TaskId

RATES = Rates(
    prefill_tokens_per_s=100, decode_tokens_per_s=10, row_cost=0.5, features_tokens_per_s=100,
    tune_tokens_per_s=100, adapter_load_s=1.0,
)  # fmt: skip


def node_of(slots: int) -> VirtualNode:
    return VirtualNode(NodeSpec(id=NodeId("n"), rates=RATES, slots=slots))


def task(name: str, work: Work, factor: float = 1.0) -> VirtualTask:
    return VirtualTask(TaskId(name), 0.0, FOREVER, 1.0, work, factor)


def answer(name: str, n_tokens: float, factor: float = 1.0, adapter: str | None = None) -> VirtualTask:
    loads = 0.0 if adapter is None else 1.0
    return task(name, Work(n_tokens=n_tokens, n_adapter_loads=loads, reuses=adapter), factor)


def tuning(name: str, n_tokens: float) -> VirtualTask:
    return task(name, Work(kind="tune", n_feature_tokens=n_tokens, n_tune_tokens=n_tokens))


def run_out(node: VirtualNode) -> dict[str, float]:
    """Let everything end; when each did."""
    ended: dict[str, float] = {}
    while node.next_at() < FOREVER:
        node.advance(node.next_at())
        assert len(node.running) <= node.spec.slots
        node.gave_way()
        ended |= {attempt.task.id: node.now for attempt in node.ended()}
    return ended


def test_work_takes_its_true_time_and_not_what_was_expected() -> None:
    node = node_of(1)
    node.start(answer("a", 20, factor=1.5), 1.0, 0.0)
    assert run_out(node) == {"a": pytest.approx(3.0)}


def test_one_slot_is_a_queue() -> None:
    node = node_of(1)
    node.start(answer("a", 20), 1.0, 0.0)
    node.start(answer("b", 10), 1.0, 0.0)
    assert run_out(node) == {"a": pytest.approx(2.0), "b": pytest.approx(3.0)}


def test_answers_together_share_every_step() -> None:
    node = node_of(2)
    node.start(answer("a", 20), 1.0, 0.0)
    node.start(answer("b", 20), 1.0, 0.0)
    assert run_out(node) == {"a": pytest.approx(3.0), "b": pytest.approx(3.0)}  # 2 s, a step is 1.5 as long


def test_a_prompt_is_read_before_an_answer_goes_on() -> None:
    node = node_of(2)
    node.start(answer("a", 10), 1.0, 0.0)
    node.start(task("b", Work(n_prompt_tokens=100)), 1.0, 0.0)
    assert run_out(node) == {"a": pytest.approx(2.0), "b": pytest.approx(1.0)}


def test_an_adapter_is_loaded_once_while_it_is_kept() -> None:
    node = node_of(1)
    node.start(answer("a", 10, adapter="x"), 1.0, 0.0)
    assert run_out(node) == {"a": pytest.approx(2.0)}
    node.start(answer("b", 10, adapter="x"), 1.0, 2.0)
    assert run_out(node) == {"b": pytest.approx(3.0)}


def test_tuning_gives_way_at_the_end_of_its_chunk_and_keeps_what_it_has_done() -> None:
    node = node_of(1)
    node.start(tuning("t", 1000), 1.0, 0.0)  # 20 s
    node.pause(TaskId("t"), 12.3)
    assert node.next_at() == pytest.approx(13.0)
    node.advance(13.0)
    (attempt,) = node.gave_way()
    assert attempt.left == pytest.approx(7 / 20)
    assert attempt.left_of_training == pytest.approx(7 / 10)
    node.start(attempt.task, attempt.left, 20.0)
    assert run_out(node) == {"t": pytest.approx(27.0)}


def test_who_waits_for_a_chunk_starts_when_it_is_over() -> None:
    node = node_of(1)
    node.start(tuning("t", 1000), 1.0, 0.0)
    node.pause(TaskId("t"), 4.5)
    node.start(answer("a", 10), 1.0, 4.5)
    node.advance(5.0)
    node.gave_way()
    assert run_out(node) == {"a": pytest.approx(6.0)}


def test_generation_stands_still_on_its_node_until_it_may_go_on() -> None:
    node = node_of(1)
    node.start(answer("a", 20), 1.0, 0.0)
    node.pause(TaskId("a"), 1.0)
    node.start(answer("b", 10), 1.0, 1.0)
    node.gave_way()
    node.advance(node.next_at())
    assert [attempt.task.id for attempt in node.ended()] == ["b"]
    node.resume(TaskId("a"), 4.0)
    assert run_out(node) == {"a": pytest.approx(5.0)}


def test_what_is_stopped_or_lost_is_gone() -> None:
    node = node_of(1)
    node.start(answer("a", 20), 1.0, 0.0)
    node.start(answer("b", 20), 1.0, 0.0)
    node.start(answer("c", 20), 1.0, 0.0)
    assert node.stop(TaskId("b"), 0.5) is not None  # still waiting for the slot
    stopped = node.stop(TaskId("a"), 1.0)
    assert isinstance(stopped, Attempt)
    assert stopped.left == pytest.approx(0.5)
    assert node.stop(TaskId("a"), 1.0) is None
    assert [attempt.task.id for attempt in node.clear(1.5)] == ["c"]
    assert node.next_at() == FOREVER


def test_busy_time_counts_slots_in_use() -> None:
    node = node_of(2)
    node.start(answer("a", 20), 1.0, 0.0)
    node.start(answer("b", 20), 1.0, 0.0)
    run_out(node)
    assert node.busy_s == pytest.approx(6.0)


def test_rests_of_work_too_small_to_tell_from_nothing_end_all_the_same() -> None:
    """A prompt read at 1e9 tokens a second, as echo nodes say: the loop once spun for ever."""
    rates = Rates(prefill_tokens_per_s=1e9, decode_tokens_per_s=10)
    node = VirtualNode(NodeSpec(id=NodeId("n"), rates=rates, slots=4))
    node.start(task("a", Work(n_prompt_tokens=1, n_tokens=10)), 1.0, 0.0)
    for _ in range(5):
        if node.next_at() == FOREVER:
            break
        node.advance(node.next_at())
        node.ended()
    assert not node.running
    assert node.now == pytest.approx(1.0)
