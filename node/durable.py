"""Files and directories that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["replace_directory", "sync_directory", "write_durably"]


def write_durably(path: Path, content: bytes) -> None:
    """Atomic and durable on return; for this user's eyes only.

    The draft's name holds the process id: two writers never share one.

    Raises:
        OSError: Nothing has changed at ``path``.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync_directory(path.parent)


def replace_directory(draft: Path, path: Path) -> None:
    """``draft``, a directory beside ``path``, takes its place; every file in it is made durable first.

    A directory cannot be replaced in one step: between the two renames there is none at ``path``, which
    readers take for "not there yet".
    """
    for file in sorted(draft.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_directory(draft)
    old = path.with_name(f".{path.name}.old.{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(path, old)
    os.rename(draft, path)
    sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_directory(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
