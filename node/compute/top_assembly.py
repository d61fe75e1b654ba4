"""The engine of a node that holds the top layers only, with all its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mesh.messages import NodeRates
from mesh.messages.node import RATED_TOP_LAYERS
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.shelf import Shelf
from node.compute.assembly import tokenizer_digest
from node.compute.features.choice import FetchOrCompute
from node.compute.features.link import MeshLink
from node.compute.features.maps import FeatureMaps
from node.compute.features.mesh_store import MeshStore
from node.compute.features.shape import Numerics
from node.compute.features.store import LocalStore
from node.compute.messages import Load, Run
from node.compute.rates import TUNE_PASSES, guessed_rates
from node.compute.serve.tokens import Tokens
from node.compute.serve.tuning import Job
from node.compute.top_backbone import TopBackbone
from node.compute.top_engine import TopEngine
from node.compute.tune.part_job import tune_job
from node.compute.tune.source import FeatureSource
from node.compute.tune.top_model import read_config, top_bytes

__all__ = ["top_engine", "top_rates"]

# To hear from the node which profiles its peers have, and who claims what: it answers from its own memory.
_ANSWER_S = 0.2


def top_engine(
    load: Load,
    names: Sequence[str],
    directory: Path,
    digest: str,
    device: str,
    threads: int,
    clock: Callable[[], float] = time.monotonic,
    *,
    link: MeshLink | None = None,
) -> TopEngine:
    """``directory`` holds the model, ``digest`` is its weights' SHA-256.

    Raises:
        ConfigError: Not of the family whose layers can be used from feature maps.
    """
    config = read_config(directory)
    facts = BackboneFacts.of(directory, digest)
    top = TopBackbone(directory, config, device, load.top_layers)
    shelf = Shelf(Path(load.adapters_dir), facts, load.adapter_bytes, device=device)
    parts = _Parts(load, directory, digest, config.hidden_size, threads, clock, link)
    return TopEngine(names, top, cache(lambda: Tokens(directory)), shelf, parts, threads, clock)


def top_rates(config: Any, top_layers: int) -> NodeRates:
    """A guess, as nothing of it is this node's to measure: its feature maps are made elsewhere, or long ago.

    They count as if it made them itself, so that a job goes to a node with the whole model where one is free.
    """
    layers = min(top_layers, config.num_hidden_layers)
    # As if all layers were as large as those here; ``guessed_rates`` knows what a device of any kind does.
    layer_bytes = top_bytes(config, 1, "classify")
    whole = guessed_rates(layer_bytes * config.num_hidden_layers, config.num_hidden_layers, True)
    through_top = whole.prefill_tokens_per_s * config.num_hidden_layers / layers
    return NodeRates(
        prefill_tokens_per_s=through_top,
        decode_tokens_per_s=whole.decode_tokens_per_s,
        row_cost=whole.row_cost,
        features_tokens_per_s=whole.features_tokens_per_s,
        tune_tokens_per_s=through_top * layers / min(RATED_TOP_LAYERS, layers) / TUNE_PASSES,
        adapter_load_s=whole.adapter_load_s,
        origin="guessed",
    )


class _Parts:
    """See ``node.compute.top_engine.TopParts``: everything on one store that reads from the mesh."""

    def __init__(
        self,
        load: Load,
        directory: Path,
        digest: str,
        width: int,
        threads: int,
        clock: Callable[[], float],
        link: MeshLink | None,
    ) -> None:
        self._load = load
        self._directory = directory
        self._digest = digest
        self._width = width
        self._threads = threads
        self._clock = clock
        self._tokenizer_digest = tokenizer_digest(directory)
        maps_dir = Path(load.maps_dir) if load.maps_dir else Path(load.features_dir) / "maps"
        # Nothing is computed here, so there is nothing to weigh fetching against.
        self._choice = FetchOrCompute(1.0, load.slowdown)
        self._store = MeshStore(
            LocalStore(maps_dir, load.feature_memory_bytes, load.feature_disk_bytes), link, self._choice
        )

    def profiles(self) -> Sequence[str]:
        asking = self._store.ask([], 0)
        if asking is None or not asking.wait(_ANSWER_S) or asking.answer is None:
            return ()
        return asking.answer[1].profiles

    def claimed(self, keys: Sequence[bytes]) -> bool:
        missing = self._store.missing(keys)
        if not missing:
            return True
        asking = self._store.ask(missing, 0)
        if asking is None or not asking.wait(_ANSWER_S) or asking.answer is None:
            return False
        return all(asking.answer[0])

    def maps(self, profile: str, cut: int, codec: str | None, error: float, n_bytes: int) -> FeatureMaps:
        return self._source(profile)(cut, error=error, n_bytes=n_bytes, codec=codec)

    def job(self, run: Run, left_s: float | None, profile: str, codec: str | None) -> Job:
        load, tune, source, made_in = self._load, run.submit.tune, self._source(profile), codec
        assert tune is not None, "the submission has been checked"

        def maps(cut: int, *, error: float = 0.0, n_bytes: int = 0, codec: str | None = None) -> FeatureMaps:
            return source(cut, error=error, n_bytes=n_bytes, codec=codec or made_in)

        return tune_job(
            tune,
            store=self._store,
            directory=self._directory,
            digest=self._digest,
            shelf_dir=Path(load.adapters_dir),
            checkpoint_dir=Path(load.features_dir) / "checkpoints",
            maps_factory=maps,
            features_name=profile,
            datasets_dir=Path(load.datasets_dir),
            threads=self._threads,
            deadline_s=left_s,
            clock=self._clock,
        )

    def _source(self, profile: str) -> FeatureSource:
        load = self._load
        precision, _, text = profile.partition(" ")
        return FeatureSource(
            backbone=None,
            store=self._store,
            backbone_digest=self._digest,
            tokenizer_digest=self._tokenizer_digest,
            numerics=Numerics(is_packed=True, threads=None, text=text),
            precision=precision,
            store_bytes=load.feature_memory_bytes + load.feature_disk_bytes,
            choice=self._choice,
            width=self._width,
        )
