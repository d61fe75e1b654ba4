"""The files of one node, put together: what ``node.agent`` starts, tells facts, and serves to peers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coordinator.facts import EngineReady, StartAttempt
from mesh.agreement.versions import FilesChanged, Versions
from mesh.core import Fact
from mesh.ids import NodeId
from mesh.messages import PullAdapter, RemoveAdapter
from mesh.transport.bulk.blobs import Holder
from mesh.transport.bulk.client import BulkClient
from node.files.blobs import FileBlobs
from node.files.distribution import Distribution
from node.files.library import Library
from node.files.model_files import ModelSeeker, Progress, list_model
from node.settings import Settings
from node.state import StateDir

__all__ = ["NodeFiles"]

log = logging.getLogger(__name__)


class NodeFiles:
    """``blobs`` is what peers may have; the rest is made when ``start`` gives it what it needs."""

    def __init__(self, me: NodeId, settings: Settings, state: StateDir, model: str | None) -> None:
        self.blobs = FileBlobs()
        self._me = me
        self._settings = settings
        self._state = state
        self._model = model
        self._base: str | None = None
        self._also_called: tuple[str, ...] = ()
        self._engine_ready = asyncio.Event()
        self._distribution: Distribution | None = None
        self._seeker: ModelSeeker | None = None

    def connect(
        self,
        *,
        versions: Versions,
        bulk: BulkClient,
        where: Callable[[NodeId], Holder | None],
        incarnation: Callable[[], int],
        is_joined: Callable[[], bool],
        learn: Callable[[Fact], None],
    ) -> None:
        """Once, before ``run``: what is made after the data plane."""
        self._distribution = Distribution(
            me=self._me,
            incarnation=incarnation,
            library=Library(self._state.adapters_dir, quota_bytes=self._settings.adapter_disk),
            versions=versions,
            blobs=self.blobs,
            bulk=bulk,
            holder=where,
            base=lambda: self._base,
            replicas=self._settings.adapter_replicas,
            learn=learn,
        )
        if self._model is not None:
            self._seeker = ModelSeeker(
                self._model,
                self._state.models_dir,
                offers=versions.models,
                is_joined=is_joined,
                holder=where,
                bulk=bulk,
            )

    async def run(self) -> None:
        """Until cancelled."""
        assert self._distribution is not None, "connect comes first"
        async with asyncio.TaskGroup() as group:
            group.create_task(self._distribution.run(), name="files.distribution")
            group.create_task(self._give_model(), name="files.model")

    async def seek_model(self, progress: Progress) -> None:
        """Before the model is loaded: have its files from peers if they are not here."""
        if self._seeker is not None:
            await self._seeker.seek(progress)

    def engine_is_ready(self, weights_sha256: str) -> None:
        """``weights_sha256`` of what is loaded; empty where there are no weights."""
        self._base = weights_sha256 or None
        self._engine_ready.set()

    def on_fact(self, fact: Fact) -> None:
        if self._distribution is None:
            return
        match fact:
            case FilesChanged():
                self._distribution.changed()
            case PullAdapter() | RemoveAdapter():
                self._distribution.asked(fact)
            case StartAttempt(assign=assign) if assign.submit.adapter is not None:
                self._distribution.used(assign.submit.adapter)
            case EngineReady():
                self._also_called = fact.also_called
                self._distribution.changed()
            case _:
                pass

    async def _give_model(self) -> None:
        """What was prepared for this node is there for others as soon as it runs here."""
        await self._engine_ready.wait()
        if self._model is None or self._distribution is None:
            return
        try:
            files = await asyncio.to_thread(
                list_model, self._model, self._state.models_dir, self._also_called
            )
        except OSError as error:
            log.warning("the model's files cannot be given to peers: %s", error)
            return
        self._distribution.serves_model(files)
