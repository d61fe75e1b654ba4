"""The terminal view: every line fits, nothing depends on colour, and the important survives."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from mesh import messages as m
from mesh.facts import LinkUp
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId
from node.faces.tui import render
from node.faces.view import TaskRow, View, ViewBuilder

NODES = ("pi-4-3f9a2c", "jetson-orin-00a1b2", "the-laptop-with-a-very-long-name-77cc01", "phone-1a2b3c")
JET = NodeId(NODES[1])


def picture(n_tasks: int = 4) -> View:
    made = ViewBuilder(
        mesh=MeshName("home"), version="0.1.0", fingerprint="3f9a2c5577aa0011", me=NodeId(NODES[0])
    )
    made.use_broker("mqtts://192.168.1.20:8883", JET)
    made.learn(LinkUp(1, JET), 0.0)
    for k, name in enumerate(NODES):
        node = NodeId(name)
        standing = "offline" if k == 3 else "online"
        made.apply(m.NodeState(node=node, state=standing, incarnation=1, boot=Boot("b")), node, 0.0)  # type: ignore[arg-type]
        info = m.NodeInfo(
            node=node, incarnation=1, hostname=name, version="0.1.0", protocol_min=1, protocol_max=1,
            addresses=[], port=1, system="Linux aarch64", device="cpu", n_cpus=4, memory_bytes=8 << 30,
            model="SmolLM2-135M-Instruct", adapters=[], slots=2,
        )  # fmt: skip
        made.apply(info, node, 0.0)
        if k < 3:
            report = m.NodeReport(
                node=node, incarnation=1, ready=k != 2, running=1,
                activity="idle" if k != 2 else "loading SmolLM2 (43 %)", cpu_percent=12.0,
                memory_free_bytes=2 << 30, rss_bytes=1 << 20, tokens_per_s=10.5,
                temperature_c=61.0,
            )  # fmt: skip
            made.apply(report, node, 0.0)
    made.apply(m.LeaseRecord(kind="lease", epoch=Epoch(4, JET), ttl_s=3.0, beat=1), JET, 0.0)
    states = ("done", "rejected", "running", "queued")
    for k in range(n_tasks):
        status = m.TaskStatus(
            task=TaskId(f"t-{k:012x}"), state=states[k % 4],  # type: ignore[arg-type]
            reason="no node serves the model 'llama-9'" if k % 4 == 1 else None,
            node=JET if k % 4 == 2 else None,
            attempt=1, epoch=Epoch(4, JET), durable_on=2, value=1.5, budget_s=18.2 if k % 4 == 2 else None,
        )  # fmt: skip
        made.apply(status, JET, 0.0)
        if k % 4 == 2:
            text = " ".join(f"word{n}" for n in range(40)) + " 猫が好きです"
            made.apply(m.TaskTokens(task=status.task, attempt=1, seq=0, text=text, n_tokens=40), "", 0.0)
    return made.view(0.5)


def drawn(view: View, width: int, height: int, *, with_help: bool = False, colour: bool = False) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=colour, no_color=not colour)
    console.print(render(view, width, height, with_help=with_help))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (60, 15), (40, 10), (200, 60), (80, 8)])
@pytest.mark.parametrize("n_tasks", [0, 1, 4, 60])
def test_one_screen_never_runs_over(width: int, height: int, n_tasks: int) -> None:
    lines = drawn(picture(n_tasks), width, height)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40)])
def test_a_person_sees_who_is_in_who_coordinates_and_what_runs(width: int, height: int) -> None:
    text = "\n".join(drawn(picture(), width, height))
    for word in (
        "home", "★ jetson-orin-00a1b2", "epoch 4", "mqtts://192.168.1.20:8883 up", "3 nodes", "2 open tasks",
        "pi-4-3f9a2c", "offline", "loading SmolLM2", "running", "queued", "rejected", "no node serves",
        "17.7 s",
    ):  # fmt: skip
        assert word in text, f"{word!r} is not on the screen:\n{text}"


def test_wide_terminals_show_more() -> None:
    narrow, wide = ("\n".join(drawn(picture(), width, 40)) for width in (80, 170))
    for word in ("SmolLM2-135M-Instruct", "2 of 8 GiB", "61 °C", "3f9a2c5577aa0011", "version 0.1.0"):
        assert word in wide
        assert word not in narrow


def test_signs_tell_what_colours_tell() -> None:
    with_colours, without = drawn(picture(), 140, 40, colour=True), drawn(picture(), 140, 40)
    assert any("\x1b[" in line for line in with_colours)
    assert not any("\x1b[" in line for line in without)
    assert any("★⇄" in line and "jetson" in line for line in without)
    assert any("›" in line and "pi-4" in line for line in without)


def test_a_growing_answer_shows_its_end_and_a_finished_one_its_beginning() -> None:
    view = picture()
    running = next(task for task in view.tasks if task.state == "running")
    assert any("猫が好きです" in line for line in drawn(view, 80, 24))
    finished = replace(view, tasks=(replace(running, state="done"),))
    assert any("word0 word1" in line for line in drawn(finished, 80, 24))
    assert not any("猫" in line for line in drawn(finished, 80, 24))


def test_on_a_short_terminal_unfinished_tasks_and_living_nodes_stay() -> None:
    lines = "\n".join(drawn(picture(60), 80, 16))
    assert "running" in lines
    assert "done" not in lines
    many = picture(0)
    crowd = tuple(
        replace(many.nodes[0], node=NodeId(f"n-{k:03}"), is_me=False, is_coordinator=False)
        for k in range(100)
    )
    text = "\n".join(drawn(replace(many, nodes=(*crowd, *many.nodes)), 80, 24))
    assert "pi-4-3f9a2c" in text
    assert "jetson-orin-00a1b2" in text
    assert "more nodes" in text


def test_newlines_and_terminal_codes_in_an_answer_do_not_break_the_table() -> None:
    view = picture()
    nasty = "line1\nline2\r\x1b[2J\x07\tend"
    task = replace(view.tasks[0], state="running", text_tail=nasty)
    lines = drawn(replace(view, tasks=(task,), events=()), 80, 24)
    assert len(lines) <= 24
    assert not any(code in line for line in lines for code in ("\x1b", "\x07", "\r"))


def test_markup_in_names_and_answers_is_text() -> None:
    view = picture()
    task: TaskRow = replace(view.tasks[0], state="running", text_tail="[bold red]x[/]")
    assert any("[bold red]x[/]" in line for line in drawn(replace(view, tasks=(task,)), 80, 24))


def test_help_lists_the_keys() -> None:
    text = "\n".join(drawn(picture(), 80, 24, with_help=True))
    assert "q  leave the mesh" in text
    assert "h  this help" in text


def tuned(**changes: object) -> View:
    """One node with adapters and a tuning task on it."""
    view = picture()
    row = replace(
        view.nodes[0], precision="int8", adapters=("spam", "poet", "a-very-long-adapter-name", "x", "y")
    )
    progress = m.TaskProgress(
        task=TaskId("t-tune"), attempt=1, seq=3, phase="training", fraction=0.55, epoch=2, epochs=5,
        loss=0.41, eta_s=12.0,
    )  # fmt: skip
    running = next(task for task in view.tasks if task.state == "running")
    tuning = replace(running, task=TaskId("t-tune"), kind="tune", text_tail="", progress=progress)
    task = replace(tuning, **changes)  # type: ignore[arg-type]
    return replace(view, nodes=(row, *view.nodes[1:]), tasks=(task,))


def test_a_tuning_task_shows_a_bar_its_epoch_and_its_loss() -> None:
    wide = "\n".join(drawn(tuned(), 140, 40))
    assert "████░░░░  55% epoch 3/5 · loss 0.41 · " in wide
    narrow = drawn(tuned(), 80, 24)
    assert any(" 55% epoch 3/5 · loss" in line for line in narrow)
    assert all(cell_len(line) <= 80 for line in narrow)
    over = "\n".join(drawn(tuned(state="done", text_tail="adapter 'spam' is here"), 140, 40))
    assert "adapter 'spam' is here" in over and "█" not in over


def test_adapters_and_precision_of_each_node_are_shown_where_there_are_any() -> None:
    text = "\n".join(drawn(tuned(), 170, 40))
    assert "int8" in text and "spam, poet +3" in text
    for word in ("precision", "adapters"):
        assert word in text and word not in "\n".join(drawn(picture(), 170, 40))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_node_that_plays_a_slower_one_says_so_at_every_width(width: int) -> None:
    view = picture()
    played = replace(view.nodes[0], emulated_slowdown=4.0)
    assert "÷4 (emulated)" in "\n".join(drawn(replace(view, nodes=(played, *view.nodes[1:])), width, 40))
    assert "emulated" not in "\n".join(drawn(view, width, 40))
