"""The records a tuning task learns from: JSON lines, checked before any work starts. Never imports torch.

    classify   {"text": "…", "label": "…"}                     labels sorted, so a label's number is its rank
    complete   {"prompt": "…", "completion": "…"}
    chat       {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

A record may carry an ``id``, which must then be its own. Other keys are refused: a misspelt key is the
commonest mistake, and one that would otherwise be found after an hour of training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from mesh.messages.output import LABEL_BYTES_MAX
from mesh.messages.tune import TuneTask

__all__ = ["DATA_BYTES_MAX", "Record", "Records", "Turn", "read_file", "read_records", "same_labels"]

# The text of all records is held in memory while it is read into tokens. A million records of 250 bytes.
DATA_BYTES_MAX = 256 * 1024 * 1024
LINE_BYTES_MAX = 1024 * 1024
RECORDS_MAX = 1_000_000
# A head of 4,096 labels has as many rows as a large layer; more are a search problem, not a class.
LABELS_MAX = 4096
LABEL_CHARS_MAX = 256
TURNS_MAX = 256
_BAD_SHOWN = 5
_ROLES = ("system", "user", "assistant")

_SHAPES: dict[TuneTask, str] = {
    "classify": '{"text": "…", "label": "…"}',
    "complete": '{"prompt": "…", "completion": "…"}',
    "chat": '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One example. Only what its task has is filled."""

    line: int
    """Where it stands, from 1."""
    text: str = ""
    """classify: the text. complete: the prompt."""
    answer: str = ""
    """classify: the label. complete: the completion."""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Records:
    """Every record of one file, in its order."""

    task: TuneTask
    items: tuple[Record, ...]
    labels: tuple[str, ...] = ()
    """classify: all labels, sorted; a label's place is its number."""
    skipped: tuple[str, ...] = ()
    """What was wrong with the lines left out; the first few."""
    n_skipped: int = 0
    sha256: str = ""
    """Of the bytes that were read."""
    label_of: dict[str, int] = field(default_factory=dict)

    def some(self, numbers: Sequence[int]) -> Records:
        """Only those records; the labels are all of them still."""
        return replace(self, items=tuple(self.items[number] for number in numbers))


def read_file(path: Path, task: TuneTask, *, skip_bad: bool = False) -> Records:
    """The records in ``path``.

    Raises:
        ConfigError: The file cannot be read, is too large, or ``read_records`` refuses it.
    """
    try:
        size = path.stat().st_size
        if size > DATA_BYTES_MAX:
            raise ConfigError(f"{path} has {size:,} bytes; tuning takes at most {DATA_BYTES_MAX:,}. Split it")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the records in {path}: {error.strerror}") from error
    return read_records(content, task, skip_bad=skip_bad, name=str(path))


def read_records(
    content: bytes | str, task: TuneTask, *, skip_bad: bool = False, name: str = "the data"
) -> Records:
    """Every record in ``content``; ``name`` is what errors call it. Blank lines do not count.

    Raises:
        ConfigError: A line is bad and ``skip_bad`` is not set, or what is left cannot be learned from.
    """
    raw = content.encode() if isinstance(content, str) else content
    if len(raw) > DATA_BYTES_MAX:
        raise ConfigError(f"{name} has {len(raw):,} bytes; tuning takes at most {DATA_BYTES_MAX:,}. Split it")
    items: list[Record] = []
    bad: list[str] = []
    n_bad = 0
    ids: dict[str, int] = {}
    for line, text in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            items.append(_record(text, line, task, ids))
        except ValueError as error:
            n_bad += 1
            if len(bad) < _BAD_SHOWN:
                bad.append(f"line {line}: {error}")
        if len(items) > RECORDS_MAX:
            raise ConfigError(f"{name} has more than {RECORDS_MAX:,} records. Split it")
    if n_bad and not skip_bad:
        raise ConfigError(_complaint(name, task, bad, n_bad))
    if not items:
        reason = f"all {n_bad} lines are bad: {bad[0]}" if n_bad else "it is empty"
        raise ConfigError(f"{name} holds no records ({reason}); each line must be {_SHAPES[task]}")
    labels = tuple(sorted({item.answer for item in items})) if task == "classify" else ()
    if len(labels) > LABELS_MAX:
        raise ConfigError(
            f"{name} has {len(labels):,} different labels; at most {LABELS_MAX:,} can be told apart. "
            "Is 'label' the right column?"
        )
    n_label_bytes = sum(len(label.encode()) for label in labels)
    if n_label_bytes > LABEL_BYTES_MAX:
        raise ConfigError(
            f"{name} has labels of {n_label_bytes:,} bytes together; an adapter's card holds at most "
            f"{LABEL_BYTES_MAX:,}. Is 'label' the right column?"
        )
    return Records(
        task=task,
        items=tuple(items),
        labels=labels,
        skipped=tuple(bad),
        n_skipped=n_bad,
        sha256=hashlib.sha256(raw).hexdigest(),
        label_of={label: number for number, label in enumerate(labels)},
    )


