"""``edgemesh task show``: decisions as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages import CandidateNode, TaskDecision, TaskExplanation
from node.faces.console import explanation_out
from node.faces.why import candidate_rows, head_line, nothing_line, number_line, verb_line

PI, SERVER = NodeId("pi"), NodeId("server")
T1 = TaskId("t-1")
EPOCH = Epoch(4, PI)
START = TaskDecision(
    verb="start", age_s=2.5, words="on server: the server ends it soonest", node=SERVER, policy="vdf",
    score=1.25, density=2.0,
    laxity_s=-0.75, cost_s=0.5, service_s=12.0, n_waiting=3,
    candidates=[
        CandidateNode(node=SERVER, service_s=12.0, why_not=None, parts={"adapter_load": 0.0, "decode": 12.0}),
        CandidateNode(node=PI, service_s=99.0, why_not="it would end [80 s] late"),
    ],
    n_candidates=5,
)  # fmt: skip
TOLD = TaskExplanation(
    task=T1, epoch=EPOCH, state="running", kind="generate", value=2.0, budget_s=21.5, node=SERVER, attempt=1,
    decisions=[START], n_decisions=1,
)  # fmt: skip


def test_a_start_is_told_with_its_numbers_and_every_candidate() -> None:
    assert verb_line(START) == "2.5 s ago  started on server: the server ends it soonest"
    assert number_line(START) == (
        "density 2/s · slack -0.75 s · score 1.25 · takes 12.0 s (costs others 0.50 s) · 3 others waiting"
        " · policy vdf"
    )
    assert candidate_rows(START) == [
        ("→", "server", "12.0 s", "decode 12.0 s", ""),
        ("", "pi", "99.0 s", "", "it would end [80 s] late"),
        ("", "… 3 more", "", "", ""),
    ]


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("drop", "now  rejected: best node needs 12.3 s, 8.0 s left"),
        ("pause", "now  paused on pi: best node needs 12.3 s, 8.0 s left"),
        ("resume", "now  carried on, on pi: best node needs 12.3 s, 8.0 s left"),
        ("wait", "now  waits: best node needs 12.3 s, 8.0 s left"),
    ],
)
def test_each_verb_is_a_word_people_know(verb: str, line: str) -> None:
    words = "best node needs 12.3 s, 8.0 s left"
    decision = TaskDecision(verb=verb, age_s=0.0, words=words, node=PI)  # type: ignore[arg-type]
    assert verb_line(decision).replace("0 ms ago", "now") == line
    assert number_line(decision) is None and candidate_rows(decision) == []


def test_the_head_says_how_the_task_stands() -> None:
    assert head_line(TOLD) == "t-1  generate  running  on server (attempt 1)  value 2  21.5 s left"
    assert nothing_line(TOLD) is None


def test_what_is_not_known_is_said_with_the_reason() -> None:
    unknown = TaskExplanation(task=T1, epoch=EPOCH, state=None)
    assert "not known to pi" in head_line(unknown) and "never submitted" in (nothing_line(unknown) or "")
    refused = replace(unknown, state="rejected", reason="best node needs 12.3 s, 8.0 s left")
    assert head_line(refused) == "t-1  rejected  best node needs 12.3 s, 8.0 s left"
    assert "refused before" in (nothing_line(refused) or "")
    inherited = TaskExplanation(task=T1, epoch=EPOCH, state="running", node=PI, attempt=1)
    assert (nothing_line(inherited) or "").startswith("An earlier coordinator decided it: reasons are kept")
    waiting = TaskExplanation(task=T1, epoch=EPOCH, state="queued")
    assert (nothing_line(waiting) or "").startswith("pi has decided nothing yet")
    many = TaskExplanation(task=T1, epoch=EPOCH, state="running", decisions=[START], n_decisions=9)
    assert nothing_line(many) == "(8 older decisions are no longer kept)"


def test_all_of_it_is_printed_and_nothing_is_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    explanation_out(TOLD)
    out = capsys.readouterr().out
    for piece in (
        "t-1  generate",
        "started on server",
        "slack -0.75 s",
        "it would end [80 s] late",
        "… 3 more",
    ):
        assert piece in out
