"""The coordinator's books and the node's store."""

from __future__ import annotations

from random import Random

import pytest

from coordinator.copies import rendezvous
from coordinator.ledger import Ledger
from coordinator.store import RecordStore, StoreConfig
from coordinator.submissions import SubmissionBuffer, unknown_to
from coordinator.task import Task, digest_of, outcome_rank, record_of
from mesh.core import Save
from mesh.ids import EPOCH_ZERO, Epoch, NodeId, TaskId
from mesh.messages import AttemptEnded, CancelTask, Outcome, Submit, TaskRecord
from tests.unit.task_world import ask

EPOCH = Epoch(1, NodeId("n0"))


def task(name: str, *, at: float = 0.0, prompt: str = "hello", acknowledged: bool = True) -> Task:
    submit = ask(prompt)
    return Task(
        id=TaskId(name), submit=submit, digest=digest_of(submit), accepted_at=at, is_acknowledged=acknowledged
    )


def outcome(*, term: int = 1, state: str = "done", text: str = "yes") -> Outcome:
    return Outcome(
        state=state,  # type: ignore[arg-type]
        text=text,
        finish_reason=None,
        reason=None,
        node=NodeId("n0"),
        attempt=1,
        epoch=Epoch(term, NodeId("n0")),
    )


def record(name: str, ended: Outcome | None = None, budget_s: float | None = None) -> TaskRecord:
    submit = ask("hello")
    return TaskRecord(
        task=TaskId(name),
        submit=submit,
        digest=digest_of(submit),
        budget_s=budget_s,
        outcome=ended,
        epoch=EPOCH,
    )


# ── books ───────────────────────────────────────────────────────────────────────────────────────────


def test_only_acknowledged_tasks_wait_and_the_earliest_first() -> None:
    ledger = Ledger()
    for one in (task("late", at=2), task("early", at=1), task("unheld", at=0, acknowledged=False)):
        ledger.add(one)
    assert [one.id for one in ledger.waiting()] == ["early", "late"]


def test_counts_and_load_follow_every_change() -> None:
    ledger, one = Ledger(), task("t")
    ledger.add(one)
    with ledger.changing(one):
        one.assign(NodeId("a"), 1, EPOCH, 1.0)
    assert (ledger.counts["assigned"], ledger.in_flight[NodeId("a")], list(ledger.waiting())) == (1, 1, [])
    with ledger.changing(one):
        one.requeue()
    assert (ledger.counts["queued"], ledger.in_flight[NodeId("a")], len(list(ledger.waiting()))) == (1, 0, 1)
    with ledger.changing(one):
        one.settle(outcome(), 2.0)
    assert (ledger.n_open, ledger.n_settled, list(ledger.waiting())) == (0, 1, [])
    ledger.drop(one)
    assert len(ledger) == 0 and not +ledger.counts


def test_a_task_is_due_once_at_the_earliest_time_it_was_armed_for() -> None:
    ledger, one = Ledger(), task("t")
    ledger.add(one)
    for at in (9.0, 5.0, 7.0):
        ledger.arm(one, at)
    assert ledger.wake_at == 5.0 and ledger.due(4.9) == []
    assert ledger.due(6.0) == [one]
    assert ledger.due(100.0) == []


def test_the_agenda_stays_small_however_often_a_task_is_armed_for_later() -> None:
    ledger, one = Ledger(), task("t")
    ledger.add(one)
    for i in range(10_000):
        ledger.arm(one, 5.0 + i)
    assert len(ledger._agenda) == 1


def test_a_requeued_task_keeps_its_place() -> None:
    ledger = Ledger()
    first, second = task("first", at=1), task("second", at=2)
    ledger.add(first)
    ledger.add(second)
    with ledger.changing(first):
        first.assign(NodeId("a"), 1, EPOCH, 3.0)
    with ledger.changing(first):
        first.requeue()
    assert [one.id for one in ledger.waiting()] == ["first", "second"]


# ── store ───────────────────────────────────────────────────────────────────────────────────────────


def test_an_open_record_never_replaces_a_settled_one() -> None:
    store = RecordStore(now=0)
    assert [effect.key for effect in store.put(record("t", outcome()), 0) if isinstance(effect, Save)] == [
        "task/t"
    ]
    assert store.put(record("t"), 1) == []
    kept = store.get(TaskId("t"), 1)
    assert kept is not None and kept.outcome == outcome()


@pytest.mark.parametrize("seed", range(20))
def test_records_in_any_order_lead_every_store_to_the_same_outcome(seed: int) -> None:
    outcomes = [
        outcome(term=term, state=state, text=text)
        for term in (1, 2)
        for state in ("done", "expired")
        for text in "ab"
    ]
    given = [record("t"), *(record("t", one) for one in outcomes)] * 2
    Random(seed).shuffle(given)
    store = RecordStore(now=0)
    for one in given:
        store.put(one, 0)
    kept = store.get(TaskId("t"), 0)
    assert kept is not None and kept.outcome == min(outcomes, key=outcome_rank)