def same_labels(training: Records, other: Records, name: str = "the evaluation records") -> None:
    """Check that training has something to tell apart, and that ``other`` asks for nothing it never saw.

    Raises:
        ConfigError: It has not, or does; the text names the labels.
    """
    if training.task != "classify":
        return
    if len(training.labels) < 2:
        raise ConfigError(
            f"all records have the label {training.labels[0]!r}: to classify, give at least two labels"
        )
    unknown = sorted(set(other.labels) - set(training.labels))
    if unknown:
        shown = ", ".join(map(repr, unknown[:_BAD_SHOWN]))
        raise ConfigError(f"{name} have labels that no training record has: {shown}")


def _complaint(name: str, task: TuneTask, bad: list[str], n_bad: int) -> str:
    more = f"\n  and {n_bad - len(bad)} more" if n_bad > len(bad) else ""
    lines = "\n  ".join(bad)
    return (
        f"{name}: {n_bad} bad line{'s' if n_bad > 1 else ''}\n  {lines}{more}\n"
        f"Each line must be {_SHAPES[task]}. Correct them, or leave them out with --skip-bad"
    )


def _record(raw: bytes, line: int, task: TuneTask, ids: dict[str, int]) -> Record:
    if len(raw) > LINE_BYTES_MAX:
        raise ValueError(f"{len(raw):,} bytes; a record has at most {LINE_BYTES_MAX:,}")
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON we read: nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object was expected, not {_kind(found)}")
    record = _BUILDERS[task](found, line)
    if "id" in found:
        own = json.dumps(found["id"], sort_keys=True)
        if own in ids:
            raise ValueError(f"the id {own} is that of line {ids[own]}, too; ids must differ")
        ids[own] = line
    return record


def _classify(found: dict[str, Any], line: int) -> Record:
    _check_keys(found, ("text", "label"))
    return Record(line, _text(found, "text"), _label(found["label"]))


def _complete(found: dict[str, Any], line: int) -> Record:
    _check_keys(found, ("prompt", "completion"))
    return Record(line, _text(found, "prompt"), _text(found, "completion"))


def _chat(found: dict[str, Any], line: int) -> Record:
    _check_keys(found, ("messages",))
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list with at least one message, not {_kind(messages)}")
    if len(messages) > TURNS_MAX:
        raise ValueError(f"{len(messages)} messages; at most {TURNS_MAX}")
    turns = tuple(_turn(message, at) for at, message in enumerate(messages, start=1))
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError("no message has the role 'assistant': there is nothing to learn")
    return Record(line, turns=turns)


_BUILDERS: dict[TuneTask, Callable[[dict[str, Any], int], Record]] = {
    "classify": _classify,
    "complete": _complete,
    "chat": _chat,
}


def _turn(message: object, at: int) -> Turn:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise ValueError(f"message {at} must be an object with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise ValueError(f"message {at}: the role must be one of {', '.join(_ROLES)}, not {_shown(role)}")
    if not isinstance(content, str):
        raise ValueError(f"message {at}: 'content' must be a text, not {_kind(content)}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"message {at}: an assistant's message must not be empty")
    return Turn(role, content)


def _check_keys(found: dict[str, Any], wanted: tuple[str, ...]) -> None:
    missing = [key for key in wanted if key not in found]
    others = sorted(set(found) - set(wanted) - {"id"})
    if missing:
        has = f" (it has {_listed(others)})" if others else ""
        raise ValueError(f"{_listed(missing)} missing{has}")
    if others:
        raise ValueError(f"unknown {_listed(others)}: remove it, it would not be used")


def _text(found: dict[str, Any], key: str) -> str:
    value = found[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, not {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def _label(value: object) -> str:
    """Texts as they are; numbers and truth values as JSON writes them."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise ValueError(f"'label' must be a text, a number or true/false, not {_kind(value)}")
    if not value.strip():
        raise ValueError("'label' is empty")
    if len(value) > LABEL_CHARS_MAX:
        raise ValueError(f"'label' has {len(value)} characters; at most {LABEL_CHARS_MAX}")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write a text instead")


def _kind(value: object) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (type(None), "null"),
        (bool, "true/false"),
        ((int, float), "a number"),
        (str, "a text"),
        (list, "a list"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "an object")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name if len(name) <= 40 else name[:39] + "…") for name in names]
    return ", ".join(shown[:_BAD_SHOWN]) + (" and more" if len(shown) > _BAD_SHOWN else "")
