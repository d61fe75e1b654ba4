"""The view: what messages mean to people, also when they come twice, late, or from another life."""

from __future__ import annotations

from typing import Any

from mesh import messages as m
from mesh.facts import LinkDown, LinkUp
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId
from node.faces.view import EVENTS_MAX, SILENCE_S, TASKS_MAX, NodeRow, TaskRow, View, ViewBuilder

PI, JET = NodeId("pi-1"), NodeId("jet-1")
T1 = TaskId("t-1")


def builder() -> ViewBuilder:
    made = ViewBuilder(mesh=MeshName("home"), version="0.1.0", fingerprint="ab", me=PI)
    made.learn(LinkUp(1, PI), 0.0)
    return made


def state(node: NodeId = PI, standing: str = "online", incarnation: int = 1) -> m.NodeState:
    return m.NodeState(node=node, state=standing, incarnation=incarnation, boot=Boot("b"))  # type: ignore[arg-type]


def report(node: NodeId = PI, incarnation: int = 1, **changes: Any) -> m.NodeReport:
    fields: dict[str, Any] = {
        "ready": True, "activity": "idle", "running": 0, "cpu_percent": 5.0, "memory_free_bytes": 1 << 30,
        "rss_bytes": 1 << 20, "tokens_per_s": 0.0,
    }  # fmt: skip
    return m.NodeReport(node=node, incarnation=incarnation, **(fields | changes))


def lease(term: int, node: NodeId = PI, kind: str = "lease") -> m.LeaseRecord:
    return m.LeaseRecord(kind=kind, epoch=Epoch(term, node), ttl_s=3.0, beat=1)  # type: ignore[arg-type]


def status(state: str, **changes: Any) -> m.TaskStatus:
    fields: dict[str, Any] = {
        "task": T1, "state": state, "reason": None, "node": None, "attempt": 0, "epoch": Epoch(1, PI),
        "durable_on": 2,
    }  # fmt: skip
    return m.TaskStatus(**(fields | changes))


def tokens(seq: int, text: str, attempt: int = 1) -> m.TaskTokens:
    return m.TaskTokens(task=T1, attempt=attempt, seq=seq, text=text, n_tokens=1)


def result(state: str = "done", text: str = "whole") -> m.TaskResult:
    return m.TaskResult(
        task=T1, state=state, text=text, finish_reason="stop", reason=None, node=PI, attempt=1,  # type: ignore[arg-type]
        epoch=Epoch(1, PI), n_prompt_tokens=1, n_tokens=9, queue_s=0.1, ttft_s=0.1, service_s=1.0,
    )  # fmt: skip


def node_of(view: View, node: NodeId = PI) -> NodeRow:
    return next(row for row in view.nodes if row.node == node)


def task_of(view: View) -> TaskRow:
    return next(row for row in view.tasks if row.task == T1)


def test_an_old_will_does_not_mark_a_newer_life_offline() -> None:
    made = builder()
    made.apply(state(incarnation=5), PI, 0.0)
    made.apply(state(standing="offline", incarnation=4), PI, 0.1)
    assert node_of(made.view(0.2)).state == "online"
    made.apply(state(standing="offline", incarnation=5), PI, 0.3)
    assert node_of(made.view(0.4)).state == "offline"


def test_an_old_report_does_not_overwrite_a_newer_lifes() -> None:
    made = builder()
    made.apply(report(incarnation=2, running=2), PI, 0.0)
    made.apply(report(incarnation=1, running=7), PI, 0.1)
    assert node_of(made.view(0.2)).running == 2


def test_a_silent_node_is_suspect_only_while_we_are_linked() -> None:
    made = builder()
    made.apply(state(), PI, 0.0)
    made.apply(report(), PI, 0.0)
    assert node_of(made.view(SILENCE_S)).state == "online"
    assert node_of(made.view(SILENCE_S + 0.1)).state == "suspect"
    made.learn(LinkDown(), SILENCE_S)
    assert node_of(made.view(SILENCE_S + 0.1)).state == "online"  # our own deafness says nothing


