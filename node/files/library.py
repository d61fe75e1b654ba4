"""The adapters' directory of this machine: notices what is new, installs, removes, makes room.

    <adapters>/<name>/              what is served under the name; peft's directories may be copied here
    <adapters>/.mesh/index.json     versions, see ``index``
                     versions/<digest>/   every version kept, older ones too; the files are hard links
                     partial/<random>/    what is arriving

A directory that appears, or is replaced, is a new version of its name. Of what was pulled, the versions
unused for longest make room within the quota; what was made here never leaves by itself.

Blocking, and for any thread or process: the index is held while something changes. Reads of the directory
are cheap, since nothing is opened while neither it nor the index has changed.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mesh.agreement.versions import Newest, rank_of
from mesh.errors import DecodeError
from mesh.ids import is_id
from mesh.messages.files import (
    ADAPTERS_HELD_MAX,
    REMOVED_MAX,
    VERSION_MAX,
    AdapterHeld,
    AdapterRemoved,
)
from node.compute.adapters.card import CONFIG_FILE, WEIGHTS_FILE
from node.durable import replace_directory
from node.files.adapter_directory import described, identity_of, link_adapter
from node.files.file_list import ADAPTER_FILES, FileList
from node.files.index import Identity, Index, Kept, Removal, ShelfPlace, open_index
from node.logs import say

__all__ = ["REMEMBERED_S", "Holdings", "Library"]

log = logging.getLogger(__name__)

REMEMBERED_S = 30 * 24 * 3600.0
"""How long a removal is remembered while a machine is on. Who is away for longer may bring its copy back."""
LEFT_OVER_S = 3600.0
"""No pull takes so long between two files; another node of this machine may be at one."""
USED_EVERY_S = 60.0
"""How exactly it is known when an adapter was used last: each note costs a write to the disk."""
NOTED_MAX = 4096
AGE_EVERY_S = 3600.0
"""How exactly it is known how long removals are still remembered."""
OLDER_KEPT_MAX = 2
"""Versions of a name beside the one that is served."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is here, as of one look."""

    adapters: tuple[AdapterHeld, ...] = ()
    """Newest use first; those on the shelf before older versions."""
    removed: tuple[AdapterRemoved, ...] = ()
    shelf: Mapping[str, AdapterHeld] = field(default_factory=dict)
    declined: Mapping[str, int] = field(default_factory=dict)
    blobs: Mapping[bytes, Path | bytes] = field(default_factory=dict)


