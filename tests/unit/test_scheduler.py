"""What a client and the nodes see of the coordinator, over a bag of messages."""

from __future__ import annotations

import pytest

from coordinator.admission import AdmissionConfig
from coordinator.attempts import AttemptsConfig
from coordinator.scheduler import SchedulerConfig
from coordinator.settlement import SettlementConfig
from coordinator.store import StoreConfig
from mesh.ids import NodeId, TaskId
from mesh.messages import (
    AdapterCard,
    Assign,
    CancelTask,
    Drain,
    Outcome,
    Output,
    Submit,
    TaskEvent,
    TaskForgotten,
    TaskProgress,
    TaskRecord,
    TaskReply,
    TaskResult,
    TaskStatus,
    TaskTokens,
    TuneSpec,
    Unacceptable,
)
from tests.unit.task_world import answer_of, ask, held_by, mesh

# ── the way of a task ───────────────────────────────────────────────────────────────────────────────


def test_a_task_is_queued_assigned_running_and_done_in_this_order() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1")))
    world.run(2)
    assert world.states("t1") == ["queued", "assigned", "running", "done"]
    (result,) = world.results("t1")
    assert (result.state, result.text, result.attempt) == ("done", "answer to hello", 1)


def test_an_acknowledged_task_is_on_two_disks() -> None:
    world = mesh(service_s=5)
    world.say(ask(id=TaskId("t1")))
    world.run(0.1)
    queued = world.heard(TaskStatus, "t1")[0]
    assert (queued.state, queued.durable_on) == ("queued", 2)
    assert sum("task/t1" in host.journal for host in world.up) == 2


def test_a_lone_node_acknowledges_at_once_and_copies_when_a_second_appears() -> None:
    world = mesh(1, service_s=60)
    world.say(ask(id=TaskId("t1")))
    assert world.heard(TaskStatus, "t1")[0].durable_on == 1
    world.start("n1").run(1)
    assert "task/t1" in world.hosts[NodeId("n1")].journal


def test_nothing_is_acknowledged_before_a_second_disk_has_it() -> None:
    world = mesh(2)
    world.cut = {frozenset((NodeId("n0"), NodeId("n1")))}
    world.say(ask(id=TaskId("t1")))
    world.run(5)
    assert world.states("t1") == [] and not world.started
    world.cut.clear()
    world.run(3)
    assert world.states("t1")[0] == "queued" and world.states("t1")[-1] == "done"


def test_a_holder_that_does_not_answer_is_passed_over() -> None:
    world = mesh(5)
    for silent in ("n1", "n2", "n3"):
        world.cut.add(frozenset((NodeId("n0"), NodeId(silent))))
    for i in range(8):
        world.say(ask(id=TaskId(f"t{i}")))
    world.run(10)
    assert all(world.states(f"t{i}")[:1] == ["queued"] for i in range(8))


def test_what_a_dead_holder_held_is_held_elsewhere() -> None:
    world = mesh(4, slots=1, service_s=1000)
    for i in range(20):
        world.say(ask(id=TaskId(f"t{i}")))
    world.run(1)
    world.kill("n1")
    world.bury("n1")
    world.run(3)
    for i in range(20):
        assert sum(f"task/t{i}" in host.journal for host in world.up) >= 2


def test_an_accepted_task_that_nobody_can_start_says_why() -> None:
    stuck = mesh(2, slots=0)
    stuck.say(ask(id=TaskId("t1")))
    stuck.run(1)
    (queued,) = stuck.heard(TaskStatus, "t1")
    assert queued.state == "queued" and "no node can start it yet" in (queued.reason or "")
    able = mesh(2)
    able.say(ask(id=TaskId("t1")))
    able.run(2)
    assert [status.reason for status in able.heard(TaskStatus, "t1")] == [None] * 4


def test_a_result_tells_how_long_the_task_waited_and_ran() -> None:
    world = mesh(1, slots=1, service_s=2)
    world.say(ask(id=TaskId("first")))
    world.say(ask("later", id=TaskId("second")))
    world.run(10)
    (result,) = world.results("second")
    assert result.queue_s == pytest.approx(2, abs=0.1)
    assert (result.service_s, result.ttft_s) == (0.5, 0.1)  # as the worker measured them


def test_tokens_are_counted_from_zero_within_an_attempt() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1")))
    world.say(ask(id=TaskId("t2"), stream=False))
    world.run(2)
    assert [(t.attempt, t.seq) for t in world.heard(TaskTokens, "t1")] == [(1, 0)]
    assert world.heard(TaskTokens, "t2") == []


CARD = AdapterCard(
    name="spam", digest="d", method="lora", top_layers=1, first_layer=3, bytes=9, task="classify"
)


