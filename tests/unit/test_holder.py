"""The second disk."""

from __future__ import annotations

from dataclasses import replace

from coordinator.holder import Holder
from coordinator.store import RecordStore, StoreConfig, attempt_key, task_key
from coordinator.task import digest_of
from mesh.agreement.fence import Fence
from mesh.core import Effect, Save, Send
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import (
    AttemptEnded,
    AttemptId,
    Held,
    Hold,
    Inventory,
    Outcome,
    Output,
    Recall,
    StaleCommand,
    Submit,
    TaskRecord,
    TuneSpec,
)
from tests.unit.task_world import ask

BOSS = NodeId("boss")
E1, E2 = Epoch(1, BOSS), Epoch(2, BOSS)


def holder(store: RecordStore | None = None, seen: Epoch = E1) -> Holder:
    return Holder(me=NodeId("me"), fence=Fence(seen), store=store or RecordStore(now=0))


def record(name: str = "t", text: str | None = None, term: int = 1, prompt: str = "hello") -> TaskRecord:
    submit = ask(prompt)
    ended = None
    if text is not None:
        ended = Outcome(
            state="done",
            text=text,
            finish_reason=None,
            reason=None,
            node=BOSS,
            attempt=1,
            epoch=Epoch(term, BOSS),
        )
    return TaskRecord(
        task=TaskId(name), submit=submit, digest=digest_of(submit), budget_s=9.0, outcome=ended, epoch=E1
    )


def sent(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def test_a_record_is_on_disk_before_it_is_said_to_be_held() -> None:
    effects = holder().receive(Hold(epoch=E1, record=record()), BOSS, 0)
    assert [type(effect) for effect in effects] == [Save, Send]
    assert sent(effects) == [Held(epoch=E1, task=TaskId("t"), settled=False)]


def test_a_repeated_hold_is_answered_again_and_written_once() -> None:
    one = holder()
    one.receive(Hold(epoch=E1, record=record(text="yes")), BOSS, 0)
    effects = one.receive(Hold(epoch=E1, record=record(text="yes")), BOSS, 0)
    assert [type(effect) for effect in effects] == [Send]


def test_an_overtaken_hold_of_the_open_version_brings_back_the_settled_one() -> None:
    one = holder()
    one.receive(Hold(epoch=E1, record=record(text="yes")), BOSS, 0)
    (news,) = sent(one.receive(Hold(epoch=E1, record=record()), BOSS, 0))
    assert isinstance(news, Inventory) and news.records[0].outcome is not None and not news.is_last


def test_an_outcome_that_came_first_is_kept_and_told_and_not_said_to_be_the_other() -> None:
    one = holder()
    one.receive(Hold(epoch=E1, record=record(text="first", term=1)), BOSS, 0)
    (news,) = sent(one.receive(Hold(epoch=E2, record=record(text="second", term=2)), BOSS, 0))
    assert isinstance(news, Inventory)
    assert [kept.outcome.text for kept in news.records if kept.outcome] == ["first"]


def test_commands_of_an_epoch_that_is_over_are_refused_and_change_nothing() -> None:
    store = RecordStore(now=0)
    one = holder(store, seen=E2)
    for command in (Hold(epoch=E1, record=record()), Recall(epoch=E1)):
        assert one.receive(command, NodeId("old"), 0) == [Send(NodeId("old"), StaleCommand(seen=E2))]
    assert store.n_records == 0


def test_a_newer_epoch_is_durable_before_it_is_obeyed() -> None:
    effects = holder().receive(Recall(epoch=E2), BOSS, 0)
    assert isinstance(effects[0], Save) and effects[0].key == "fence"


def test_a_full_store_says_nothing_so_that_another_holder_is_asked() -> None:
    store = RecordStore(now=0, config=StoreConfig(open_max=1))
    one = holder(store)
    one.receive(Hold(epoch=E1, record=record("a")), BOSS, 0)
    assert one.receive(Hold(epoch=E1, record=record("b")), BOSS, 0) == []


def test_an_inventory_is_whole_numbered_and_in_parts_that_fit_a_message() -> None:
    store = RecordStore(now=0)
    for i in range(60):
        store.put(record(f"t{i}", prompt="x" * 10_000), 0)
    store.running[TaskId("r")] = AttemptId(task=TaskId("r"), attempt=1, epoch=E1)
    ended = record("e", text="yes").outcome
    assert ended is not None
    store.end(AttemptEnded(task=TaskId("e"), attempt=1, epoch=E1, outcome=ended))
    parts = sent(holder(store).receive(Recall(epoch=E1, round=7), BOSS, 0))
    assert [part.part for part in parts] == list(range(len(parts))) and len(parts) > 4  # type: ignore[attr-defined]
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]  # type: ignore[attr-defined]
    assert all(part.round == 7 and len(part.records) <= 10 for part in parts)  # type: ignore[attr-defined]
    assert {kept.task for part in parts for kept in part.records} == {f"t{i}" for i in range(60)}  # type: ignore[attr-defined]
    assert sum(len(part.running) for part in parts) == sum(len(part.ended) for part in parts) == 1  # type: ignore[attr-defined]


