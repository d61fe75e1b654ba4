"""``tune``, ``classify``, ``score``, ``embed``, ``adapters``: what they refuse, send and print."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mesh.ids import Epoch, MeshName, NodeId, TaskId
from mesh.messages import AdapterCard, Output, Submit, TaskProgress, TaskResult, TaskStatus
from mesh.messages.tune import INLINE_DATA_BYTES_MAX
from node import client as client_module
from node.cli.main import cli
from node.state import StateDir

ME = NodeId("pi-1")
EPOCH = Epoch(1, ME)
GOOD = b'{"text": "win a prize", "label": "spam"}\n{"text": "see you at six", "label": "ham"}\n'
CARD = AdapterCard(
    name="spam", digest="d" * 64, method="lora", top_layers=2, first_layer=28, bytes=1000, task="classify",
    labels=["ham", "spam"],
)  # fmt: skip


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    for name in list(os.environ):
        if name.startswith("EDGEMESH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEMESH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return StateDir(tmp_path / "state")


def invoke(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="edgemesh", **options)


def result(state: str = "done", output: Output | None = None, **changes: Any) -> TaskResult:
    fields: dict[str, Any] = {
        "task": TaskId("t"), "state": state, "text": "", "finish_reason": None, "reason": None, "node": ME,
        "attempt": 1, "epoch": EPOCH, "n_prompt_tokens": 1, "n_tokens": 0, "queue_s": 0.0, "ttft_s": None,
        "service_s": 3.0, "output": output,
    }  # fmt: skip
    return TaskResult(**(fields | changes))


class FakeMesh:
    """Answers in place of a mesh: ``script`` gives the news of each submission. Keeps what was sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
        self.sent: list[Submit] = []

        @asynccontextmanager
        async def connected(*_: object, **__: object) -> AsyncIterator[object]:
            yield object()

        async def submit(_: object, request: Submit) -> AsyncIterator[Any]:
            self.sent.append(request)
            for news in script(request):
                yield news

        monkeypatch.setattr(client_module, "connected", connected)
        monkeypatch.setattr(client_module, "submit", submit)


def running(state: StateDir, name: str) -> None:
    """A node of mesh ``home`` that runs on this machine, as its slot shows it."""
    slot = state.path / "meshes" / "home" / "nodes" / "0"
    slot.mkdir(parents=True)
    (slot / "lock").write_text(str(os.getpid()))
    (slot / "node.json").write_text(json.dumps({"id": name, "incarnation": 1}))
    assert state.nodes_here(MeshName("home")) == [name]


