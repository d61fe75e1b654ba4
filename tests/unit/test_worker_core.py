"""What a worker does with orders and with what its engine says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.facts import (
    AdaptersChanged,
    AttemptFinished,
    AttemptProgress,
    AttemptText,
    DrainChanged,
    EngineLost,
    EngineReady,
    PauseAttempt,
    ResumeAttempt,
    StartAttempt,
    StopAttempt,
)
from coordinator.store import RecordStore
from coordinator.worker import Worker, WorkerConfig
from mesh.agreement.fence import Fence
from mesh.core import Broadcast, Effect, Notify, Save, Send
from mesh.facts import Followed
from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import (
    Assign,
    AttemptEnded,
    AttemptId,
    AttemptsRunning,
    CancelAttempt,
    Drain,
    OutcomeTaken,
    Refused,
    StaleCommand,
    Submit,
    TaskProgress,
    TaskTokens,
    TuneSpec,
)
from tests.unit.task_world import MODEL, answer_of, ask

BOSS, HEIR = NodeId("boss"), NodeId("heir")
E1, E2 = Epoch(1, BOSS), Epoch(2, HEIR)


def worker(
    *, slots: int = 2, ready: bool = True, store: RecordStore | None = None, over_max: int = 1024
) -> Worker:
    one = Worker(
        me=NodeId("me"),
        fence=Fence(),
        store=store or RecordStore(now=0),
        now=0,
        config=WorkerConfig(over_max=over_max),
    )
    if ready:
        one.learn(EngineReady(MODEL, 2048, slots), 0)
    return one


def order(task: str = "t", attempt: int = 1, epoch: Epoch = E1, **fields: object) -> Assign:
    assign = Assign(epoch=epoch, task=TaskId(task), attempt=attempt, submit=ask(), budget_s=None, queue_s=3.0)
    return replace(assign, **fields)  # type: ignore[arg-type]


def sent(effects: list[Effect], kind: type) -> list:  # type: ignore[type-arg]
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def facts(effects: list[Effect], kind: type) -> list:  # type: ignore[type-arg]
    return [e.fact for e in effects if isinstance(e, Notify) and isinstance(e.fact, kind)]


def finish(one: Worker, assign: Assign, now: float = 1.0, **changes: object) -> list[Effect]:
    return one.learn(AttemptFinished(assign.task, assign.attempt, answer_of(assign, **changes)), now)


def test_an_attempt_starts_once_however_often_it_is_assigned() -> None:
    one = worker()
    assert facts(one.receive(order(), BOSS, 0), StartAttempt) == [StartAttempt(order())]
    again = one.receive(order(), BOSS, 0)
    assert facts(again, StartAttempt) == []
    assert sent(again, AttemptsRunning)[0].attempts == [AttemptId(task=TaskId("t"), attempt=1, epoch=E1)]


def test_a_running_task_is_adopted_by_a_newer_coordinator_instead_of_starting_twice() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    effects = one.receive(order(attempt=5, epoch=E2), HEIR, 1)
    assert facts(effects, StartAttempt) == []
    assert sent(effects, AttemptsRunning)[-1].attempts == [AttemptId(task=TaskId("t"), attempt=1, epoch=E1)]


def test_an_older_coordinator_is_refused_and_told_so() -> None:
    one = worker()
    one.receive(order("a", epoch=E2), HEIR, 0)
    for command in (
        order("b"),
        CancelAttempt(epoch=E1, task=TaskId("a"), reason="x"),
        OutcomeTaken(epoch=E1, task=TaskId("a"), attempt=1),
    ):
        assert one.receive(command, BOSS, 0) == [Send(BOSS, StaleCommand(seen=E2))]
    assert one.n_running == 1


def test_a_newer_epoch_is_on_disk_before_its_order_starts_anything() -> None:
    effects = worker().receive(order(), BOSS, 0)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Save) < kinds.index(Notify)


def test_an_outcome_is_on_disk_before_anybody_hears_of_it() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    effects = finish(one, order())
    assert [type(effect) for effect in effects] == [Save, Send]
    (ended,) = sent(effects, AttemptEnded)
    assert (ended.outcome.node, ended.outcome.queue_s, ended.outcome.epoch) == ("me", 3.0, E1)


def test_an_outcome_is_repeated_ever_more_rarely_until_it_is_taken() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    finish(one, order(), now=0)
    times = []
    for _ in range(5):
        now = one.wake_at
        times.append(now)
        assert len(sent(one.tick(now), AttemptEnded)) == 1
    assert times == [1, 3, 7, 15, 23]
    assert one.receive(OutcomeTaken(epoch=E1, task=TaskId("t"), attempt=1), BOSS, 30) == [
        Save("attempt/t/1", None)
    ]
    assert one.wake_at == float("inf") and one.is_idle


def test_an_outcome_survives_a_restart_and_goes_to_whoever_coordinates_then() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    (ended,) = sent(finish(one, order()), AttemptEnded)
    restarted = worker(store=RecordStore(now=0, journal={"attempt/t/1": ended}))
    effects = restarted.learn(Followed(E2), 0)
    assert effects == [Send(HEIR, ended)]


def test_a_late_order_for_an_attempt_that_ended_does_not_run_it_again() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    finish(one, order())
    assert len(sent(one.receive(order(), BOSS, 2), AttemptEnded)) == 1
    one.receive(OutcomeTaken(epoch=E1, task=TaskId("t"), attempt=1), BOSS, 3)
    assert one.receive(order(), BOSS, 4) == []


def test_the_memory_of_ended_attempts_is_bounded() -> None:
    one = worker(over_max=3)
    for i in range(10):
        one.receive(order(f"t{i}"), BOSS, 0)
        finish(one, order(f"t{i}"))
        one.receive(OutcomeTaken(epoch=E1, task=TaskId(f"t{i}"), attempt=1), BOSS, 0)
    assert len(one._over) == 3


def test_every_refusal_has_its_reason_and_stays_refused() -> None:
    full = worker(slots=1)
    full.receive(order("other"), BOSS, 0)
    draining = worker()
    draining.receive(Drain(on=True), BOSS, 0)
    rows = [
        (worker(ready=False), order(), "not loaded"),
        (full, order(), "slots are taken"),
        (draining, order(), "draining"),
        (worker(), order(submit=ask(model="other")), "not other"),
        (worker(), order(budget_s=0.0), "deadline has passed"),
    ]
    for one, assign, reason in rows:
        (refused,) = sent(one.receive(assign, BOSS, 0), Refused)
        assert reason in refused.reason
        if one is draining:
            one.receive(Drain(on=False), BOSS, 0)
        one.learn(EngineReady(MODEL, 2048, 9), 0)
        assert sent(one.receive(assign, BOSS, 1), Refused) == [refused], "a repetition is answered alike"


def test_draining_is_told_to_the_node_and_can_be_taken_back() -> None:
    one = worker()
    assert facts(one.receive(Drain(on=True, leave=True), BOSS, 0), DrainChanged) == [DrainChanged(True, True)]
    assert one.is_draining and not one.may_start
    one.receive(Drain(on=False), BOSS, 0)
    assert one.may_start


def test_a_cancelled_attempt_is_stopped_once_and_says_why() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    cancel = CancelAttempt(epoch=E1, task=TaskId("t"), reason="cancelled by the client")
    assert facts(one.receive(cancel, BOSS, 0), StopAttempt) == [StopAttempt(TaskId("t"), 1, cancel.reason)]
    assert facts(one.receive(cancel, BOSS, 0), StopAttempt) == []
    (ended,) = sent(finish(one, order(), state="cancelled", text="half an ans"), AttemptEnded)
    assert (ended.outcome.state, ended.outcome.reason, ended.outcome.text) == (
        "cancelled",
        cancel.reason,
        "half an ans",
    )


def test_an_attempt_past_its_deadline_is_stopped_without_any_coordinator() -> None:
    one = worker()
    assign = order(budget_s=5.0)
    one.receive(assign, BOSS, 0)
    assert facts(one.tick(4.9), StopAttempt) == []
    assert len(facts(one.tick(5.0), StopAttempt)) == 1
    (ended,) = sent(finish(one, assign, state="cancelled"), AttemptEnded)
    assert ended.outcome.state == "expired"


def test_a_lost_engine_fails_its_attempts_so_that_they_run_elsewhere() -> None:
    one = worker()
    one.receive(order("a"), BOSS, 0)
    one.receive(order("b"), BOSS, 0)
    ended = sent(one.learn(EngineLost("killed by signal 9"), 1), AttemptEnded)
    assert [(e.task, e.outcome.state, e.outcome.retry) for e in ended] == [
        ("a", "failed", True),
        ("b", "failed", True),
    ]
    assert "signal 9" in sent(one.receive(order("c"), BOSS, 2), Refused)[0].reason
    assert finish(one, order("a")) == [], "the lost attempt's own end comes too late"


def test_a_task_whose_attempt_failed_here_may_be_tried_here_again() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    finish(one, order(), state="failed", retry=True)
    assert len(facts(one.receive(order(attempt=2), BOSS, 1), StartAttempt)) == 1


def test_an_answer_not_yet_taken_answers_any_later_attempt() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    (ended,) = sent(finish(one, order()), AttemptEnded)
    effects = one.receive(order(attempt=2, epoch=E2), HEIR, 1)
    assert facts(effects, StartAttempt) == []
    assert sent(effects, AttemptEnded)[-1] == ended


def test_running_attempts_are_reported_every_second_and_silence_follows_the_last() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    for now in (1.0, 2.0, 3.0):
        assert one.wake_at == now
        assert len(sent(one.tick(now), AttemptsRunning)) == 1
    finish(one, order())
    one.receive(OutcomeTaken(epoch=E1, task=TaskId("t"), attempt=1), BOSS, 3)
    one.tick(4.0)
    assert one.wake_at == float("inf")


def test_tokens_are_numbered_and_late_ones_of_an_ended_attempt_are_dropped() -> None:
    one = worker()
    one.receive(order(), BOSS, 0)
    effects = one.learn(AttemptText(TaskId("t"), 1, "a", 1), 0) + one.learn(
        AttemptText(TaskId("t"), 1, "b", 2), 0
    )
    said = [effect.message for effect in effects if isinstance(effect, Broadcast)]
    assert [(piece.seq, piece.text) for piece in said if isinstance(piece, TaskTokens)] == [
        (0, "a"),
        (1, "b"),
    ]
    assert one.learn(AttemptText(TaskId("t"), 2, "x", 1), 0) == []
    finish(one, order())
    assert one.learn(AttemptText(TaskId("t"), 1, "c", 1), 1) == []


def progress(attempt: int = 1, fraction: float = 0.5) -> TaskProgress:
    return TaskProgress(task=TaskId("t"), attempt=attempt, seq=0, phase="training", fraction=fraction)


def test_progress_is_numbered_and_what_a_stale_attempt_says_is_dropped() -> None:
    one = worker()
    one.receive(order(attempt=2), BOSS, 0)
    effects = [e for k in range(3) for e in one.learn(AttemptProgress(progress(2, k / 10)), 0)]
    assert [(e.message.seq, e.message.fraction) for e in effects if isinstance(e, Broadcast)] == [
        (0, 0.0),
        (1, 0.1),
        (2, 0.2),
    ]
    assert one.learn(AttemptProgress(progress(1)), 0) == [] == one.learn(AttemptProgress(progress(3)), 0)
    finish(one, order(attempt=2))
    assert one.learn(AttemptProgress(progress(2)), 1) == []


def test_who_wants_no_stream_gets_no_progress() -> None:
    one = worker()
    one.receive(order(submit=replace(ask(), stream=False)), BOSS, 0)
    assert one.learn(AttemptProgress(progress()), 0) == []


def test_an_attempt_with_an_adapter_runs_where_it_is_and_only_while_it_is_there() -> None:
    one = worker()
    task = order(submit=replace(ask(), adapter="poet"))
    (refused,) = sent(one.receive(task, BOSS, 0), Refused)
    assert refused.reason == "it has no adapter 'poet'"
    one.learn(AdaptersChanged(("poet",)), 0)
    assert facts(one.receive(replace(task, attempt=2), BOSS, 0), StartAttempt)
    finish(one, replace(task, attempt=2))
    one.learn(EngineReady(MODEL, 2048, 2), 1)
    assert sent(one.receive(replace(task, task=TaskId("u")), BOSS, 1), Refused)
    one.learn(EngineReady(MODEL, 2048, 2, adapters=("poet",)), 2)
    assert facts(one.receive(replace(task, task=TaskId("v")), BOSS, 2), StartAttempt)


def test_a_tuning_attempt_runs_where_its_data_are() -> None:
    def tune(*holders: str) -> Submit:
        spec = TuneSpec(adapter="a", data_sha256="0" * 64, holders=[NodeId(name) for name in holders])
        return Submit(kind="tune", tune=spec)

    (refused,) = sent(worker().receive(order(submit=tune("other")), BOSS, 0), Refused)
    assert refused.reason == "the data are on other"
    assert facts(worker().receive(order(submit=tune("other", "me")), BOSS, 0), StartAttempt)
    assert facts(worker().receive(order(submit=tune()), BOSS, 0), StartAttempt)


# ── standing still for another ──────────────────────────────────────────────────────────────────────


def pausing(slots: int = 1) -> Worker:
    one = worker(ready=False)
    one.learn(EngineReady(MODEL, 2048, slots, can_pause=True), 0)
    return one


def test_a_generation_stands_still_for_an_urgent_one_and_goes_on_when_a_slot_is_free() -> None:
    one = pausing()
    one.receive(order("slow"), BOSS, 0)
    effects = one.receive(order("urgent", pauses=TaskId("slow")), BOSS, 1)
    kinds = [type(e.fact) for e in effects if isinstance(e, Notify)]
    assert kinds == [PauseAttempt, StartAttempt], "it makes way before the other one comes"
    (report,) = sent(effects, AttemptsRunning)
    assert {attempt.task for attempt in report.attempts} == {"slow", "urgent"}, "it still runs here"
    assert one.n_running == 1
    ended = finish(one, order("urgent"), 2)
    assert facts(ended, ResumeAttempt) == [ResumeAttempt(TaskId("slow"), 1)]
    assert one.n_running == 1
    assert not facts(finish(one, order("slow"), 3), ResumeAttempt) and one.n_running == 0


def test_who_goes_on_is_first_in_line_for_a_free_slot() -> None:
    one = pausing()
    one.receive(order("slow"), BOSS, 0)
    one.receive(order("urgent", pauses=TaskId("slow")), BOSS, 1)
    finish(one, order("urgent"), 2)
    assert sent(one.receive(order("third"), BOSS, 3), Refused), "the slot is taken again"


def test_one_stands_still_at_a_time() -> None:
    one = pausing(slots=2)
    for task in ("a", "b"):
        one.receive(order(task), BOSS, 0)
    assert facts(one.receive(order("c", pauses=TaskId("a")), BOSS, 1), PauseAttempt)
    (refused,) = sent(one.receive(order("d", pauses=TaskId("b")), BOSS, 2), Refused)
    assert "slots are taken" in refused.reason


@pytest.mark.parametrize("reason", ["unknown", "cannot", "stopped", "tune"])
def test_without_somebody_who_can_make_way_it_is_refused_as_ever(reason: str) -> None:
    one = worker(slots=1) if reason == "cannot" else pausing()
    spec = TuneSpec(adapter="a", data='{"text": "x", "label": "y"}')
    slow = order("slow", submit=Submit(kind="tune", tune=spec)) if reason == "tune" else order("slow")
    one.receive(slow, BOSS, 0)
    if reason == "stopped":
        one.receive(CancelAttempt(epoch=E1, task=TaskId("slow"), reason="away"), BOSS, 0)
    pauses = TaskId("nobody") if reason == "unknown" else TaskId("slow")
    effects = one.receive(order("urgent", pauses=pauses), BOSS, 1)
    assert sent(effects, Refused) and not facts(effects, PauseAttempt) and not facts(effects, StartAttempt)


def test_with_a_slot_free_nobody_needs_to_make_way() -> None:
    one = pausing(slots=2)
    one.receive(order("slow"), BOSS, 0)
    effects = one.receive(order("urgent", pauses=TaskId("slow")), BOSS, 1)
    assert facts(effects, StartAttempt) and not facts(effects, PauseAttempt)


def test_who_stands_still_can_be_cancelled_and_its_deadline_still_counts() -> None:
    one = pausing()
    one.receive(order("slow", budget_s=10.0), BOSS, 0)
    one.receive(order("urgent", pauses=TaskId("slow")), BOSS, 1)
    assert facts(one.tick(10.0), StopAttempt) == [StopAttempt(TaskId("slow"), 1, "its deadline passed")]
    effects = finish(one, order("slow"), 10.1, state="cancelled")
    assert not facts(effects, ResumeAttempt) and one.n_running == 1
    assert not facts(finish(one, order("urgent"), 11), ResumeAttempt)


def test_an_engine_that_ends_takes_who_stands_still_with_it_and_nobody_goes_on() -> None:
    one = pausing()
    one.receive(order("slow"), BOSS, 0)
    one.receive(order("urgent", pauses=TaskId("slow")), BOSS, 1)
    effects = one.learn(EngineLost("killed"), 2)
    assert not facts(effects, ResumeAttempt) and one.n_running == 0
    assert {ended.task for ended in sent(effects, AttemptEnded)} == {"slow", "urgent"}


def test_the_same_order_twice_pauses_once() -> None:
    one = pausing()
    one.receive(order("slow"), BOSS, 0)
    urgent = order("urgent", pauses=TaskId("slow"))
    one.receive(urgent, BOSS, 1)
    again = one.receive(urgent, BOSS, 1.1)
    assert not facts(again, PauseAttempt) and sent(again, AttemptsRunning)