def tune(*holders: str, **fields: object) -> Submit:
    spec = TuneSpec(adapter="spam", data_sha256="0" * 64, holders=[NodeId(name) for name in holders])
    return Submit(kind="tune", tune=spec, id=TaskId("t1"), **fields)  # type: ignore[arg-type]


def trained(assign: Assign) -> Outcome:
    return answer_of(assign, text="", output=Output(adapter=CARD))


def test_a_tuning_task_runs_where_its_data_are_says_how_far_it_is_and_gives_its_adapter() -> None:
    world = mesh(answer=trained)
    world.say(tune("n2"))
    world.run(2)
    assert [(node, assign.task) for _, node, assign in world.started] == [("n2", "t1")]
    assert [(p.attempt, p.seq, p.fraction) for p in world.heard(TaskProgress, "t1")] == [(1, 0, 0.5)]
    (result,) = world.results("t1")
    assert result.output == Output(adapter=CARD)


def test_a_tuning_task_waits_for_the_node_with_its_data_and_goes_on_there() -> None:
    world = mesh(answer=trained, service_s=4)
    world.say(tune("n2"))
    world.run(1)
    world.kill("n2")
    world.bury("n2")
    world.run(10)
    assert world.results("t1") == [] and {node for _, node, _ in world.started} == {"n2"}
    world.start("n2")
    world.run(20)
    (result,) = world.results("t1")
    assert (result.node, result.attempt, result.output) == ("n2", 2, Output(adapter=CARD))


def test_what_was_trained_is_known_to_the_next_coordinator() -> None:
    world = mesh(answer=trained)
    world.say(tune())
    world.run(2)
    world.kill("n0")
    world.bury("n0")
    world.elect("n1")
    world.run(3)
    before = len(world.results("t1"))
    world.say(tune())
    world.run(1)
    assert [result.output for result in world.results("t1")[before:]] == [Output(adapter=CARD)]
    assert len(world.started) == 1, "it is not trained again"


def test_a_client_with_its_own_topic_hears_acknowledgement_and_result_there() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1"), reply_to="me/answers", correlation="7"))
    world.run(2)
    first, second = world.replies("me/answers")
    assert isinstance(first, TaskStatus) and first.state == "queued"
    assert isinstance(second, TaskResult) and second.text == "answer to hello"
    assert {reply.correlation for reply in world.heard(TaskReply)} == {"7"}


# ── the same, again ─────────────────────────────────────────────────────────────────────────────────


def test_the_same_body_under_the_same_id_runs_once_and_is_answered_again() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1")))
    world.run(2)
    world.say(ask(id=TaskId("t1"), reply_to="me/late"))
    world.run(2)
    assert len(world.started) == 1
    assert [body.text for body in world.replies("me/late") if isinstance(body, TaskResult)] == [
        "answer to hello"
    ]
    assert len({result.text for result in world.results("t1")}) == 1


def test_another_body_under_a_taken_id_leaves_the_first_alone() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1")))
    world.run(2)
    before = len(world.heard(TaskStatus, "t1"))
    world.say(ask("something else", id=TaskId("t1"), reply_to="me/oops"))
    world.run(2)
    (reply,) = world.replies("me/oops")
    assert (
        isinstance(reply, TaskStatus) and reply.state == "rejected" and "another body" in (reply.reason or "")
    )
    assert len(world.heard(TaskStatus, "t1")) == before
    assert any("another body" in event.text for event in world.heard(TaskEvent))


def test_what_cannot_be_read_is_rejected_by_the_coordinator_alone() -> None:
    world = mesh()
    world.say(Unacceptable(reason="prompt is empty", id=TaskId("bad"), reply_to="me/bad", correlation="c"))
    world.run(1)
    (status,) = world.heard(TaskStatus, "bad")
    assert (status.state, status.reason) == ("rejected", "prompt is empty")
    (reply,) = world.replies("me/bad")
    assert reply == status


def test_an_unknown_model_is_rejected_and_its_retained_refusal_is_cleared() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1"), model="no-such-model"))
    assert "no node serves model 'no-such-model'" in world.heard(TaskStatus, "t1")[0].reason
    world.run(119)
    assert not world.heard(TaskForgotten, "t1")
    world.run(2)
    assert world.heard(TaskForgotten, "t1")


def test_a_task_refused_once_may_be_accepted_later_and_is_then_not_forgotten_early() -> None:
    world = mesh(1, config=SchedulerConfig(), service_s=1000)
    world.say(ask(id=TaskId("t1"), model="late/Model"))
    world.run(100)
    world.say(ask(id=TaskId("t1")))
    world.run(60)
    assert world.states("t1") == ["rejected", "queued", "assigned", "running"]
    assert not world.heard(TaskForgotten, "t1")