class Library:
    """``now`` is this machine's calendar, ``uptime`` its monotonic clock; both in seconds."""

    def __init__(
        self,
        directory: Path,
        *,
        quota_bytes: int = 0,
        now: Callable[[], float] = time.time,
        uptime: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.home = directory / ".mesh"
        self._quota_bytes = quota_bytes
        self._now = now
        self._uptime = uptime
        self._used: dict[str, float] = {}
        self._noted: dict[str, float] = {}
        self._used_lock = threading.Lock()
        self._last: tuple[object, Holdings] | None = None
        self._missing: set[str] = set()
        """Not there at the last look: a directory that is being replaced is not there for an instant."""

    # ── looking ─────────────────────────────────────────────────────────────────────────────────────

    def look(self, newest: Mapping[str, Newest], base: str | None = None) -> Holdings:
        """What is here now, after taking in what is new in the directory and removed in the mesh.

        Args:
            newest: What the mesh says each name stands for.
            base: The backbone served here, taken for that of adapters which do not say.

        Raises:
            OSError: The directory cannot be read or written.
        """
        seen = self._seen()
        gone = {name: one.version for name, one in newest.items() if one.held is None}
        rest = (gone, base, int(self._uptime() // AGE_EVERY_S))
        if self._last is not None and self._last[0] == (seen, self._stamp(), rest) and not self._used:
            return self._last[1]
        with open_index(self.home) as index:
            self._age(index)
            self._note_uses(index)
            for name, identity in seen.items():
                place = index.shelf.get(name)
                if place is None or place.identity != identity:
                    self._take_in(index, name, identity, newest.get(name))
            missing = {name for name in index.shelf if name not in seen}
            for name in missing & self._missing:
                self._decline(index, name)  # somebody removed the directory by hand
            self._missing = missing - self._missing
            for name, one in newest.items():
                if one.held is None:
                    self._bury(index, name, one.version, min(one.left_s, REMEMBERED_S))
            holdings = self._holdings(index, base)
        self._last = None if self._missing else ((seen, self._stamp(), rest), holdings)
        return holdings

    def used(self, name: str) -> None:
        """Somebody asked for the adapter. Written down at the next look."""
        now = self._now()
        with self._used_lock:
            if now - self._noted.get(name, float("-inf")) >= USED_EVERY_S:
                if len(self._noted) >= NOTED_MAX:
                    self._noted.clear()
                self._used[name] = self._noted[name] = now

    def next_version(self, name: str, newest: Newest | None) -> int:
        """The number of a version made now."""
        with open_index(self.home) as index:
            return self._next_version(index, name, "", newest)

    def _seen(self) -> dict[str, Identity]:
        found: dict[str, Identity] = {}
        try:
            entries = list(os.scandir(self.directory))
        except FileNotFoundError:
            return {}
        for entry in entries:
            if is_id(entry.name) and (Path(entry.path) / CONFIG_FILE).is_file():
                found[entry.name] = identity_of(Path(entry.path))
        return found

    def _stamp(self) -> tuple[int, int]:
        try:
            status = (self.home / "index.json").stat()
        except OSError:
            return (0, 0)
        return (status.st_ino, status.st_mtime_ns)

    def _take_in(self, index: Index, name: str, identity: Identity, newest: Newest | None) -> None:
        """A directory that is new, or holds other files than before."""
        path = self.directory / name
        try:
            files = FileList.of(path / file for file in ADAPTER_FILES if (path / file).is_file())
        except OSError as error:
            log.warning("adapter %s cannot be read: %s", name, error)
            return
        if identity_of(path) != identity or not any(file.name == WEIGHTS_FILE for file in files.files):
            return  # it is still being written: next time
        digest = files.blob.digest.hex()
        place = index.shelf.get(name)
        kept: Kept | None = index.kept.get((name, digest))
        if kept is None or (place is not None and place.digest != digest):
            version = self._next_version(index, name, digest, newest)
            kept = Kept(held=described(path, name, version, files), files=files.content.decode(),
                        used_at=self._now())  # fmt: skip
            text = f"adapter {name} here is version {version}"
            say(log, "adapter_version", text, name=name, version=version, digest=digest[:12])
        self._link(path, self.version_path(digest))
        index.kept[kept.key] = kept
        index.shelf[name] = ShelfPlace(digest, identity)
        index.declined.pop(name, None)
        self._trim(index, name)

    @staticmethod
    def _next_version(index: Index, name: str, digest: str, newest: Newest | None) -> int:
        if newest is not None and newest.held is not None and newest.held.digest == digest:
            return newest.version
        here = [kept.held.version for (of, _), kept in index.kept.items() if of == name]
        removal = index.removed.get(name)
        known = [*here, removal.version if removal else 0, newest.version if newest else 0]
        known.append(index.declined.get(name, 0))
        return min(max(known) + 1, VERSION_MAX)

    def _holdings(self, index: Index, base: str | None) -> Holdings:
        blobs: dict[bytes, Path | bytes] = {}
        ordered = sorted(index.kept.values(), key=lambda kept: (not index.is_current(kept), -kept.used_at))
        for kept in ordered:
            if (files := _listed(kept)) is None:
                continue
            blobs[bytes.fromhex(kept.held.digest)] = files.content
            for file in files.files:
                blobs[file.digest] = self.version_path(kept.held.digest) / file.name

        def told(held: AdapterHeld) -> AdapterHeld:
            return replace(held, base=base) if held.base is None and held.is_own else held

        removed = sorted(index.removed.items(), key=lambda one: -one[1].left_s)[:REMOVED_MAX]
        return Holdings(
            adapters=tuple(told(kept.held) for kept in ordered[:ADAPTERS_HELD_MAX]),
            removed=tuple(
                AdapterRemoved(name=name, version=one.version, left_s=max(0.0, one.left_s))
                for name, one in removed
            ),
            shelf={
                name: told(current.held)
                for name in index.shelf
                if (current := index.current(name)) is not None
            },
            declined=dict(index.declined),
            blobs=blobs,
        )

    def _note_uses(self, index: Index) -> None:
        with self._used_lock:
            used, self._used = self._used, {}
        for name, used_at in used.items():
            if (kept := index.current(name)) is not None:
                index.kept[kept.key] = replace(kept, used_at=used_at)

    # ── installing ──────────────────────────────────────────────────────────────────────────────────

    def partial(self) -> Path:
        """A new, empty directory for what arrives.

        Raises:
            OSError: It cannot be made.
        """
        path = self.home / "partial" / secrets.token_hex(8)
        path.mkdir(mode=0o700, parents=True)
        return path

    def kept(self) -> list[tuple[Kept, bool]]:
        """Every version here, and whether it is the one that is served.

        Raises:
            OSError: The index cannot be read.
        """
        if not self.home.is_dir():
            return []
        with open_index(self.home) as index:
            return [(kept, index.is_current(kept)) for kept in index.kept.values()]

    def forget_version(self, name: str, digest: str) -> None:
        """Remove a version from this machine; if it is the one that is served, the name with it.

        Raises:
            OSError: The directory cannot be written.
        """
        with open_index(self.home) as index:
            kept = index.kept.get((name, digest))
            if kept is None:
                return
            if index.is_current(kept):
                self._decline(index, name)
                self.discard(self.directory / name)
            else:
                self._drop(index, [kept])

    def own_copy(self, digest: str) -> tuple[FileList, Path] | None:
        """A version that is kept here, as if it had just arrived; ``None`` if it is not.

        Raises:
            OSError: The disk takes no more.
        """
        with open_index(self.home) as index:
            kept = next((kept for kept in index.kept.values() if kept.held.digest == digest), None)
            files = _listed(kept) if kept is not None else None
            if files is None:
                return None
            path = self.home / "partial" / secrets.token_hex(8)
            self._link(self.version_path(digest), path)
            return files, path

    def sweep(self) -> int:
        """Remove what an earlier life of any node here left half-way; how many bytes that was."""
        n_bytes = 0
        for path in (self.home / "partial").glob("*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFT_OVER_S:
                    n_bytes += sum(file.stat().st_size for file in path.glob("*"))
                    shutil.rmtree(path, ignore_errors=True)
        if self.home.is_dir():
            with open_index(self.home) as index:  # a damaged one was given up: nobody knows these any more
                known = {digest for _, digest in index.kept}
                for path in (self.home / "versions").glob("*"):
                    if path.name not in known:
                        self.discard(path)
        return n_bytes

    def has_room(self, n_bytes: int) -> bool:
        """Within the quota, without anything leaving but older versions."""
        with open_index(self.home) as index:
            return self._make_room(index, n_bytes, False, (), is_trial=True)

    def install(
        self,
        held: AdapterHeld,
        files: FileList,
        partial: Path,
        *,
        is_wanted: bool,
        is_own: bool = False,
        only_here: Container[str] = (),
    ) -> str | None:
        """Serve what arrived in ``partial`` under ``held.name``; ``None``, or why it is not.

        ``is_wanted``: somebody asked for it, so pulled adapters that nobody used lately make room, but not
        the versions ``only_here``, by their digests.

        Raises:
            OSError: The disk takes no more.
        """
        name, path = held.name, self.directory / held.name
        try:
            with open_index(self.home) as index:
                removal, place, current = index.removed.get(name), index.shelf.get(name), index.current(name)
                if removal is not None and removal.version >= held.version:
                    return "it was removed meanwhile"
                if place is not None and place.identity != identity_of(path):
                    return "the directory here has just changed: a look at it comes first"
                if place is None and path.exists():
                    return f"{path} is in the way"
                if current is not None and current.rank >= rank_of(held.version, held.digest):
                    return None  # another process of this machine was faster
                if not is_own and not self._make_room(index, held.bytes, is_wanted, only_here):
                    return "no room: see the setting adapter_disk"
                version = self.version_path(held.digest)
                if not version.exists():
                    version.parent.mkdir(mode=0o700, exist_ok=True)
                    replace_directory(partial, version)
                draft = self.home / "partial" / secrets.token_hex(8)
                self._link(version, draft)
                replace_directory(draft, path)
                kept = Kept(held=replace(held, is_own=is_own), files=files.content.decode(),
                            used_at=self._now())  # fmt: skip
                index.kept[kept.key] = kept
                index.shelf[name] = ShelfPlace(held.digest, identity_of(path))
                index.declined.pop(name, None)
                self._trim(index, name)
                return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _link(self, source: Path, target: Path) -> None:
        """The same files in another directory, on the disk once where the file system can do that."""
        if target.exists():
            return
        draft = self.home / "partial" / secrets.token_hex(8)
        link_adapter(source, draft)
        if target.parent == draft.parent:
            draft.rename(target)
        else:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_directory(draft, target)

    # ── removing ────────────────────────────────────────────────────────────────────────────────────

    def remove(self, name: str, version: int) -> None:
        """For the whole mesh: versions up to this one are gone, here and wherever this is heard.

        Raises:
            OSError: The directory cannot be written.
        """
        with open_index(self.home) as index:
            self._age(index)
            self._bury(index, name, version, REMEMBERED_S)

    def remove_here(self, name: str) -> bool:
        """On this machine only: it is not pulled again before there is a newer version.

        Raises:
            OSError: The directory cannot be written.
        """
        with open_index(self.home) as index:
            was_here = name in index.shelf or (self.directory / name).exists()
            self._decline(index, name)
            self.discard(self.directory / name)
            return was_here

    def _bury(self, index: Index, name: str, version: int, left_s: float) -> None:
        known = index.removed.get(name)
        is_news = known is None or known.version < version
        if is_news or (known is not None and known.version == version and left_s < known.left_s):
            index.removed[name] = Removal(version, left_s)
            if len(index.removed) > REMOVED_MAX:
                del index.removed[min(index.removed, key=lambda name: index.removed[name].left_s)]
        current, path = index.current(name), self.directory / name
        if current is not None and current.held.version <= version:
            # What was put there since the last look is newer than what is removed.
            if identity_of(path) == index.shelf.pop(name).identity:
                self.discard(path)
            say(
                log,
                "adapter_removed",
                f"adapter {name} was removed from the mesh",
                name=name,
                version=version,
            )
        self._drop(index, [
            kept for (of, _), kept in index.kept.items() if of == name and kept.held.version <= version
        ])  # fmt: skip

    def _decline(self, index: Index, name: str) -> None:
        versions = [kept for (of, _), kept in index.kept.items() if of == name]
        if versions:
            index.declined[name] = max(kept.held.version for kept in versions)
        index.shelf.pop(name, None)
        self._drop(index, versions)

    def _age(self, index: Index) -> None:
        """Before anything is added: what is remembered has become older."""
        uptime = self._uptime()
        if not 0 <= uptime - index.aged_at < AGE_EVERY_S:  # or this machine was started since
            passed_s = max(0.0, uptime - index.aged_at)
            index.aged_at = uptime
            index.removed = {
                name: Removal(one.version, one.left_s - passed_s)
                for name, one in index.removed.items()
                if one.left_s > passed_s
            }

    def _trim(self, index: Index, name: str) -> None:
        older = [kept for (of, _), kept in index.kept.items() if of == name and not index.is_current(kept)]
        older.sort(key=lambda kept: kept.rank, reverse=True)
        self._drop(index, older[OLDER_KEPT_MAX:])

    def _drop(self, index: Index, versions: Iterable[Kept]) -> None:
        for kept in list(versions):
            del index.kept[kept.key]
            if not any(digest == kept.held.digest for _, digest in index.kept):
                self.discard(self.version_path(kept.held.digest))

    def _make_room(
        self, index: Index, n_bytes: int, evicts: bool, only_here: Container[str], *, is_trial: bool = False
    ) -> bool:
        """Whether ``n_bytes`` more fit; what had to leave for that has left."""
        if n_bytes > self._quota_bytes:
            return False
        by_use = sorted(index.kept.values(), key=lambda kept: kept.used_at)
        older = [kept for kept in by_use if not index.is_current(kept)]
        pulled = [kept for kept in by_use if index.is_current(kept) and not kept.held.is_own]
        counted = sum(kept.held.bytes for kept in (*older, *pulled))
        leaving = []
        may_leave = [kept for kept in pulled if evicts and kept.held.digest not in only_here]
        for kept in (*older, *may_leave):
            if counted + n_bytes <= self._quota_bytes:
                break
            counted -= kept.held.bytes
            leaving.append(kept)
        if counted + n_bytes > self._quota_bytes:
            return False
        if not is_trial:
            for kept in leaving:
                if index.is_current(kept):
                    del index.shelf[kept.held.name]
                    self.discard(self.directory / kept.held.name)
                    log.info("adapter_evicted name=%s bytes=%d", kept.held.name, kept.held.bytes)
            self._drop(index, leaving)
        return True

    def discard(self, path: Path) -> None:
        """Remove a directory; it is gone from its name at once, whatever becomes of the rest."""
        bin_path = self.home / "partial" / secrets.token_hex(8)
        bin_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.rename(bin_path)
        shutil.rmtree(bin_path, ignore_errors=True)

    def version_path(self, digest: str) -> Path:
        return self.home / "versions" / digest


def _listed(kept: Kept) -> FileList | None:
    """Its files; ``None`` where the index was damaged in a way that only shows here."""
    try:
        return FileList.parse(kept.files.encode(), lambda name: name in ADAPTER_FILES)
    except (DecodeError, UnicodeError):
        return None