def test_an_empty_disk_says_so() -> None:
    (part,) = sent(holder().receive(Recall(epoch=E1), BOSS, 0))
    assert isinstance(part, Inventory) and part.is_last and not part.records


def test_an_inventory_tells_what_is_left_of_the_time_now() -> None:
    one = holder()
    one.receive(Hold(epoch=E1, record=record()), BOSS, 100)
    (part,) = sent(one.receive(Recall(epoch=E1), BOSS, 104))
    assert isinstance(part, Inventory)
    assert (part.records[0].budget_s, part.records[0].age_s) == (5.0, 4.0)


def test_settled_records_go_after_their_time() -> None:
    one = holder()
    one.receive(Hold(epoch=E1, record=record(text="yes")), BOSS, 0)
    assert one.wake_at == 600.0
    assert one.tick(600.0) == [Save("task/t", None)]


def test_what_is_not_for_a_holder_is_ignored() -> None:
    assert holder().receive(replace(record()), BOSS, 0) == []


def test_a_store_is_bounded_in_bytes_too_so_that_its_journal_never_fills_up() -> None:
    """A flood of the longest prompts: 2,048 of them would fill the journal, and silence every coordinator."""
    config = StoreConfig(open_bytes_max=10_000, settled_bytes_max=10_000)
    store = RecordStore(now=0, config=config)
    for k in range(100):
        store.put(record(f"open-{k}", prompt="x" * 1000), 0)
    assert (store.n_records, store.has_room) == (10, False)
    for k in range(100):
        store.put(record(f"open-{k}", text="y" * 1000, prompt="x" * 1000), 1)
    assert store.n_records == 5 and store.has_room, (
        "the answers count, the oldest went, the open ones are none"
    )
    assert store.tombstone(TaskId("open-0")) is not None

    journal = {task_key(one.task): one for one in store.records(2)}
    again = RecordStore(now=0, journal=journal, config=config)
    effects = again.put(record("one-more", text="y" * 1000, prompt="x" * 1000), 0)
    assert len(effects) == 2 and again.n_records == 5, "counted after a restart as well"


def test_data_texts_and_outputs_count_like_prompts_and_answers() -> None:
    texts, data = ["x" * 500] * 2, "y" * 600
    vectors = Output(vectors=[[0.5] * 100])
    base = record("b", text="")
    assert base.outcome is not None
    tasks = {
        "embed": replace(base, task=TaskId("embed"), submit=Submit(kind="embed", texts=texts)),
        "tune": replace(
            base,
            task=TaskId("tune"),
            submit=Submit(kind="tune", tune=TuneSpec(adapter="a", data=data, eval_data=data)),
        ),
        "vectors": replace(
            base,
            task=TaskId("vectors"),
            submit=Submit(prompt="hi"),
            outcome=replace(base.outcome, output=vectors),
        ),
    }
    for one in tasks.values():
        size = 100 + max(one.submit.n_text_bytes, one.outcome.n_bytes)  # type: ignore[union-attr]
        store = RecordStore(now=0, config=StoreConfig(settled_bytes_max=size))
        store.put(one, 0)
        store.put(replace(one, task=TaskId("next")), 1)
        assert store.n_records == 1 and size > 900, "the older one went"


def test_outcomes_nobody_takes_are_bounded_in_bytes_too() -> None:
    outcome = record("e", text="").outcome
    assert outcome is not None
    vectors = replace(outcome, output=Output(vectors=[[0.5] * 100]))
    config = StoreConfig(ended_bytes_max=4000)
    store = RecordStore(now=0, config=config)
    for k in range(1, 10):
        store.end(AttemptEnded(task=TaskId("t"), attempt=k, epoch=E1, outcome=vectors))
    assert sorted(attempt for _, attempt in store.ended) == [6, 7, 8, 9]
    journal = {attempt_key(one.task, one.attempt): one for one in store.ended.values()}
    again = RecordStore(now=0, journal=journal, config=config)
    again.take(TaskId("t"), 9)
    again.end(AttemptEnded(task=TaskId("t"), attempt=10, epoch=E1, outcome=vectors))
    assert sorted(attempt for _, attempt in again.ended) == [6, 7, 8, 10]
