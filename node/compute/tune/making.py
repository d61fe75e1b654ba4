"""A ``features`` task: feature maps of records or texts, made and kept for whoever reads them next.

reading ─▶ features

Chunks of a few tenths of a second, as tuning. What was made stays when the task is stopped, but for the last
few seconds' work: the same task another time finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path

import torch

from mesh.errors import ConfigError
from mesh.messages import AdapterCard, FeaturesHeld, FeaturesSpec, Output, Submit, TuneSpec
from mesh.messages.node import RATED_TOP_LAYERS
from node.compute.serve.texts import read_ids, texts_ids
from node.compute.serve.tokens import Tokens
from node.compute.tune.batches import TuneTokens, encoded
from node.compute.tune.data import records_of
from node.compute.tune.held import features_held
from node.compute.tune.job import Snapshot, TuneEvent
from node.compute.tune.source import MapsFactory
from node.compute.tune.top_model import check_cut, read_config

__all__ = ["FeaturesJob"]

_TEXTS_PER_LOOK = 16

Text = tuple[int, ...]


class FeaturesJob:
    """``directory`` holds the model; ``profile`` is how its features are computed, as ``NodeInfo`` says it.

    Raises (from ``step`` and on construction):
        ConfigError: The task cannot be done as asked; the text says what to change.
    """

    result: AdapterCard | None = None

    def __init__(
        self,
        submit: Submit,
        *,
        directory: Path,
        maps_factory: MapsFactory,
        tokens: Tokens,
        profile: str,
        datasets_dir: Path | None = None,
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._submit = submit
        self._directory = directory
        self._maps_factory = maps_factory
        self._tokens = tokens
        self._profile = profile
        self._datasets_dir = datasets_dir
        self._threads = threads
        self._clock = clock
        self._config = read_config(directory)
        self._spec = submit.features or FeaturesSpec(
            top_layers=(submit.tune.top_layers if submit.tune else None) or RATED_TOP_LAYERS
        )
        self._cut = check_cut(self._config, self._spec.top_layers)
        self.progress = Snapshot()
        self.held: FeaturesHeld | None = None
        self._work = self._whole()

    @property
    def output(self) -> Output:
        return Output(features=self.held)

    def step(self) -> TuneEvent:
        """One chunk of work; ``is_done`` once ``held`` is there."""
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode(False), torch.no_grad():
            is_done = next(self._work, "end") == "end"
        assert not is_done or self.held is not None
        return TuneEvent(self.progress, is_done)

    def close(self) -> None:
        """Give up; what is made already stays."""
        self._work.close()

    def _whole(self) -> Generator[None, None, None]:
        texts: list[Text] = []
        tune = self._submit.tune
        reading_of = self._read_texts() if tune is None else self._read_records(tune)
        for text in reading_of:
            texts.append(text)
            if len(texts) % _TEXTS_PER_LOOK == 0:
                self.progress = Snapshot(phase="reading", text=f"{len(texts)} texts read")
                yield
        texts = list(dict.fromkeys(texts))
        width: int = self._config.hidden_size
        n_bytes = 4 * width * sum(map(len, texts))
        error = tune.feature_error if tune is not None else 0.0
        maps = self._maps_factory(self._cut, error=error, n_bytes=n_bytes)
        self.progress = Snapshot(phase="features")
        yield
        started_at = self._clock()
        reading = maps.reading(texts, keep=False)
        try:
            while not reading.step():
                done = reading.fraction
                spent_s = self._clock() - started_at
                self.progress = Snapshot(
                    phase="features",
                    fraction=done,
                    eta_s=spent_s / done * (1 - done) if done > 0 else None,
                    cache_hits=maps.hits,
                    cache_misses=maps.misses,
                )
                yield
        finally:
            reading.close()
        self.held = features_held(maps, texts, top_layers=self._spec.top_layers, profile=self._profile)
        self.progress = Snapshot(
            phase="features", fraction=1.0, cache_hits=maps.hits, cache_misses=maps.misses
        )

    def _read_records(self, spec: TuneSpec) -> Generator[Text, None, None]:
        records, held_out = records_of(spec, self._datasets_dir)
        tokens = TuneTokens(self._directory, spec.max_tokens)
        for found, name in ((records, "the data"), (held_out, "the evaluation data")):
            if found is not None:
                for example in encoded(found, tokens, skip_bad=spec.skip_bad, name=name):
                    yield example.ids

    def _read_texts(self) -> Generator[Text, None, None]:
        spec = self._spec
        try:
            texts, _ = texts_ids(self._submit, spec.reads, self._tokens, completes=spec.completes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for number, ids in enumerate(texts):
            read = read_ids(ids, spec.reads)
            if not read:
                raise ConfigError(f"text {number + 1} has no tokens")
            yield tuple(read)