def test_the_coordinator_is_the_holder_of_the_highest_lease_while_it_lasts() -> None:
    made = builder()
    made.apply(lease(4, JET), JET, 0.0)
    made.apply(lease(3, PI), PI, 0.1)  # an old lease changes nothing
    assert made.view(0.2).coordinator == JET
    assert made.view(0.2).epoch == "4@jet-1"
    assert made.view(3.1).coordinator is None  # it ran out
    made.apply(lease(4, JET), JET, 3.2)
    made.apply(lease(5, PI, "claim"), PI, 3.3)
    assert made.view(3.4).coordinator is None  # a claim asks, it does not hold
    made.apply(lease(5, PI), PI, 3.5)
    assert made.view(3.6).coordinator == PI
    made.apply(lease(5, PI, "resigned"), PI, 3.7)
    assert made.view(3.8).coordinator is None


def test_signs_say_who_coordinates_hosts_and_looks() -> None:
    made = builder()
    for node in (PI, JET):
        made.apply(state(node), node, 0.0)
    made.use_broker("mqtts://x:1", JET)
    made.apply(lease(1, JET), JET, 0.0)
    view = made.view(0.1)
    assert [(row.node, row.is_me, row.is_coordinator, row.is_broker) for row in view.nodes] == [
        (JET, False, True, True),
        (PI, True, False, False),
    ]


def test_a_deadline_counts_down_on_our_own_clock() -> None:
    made = builder()
    made.apply(status("running", budget_s=10.0), PI, 100.0)
    assert task_of(made.view(104.0)).budget_s == 6.0
    assert task_of(made.view(111.0)).budget_s == -1.0
    made.apply(status("expired"), PI, 112.0)
    assert task_of(made.view(113.0)).budget_s is None


def test_pieces_in_order_make_the_tail_and_a_new_attempt_starts_it_over() -> None:
    made = builder()
    for piece in (tokens(0, "one "), tokens(1, "two "), tokens(1, "two "), tokens(0, "one ")):
        made.apply(piece, "", 0.0)
    assert (task_of(made.view(0.0)).text_tail, task_of(made.view(0.0)).n_tokens) == ("one two ", 2)
    made.apply(tokens(0, "uno ", attempt=2), "", 0.1)
    made.apply(tokens(2, "three", attempt=1), "", 0.2)  # the first attempt still talks: too late
    assert task_of(made.view(0.3)).text_tail == "uno "


def test_the_first_end_stands() -> None:
    made = builder()
    made.apply(status("done"), PI, 0.0)
    made.apply(status("running", epoch=Epoch(9, JET)), JET, 0.1)
    made.apply(tokens(0, "late"), "", 0.2)
    assert task_of(made.view(0.3)).state == "done"
    made.apply(result(), PI, 0.4)
    assert task_of(made.view(0.5)).text_tail == "whole"


def test_an_overtaken_coordinators_status_changes_nothing() -> None:
    made = builder()
    made.apply(status("running", epoch=Epoch(5, JET)), JET, 0.0)
    made.apply(status("queued", epoch=Epoch(4, PI)), PI, 0.1)
    assert task_of(made.view(0.2)).state == "running"


def test_what_is_forgotten_is_gone() -> None:
    made = builder()
    made.apply(state(), PI, 0.0)
    made.apply(status("queued"), PI, 0.0)
    made.apply(m.NodeForgotten(node=PI), PI, 0.1)
    made.apply(m.TaskForgotten(task=T1), PI, 0.1)
    assert (made.view(0.2).nodes, made.view(0.2).tasks) == ((), ())


def test_tables_are_bounded_and_finished_tasks_leave_first() -> None:
    made = builder()
    made.apply(status("running", task=TaskId("t-open")), PI, 0.0)
    for k in range(3 * TASKS_MAX):
        made.apply(status("done", task=TaskId(f"t-{k}")), PI, 0.0)
    tasks = made.view(0.0).tasks
    assert len(tasks) == TASKS_MAX
    assert tasks[0].task == "t-open"
    for k in range(3 * EVENTS_MAX):
        made.event(f"line {k}", 0.0)
    assert len(made.view(0.0).events) == EVENTS_MAX


def test_events_tell_what_changed_once() -> None:
    made = builder()
    for _ in range(3):
        made.apply(state(JET), JET, 0.0)
        made.apply(lease(2, JET), JET, 0.0)
    made.apply(state(JET, "left"), JET, 1.0)
    made.apply(m.TaskEvent(text="task t-1 starts again"), JET, 2.0)
    made.learn(LinkDown(), 3.0)
    assert [event.text for event in made.view(4.0).events] == [
        "jet-1 is online",
        "jet-1 coordinates (epoch 2)",
        "jet-1 left",
        "task t-1 starts again",
        "link to the broker is down",
    ]
    assert [event.age_s for event in made.view(4.0).events] == [4.0, 4.0, 3.0, 2.0, 1.0]


