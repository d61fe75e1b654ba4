"""Whatever lies in a file of records: it is read, or a person is told which line to correct."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.messages.tune import TuneTask
from node.compute.tune.records import read_records

TASKS = st.sampled_from(["classify", "complete", "chat"])
TEXTS = st.text(min_size=1, max_size=40).filter(lambda text: bool(text.strip()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "label", "messages", "role", "content"]), inner)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=200), TASKS)
def test_any_bytes_are_read_or_refused_as_the_operators_to_correct(content: bytes, task: TuneTask) -> None:
    try:
        assert read_records(content, task).items
    except ConfigError as error:
        assert re.search(r"line \d+: |holds no records", str(error))


@given(st.lists(JSON, min_size=1, max_size=6), TASKS)
def test_any_json_is_read_or_refused_with_the_numbers_of_its_lines(
    values: list[object], task: TuneTask
) -> None:
    content = "\n".join(map(json.dumps, values))
    try:
        assert len(read_records(content, task).items) == len(values)
    except ConfigError as error:
        lines = [int(number) for number in re.findall(r"^  line (\d+): ", str(error), re.MULTILINE)]
        assert lines and all(1 <= number <= len(values) for number in lines)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=20))
def test_good_records_come_back_as_they_were_written(pairs: list[tuple[str, str]]) -> None:
    content = "\n".join(json.dumps({"text": text, "label": label}) for text, label in pairs)
    found = read_records(content, "classify")
    assert [(item.text, item.answer) for item in found.items] == pairs
    assert list(found.labels) == sorted(set(label for _, label in pairs))
    assert all(found.labels[found.label_of[label]] == label for _, label in pairs)


@given(st.lists(st.sampled_from(["good", "bad", "blank"]), min_size=1, max_size=30))
def test_leaving_bad_lines_out_leaves_exactly_the_good_ones(kinds: list[str]) -> None:
    lines = {"good": '{"text": "t", "label": "l"}', "bad": "{", "blank": ""}
    content = "\n".join(lines[kind] for kind in kinds)
    good = [at for at, kind in enumerate(kinds, start=1) if kind == "good"]
    try:
        found = read_records(content, "classify", skip_bad=True)
    except ConfigError:
        assert not good
    else:
        assert [item.line for item in found.items] == good
        assert found.n_skipped == kinds.count("bad")
