"""The backbone's files: listed for other nodes, or had from them before any registry is asked.

What one node has converted, the others need not fetch from the internet and convert again. A list of files
with their digests is computed once and kept beside the model. Who has not got the model asks the nodes that
serve it; the list's digest comes from them, since no source publishes digests of converted files: here a
node trusts the members of its mesh (docs/security.md).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.cluster import serves
from mesh.ids import NodeId
from mesh.messages.files import ModelHeld
from mesh.transport.bulk.blobs import BlobRef, Holder
from mesh.transport.bulk.client import BulkClient
from mesh.units import bytes_text
from node.compute.models import Source, adopt, described, read_manifest, resolve
from node.durable import write_durably
from node.files.fetching import fetch_files, fetch_list
from node.files.file_list import FileEntry, FileList, blob_of_file, is_model_file
from node.logs import say

__all__ = ["ModelFiles", "ModelSeeker", "choose_offer", "list_model"]

log = logging.getLogger(__name__)

Offers = Callable[[], Iterable[tuple[NodeId, ModelHeld]]]
Progress = Callable[[str, float | None], None]

DIGESTS = "files.json"
JOINED_WAIT_S = 3.0
"""After joining: what the others have is retained and comes at once; a second node may just be starting."""
WAIT_S = 15.0
LOOK_EVERY_S = 0.2
SAY_EVERY_S = 0.5
"""How far it is: a line in the log each time."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine as peers may have it."""

    held: ModelHeld
    blobs: Mapping[bytes, Path | bytes]


def list_model(model: str, models_dir: Path, also_called: Sequence[str] = ()) -> ModelFiles | None:
    """The files of a model that is here; ``None`` where there are none to give.

    Reads every file the first time, about a second a GB; then only those that have changed.

    Raises:
        OSError: A file cannot be read.
    """
    source = resolve(model)
    home = models_dir / source.slug
    if source.kind == "echo" or (manifest := read_manifest(home)) is None:
        return None
    directory = source.path if source.kind == "directory" and source.path is not None else home
    paths = sorted(path for path in directory.iterdir() if path.is_file() and is_model_file(path.name))
    if source.kind != "directory":
        paths = [path for path in paths if path.name in manifest.file_bytes]
    files = _digested(paths, home / DIGESTS)
    blob = files.blob
    is_local = source.kind in ("directory", "gguf")
    held = ModelHeld(
        name=source.name, digest=blob.digest.hex(), manifest_bytes=blob.size, bytes=files.n_bytes,
        weights_sha256=manifest.weights_sha256, source="" if is_local else described(source),
        also_called=[name[:256] for name in also_called][:8],
    )  # fmt: skip
    blobs: dict[bytes, Path | bytes] = {file.digest: directory / file.name for file in files.files}
    return ModelFiles(held, {**blobs, blob.digest: files.content})


def choose_offer(
    source: Source, offers: Iterable[tuple[NodeId, ModelHeld]]
) -> tuple[ModelHeld, list[NodeId]] | None:
    """Which files to take, and who has them: those that most nodes have; then by digest.

    Of a model with a known source only what was made from that source counts.
    """
    groups: dict[str, list[tuple[NodeId, ModelHeld]]] = defaultdict(list)
    for node, held in offers:
        is_source_right = source.kind == "mesh" or held.source == described(source)
        if is_source_right and serves(held.name, source.name, held.also_called):
            groups[held.digest].append((node, held))
    if not groups:
        return None
    if len(weights := {held.weights_sha256 for group in groups.values() for _, held in group}) > 1:
        log.warning(
            "model_disagreement model=%s: %d different weights are offered; those of most nodes are taken",
            source.name, len(weights),
        )  # fmt: skip
    digest = min(groups, key=lambda digest: (-len(groups[digest]), digest))
    return groups[digest][0][1], sorted(node for node, _ in groups[digest])