def test_retained_topics_of_a_settled_task_are_removed_after_their_time() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1")))
    world.run(100)
    assert not world.heard(TaskForgotten)
    world.run(30)
    assert len(world.heard(TaskForgotten, "t1")) == 1


def test_an_id_is_known_long_after_its_answer_is_gone() -> None:
    world = mesh()
    world.say(ask(id=TaskId("t1")))
    world.run(700)
    assert not any("task/t1" in host.journal for host in world.up)
    assert len(world.scheduler.statuses(world.now)) == 0
    world.say(ask(id=TaskId("t1"), reply_to="me/late"))
    world.run(2)
    assert len(world.started) == 1
    assert "answer is gone" in world.replies("me/late")[0].reason


# ── time ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_expired_task_never_starts() -> None:
    world = mesh(1, slots=1, service_s=5)
    world.say(ask(id=TaskId("long")))
    world.say(ask("soon", id=TaskId("short"), deadline_s=1))
    world.run(20)
    assert world.states("short") == ["queued", "expired"]
    assert [assign.task for _, _, assign in world.started] == ["long"]


def test_a_task_running_past_its_deadline_is_stopped_and_expires_at_once() -> None:
    world = mesh(2, service_s=60)
    world.say(ask(id=TaskId("t1"), deadline_s=2))
    world.run(2.5)
    assert world.states("t1")[-1] == "expired"
    assert world.results("t1")[0].text == ""
    assert all(not host.running for host in world.up)


def test_a_queued_task_is_cancelled_at_once_and_a_running_one_when_its_worker_stops() -> None:
    world = mesh(1, slots=1, service_s=60)
    world.say(ask(id=TaskId("runs")))
    world.say(ask("waits", id=TaskId("waits")))
    world.run(1)
    world.say(CancelTask(task=TaskId("waits")))
    assert world.states("waits")[-1] == "cancelled"
    world.say(CancelTask(task=TaskId("runs")))
    world.run(0.5)
    assert world.states("runs")[-1] == "cancelled"
    assert not world.hosts[NodeId("n0")].running


def test_a_cancelled_task_ends_even_if_its_worker_never_answers() -> None:
    world = mesh(2, service_s=60, slots=1)
    world.say(ask(id=TaskId("a")))
    world.say(ask("b", id=TaskId("b")))
    world.run(1)
    (on_n1,) = [assign.task for _, node, assign in world.started if node == "n1"]
    world.kill("n1")
    world.say(CancelTask(task=on_n1))
    world.run(4)
    assert world.states(on_n1)[-1] == "running"
    world.bury("n1")
    assert world.states(on_n1)[-1] == "cancelled"


# ── workers come and go ─────────────────────────────────────────────────────────────────────────────


def test_work_of_a_dead_node_runs_elsewhere_as_the_next_attempt() -> None:
    world = mesh(3, service_s=3, slots=1)
    for i in range(3):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(1)
    (victim,) = [assign.task for _, node, assign in world.started if node == "n2"]
    world.kill("n2")
    world.bury("n2")
    world.run(10)
    (result,) = world.results(victim)
    assert (result.state, result.attempt) == ("done", 2)


def test_a_task_that_every_node_fails_is_given_up_with_the_reason() -> None:
    world = mesh(
        2,
        config=SchedulerConfig(attempts=AttemptsConfig(failures_max=2)),
        answer=lambda assign: answer_of(assign, state="failed", reason="out of memory", retry=True),
    )
    world.say(ask(id=TaskId("t1")))
    world.run(60)
    (result,) = world.results("t1")
    assert result.state == "failed" and "out of memory" in result.reason and "3 attempts" in result.reason
    assert len(world.started) == 3


def test_a_failure_of_the_task_itself_is_final() -> None:
    world = mesh(answer=lambda assign: answer_of(assign, state="rejected", reason="prompt is too long"))
    world.say(ask(id=TaskId("t1")))
    world.run(5)
    assert world.states("t1")[-1] == "rejected"
    assert len(world.started) == 1


def test_a_draining_node_gets_nothing_new() -> None:
    world = mesh(2, slots=1)
    world.hosts[NodeId("n1")].stack.receive(Drain(on=True), NodeId("n0"), world.now)
    for i in range(4):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(20)
    assert {node for _, node, _ in world.started} == {"n0"}
    assert all(world.states(f"t{i}")[-1] == "done" for i in range(4))