def test_remaining_time_runs_on_while_a_record_is_held_and_from_a_restart() -> None:
    store = RecordStore(now=100)
    store.put(record("t", budget_s=10.0), 100)
    kept = store.get(TaskId("t"), 104)
    assert kept is not None and (kept.budget_s, kept.age_s) == (6.0, 4.0)
    restarted = RecordStore(now=5000, journal={"task/t": record("t", budget_s=10.0)}).get(TaskId("t"), 5003)
    assert restarted is not None and restarted.budget_s == 7.0


def test_a_journal_brings_everything_back() -> None:
    ended = AttemptEnded(task=TaskId("u"), attempt=2, epoch=EPOCH, outcome=outcome())
    store = RecordStore(
        now=0, journal={"task/t": record("t"), "attempt/u/2": ended, "fence": "something else"}
    )
    assert [one.task for one in store.records(0)] == ["t"]
    assert store.ended == {(TaskId("u"), 2): ended}


def test_settled_records_are_buried_after_their_time_and_leave_a_tombstone() -> None:
    store = RecordStore(now=0, config=StoreConfig(settled_keep_s=10))
    store.put(record("t", outcome()), 0)
    assert store.bury_due(9.9) == []
    assert store.bury_due(10.0) == [Save("task/t", None)]
    tombstone = store.tombstone(TaskId("t"))
    assert tombstone is not None and tombstone.state == "done"


def test_everything_in_a_store_is_bounded() -> None:
    config = StoreConfig(settled_max=3, open_max=3, ended_max=3, tombstones_max=5)
    store = RecordStore(now=0, config=config)
    keys: set[str] = set()
    for i in range(20):
        effects = store.put(record(f"o{i}"), 0) + store.put(record(f"s{i}", outcome()), 0)
        effects += store.end(AttemptEnded(task=TaskId(f"e{i}"), attempt=1, epoch=EPOCH, outcome=outcome()))
        for effect in effects:
            assert isinstance(effect, Save)
            keys = keys - {effect.key} if effect.record is None else keys | {effect.key}
    assert store.n_records == 6 and len(store.ended) == 3 and not store.has_room
    assert keys == {
        *(f"task/o{i}" for i in range(3)),
        *(f"task/s{i}" for i in (17, 18, 19)),
        *(f"attempt/e{i}/1" for i in (17, 18, 19)),
    }
    assert sum(store.tombstone(TaskId(f"s{i}")) is not None for i in range(20)) == 5


# ── what was said while nobody coordinated ──────────────────────────────────────────────────────────


def test_a_submission_with_an_id_is_known_by_it() -> None:
    buffer = SubmissionBuffer()
    for name in ("a", "b"):
        buffer.keep(ask(id=TaskId(name)), 1.0)
    left = unknown_to([task("a")], buffer.take(2.0))
    assert [said.id for _, said in left if isinstance(said, Submit)] == ["b"]


def test_equal_submissions_without_id_are_a_multiset() -> None:
    said = [(float(i), ask("same")) for i in range(3)]
    left = unknown_to([task("x", at=1.1, prompt="same")], said)
    assert [at for at, _ in left] == [0.0, 2.0] or len(left) == 2


def test_an_old_task_does_not_stand_for_a_new_submission() -> None:
    assert len(unknown_to([task("x", at=-100.0, prompt="same")], [(1.0, ask("same"))])) == 1


def test_another_clients_equal_question_is_not_mine() -> None:
    assert len(unknown_to([task("x", at=1.0, prompt="same")], [(1.0, ask("same", reply_to="me"))])) == 1


def test_the_buffer_is_bounded_in_number_and_in_time() -> None:
    buffer = SubmissionBuffer()
    for i in range(1000):
        buffer.keep(CancelTask(task=TaskId(f"t{i}")), float(i))
    assert len(buffer) == 256
    assert [at for at, _ in buffer.take(999.0)] == [float(at) for at in range(984, 1000)]
    assert len(buffer) == 0


# ── holders ─────────────────────────────────────────────────────────────────────────────────────────


def test_when_a_node_goes_only_its_tasks_change_holder() -> None:
    nodes = [NodeId(f"n{i}") for i in range(5)]
    for i in range(200):
        before = rendezvous(TaskId(f"t{i}"), nodes)[0]
        after = rendezvous(TaskId(f"t{i}"), [node for node in nodes if node != "n3"])[0]
        assert after == before or before == "n3"


def test_holders_share_the_tasks_about_evenly() -> None:
    nodes = [NodeId(f"n{i}") for i in range(4)]
    firsts = [rendezvous(TaskId(f"t{i}"), nodes)[0] for i in range(2000)]
    assert all(400 < firsts.count(node) < 600 for node in nodes)


def test_the_record_of_a_fresh_task_has_no_outcome() -> None:
    assert record_of(task("t"), EPOCH_ZERO, 0.0).outcome is None
