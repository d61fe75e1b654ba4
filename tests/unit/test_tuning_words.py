"""How a tuning task is getting on: in words, as a bar, and as lines in a file."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mesh.ids import TaskId
from mesh.messages import AdapterCard, TaskProgress
from node.faces.progress import LINE_EVERY_S, TuneProgress
from node.faces.tuning import bar, card_words, progress_words, short_words, use_words


def progress(**changes: Any) -> TaskProgress:
    fields: dict[str, Any] = {
        "task": TaskId("t"), "attempt": 1, "seq": 0, "phase": "training", "fraction": 0.5, "epoch": 2,
        "epochs": 5, "loss": 0.4123, "eta_s": 12.0, "cache_hits": 96, "cache_misses": 4,
    }  # fmt: skip
    return TaskProgress(**(fields | changes))


CARD = AdapterCard(
    name="spam", digest="d" * 64, method="lora", top_layers=2, first_layer=28, bytes=317_440,
    task="classify", labels=["ham", "spam"], metric=0.931,
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_person_reads_phase_epoch_loss_time_left_and_what_the_cache_saved() -> None:
    assert progress_words(progress()) == "training · epoch 3 of 5 · loss 0.412 · 12.0 s left · 96% cached"
    reading = progress(phase="reading", loss=None, eta_s=0.0, cache_hits=0, cache_misses=0)
    assert progress_words(reading) == "reading the data"
    assert short_words(progress()) == "epoch 3/5 · loss 0.412 · 12.0 s left"
    assert short_words(reading) == "reading the data"
    assert "epoch 5 of 5" in progress_words(progress(epoch=5)), "the last epoch is not followed by a sixth"
    assert "evaluation 0.875" in progress_words(progress(metric=0.875))


@pytest.mark.parametrize("width", [1, 8, 24])
def test_a_bar_is_full_at_the_end_and_only_then(width: int) -> None:
    drawn = [bar(k / 1000, width) for k in range(1001)]
    assert {len(one) for one in drawn} == {width}
    assert drawn == sorted(drawn, key=lambda one: one.count("█"))
    assert [one for one in drawn if "░" not in one] == drawn[-1:]


def test_the_result_says_what_it_is_and_how_to_use_it() -> None:
    assert card_words(CARD) == (
        "adapter 'spam' (lora on the top 2 layers, 310 KiB, accuracy 0.931 on the evaluation data)"
    )
    assert use_words(CARD) == 'edgemesh classify --adapter spam "TEXT"'
    chat = AdapterCard(
        name="poet", digest="d", method="ia3", top_layers=1, first_layer=29, bytes=10, task="chat"
    )
    assert card_words(chat) == "adapter 'poet' (ia3 on the top layer, 10 B)"
    assert use_words(chat) == 'edgemesh run --adapter poet "PROMPT"'


def test_off_a_terminal_a_line_is_said_for_a_phase_an_epoch_a_reason_and_a_sign_of_life() -> None:
    out, now = io.StringIO(), 0.0
    with TuneProgress("spam", out, lambda: now) as shown:
        shown.show(progress(seq=0, phase="reading", epoch=0, fraction=0.0))
        for seq in range(1, 100):  # one epoch in 2.5 s
            now += 0.025
            shown.show(progress(seq=seq, epoch=0))
        shown.show(progress(seq=100, epoch=1))
        shown.show(progress(seq=101, epoch=1, text="4 layers: 0.93 on the trial, 2 layers 0.88"))
        now += LINE_EVERY_S
        shown.show(progress(seq=102, epoch=1))
        shown.note("pi-4 tunes")
    lines = out.getvalue().splitlines()
    assert [line[:22] for line in lines] == [
        "  0%  reading the data",
        " 50%  training · epoch",
        " 50%  training · epoch",
        "4 layers: 0.93 on the ",
        " 50%  training · epoch",
        "pi-4 tunes",
    ]
    assert all(line.isprintable() for line in lines)


def test_counts_while_reading_and_choosing_pass_by_and_do_not_fill_the_screen() -> None:
    for out in (io.StringIO(), Terminal()):
        with TuneProgress("spam", out, lambda: 0.0) as shown:
            for seq in range(20):
                shown.show(progress(seq=seq, phase="reading", epoch=0, text=f"{seq} of 20 records read"))
        assert out.getvalue().count("of 20 records read") <= 3, out.getvalue()
    choosing = progress(
        phase="choosing", epoch=0, loss=None, eta_s=None, cache_hits=0, cache_misses=0, text="4: .9"
    )
    assert progress_words(choosing) == short_words(choosing) == "4: .9"


def test_late_and_repeated_progress_changes_nothing_and_a_new_attempt_counts() -> None:
    out = io.StringIO()
    shown = TuneProgress("spam", out, lambda: 0.0)
    shown.show(progress(seq=5, epoch=3))
    for late in (progress(seq=5, epoch=4), progress(seq=2, epoch=1)):
        shown.show(late)
    assert len(out.getvalue().splitlines()) == 1
    shown.show(progress(attempt=2, seq=0, epoch=2))
    assert "epoch 3 of 5" in out.getvalue().splitlines()[-1]


def test_on_a_terminal_there_is_a_bar_with_the_name_the_share_and_the_words() -> None:
    out = Terminal()
    with TuneProgress("[bold]spam[/]", out) as shown:
        shown.show(progress(text="chosen: \x1b[2J4 layers"))
        shown.note("a note")
        assert shown._bar is not None
        shown._bar.refresh()
    text = out.getvalue()
    for word in ("[bold]spam[/]", " 50%", "epoch 3 of 5", "a note", "chosen: [2J4 layers"):
        assert word in text, word
    assert "\x1b[2J" not in text, "what a node says cannot steer the terminal"
