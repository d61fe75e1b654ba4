"""Keeps this node's adapters in step with the mesh: announces what is new here, pulls what is new there.

    every second   look at the directory; say what has changed (``OwnFiles``)
    on news        of what others say: remove what was removed, pull what this node should have

A node pulls the newest version of an adapter for its backbone: always of those it has already; of others
if they are small or somebody asked (``PullAdapter``), as the settings say. What failed is tried again, ever
more seldom. The compute process notices the directory by itself, within two seconds and without a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial as partial_of
from pathlib import Path
from typing import Literal

from mesh.agreement.versions import Newest, OwnFiles, Versions, rank_of
from mesh.core import Fact
from mesh.ids import NodeId
from mesh.messages import FilesHeld, PullAdapter, RemoveAdapter
from mesh.messages.files import PULLS_MAX, AdapterHeld, AdapterPull
from mesh.transport.bulk.blobs import BlobRef, Holder
from mesh.transport.bulk.client import BulkClient
from mesh.units import bytes_text
from node.compute.adapters.card import CONFIG_FILE, WEIGHTS_FILE
from node.files.blobs import FileBlobs
from node.files.fetching import fetch_files, fetch_list
from node.files.file_list import ADAPTER_FILES, FileList
from node.files.library import Holdings, Library
from node.files.model_files import ModelFiles
from node.logs import say

__all__ = ["SMALL_BYTES", "Distribution", "Replicas", "wanted"]

log = logging.getLogger(__name__)

Replicas = Literal["auto", "all", "demand"]

SMALL_BYTES = 32_000_000
"""An adapter of rank 8 on the top quarter of a 1B model has 5 MB; at 200 Mbit/s this is 1.3 s."""
LOOK_EVERY_S = 1.0
TELL_OTHERS_EVERY_S = 2.0
"""Of what was pulled: who joins a mesh of many adapters does not send its whole list after each."""
PULLS_AT_ONCE = 4
RETRY_S = 2.0
RETRY_MOST_S = 120.0
FAILED_MAX = 1024
TELL_EVERY_S = 0.5
"""While a pull that somebody waits for goes on."""


def wanted(
    newest: Mapping[str, Newest], here: Holdings, base: str | None, replicas: Replicas
) -> list[AdapterHeld]:
    """What this node should have of what the mesh has, the smallest first."""
    if base is None:
        return []
    found = []
    given_up = dict(here.declined)
    for removed in here.removed:
        given_up[removed.name] = max(given_up.get(removed.name, 0), removed.version)
    for name, one in newest.items():
        held = one.held
        if held is None or held.base not in (None, base) or given_up.get(name, 0) >= one.version:
            continue
        mine = here.shelf.get(name)
        if mine is not None:
            if rank_of(mine.version, mine.digest) < one.rank:
                found.append(held)
        elif replicas == "all" or (replicas == "auto" and held.bytes <= SMALL_BYTES):
            found.append(held)
    return sorted(found, key=lambda held: (held.bytes, held.name))


class Distribution:
    """The shell around ``Versions`` and the ``Library``; ``run`` it beside the other parts of a node.

    Args:
        incarnation: This node's, as it is now.
        base: SHA-256 of the weights served here, once they are loaded.
        holder: Where a node's data plane answers.
        learn: Takes facts; must not call back at once.
    """

    def __init__(
        self,
        *,
        me: NodeId,
        incarnation: Callable[[], int],
        library: Library,
        versions: Versions,
        blobs: FileBlobs,
        bulk: BulkClient,
        holder: Callable[[NodeId], Holder | None],
        base: Callable[[], str | None],
        replicas: Replicas,
        learn: Callable[[Fact], None],
    ) -> None:
        self._me = me
        self._incarnation = incarnation
        self._library = library
        self._versions = versions
        self._blobs = blobs
        self._bulk = bulk
        self._holder = holder
        self._base = base
        self._replicas: Replicas = replicas
        self._learn = learn
        self._here = Holdings()
        self._model: ModelFiles | None = None
        self._said: FilesHeld | None = None
        self._said_at = float("-inf")
        self._news = asyncio.Event()
        self._pulling: dict[str, asyncio.Task[None]] = {}  # by name
        self._failed: dict[str, tuple[int, float]] = {}  # digest -> how often, not before
        self._asked: dict[str, AdapterPull] = {}  # pulls that somebody waits for, by name
        self._removals: list[tuple[str, int]] = []
        self._trouble_said = ""

    # ── what others of this process say ─────────────────────────────────────────────────────────────

    def changed(self) -> None:
        """Others have other files than before."""
        self._news.set()

    def asked(self, message: PullAdapter | RemoveAdapter) -> None:
        """A command, or the coordinator, wants something of this node."""
        match message:
            case PullAdapter(digest=digest):
                name = message.save_as or message.name
                if name in self._pulling:
                    return
                mine = next((one for one in self._here.adapters if one.digest == digest), None)
                held = mine or self._versions.held(digest)
                if held is None:
                    self._note(AdapterPull(name=name, digest=digest, done_bytes=0, bytes=0,
                                           trouble="no node that is here has this version"))  # fmt: skip
                    return
                self._note(AdapterPull(name=name, digest=digest, done_bytes=0, bytes=held.bytes))
                self._begin(held, name, is_asked=True)
            case RemoveAdapter(name=name, version=version):
                self._removals.append((name, version))
        self._news.set()

    def used(self, name: str) -> None:
        """An attempt uses the adapter."""
        self._library.used(name)

    def serves_model(self, model: ModelFiles | None) -> None:
        """From now on this node gives these files to others."""
        self._model = model
        self._blobs.put("model", model.blobs if model is not None else {})
        self._news.set()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await asyncio.to_thread(self._library.sweep)
            while True:
                await self._look()
                self._pull_what_is_wanted()
                try:
                    async with asyncio.timeout(TELL_EVERY_S if self._pulling else LOOK_EVERY_S):
                        await self._news.wait()
                except TimeoutError:
                    pass
                self._news.clear()
        finally:
            for task in self._pulling.values():
                task.cancel()
            await asyncio.gather(*self._pulling.values(), return_exceptions=True)

    async def _look(self) -> None:
        newest = dict(self._versions.newest)
        try:
            while self._removals:
                await asyncio.to_thread(self._library.remove, *self._removals[0])
                del self._removals[0]
            self._here = await asyncio.to_thread(self._library.look, newest, self._base())
        except OSError as error:
            if str(error) != self._trouble_said:
                self._trouble_said = str(error)
                log.warning("adapters cannot be looked at: %s", error)
            return
        self._trouble_said = ""
        self._blobs.put("adapters", self._here.blobs)
        held = FilesHeld(
            node=self._me,
            incarnation=self._incarnation(),
            adapters=list(self._here.adapters),
            removed=list(self._here.removed),
            model=self._model.held if self._model is not None else None,
            base=self._base(),
            pulls=list(self._asked.values()),
        )
        now = asyncio.get_running_loop().time()
        is_due = now - self._said_at >= TELL_OTHERS_EVERY_S
        if (
            self._said is None
            or _urgent(held) != _urgent(self._said)
            or (is_due and _stable(held) != _stable(self._said))
        ):
            self._said, self._said_at = held, now
            self._learn(OwnFiles(held))

    def _pull_what_is_wanted(self) -> None:
        now = asyncio.get_running_loop().time()
        for held in wanted(self._versions.newest, self._here, self._base(), self._replicas):
            if len(self._pulling) >= PULLS_AT_ONCE:
                return
            _, not_before = self._failed.get(held.digest, (0, 0.0))
            if held.name not in self._pulling and now >= not_before and self._holders(held.digest):
                self._begin(held, held.name, is_asked=False)

    def _holders(self, digest: str) -> list[Holder]:
        nodes = self._versions.holders(digest)
        return [holder for node in nodes if (holder := self._holder(node)) is not None]

    # ── pulling ─────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, held: AdapterHeld, name: str, *, is_asked: bool) -> None:
        task = asyncio.create_task(self._pull(held, name, is_asked), name=f"files.pull-{name}")
        self._pulling[name] = task
        task.add_done_callback(lambda done: self._ended(name))

    def _ended(self, name: str) -> None:
        self._pulling.pop(name, None)
        self._news.set()

    async def _pull(self, held: AdapterHeld, name: str, is_asked: bool) -> None:
        began_at = asyncio.get_running_loop().time()
        try:
            trouble = await self._pulled(held, name, is_asked)
        except OSError as error:
            trouble = f"{error.strerror or error}"
        seconds = asyncio.get_running_loop().time() - began_at
        if trouble is None:
            self._failed.pop(held.digest, None)
            text = f"adapter {name} version {held.version}, {bytes_text(held.bytes)} in {seconds:.2f} s"
            say(log, "adapter_pulled", text, name=name, version=held.version, seconds=round(seconds, 3))
        else:
            n_failed = self._failed.get(held.digest, (0, 0.0))[0] + 1
            rest_s = min(RETRY_S * 2 ** min(n_failed - 1, 10), RETRY_MOST_S)
            if len(self._failed) >= FAILED_MAX:
                del self._failed[next(iter(self._failed))]
            self._failed[held.digest] = (n_failed, asyncio.get_running_loop().time() + rest_s)
            log.warning("adapter_not_pulled name=%s version=%d why=%s", name, held.version, trouble)
        if is_asked:
            done_bytes = held.bytes if trouble is None else 0
            self._note(AdapterPull(name=name, digest=held.digest, done_bytes=done_bytes, bytes=held.bytes,
                                   trouble=trouble))  # fmt: skip

    async def _pulled(self, held: AdapterHeld, name: str, is_asked: bool) -> str | None:
        """``None``, or why it is not here."""
        is_new = not is_asked and name not in self._here.shelf
        if is_new and not await asyncio.to_thread(self._library.has_room, held.bytes):
            return "no room: see the setting adapter_disk"
        mine = await asyncio.to_thread(self._library.own_copy, held.digest)
        arrived = mine or await self._fetched(held, name, is_asked)
        if isinstance(arrived, str):
            return arrived
        files, partial = arrived
        is_own = name != held.name  # somebody's choice, and perhaps the last copy
        if is_own:
            newest = self._versions.newest.get(name)
            version = await asyncio.to_thread(self._library.next_version, name, newest)
            held = replace(held, name=name, version=version)
        only_here = {one.digest for one in self._here.adapters if not self._versions.holders(one.digest)}
        install = partial_of(
            self._library.install,
            held,
            files,
            partial,
            is_wanted=is_asked,
            is_own=is_own,
            only_here=only_here,
        )
        return await asyncio.to_thread(install)

    async def _fetched(self, held: AdapterHeld, name: str, is_asked: bool) -> tuple[FileList, Path] | str:
        """Its files in a directory of their own, or why not."""
        blob = BlobRef(bytes.fromhex(held.digest), held.manifest_bytes)
        files = await fetch_list(self._bulk, blob, self._holders(held.digest), ADAPTER_FILES.__contains__)
        if files is None:
            return "no holder gave the list of its files"
        if files.n_bytes != held.bytes:
            return "its files are not as large as was said"
        if not {CONFIG_FILE, WEIGHTS_FILE} <= {file.name for file in files.files}:
            return "it lacks the configuration or the weights"

        def on_bytes(n_bytes: int) -> None:
            if is_asked:
                self._note(AdapterPull(name=name, digest=held.digest, done_bytes=n_bytes, bytes=held.bytes))

        partial = await asyncio.to_thread(self._library.partial)
        is_whole = await fetch_files(
            self._bulk, files, lambda: self._holders(held.digest), partial, on_bytes, tries=3
        )
        if not is_whole:
            await asyncio.to_thread(self._library.discard, partial)
            return "its holders did not bring it"
        return files, partial

    def _note(self, pull: AdapterPull) -> None:
        """For whoever waits: they read it in what this node says of its files."""
        self._asked.pop(pull.name, None)
        self._asked[pull.name] = pull
        while len(self._asked) > PULLS_MAX:
            del self._asked[next(iter(self._asked))]


def _urgent(files: FilesHeld) -> FilesHeld:
    """Without what somebody else has said already: that this node has it, too, can wait a little."""
    return replace(_stable(files), adapters=[held for held in files.adapters if held.is_own])


def _stable(files: FilesHeld) -> FilesHeld:
    """Without what time alone changes."""
    return replace(files, removed=[replace(one, left_s=0.0) for one in files.removed])
