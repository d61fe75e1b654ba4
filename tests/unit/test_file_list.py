"""What a peer may ask us to write: plain names with known endings, within bounds, written one way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.errors import DecodeError
from node.files.file_list import ADAPTER_FILES, FILES_MAX, FileEntry, FileList, is_model_file

GOOD = FileList((FileEntry("config.json", 3, b"1" * 32), FileEntry("model.safetensors", 5, b"2" * 32)))


def listed(**changes: object) -> bytes:
    """One file, otherwise as it should be."""
    file = {"digest": "11" * 32, "name": "config.json", "size": 3, **changes}
    return json.dumps({"files": [file]}, sort_keys=True, separators=(",", ":")).encode()


def test_what_was_written_is_read_and_has_one_digest(tmp_path: Path) -> None:
    assert FileList.parse(GOOD.content, is_model_file) == GOOD
    assert FileList(GOOD.files[::-1]).blob == GOOD.blob
    for name in ("b.json", "a.json"):
        (tmp_path / name).write_text(name)
    files = FileList.of(tmp_path.iterdir())
    assert [file.name for file in files.files] == ["a.json", "b.json"] and files.n_bytes == 12
    assert FileList.parse(files.content, is_model_file) == files


@pytest.mark.parametrize(
    "name",
    [
        "../config.json", "/etc/x.json", "a/b.json", "..json", ".hidden.json", "a\\b.json", "",
        "x" * 200 + ".json", "run.py", "weights.bin", "weights.pkl", "model.pt", "a\x00.json",
        "manifest.json", "files.json", "é.json", "config.json\n",
    ],
)  # fmt: skip
def test_a_name_that_could_leave_the_directory_or_run_is_refused(name: str) -> None:
    with pytest.raises(DecodeError):
        FileList.parse(listed(name=name), is_model_file)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1}, {"size": True}, {"size": 1.5}, {"size": 1 << 60}, {"digest": "11"}, {"digest": 3},
        {"digest": "11" * 31 + "GG"}, {"more": 1}, {"name": 7},
    ],
)  # fmt: skip
def test_impossible_sizes_and_digests_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DecodeError):
        FileList.parse(listed(**changes), is_model_file)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b'{"files":[]}', b'{"files":3}', b"\xff", b"[" * 10_000, b"x" * 70_000,
        listed() + b" ", GOOD.content.replace(b"model.safetensors", b"CONFIG.JSON.json"),
    ],
)  # fmt: skip
def test_what_is_no_list_or_written_otherwise_is_refused(content: bytes) -> None:
    with pytest.raises(DecodeError):
        FileList.parse(content, is_model_file)


def test_two_files_of_one_name_are_refused_also_where_case_does_not_count() -> None:
    twice = FileList((FileEntry("A.json", 3, b"1" * 32), FileEntry("a.json", 5, b"2" * 32)))
    with pytest.raises(DecodeError, match="two of one name"):
        FileList.parse(twice.content, is_model_file)


def test_more_files_than_any_model_has_are_refused() -> None:
    many = FileList(tuple(FileEntry(f"f{k:03}.json", 1, b"1" * 32) for k in range(FILES_MAX + 1)))
    with pytest.raises(DecodeError):
        FileList.parse(many.content, is_model_file)


def test_an_adapter_has_its_three_files_and_no_other() -> None:
    for name in ADAPTER_FILES:
        FileList.parse(listed(name=name), ADAPTER_FILES.__contains__)
    for name in ("config.json", "adapter_model.bin"):
        with pytest.raises(DecodeError):
            FileList.parse(listed(name=name), ADAPTER_FILES.__contains__)