class ModelSeeker:
    """Gets a model that is not here from peers. What did not come is left to the registry."""

    def __init__(
        self,
        model: str,
        models_dir: Path,
        *,
        offers: Offers,
        is_joined: Callable[[], bool],
        holder: Callable[[NodeId], Holder | None],
        bulk: BulkClient,
        waits_s: tuple[float, float] = (JOINED_WAIT_S, WAIT_S),
    ) -> None:
        self._source = resolve(model)
        self._models_dir = models_dir
        self._offers = offers
        self._is_joined = is_joined
        self._holder = holder
        self._bulk = bulk
        self._waits_s = waits_s

    async def seek(self, progress: Progress) -> None:
        """Returns when the model is here, or no peer can give it and there is a registry to ask."""
        source = self._source
        if source.kind not in ("catalogue", "hub", "mesh"):
            return
        if await asyncio.to_thread(read_manifest, self._models_dir / source.slug) is not None:
            return
        progress(f"asking peers for {source.display}", None)
        if (chosen := await self._first_offer()) is None:
            log.info("model_not_offered model=%s", source.name)
            return
        held, nodes = chosen
        try:
            async with _alone(self._models_dir, source, progress):
                is_here = await self._fetch(held, progress)
        except OSError as error:
            log.warning("model_not_fetched model=%s why=%s", source.name, error)
            return
        if is_here:
            text = f"{source.name}: {bytes_text(held.bytes)} from {', '.join(nodes)}"
            say(log, "model_from_peers", text, model=source.name, bytes=held.bytes, peers=nodes)
        else:
            log.warning("model_not_fetched model=%s why=peers did not bring it", source.name)

    async def _first_offer(self) -> tuple[ModelHeld, list[NodeId]] | None:
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        joined_at: float | None = None
        joined_wait_s, wait_s = self._waits_s
        while True:
            now = loop.time()
            if joined_at is None and self._is_joined():
                joined_at = now
            if (chosen := choose_offer(self._source, self._reachable())) is not None:
                return chosen
            is_over = now - began_at > wait_s or (joined_at is not None and now - joined_at > joined_wait_s)
            if is_over and self._source.kind != "mesh":  # there is nobody else to ask
                return None
            await asyncio.sleep(LOOK_EVERY_S)

    def _reachable(self) -> Iterable[tuple[NodeId, ModelHeld]]:
        return [(node, held) for node, held in self._offers() if self._holder(node) is not None]

    async def _fetch(self, held: ModelHeld, progress: Progress) -> bool:
        source = self._source
        if await asyncio.to_thread(read_manifest, self._models_dir / source.slug) is not None:
            return True  # another node of this machine was faster

        def holders() -> list[Holder]:
            nodes = [node for node, other in self._offers() if other.digest == held.digest]
            return [holder for node in nodes if (holder := self._holder(node)) is not None]

        blob = BlobRef(bytes.fromhex(held.digest), held.manifest_bytes)
        files = await fetch_list(self._bulk, blob, holders(), is_model_file)
        if files is None:
            return False
        total = max(1, files.n_bytes)

        loop = asyncio.get_running_loop()
        said_at = float("-inf")

        def on_bytes(n_bytes: int) -> None:
            nonlocal said_at
            if loop.time() - said_at < SAY_EVERY_S and n_bytes < total:
                return
            said_at = loop.time()
            n_peers = len(holders())
            whom = f"{n_peers} peer{'s' * (n_peers != 1)}"
            progress(f"fetching {source.display} ({bytes_text(held.bytes)}) from {whom}", n_bytes / total)

        # Its name says what is in it: an interrupted fetch goes on where the list is the same.
        partial = self._models_dir / f".{source.slug}.peers-{held.digest[:16]}.fetching"
        partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        on_bytes(0)
        is_whole = await fetch_files(self._bulk, files, holders, partial, on_bytes)
        if not is_whole:
            return False
        progress(f"checking {source.display}", None)
        stray = [path for path in partial.iterdir() if path.name not in {file.name for file in files.files}]
        for path in stray:
            path.unlink()
        is_right = await asyncio.to_thread(adopt, source, self._models_dir, partial, held.weights_sha256)
        if not is_right:
            log.warning("model_wrong model=%s: the weights are not those that were offered", source.name)
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
        return is_right


@asynccontextmanager
async def _alone(models_dir: Path, source: Source, progress: Progress) -> AsyncIterator[None]:
    """One node of this machine at a time fetches a model; the system frees the lock if it dies."""
    await asyncio.to_thread(models_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
    lock = os.open(models_dir / f".{source.slug}.fetching.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(f"waiting for another node on this machine to fetch {source.display}", None)
                await asyncio.sleep(LOOK_EVERY_S)
        yield
    finally:
        os.close(lock)


def _digested(paths: Sequence[Path], cache: Path) -> FileList:
    """Digests of files that have not changed are taken from ``cache``."""
    try:
        known = json.loads(cache.read_bytes())
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    rows: dict[str, list[object]] = {}
    entries = []
    for path in paths:
        status = path.stat()
        row = known.get(path.name)
        if not (isinstance(row, list) and len(row) == 3 and row[:2] == [status.st_size, status.st_mtime_ns]):
            row = [status.st_size, status.st_mtime_ns, blob_of_file(path).digest.hex()]
        rows[path.name] = row
        entries.append(FileEntry(path.name, status.st_size, bytes.fromhex(str(row[2]))))
    if rows != known:
        write_durably(cache, json.dumps(rows, indent=1).encode())
    return FileList(tuple(sorted(entries)))