# ── before anything is sent ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (GOOD + b'{"text": "no label"}\n', [], "line 3: 'label' missing"),
        (b'{"text": "x", "label": "a"}\n{"txt": "x"}\n[1]\n', [], "2 bad lines"),
        (GOOD + b"not json\n", [], "line 3: not JSON"),
        (b"", [], "no line of data.jsonl has text and label"),
        (b"hello\n", [], "Is it the right file?"),
        (GOOD, ["--task", "chat"], "line 1: 'messages' missing"),
        (b'{"text": "x", "label": "a"}\n', [], "at least two labels"),
        (GOOD, ["--adapter", "../evil"], "adapter must be 1 to 63 of a-z"),
        (GOOD, ["--top-layers", "many"], "--top-layers must be a number of layers or 'auto', got 'many'"),
        (GOOD, ["--top-layers", "0"], "top_layers must be from 1"),
        (GOOD, ["--epochs", "0"], "epochs must be from 1"),
        (GOOD, ["--rank", "0"], "rank must be from 1"),
        (GOOD, ["--nodes", "0"], "nodes must be from 1"),
        (GOOD, ["--nodes", "3"], "2 records cannot be split among --nodes 3"),
        (GOOD, ["--learning-rate", "-1"], "learning_rate must be a positive"),
        (GOOD, ["--feature-error", "1"], "feature_error must be from 0"),
        (GOOD, ["--deadline", "0"], "deadline_s must be a positive"),
        (GOOD, ["--id", "a/b"], "id must be"),
        (GOOD, ["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_data_or_options_stop_before_anything_is_sent(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, content: bytes, arguments: list[str], says: str
) -> None:
    mesh = FakeMesh(monkeypatch, lambda request: [])
    Path("data.jsonl").write_bytes(content)
    done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam", *arguments)
    assert (done.exit_code, done.stdout, mesh.sent) == (2, "", [])
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not state.path.exists(), "nothing is kept of what is refused"


def test_a_bad_line_of_the_evaluation_file_stops_it_too(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(monkeypatch, lambda request: [])
    Path("data.jsonl").write_bytes(GOOD)
    for content, says in ((b"{}\n", "line 1: "), (b'{"text": "x", "label": "new"}\n', "'new'")):
        Path("eval.jsonl").write_bytes(content)
        done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam", "--eval", "eval.jsonl")
        assert (done.exit_code, mesh.sent) == (2, []) and says in done.stderr


@pytest.mark.parametrize(
    ("line", "task"),
    [
        ({"text": "x", "label": "a"}, "classify"),
        ({"prompt": "x", "completion": "a"}, "complete"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "chat"),
    ],
)
def test_what_to_learn_is_read_from_the_records(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any], task: str
) -> None:
    mesh = FakeMesh(monkeypatch, lambda request: [result("done", Output(adapter=CARD))])
    lines = [line, {**line, "label": "b"} if task == "classify" else line]
    Path("data.jsonl").write_text("\n".join(json.dumps(one) for one in lines))
    assert invoke("tune", "--data", "data.jsonl", "--adapter", "spam").exit_code == 0
    (sent,) = mesh.sent
    assert sent.tune is not None and sent.tune.task == task


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────


def test_small_data_travel_with_the_task_and_every_option_arrives(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(monkeypatch, lambda request: [result("done", Output(adapter=CARD))])
    Path("data.jsonl").write_bytes(GOOD + b"{}\n")
    Path("eval.jsonl").write_bytes(GOOD)
    done = invoke(
        "tune", "--data", "data.jsonl", "--adapter", "spam", "--eval", "eval.jsonl", "--skip-bad",
        "--top-layers", "3", "--epochs", "7", "--method", "dora", "--rank", "4", "--alpha", "2",
        "--targets", "q_proj,v_proj",
        "--targets", "o_proj", "--learning-rate", "0.001", "--batch", "2", "--seed", "9",
        "--max-tokens", "64", "--feature-error", "0.02", "--deadline", "60", "--value", "3",
        "--model", "tiny", "--id", "job-1", "--nodes", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (sent,) = mesh.sent
    spec = sent.tune
    assert spec is not None and (spec.nodes, spec.part) == (2, None)
    assert spec is not None and (spec.data, spec.eval_data) == ((GOOD + b"{}\n").decode(), GOOD.decode())
    assert (spec.holders, spec.data_sha256, spec.eval_sha256, spec.skip_bad) == ([], None, None, True)
    assert (spec.top_layers, spec.epochs, spec.method, spec.rank, spec.alpha) == (3, 7, "dora", 4, 2.0)
    assert (spec.targets, spec.learning_rate, spec.batch) == (["q_proj", "v_proj", "o_proj"], 0.001, 2)
    assert (spec.seed, spec.max_tokens, spec.feature_error) == (9, 64, 0.02)
    assert (sent.id, sent.kind, sent.deadline_s, sent.value, sent.model) == ("job-1", "tune", 60, 3, "tiny")
    assert "data.jsonl: 2 records, 1 lines left out" in done.stderr


def large() -> bytes:
    lines = GOOD.splitlines(keepends=True)
    return b"".join(lines) * (INLINE_DATA_BYTES_MAX // len(GOOD) + 1)


def test_large_data_stay_on_this_machine_and_the_task_goes_to_its_nodes(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(monkeypatch, lambda request: [result("done", Output(adapter=CARD))])
    running(state, "pi-1")
    Path("data.jsonl").write_bytes(large())
    Path("eval.jsonl").write_bytes(GOOD)
    done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam", "--eval", "eval.jsonl")
    assert done.exit_code == 0, done.stderr
    spec = mesh.sent[0].tune
    assert spec is not None and spec.holders == ["pi-1"] and spec.data is None
    assert (state.datasets_dir / f"{spec.data_sha256}.jsonl").read_bytes() == large()
    assert spec.eval_data == GOOD.decode()
    assert f"on      pi-1: {state.adapters_dir / 'spam'}" in done.stdout


def test_large_data_without_a_node_here_say_what_to_do(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(monkeypatch, lambda request: [])
    Path("data.jsonl").write_bytes(large())
    done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam")
    assert (done.exit_code, mesh.sent) == (2, [])
    assert "more than travels with a task" in done.stderr and "`edgemesh join`" in done.stderr
    assert not state.datasets_dir.exists()


# ── what is printed ─────────────────────────────────────────────────────────────────────────────────


def script(request: Submit) -> list[Any]:
    assert request.id is not None
    status = TaskStatus(
        task=request.id, state="running", reason=None, node=ME, attempt=1, epoch=EPOCH, durable_on=2,
        kind="tune",
    )  # fmt: skip
    progress = TaskProgress(
        task=request.id, attempt=1, seq=0, phase="training", fraction=0.5, epoch=1, epochs=5, loss=0.5
    )
    return [status, progress, result("done", Output(adapter=CARD))]


def test_the_result_goes_to_stdout_and_says_how_to_use_it_and_progress_is_talk(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMesh(monkeypatch, script)
    Path("data.jsonl").write_bytes(GOOD)
    done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "adapter 'spam' (lora on the top 2 layers, 1000 B)",
        f"digest  {'d' * 64}",
        "on      pi-1",
        'use it  edgemesh classify --adapter spam "TEXT"',
    ]
    assert "pi-1 tunes" in done.stderr and "50%  training · epoch 2 of 5 · loss 0.5" in done.stderr


def test_json_is_one_object_a_line_and_the_last_is_the_result(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMesh(monkeypatch, script)
    Path("data.jsonl").write_bytes(GOOD)
    done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam", "--json")
    first, last = map(json.loads, done.stdout.splitlines())
    assert (first["type"], first["fraction"], last["type"], last["state"]) == (
        "TaskProgress",
        0.5,
        "TaskResult",
        "done",
    )
    assert last["output"]["adapter"]["digest"] == "d" * 64


@pytest.mark.parametrize(
    ("state_word", "code"), [("failed", 1), ("rejected", 5), ("expired", 6), ("cancelled", 6)]
)
def test_each_other_end_has_its_exit_code_and_its_reason(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, state_word: str, code: int
) -> None:
    FakeMesh(monkeypatch, lambda request: [result(state_word, reason="because \x1b[2J")])
    Path("data.jsonl").write_bytes(GOOD)
    done = invoke("tune", "--data", "data.jsonl", "--adapter", "spam")
    assert (done.exit_code, done.stdout) == (code, "")
    assert f"edgemesh: {state_word}: because [2J" in done.stderr


# ── classify, score, embed ──────────────────────────────────────────────────────────────────────────


def outputs(request: Submit) -> list[Any]:
    n = len(request.texts)
    made = {
        "classify": Output(labels=["spam"] * n, classes=["ham", "spam"], scores=[[0.25, 0.75]] * n),
        "score": Output(scores=[[-1.0, -3.0]] * n),
        "embed": Output(vectors=[[0.6, 0.8]] * n),
    }[request.kind]
    return [result(output=made)]


def test_texts_are_classified_in_their_order(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = FakeMesh(monkeypatch, outputs)
    done = invoke("classify", "--adapter", "spam", "one", "-", "last", input="two\n\n  \nthree\n")
    assert done.exit_code == 0, done.stderr
    assert mesh.sent[0].texts == ["one", "two", "three", "last"] and mesh.sent[0].adapter == "spam"
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["label", "probability", "text"],
        *(["spam", "0.750", text] for text in ("one", "two", "three", "last")),
    ]
    (told, *_) = json.loads(invoke("classify", "--adapter", "spam", "one", "--json").stdout)
    assert told == {"text": "one", "label": "spam", "scores": {"ham": 0.25, "spam": 0.75}}


def test_many_texts_travel_in_several_tasks_and_come_back_as_one_list(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(monkeypatch, outputs)
    texts = [f"text {k} {'x' * 3000 * (k % 50 == 0)}" for k in range(300)]
    for kind in ("classify", "score", "embed"):
        mesh.sent.clear()
        adapter = ("--adapter", "spam") if kind == "classify" else ()
        done = invoke(kind, *adapter, "-", "--json", input="\n".join(texts))
        assert [row["text"] for row in json.loads(done.stdout)] == [text.rstrip("\n") for text in texts]
        assert len(mesh.sent) > 2 and [t for one in mesh.sent for t in one.texts] == texts


def test_scores_and_vectors_are_printed_for_people_and_whole_for_scripts(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(monkeypatch, outputs)
    told = invoke("score", "a text", "--prompt", "before").stdout.splitlines()
    assert told[1].split() == ["-4.000", "2", "7.389", "a", "text"] and mesh.sent[0].prompt == "before"
    (row,) = json.loads(invoke("score", "a text", "--json").stdout)
    assert row["token_logprobs"] == [-1.0, -3.0] and row["logprob"] == -4.0
    assert invoke("embed", "a text").stdout.splitlines()[1].split()[0] == "2"
    assert json.loads(invoke("embed", "a text", "--json").stdout) == [
        {"text": "a text", "vector": [0.6, 0.8]}
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["classify", "hi"], "--adapter"),
        (["classify", "--adapter", "x", " "], "texts takes 1 to 256 strings that are not empty"),
        (["classify", "--adapter", "x", "-"], "stdin held no text"),
        (["embed"], "TEXT"),
        (["score", "hi", "--prompt", " "], "prompt is empty"),
        (["score", "hi", "--deadline", "nan"], "deadline_s must be a positive"),
    ],
)
def test_texts_that_cannot_be_sent_are_refused(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    mesh = FakeMesh(monkeypatch, outputs)
    done = invoke(*arguments, input="\n")
    assert (done.exit_code, done.stdout, mesh.sent) == (2, "", []) and says in done.stderr


def test_a_part_that_fails_is_the_end_and_nothing_is_printed(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = FakeMesh(
        monkeypatch,
        lambda request: (
            outputs(request) if "first" in request.texts[0] else [result("rejected", reason="too long")]
        ),
    )
    done = invoke("embed", *(f"{'first' if k < 8 else 'then'} {k}" for k in range(30)))
    assert (done.exit_code, done.stdout, len(mesh.sent)) == (5, "", 2)
    assert "edgemesh: rejected: too long" in done.stderr


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_here_are_listed_with_what_their_files_say(state: StateDir) -> None:
    assert json.loads(invoke("adapters", "list", "--json").stdout) == []
    assert "`edgemesh tune` makes one" in invoke("adapters", "list").stderr
    for name in ("spam", "elsewhere", "broken", ".draft"):
        directory = state.adapters_dir / name
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(bytes(2048))
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (state.adapters_dir / "broken" / "adapter_config.json").write_text("{")
    card = {
        "name": "spam", "digest": "d" * 64, "method": "dora", "task": "classify", "labels": ["ham", "spam"],
        "first_layer": 28, "top_layers": 2, "metric": 0.9311, "bytes": 2048,
    }  # fmt: skip
    (state.adapters_dir / "spam" / "edgemesh.json").write_text(json.dumps(card))
    broken, elsewhere, spam = json.loads(invoke("adapters", "list", "--json").stdout)
    assert (spam["method"], spam["top_layers"], spam["bytes"], spam["metric"]) == ("dora", 2, 2048, 0.9311)
    assert (elsewhere["method"], elsewhere["task"], elsewhere["trouble"]) == ("lora", None, None)
    assert "not JSON" in broken["trouble"]
    lines = [line.split() for line in invoke("adapters", "list").stdout.splitlines()]
    assert ["spam", "classify", "dora", "top", "2", "2", "KiB", "0.931", "d" * 12] in lines
    assert ["elsewhere", "–", "lora", "–", "2", "KiB", "–", "–"] in lines
