"""The engine with all its parts: shelf of adapters, store of feature maps, and what starts a tuning task."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from mesh.errors import ConfigError
from mesh.messages import NodeRates, TuneSpec
from mesh.messages.node import RATED_TOP_LAYERS
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.contract import Backbone
from node.compute.backbone.llama import LlamaBackbone
from node.compute.features.choice import FetchOrCompute
from node.compute.features.link import MeshLink
from node.compute.features.maps import FeatureMaps
from node.compute.features.mesh_store import MeshStore
from node.compute.features.proof import Proof
from node.compute.features.shape import Numerics
from node.compute.features.store import LocalStore
from node.compute.messages import Load, Run
from node.compute.model_engine import ModelEngine
from node.compute.rate_watch import Measure
from node.compute.self_benchmark import SelfBenchmark
from node.compute.serve.arrivals import Source
from node.compute.serve.prefix_disk import PrefixDisk
from node.compute.serve.prefix_keys import PrefixKeys
from node.compute.serve.prefixes import Prefixes
from node.compute.serve.shared_prefixes import SharedPrefixes
from node.compute.serve.tokens import Tokens
from node.compute.tune.job import TuneJob
from node.compute.tune.making import FeaturesJob
from node.compute.tune.part_job import tune_job
from node.compute.tune.source import FeatureSource, MapsFactory
from node.compute.tune.variants import Variant, VariantJob

__all__ = ["FeatureMemory", "measurement", "model_engine", "tokenizer_digest"]

log = logging.getLogger(__name__)

# Of a node that does not know its rates: a small board's, so that what peers have is fetched.
_GUESSED_TOKENS_PER_S = 100.0


def model_engine(
    load: Load,
    names: Sequence[str],
    directory: Path,
    digest: str,
    backbone: Backbone,
    threads: int,
    clock: Callable[[], float] = time.monotonic,
    *,
    memory: FeatureMemory | None = None,
) -> ModelEngine:
    """``directory`` holds the model, ``digest`` is its weights' SHA-256. A model outside the Llama family is
    served without adapters and cannot be tuned. ``clock`` is what every duration is told by. ``memory``:
    where feature maps are found and kept; one without a mesh unless given."""
    tokens = Tokens(directory)
    try:
        facts = BackboneFacts.of(directory, digest)
    except ConfigError as error:
        log.info("no adapters: %s", error)
        return ModelEngine(names, backbone, tokens, threads, clock, why_plain=str(error))
    shelf = Shelf(Path(load.adapters_dir), facts, load.adapter_bytes, device=backbone.device)
    memory = memory or FeatureMemory(load, backbone, threads)
    jobs = _Jobs(load, directory, digest, backbone, threads, clock, memory)
    return ModelEngine(
        names, backbone, tokens, threads, clock,
        shelf=shelf, make_job=jobs.job, make_features=lambda run, left_s: jobs.features(run, tokens),
        share=_sharing(load, directory, digest, backbone, memory),
    )  # fmt: skip


def _sharing(
    load: Load, directory: Path, digest: str, backbone: Backbone, memory: FeatureMemory
) -> Callable[[Prefixes], SharedPrefixes] | None:
    """What fetches prefixes from the disk and the mesh and publishes ours; ``None`` where that is of no use:
    a graphics card reads a prefix in less time than any link carries its states."""
    if not isinstance(backbone, LlamaBackbone) or backbone.device != "cpu":
        return None
    rates = memory.rates

    def share(prefixes: Prefixes) -> SharedPrefixes:
        keys = PrefixKeys(backbone, backbone_digest=digest, tokenizer_digest=tokenizer_digest(directory))
        sources: list[tuple[str, Source]] = []
        disk = None
        if load.feature_disk_bytes:
            disk = PrefixDisk(LocalStore(memory.directory, 0, load.feature_disk_bytes))
            sources.append(("disk", disk))
        if memory.link is not None:
            sources.append(("mesh", memory.link))
        row_s = 1 / rates.prefill_tokens_per_s if rates is not None else None
        return SharedPrefixes(prefixes, keys, sources, disk, row_s=row_s, slowdown=load.slowdown)

    return share


def measurement(directory: Path, digest: str, backbone: Backbone, threads: int) -> Measure:
    """What starts a measurement of the rates of ``backbone``, as ``model_engine`` would use it."""
    try:
        facts = BackboneFacts.of(directory, digest)
    except ConfigError:
        facts = None  # served without adapters

    def measure(is_busy: bool) -> Generator[None, None, NodeRates]:
        return SelfBenchmark(backbone, 1 if is_busy else threads, facts).run()

    return measure


class FeatureMemory:
    """Where this process finds and keeps feature maps: memory, disk, and over ``link`` the mesh.

    ``rates``: as far as known; what fetching is weighed against until something was computed. ``proof``: of
    how ``backbone`` computes, ``None`` = nothing is kept of it.
    """

    def __init__(
        self,
        load: Load,
        backbone: Backbone,
        threads: int,
        *,
        link: MeshLink | None = None,
        rates: NodeRates | None = None,
        proof: Proof | None = None,
    ) -> None:
        tokens_per_s = (rates.features_tokens_per_s if rates is not None else None) or _GUESSED_TOKENS_PER_S
        below = max(1, backbone.n_layers - RATED_TOP_LAYERS)
        self.link = link
        self.proof = proof or Proof(backbone, threads)
        self.choice = FetchOrCompute(1 / (tokens_per_s * below), load.slowdown)
        self.rates = rates
        self.directory = Path(load.maps_dir) if load.maps_dir else Path(load.features_dir) / "maps"
        local = LocalStore(self.directory, load.feature_memory_bytes, load.feature_disk_bytes)
        self.store = MeshStore(local, link, self.choice, below)


class _Jobs:
    """Tuning tasks on one backbone and one store of feature maps; both are made ready by the first."""

    def __init__(
        self,
        load: Load,
        directory: Path,
        digest: str,
        backbone: Backbone,
        threads: int,
        clock: Callable[[], float],
        memory: FeatureMemory,
    ) -> None:
        self._memory = memory
        self._load = load
        self._directory = directory
        self._digest = digest
        self._backbone = backbone
        self._threads = threads
        self._clock = clock
        self._source: FeatureSource | None = None

    def job(self, spec: TuneSpec, deadline_s: float | None) -> TuneJob | VariantJob:
        """``deadline_s``: seconds left for it.

        Raises:
        ConfigError: The task cannot be done as asked.
        """
        load, own = self._load, self._feature_source()
        checkpoint_dir = Path(load.features_dir) / "checkpoints"
        began_at = self._clock()

        def make(variant: Variant) -> TuneJob:
            left_s = None if deadline_s is None else max(0.0, deadline_s - (self._clock() - began_at))
            return tune_job(
                spec,
                store=self._memory.store,
                directory=self._directory,
                digest=self._digest,
                shelf_dir=Path(load.adapters_dir),
                checkpoint_dir=checkpoint_dir,
                maps_factory=self._in_form(variant),
                features_name=variant.profile,
                datasets_dir=Path(load.datasets_dir),
                threads=self._threads,
                deadline_s=left_s,
                clock=self._clock,
            )

        if not self._memory.store.is_linked or spec.part is not None:  # parts are made in one form by all
            return make(Variant(_profile(own)))
        make(Variant(_profile(own))).close()  # what cannot be done is refused now
        return VariantJob(
            spec,
            _profile(own),
            make=make,
            maps=lambda variant, cut, n_bytes: self._in_form(variant)(
                cut, error=spec.feature_error, n_bytes=n_bytes
            ),
            store=self._memory.store,
            choice=self._memory.choice,
            directory=self._directory,
            digest=self._digest,
            shelf_dir=Path(load.adapters_dir),
            checkpoint_dir=checkpoint_dir,
            datasets_dir=Path(load.datasets_dir),
            n_layers=self._backbone.n_layers,
            width=self._backbone.width,
            clock=self._clock,
        )

    def _in_form(self, variant: Variant) -> MapsFactory:
        """Features as this node computes them, or as others have: then there is no computing them here."""
        source = self._feature_source()
        if variant.profile != _profile(source):
            precision, _, text = variant.profile.partition(" ")
            source = replace(
                source,
                backbone=None,
                numerics=Numerics(is_packed=True, threads=None, text=text),
                precision=precision,
                width=self._backbone.width,
            )

        def maps(cut: int, *, error: float = 0.0, n_bytes: int = 0, codec: str | None = None) -> FeatureMaps:
            return source(cut, error=error, n_bytes=n_bytes, codec=codec or variant.codec)

        return maps

    def features(self, run: Run, tokens: Tokens) -> FeaturesJob:
        """Raises:
        ConfigError: The task cannot be done as asked.
        """
        source = self._feature_source()
        return FeaturesJob(
            run.submit,
            directory=self._directory,
            maps_factory=source,
            tokens=tokens,
            profile=_profile(source),
            datasets_dir=Path(self._load.datasets_dir),
            threads=self._threads,
            clock=self._clock,
        )

    def _feature_source(self) -> FeatureSource:
        load = self._load
        if self._source is None:
            self._source = FeatureSource(
                backbone=self._backbone,
                store=self._memory.store,
                backbone_digest=self._digest,
                tokenizer_digest=tokenizer_digest(self._directory),
                numerics=self._memory.proof.numerics(),
                precision=self._backbone.precision,
                store_bytes=load.feature_memory_bytes + load.feature_disk_bytes,
                choice=self._memory.choice,
            )
        return self._source


def _profile(source: FeatureSource) -> str:
    """As ``NodeInfo.features_profile`` says it."""
    return f"{source.precision} {source.numerics.text}"


def tokenizer_digest(directory: Path) -> str:
    """Of what turns texts into tokens."""
    digest = hashlib.blake2b(digest_size=32)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
