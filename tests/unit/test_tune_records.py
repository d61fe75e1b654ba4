"""Tuning data: what is accepted, and what a person is told about a line that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.messages.tune import TuneTask
from node.compute.tune import records as module
from node.compute.tune.records import Record, Turn, read_file, read_records, same_labels

GOOD = '{"text": "a b", "label": "x"}\n{"text": "c", "label": "y"}\n'


def line(**fields: object) -> str:
    return json.dumps(fields)


def test_texts_and_labels_are_read_and_labels_numbered_in_their_order() -> None:
    found = read_records(line(text="one", label="z") + "\n" + line(text="two", label="b"), "classify")
    assert found.items == (Record(1, "one", "z"), Record(2, "two", "b"))
    assert found.labels == ("b", "z")
    assert found.label_of == {"b": 0, "z": 1}


def test_prompts_and_completions_are_read() -> None:
    found = read_records(line(prompt="p", completion=" c"), "complete")
    assert found.items == (Record(1, "p", " c"),)


def test_conversations_are_read() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = read_records(line(messages=messages), "chat")
    assert found.items == (Record(1, turns=(Turn("user", "q"), Turn("assistant", "a"))),)


@pytest.mark.parametrize(("label", "text"), [(1, "1"), (2.5, "2.5"), (True, "true"), (False, "false")])
def test_numbers_and_truth_values_are_labels_too(label: object, text: str) -> None:
    found = read_records(line(text="t", label=label), "classify")
    assert found.items[0].answer == text


def test_blank_lines_and_a_byte_order_mark_do_not_matter() -> None:
    found = read_records(b"\xef\xbb\xbf\n" + GOOD.encode() + b"\n  \r\n", "classify")
    assert [item.line for item in found.items] == [2, 3]


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD)
    assert read_file(path, "classify").sha256 == read_records(GOOD, "classify").sha256


BAD: list[tuple[TuneTask, str, str]] = [
    ("classify", "nonsense", "not JSON"),
    ("classify", "[1]", "a JSON object was expected, not a list"),
    ("classify", "3", "not a number"),
    ("classify", "null", "not null"),
    ("classify", '{"text": "a"}', "'label' missing"),
    ("classify", '{"txt": "a", "label": "x"}', "'text' missing (it has 'txt')"),
    ("classify", '{"text": "a", "label": "x", "more": 1}', "unknown 'more'"),
    ("classify", '{"text": " ", "label": "x"}', "'text' is empty"),
    ("classify", '{"text": "a", "label": ""}', "'label' is empty"),
    ("classify", '{"text": "a", "label": null}', "'label' must be a text, a number or true/false, not null"),
    ("classify", '{"text": "a", "label": ["x"]}', "not a list"),
    ("classify", '{"text": 7, "label": "x"}', "'text' must be a text, not a number"),
    ("classify", '{"text": "a", "label": NaN}', "NaN is not JSON"),
    ("classify", '{"text": "a", "label": "' + "x" * 300 + '"}', "300 characters; at most 256"),
    ("complete", '{"prompt": "p", "completion": ""}', "'completion' is empty"),
    ("complete", '{"text": "a", "label": "x"}', "'prompt', 'completion' missing (it has 'label', 'text')"),
    ("chat", '{"messages": []}', "at least one message"),
    ("chat", '{"messages": "hello"}', "not a text"),
    ("chat", '{"messages": [{"role": "user"}]}', "message 1 must be an object with 'role' and 'content'"),
    ("chat", '{"messages": [{"role": "bot", "content": "a"}]}', "must be one of system, user, assistant"),
    ("chat", '{"messages": [{"role": "user", "content": 1}]}', "'content' must be a text, not a number"),
    ("chat", '{"messages": [{"role": "user", "content": "a"}]}', "no message has the role 'assistant'"),
    ("chat", '{"messages": [{"role": "assistant", "content": " "}]}', "must not be empty"),
]


@pytest.mark.parametrize(("task", "text", "reason"), BAD)
def test_a_bad_line_is_named_by_number_and_reason(task: TuneTask, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_records("\n" + text, task)
    assert "1 bad line\n  line 2: " in str(refused.value)
    assert reason in str(refused.value)
    assert "--skip-bad" in str(refused.value)


def test_bytes_that_are_no_text_are_a_bad_line() -> None:
    with pytest.raises(ConfigError, match="line 1: not UTF-8 at byte 11"):
        read_records(b'{"text": "\xff"}', "classify")


def test_of_many_bad_lines_the_first_are_shown_and_all_are_counted() -> None:
    with pytest.raises(ConfigError) as refused:
        read_records("x\n" * 12, "classify")
    assert "12 bad lines" in str(refused.value)
    assert "line 5:" in str(refused.value)
    assert "line 6:" not in str(refused.value)
    assert "and 7 more" in str(refused.value)


def test_bad_lines_can_be_left_out() -> None:
    found = read_records("x\n" + GOOD + "y\n", "classify", skip_bad=True)
    assert [item.line for item in found.items] == [2, 3]
    assert found.n_skipped == 2
    assert found.skipped[0].startswith("line 1: not JSON")


def test_an_id_that_occurs_twice_is_a_bad_line() -> None:
    twice = line(text="a", label="x", id=7) + "\n" + line(text="b", label="y", id=7)
    with pytest.raises(ConfigError, match="line 2: the id 7 is that of line 1, too"):
        read_records(twice, "classify")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(content: str) -> None:
    with pytest.raises(ConfigError, match="holds no records"):
        read_records(content, "classify")


def test_nothing_but_bad_lines_is_refused_even_if_they_may_be_left_out() -> None:
    with pytest.raises(ConfigError, match="all 2 lines are bad"):
        read_records("x\ny\n", "classify", skip_bad=True)


def test_one_label_alone_cannot_be_learned() -> None:
    one = read_records(line(text="a", label="x"), "classify")
    with pytest.raises(ConfigError, match="all records have the label 'x'"):
        same_labels(one, one)


def test_evaluation_must_not_ask_for_labels_that_training_never_saw() -> None:
    with pytest.raises(ConfigError, match="no training record has: 'new'"):
        same_labels(read_records(GOOD, "classify"), read_records(line(text="a", label="new"), "classify"))


def test_what_is_too_large_is_refused_with_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES_MAX", 60)
    with pytest.raises(ConfigError, match="a record has at most 60"):
        read_records(line(text="a" * 60, label="x"), "classify")
    monkeypatch.setattr(module, "RECORDS_MAX", 1)
    with pytest.raises(ConfigError, match="more than 1 records"):
        read_records(GOOD, "classify")
    monkeypatch.setattr(module, "LABELS_MAX", 1)
    monkeypatch.setattr(module, "RECORDS_MAX", 10)
    with pytest.raises(ConfigError, match="Is 'label' the right column"):
        read_records(GOOD, "classify")
    monkeypatch.setattr(module, "DATA_BYTES_MAX", 10)
    (tmp_path / "data").write_text(GOOD)
    with pytest.raises(ConfigError, match="tuning takes at most 10"):
        read_file(tmp_path / "data", "classify")


def test_a_missing_file_is_said_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the records in .*absent"):
        read_file(tmp_path / "absent", "classify")


def test_checking_records_does_not_load_torch() -> None:
    code = "import sys, node.compute.tune.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_labels_that_no_adapter_s_card_could_hold_are_refused_before_any_work() -> None:
    lines = "\n".join(json.dumps({"text": "x", "label": f"{k:0256}"}) for k in range(300))
    with pytest.raises(ConfigError, match="76,800 bytes together; an adapter's card holds at most 65,536"):
        read_records(lines, "classify")
