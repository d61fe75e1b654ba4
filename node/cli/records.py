"""Records of tuning data as a command gets them: all checked, and placed where a node finds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError
from mesh.units import bytes_text
from node.cli.options import Chosen

if TYPE_CHECKING:
    from mesh.messages import TuneTask
    from node.compute.tune.records import Records

__all__ = ["TASKS", "RecordsFile", "placed", "read_records_of"]

TASKS = ("classify", "chat", "complete")


@dataclass(frozen=True, slots=True)
class RecordsFile:
    """A file of good records."""

    path: Path
    content: bytes
    records: Records

    @staticmethod
    def of(path: Path, content: bytes, task: TuneTask, skip_bad: bool) -> RecordsFile:
        from node.compute.tune.records import read_records

        return RecordsFile(path, content, read_records(content, task, skip_bad=skip_bad, name=str(path)))


def read_records_of(options: Mapping[str, Any]) -> tuple[TuneTask, RecordsFile, RecordsFile | None]:
    """What ``--data``, ``--eval``, ``--task`` and ``--skip-bad`` name: the task, the records, and those to
    evaluate by.

    Raises:
        ConfigError: A file cannot be read, or a record is wrong; the text has its line.
    """
    content = _read_data(options["data"])
    task = options["task"] or _guessed_task(options["data"], content)
    data = RecordsFile.of(options["data"], content, task, options["skip_bad"])
    if (path := options["eval_path"]) is None:
        return task, data, None
    return task, data, RecordsFile.of(path, _read_data(path), task, options["skip_bad"])


def _read_data(path: Path) -> bytes:
    from node.compute.tune.records import DATA_BYTES_MAX

    try:
        size = path.stat().st_size
        if size > DATA_BYTES_MAX:
            raise ConfigError(
                f"{path} has {bytes_text(size)}, tuning takes at most {bytes_text(DATA_BYTES_MAX)}: split it"
            )
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from error


def _guessed_task(path: Path, content: bytes) -> TuneTask:
    """What the first record that says anything is for.

    Raises:
        ConfigError: None does.
    """
    for line in content.removeprefix(b"\xef\xbb\xbf").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for key, task in _TASK_OF_KEY.items():
            if isinstance(found, dict) and key in found:
                return task
    raise ConfigError(
        f"no line of {path} has text and label, prompt and completion, or messages. "
        "Is it the right file? --task says what its lines should be"
    )


_TASK_OF_KEY: dict[str, TuneTask] = {
    "messages": "chat",
    "completion": "complete",
    "prompt": "complete",
    "label": "classify",
    "text": "classify",
}


def placed(chosen: Chosen, data: RecordsFile, evaluation: RecordsFile | None) -> dict[str, Any]:
    """Where a node finds the records: in the task, or in a file of this machine's state directory.

    Raises:
        ConfigError: They are too large to travel, and no node runs here.
    """
    from mesh.messages.tune import INLINE_DATA_BYTES_MAX

    fields: dict[str, Any] = {}
    for name, digest_name, one in (("data", "data_sha256", data), ("eval_data", "eval_sha256", evaluation)):
        if one is None:
            continue
        if len(one.content) <= INLINE_DATA_BYTES_MAX:
            fields[name] = one.content.decode()
            continue
        holders = chosen.state.nodes_here(chosen.settings.mesh)
        if not holders:
            raise ConfigError(
                f"{one.path} has {bytes_text(len(one.content))}: more than travels with a task "
                f"({bytes_text(INLINE_DATA_BYTES_MAX)}), and no node of mesh '{chosen.settings.mesh}' runs "
                "on this machine. Start one here with `edgemesh join`, or run this command where one runs"
            )
        fields |= {digest_name: chosen.state.keep_dataset(one.content), "holders": holders}
    return fields