def test_commands_between_nodes_are_none_of_the_views_business() -> None:
    made = builder()
    before = made.view(0.0)
    made.apply(m.Recall(epoch=Epoch(1, PI)), PI, 0.0)
    made.apply(object(), PI, 0.0)
    assert made.view(0.0) == before


def progress(seq: int, fraction: float, attempt: int = 1) -> m.TaskProgress:
    return m.TaskProgress(task=T1, attempt=attempt, seq=seq, phase="training", fraction=fraction)


def test_a_tuning_task_shows_its_newest_progress_and_keeps_it_at_its_end() -> None:
    made = builder()
    made.apply(status("queued", kind="tune"), PI, 0.0)
    for piece in (progress(0, 0.1), progress(2, 0.3), progress(1, 0.2), progress(2, 0.4)):
        made.apply(piece, "", 0.0)
    shown = task_of(made.view(0.1))
    assert (shown.kind, shown.state, shown.progress) == ("tune", "running", progress(2, 0.3))
    made.apply(progress(0, 0.25, attempt=2), "", 0.2)
    made.apply(progress(9, 0.9, attempt=1), "", 0.3)
    shown = task_of(made.view(0.4))
    assert (shown.attempt, shown.progress) == (2, progress(0, 0.25, attempt=2))
    made.apply(result(), PI, 0.5)
    made.apply(progress(1, 0.5, attempt=2), "", 0.6)
    assert task_of(made.view(0.7)).progress == progress(0, 0.25, attempt=2)


def test_progress_of_a_task_not_heard_of_before_makes_it_known() -> None:
    made = builder()
    made.apply(progress(7, 0.5), "", 0.0)
    assert (task_of(made.view(0.1)).kind, task_of(made.view(0.1)).state) == ("tune", "running")


def test_precision_and_adapters_of_a_node_are_in_its_row() -> None:
    made = builder()
    made.apply(state(), PI, 0.0)
    assert (node_of(made.view(0.0)).precision, node_of(made.view(0.0)).adapters) == (None, ())
    info = m.NodeInfo(
        node=PI, incarnation=1, hostname="pi", version="0", protocol_min=1, protocol_max=1, addresses=[],
        port=1, system="Linux", device="cpu", n_cpus=4, memory_bytes=1 << 30, model="tiny",
        adapters=["poet", "spam"], slots=1, precision="int8", precision_reason="fastest of those that fit",
    )  # fmt: skip
    made.apply(info, PI, 0.1)
    row = node_of(made.view(0.2))
    assert (row.precision, row.precision_reason) == ("int8", "fastest of those that fit")
    assert row.adapters == ("poet", "spam")


def info(slowdown: float = 1.0) -> m.NodeInfo:
    rates = m.NodeRates(
        prefill_tokens_per_s=90.0, decode_tokens_per_s=9.0, row_cost=0.2, emulated_slowdown=slowdown
    )
    return m.NodeInfo(
        node=PI, incarnation=1, hostname="pi", version="0.1.0", protocol_min=1, protocol_max=1, addresses=[],
        port=1, system="Linux", device="cpu", n_cpus=4, memory_bytes=1, model="m", adapters=[], slots=2,
        rates=rates,
    )  # fmt: skip


def test_a_node_shows_its_rates_and_that_it_plays_a_slower_one() -> None:
    made = builder()
    made.apply(state(), PI, 0.0)
    assert (node_of(made.view(0.0)).rates, node_of(made.view(0.0)).emulated_slowdown) == (None, 1.0)
    made.apply(info(4.0), PI, 0.0)
    row = node_of(made.view(0.0))
    assert row.rates == info(4.0).rates and row.emulated_slowdown == 4.0


def test_prediction_errors_are_the_newest_coordinators() -> None:
    made = builder()
    assert made.view(0.0).prediction_errors == ()
    for term, p50 in ((2, 0.2), (1, 0.9), (2, 0.3)):
        errors = [m.KindError(kind="generate", p50=p50, n=5)]
        made.apply(m.CostReport(epoch=Epoch(term, PI), errors=errors), PI, 0.0)
    assert [error.p50 for error in made.view(0.0).prediction_errors] == [0.3]
