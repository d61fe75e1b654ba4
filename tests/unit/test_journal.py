"""The journal: what it says is durable, is."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.ids import Epoch, NodeId, TaskId
from mesh.journal import Journal, JournalError
from mesh.messages import EpochSeen, Submit, TaskRecord
from mesh.wire import FRAME_BYTES_MAX


def seen(term: int) -> EpochSeen:
    return EpochSeen(epoch=Epoch(term, NodeId("pi-4")))


def record(prompt: str) -> TaskRecord:
    return TaskRecord(
        task=TaskId("t-1"),
        submit=Submit(prompt=prompt),
        digest="d",
        budget_s=None,
        outcome=None,
        epoch=Epoch(1, NodeId("pi-4")),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


def test_committed_records_are_there_for_the_next_process(path: Path) -> None:
    journal = Journal(path)
    journal.save("fence", seen(1))
    journal.save("task/t-1", record("hello"))
    journal.save("fence", seen(2))
    journal.commit()
    journal.close()
    assert Journal(path).load() == {"fence": seen(2), "task/t-1": record("hello")}


def test_what_was_staged_and_not_committed_is_not_there(path: Path) -> None:
    journal = Journal(path)
    journal.save("fence", seen(1))
    journal.commit()
    journal.save("fence", seen(2))
    journal.close()
    assert Journal(path).load() == {"fence": seen(1)}


def test_saving_none_erases_the_key(path: Path) -> None:
    journal = Journal(path)
    journal.save("a", seen(1))
    journal.save("b", seen(1))
    journal.commit()
    journal.save("a", None)
    journal.save("never-there", None)
    journal.commit()
    assert Journal(path).load() == {"b": seen(1)}


def test_only_the_owner_may_read_prompts_and_answers(path: Path) -> None:
    Journal(path)
    assert [file.stat().st_mode & 0o077 for file in path.parent.iterdir()] == [0] * len(
        list(path.parent.iterdir())
    )


def test_a_record_that_cannot_be_read_is_skipped_and_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(path)
    journal.save("good", seen(1))
    journal.commit()
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO records VALUES ('bad', x'c1c1')")
    with caplog.at_level(logging.WARNING):
        assert Journal(path).load() == {"good": seen(1)}
    assert "bad" in caplog.text


@pytest.mark.parametrize("n_broken", [1, 2])
def test_a_corrupt_file_is_kept_aside_and_a_new_one_begun(
    path: Path, n_broken: int, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(1, n_broken + 1):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"this is no database" * 1000)
        journal = Journal(path)
        assert journal.load() == {}
        journal.save("fence", seen(n))
        journal.commit()
        journal.close()
        again = Journal(path)
        assert again.load() == {"fence": seen(n)}
        again.close()
        assert path.with_name(f"journal.db.corrupt-{n}").read_bytes().startswith(b"this is no")
    assert "corrupt" in caplog.text


def test_pages_that_rot_later_are_found_at_the_next_start(path: Path) -> None:
    journal = Journal(path)
    for n in range(200):
        journal.save(f"task/{n}", record("x" * 1000))
    journal.commit()
    journal.close()
    rotten = bytearray(path.read_bytes())
    rotten[4096 * 3 : 4096 * 20] = b"\xff" * (4096 * 17)
    path.write_bytes(rotten)
    fresh = Journal(path)
    assert fresh.load() == {}
    fresh.save("fence", seen(1))
    fresh.commit()
    assert path.with_name("journal.db.corrupt-1").exists()


def test_a_full_disk_is_one_clear_error_and_changes_nothing(path: Path) -> None:
    journal = Journal(path, bytes_max=128 * 1024)
    journal.save("fence", seen(1))
    journal.commit()
    for n in range(100):
        journal.save(f"task/{n}", record("x" * 8000))
    with pytest.raises(JournalError, match="free some space"):
        journal.commit()
    assert journal.load() == {"fence": seen(1)}
    for n in range(100):  # the ledger lets go of them
        journal.save(f"task/{n}", None)
    journal.save("fence", seen(2))
    journal.commit()
    assert Journal(path).load() == {"fence": seen(2)}


def test_a_place_one_may_not_write_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalError, match="cannot open the journal"):
        Journal(tmp_path / "file" / "journal.db")


def test_a_record_larger_than_a_frame_is_refused_when_staged(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(ValueError, match="a frame has at most"):
        journal.save("x", TaskRecord(**{**_fields(record("p")), "digest": "d" * FRAME_BYTES_MAX}))


def _fields(one: TaskRecord) -> dict[str, object]:
    return {name: getattr(one, name) for name in type(one).__slots__}


WRITER = """
import sys
from pathlib import Path
from mesh.ids import Epoch
from mesh.journal import Journal
from mesh.messages import EpochSeen
journal = Journal(Path(sys.argv[1]))
for term in range(1, 1_000_000):
    journal.save("first", EpochSeen(epoch=Epoch(term, "pi-4")))
    journal.save("second", EpochSeen(epoch=Epoch(term, "pi-4")))
    journal.commit()
    print(term, flush=True)
"""


def test_kill_9_loses_nothing_that_was_committed_and_tears_no_batch(path: Path) -> None:
    said = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(40):
                line = writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().splitlines()
        said = int((rest or [line])[-1])
        journal = Journal(path)
        records = journal.load()
        journal.close()
        assert records["first"] == records["second"], "half a batch"
        assert records["first"].epoch.term >= said, "said to be durable, and was not"
    assert said >= 40
