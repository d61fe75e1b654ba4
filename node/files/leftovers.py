"""What this machine keeps that nobody is likely to miss, for ``edgemesh cleanup``.

Only what can be had again, or was begun and never ended: data of tuning jobs that nobody reads, their
checkpoints, feature maps of nodes that no longer start, adapters that were pulled and are not used, what an
interrupted download left, and models other than the one of the settings. Adapters made here never.

What may be in use is left out: what changed lately, what a running process has locked, and the models and
feature maps of a machine on which nodes run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from node.compute.models import list_models
from node.files.library import Library
from node.state import StateDir

__all__ = ["Leftover", "find_leftovers", "remove_leftover"]

UNFINISHED_S = 3600.0
"""Nothing writes for so long without touching a file."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """One thing that could go."""

    kind: str
    name: str
    n_bytes: int
    why: str
    path: Path
    adapter: tuple[str, str] | None = None
    """Name and digest, where it is a version of an adapter."""


def find_leftovers(
    state: StateDir, *, model: str, unused_s: float, now: Callable[[], float] = time.time
) -> list[Leftover]:
    """Everything that could go, the largest first.

    Args:
        model: The directory name of the model that stays.
        unused_s: What was used within so many seconds stays.

    Raises:
        OSError: The state directory cannot be read.
    """
    before = now() - unused_s
    found = [
        *_old_files(state.datasets_dir, "*.jsonl", before, "data set", "no tuning job has read it"),
        *_old_directories(state.features_dir / "checkpoints", before, "checkpoint", "its job never went on"),
        *_adapters(state, before),
        *_unfinished(state, now() - UNFINISHED_S),
        *_features(state, before),
    ]
    if not _nodes_run(state):
        found += [
            Leftover("model", row.name, _size(Path(row.path)), "not the model of this device", Path(row.path))
            for row in list_models(state.models_dir)
            if row.path is not None and Path(row.path).name != model
        ]
    return sorted(found, key=lambda one: (-one.n_bytes, one.kind, one.name))


def remove_leftover(state: StateDir, leftover: Leftover) -> None:
    """
    Raises:
        OSError: It cannot be removed.
    """
    if leftover.adapter is not None:
        Library(state.adapters_dir).forget_version(*leftover.adapter)
    elif leftover.path.is_dir():
        shutil.rmtree(leftover.path)
    else:
        leftover.path.unlink(missing_ok=True)


def _old_files(directory: Path, pattern: str, before: float, kind: str, why: str) -> Iterator[Leftover]:
    for path in sorted(directory.glob(pattern)):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                yield Leftover(kind, path.stem[:12], _size(path), why, path)


def _old_directories(directory: Path, before: float, kind: str, why: str) -> Iterator[Leftover]:
    for path in sorted(directory.glob("*")):
        if path.is_dir() and _changed_at(path) < before:
            yield Leftover(kind, path.name[:12], _size(path), why, path)


def _adapters(state: StateDir, before: float) -> Iterator[Leftover]:
    library = Library(state.adapters_dir)
    for kept, is_current in library.kept():
        held = kept.held
        if kept.used_at >= before or (is_current and held.is_own):
            continue
        kind = "adapter" if is_current else "adapter version"
        why = "pulled from another node, and not used" if is_current else "a newer version is here"
        path = library.directory / held.name if is_current else library.version_path(held.digest)
        yield Leftover(kind, f"{held.name} {held.version}", held.bytes, why, path, (held.name, held.digest))


def _unfinished(state: StateDir, before: float) -> Iterator[Leftover]:
    why = "begun and never finished"
    for path in sorted((state.adapters_dir / ".mesh" / "partial").glob("*")):
        if _changed_at(path) < before:
            yield Leftover("unfinished adapter", path.name, _size(path), why, path)
    for path in sorted(state.models_dir.glob(".*")):
        is_draft = path.suffix in (".partial", ".fetching") and path.is_dir()
        if is_draft and _changed_at(path) < before and not _is_locked(state.models_dir, path.name):
            yield Leftover("unfinished model", path.name.strip("."), _size(path), why, path)


def _features(state: StateDir, before: float) -> Iterator[Leftover]:
    shared = state.features_dir / "maps"
    if shared.is_dir():
        why = "of an earlier version: feature maps are kept by node now"
        yield Leftover("feature maps", "maps", _size(shared), why, shared)
    for path in sorted((state.path / "meshes").glob("*/nodes/*/features")):
        slot = path.parent
        if not _is_running(slot / "lock") and _changed_at(slot) < before and _size(path):
            why = "of a node that has not run here since"
            yield Leftover("feature maps", f"{slot.parent.parent.name}/{slot.name}", _size(path), why, path)


def _nodes_run(state: StateDir) -> bool:
    return any(_is_running(lock) for lock in (state.path / "meshes").glob("*/nodes/*/lock"))


def _is_running(lock: Path) -> bool:
    """As ``StateDir.nodes_here``: by the process id, since to try a lock could take it from a node."""
    try:
        os.kill(int(lock.read_text()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _is_locked(models_dir: Path, draft: str) -> bool:
    """Whether a process is at this download or conversion."""
    slug = draft.strip(".").rsplit(".", 2)[0]
    for name in (f".{slug}.lock", f".{slug}.fetching.lock"):
        try:
            with (models_dir / name).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def _changed_at(path: Path) -> float:
    """When it, or a file in it, changed last."""
    newest = path.stat().st_mtime
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            newest = max(newest, file.stat().st_mtime)
    return newest


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    n_bytes = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            n_bytes += file.stat().st_size if file.is_file() else 0
    return n_bytes