def test_a_restarted_worker_starts_its_attempt_anew_under_another_number() -> None:
    world = mesh(2, service_s=5, slots=1)
    world.say(ask("a", id=TaskId("a")))
    world.say(ask("b", id=TaskId("b")))
    world.run(1)
    (on_n1,) = [assign.task for _, node, assign in world.started if node == "n1"]
    world.kill("n1")
    world.start("n1")
    world.run(12)
    assert world.results(on_n1)[0].attempt == 2


def test_a_silent_worker_is_asked_again() -> None:
    world = mesh(2, service_s=3, slots=1)
    link = frozenset((NodeId("n0"), NodeId("n1")))
    world.say(ask("a", id=TaskId("a")))
    world.say(ask("b", id=TaskId("b")))
    world.run(0.2)
    world.cut.add(link)
    world.run(20)
    world.cut.clear()
    world.run(20)
    assert {world.states(task)[-1] for task in "ab"} == {"done"}
    assert all(len(world.results(task)) == 1 for task in "ab")


def test_a_worker_forgets_an_outcome_only_when_two_disks_have_it() -> None:
    world = mesh(3, slots=1)
    for i in range(3):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(5)
    assert not any(key.startswith("attempt/") for host in world.up for key in host.journal)
    for i in range(3):
        settled = [
            host.node
            for host in world.up
            if isinstance(record := host.journal.get(f"task/t{i}"), TaskRecord) and record.outcome
        ]
        assert len(settled) >= 2


def test_a_result_does_not_wait_for_the_holder_but_the_workers_copy_does() -> None:
    world = mesh(3, slots=1, service_s=1)
    task = held_by("n2", ["n1", "n2"], "t")
    world.say(ask("fills n0", id=TaskId("filler")))
    world.run(0.2)
    world.say(ask("runs on n1", id=task))
    world.run(0.2)
    world.cut.add(frozenset((NodeId("n0"), NodeId("n2"))))
    world.run(1.2)
    assert world.results(task) and f"attempt/{task}/1" in world.hosts[NodeId("n1")].journal
    world.cut.clear()
    world.run(10)
    assert f"attempt/{task}/1" not in world.hosts[NodeId("n1")].journal


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_rejects_and_says_so() -> None:
    world = mesh(1, config=SchedulerConfig(admission=AdmissionConfig(open_max=3)), slots=1, service_s=1000)
    for i in range(5):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    assert [world.states(f"t{i}")[0] for i in range(5)] == ["queued"] * 3 + ["rejected"] * 2
    assert "queue is full" in world.heard(TaskStatus, "t4")[0].reason


def test_the_ledger_remembers_a_bounded_number_of_settled_tasks() -> None:
    world = mesh(1, config=SchedulerConfig(settlement=SettlementConfig(settled_max=5)), service_s=0.01)
    for i in range(30):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
        world.run(0.5)
    assert len(world.scheduler.statuses(world.now)) == 5
    assert len(world.heard(TaskForgotten)) == 25


def test_what_the_store_buried_for_its_size_the_ledger_forgets_too() -> None:
    """Prompts of 256 KiB: 4,096 of them would be a gigabyte of memory, though not of disk."""
    world = mesh(1, disk=StoreConfig(settled_bytes_max=20_000), service_s=0.01)
    for i in range(30):
        world.say(ask("p" * 4_000, id=TaskId(f"t{i}")))
        world.run(0.5)
    n_remembered = len(world.scheduler.statuses(world.now))
    assert 0 < n_remembered <= 5
    assert len(world.heard(TaskForgotten)) == 30 - n_remembered


def test_the_order_of_simultaneous_arrivals_changes_nothing_but_ids() -> None:
    def starts(prompts: list[str]) -> list[str | None]:
        world = mesh(1, slots=1)
        world.say(ask("first"))
        for prompt in prompts:
            world.say(ask(prompt))
        world.run(30)
        return [assign.submit.prompt for _, _, assign in world.started]

    assert starts(["a", "b", "c", "d"]) == starts(["d", "b", "a", "c"])


def test_repeated_and_late_messages_of_every_kind_change_nothing() -> None:
    calm = mesh(3, service_s=1)
    rough = mesh(3, service_s=1, repeat=0.5, delay_s=(0.001, 0.4), seed=3)
    for world in (calm, rough):
        for i in range(6):
            world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
        world.run(60)
    for i in range(6):
        assert {r.text for r in rough.results(f"t{i}")} == {r.text for r in calm.results(f"t{i}")}
        assert len(rough.results(f"t{i}")) == 1


def test_counts_follow_the_tasks() -> None:
    world = mesh(1, slots=1, service_s=2)
    for i in range(3):
        world.say(ask(f"p{i}", id=TaskId(f"t{i}")))
    world.run(1)
    assert world.scheduler.counts == {"queued": 2, "running": 1}
    world.run(10)
    assert world.scheduler.counts == {"done": 3}
