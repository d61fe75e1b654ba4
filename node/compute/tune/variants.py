"""In which form a tuning job reads its features: as this node computes them, or as a peer has them already.

Features of another precision, other kernels or another codec have other last bits, so a job reads all of
them in one form, which is part of its name. This node's own form needs nobody. Another one is taken where
the mesh holds nearly all features of a sample in it and fetching them is clearly quicker than computing:

    forms on offer ─▶ begun before in one? ─▶ that one
                  └─▶ a sample of the records: who has their features, in which form? ─▶ the cheapest

What a peer's form lacks cannot be computed here. If it turns out to lack something, the job starts over in
this node's own form, as a whole: no run ever mixes two.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.errors import ConfigError
from mesh.messages import Output, TuneSpec
from node.compute.adapters.card import read_card
from node.compute.features.choice import FetchOrCompute
from node.compute.features.codec import choose_codec
from node.compute.features.entry import bytes_of
from node.compute.features.key import BLOCK_TOKENS
from node.compute.features.maps import FeatureMaps, MissingFeaturesError
from node.compute.features.mesh_store import MeshStore
from node.compute.tune.batches import TuneTokens, encoded
from node.compute.tune.data import records_of
from node.compute.tune.identity import spec_digest
from node.compute.tune.job import Snapshot, TuneEvent, TuneJob
from node.compute.tune.records import Records

__all__ = ["Offer", "Variant", "VariantJob", "cheapest"]

_log = logging.getLogger(__name__)

_SAMPLE = 64
"""Records: a share estimated from so many is off by .06 at most, two times of three."""
_WHOLE = 0.98
_CLEARLY, _CLEARLY_S = 0.75, 1.0
_PROFILES_MAX = 4
"""Each is a question of a millisecond."""
_WAIT_S = 0.01
_CODECS = ("raw", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Variant:
    """``codec`` ``None``: whichever this node would choose."""

    profile: str
    codec: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What one form would cost."""

    variant: Variant
    is_own: bool
    """What is not there can be computed here."""
    share: float
    """Of the features that is here or at peers."""
    fetch_s: float
    """For those that peers have."""
    compute_s: float
    """For all of them, were none there."""

    @property
    def cost_s(self) -> float:
        if self.is_own:
            fetched = min(self.fetch_s, self.share * self.compute_s)
            return fetched + (1 - self.share) * self.compute_s
        return self.fetch_s if self.share >= _WHOLE else math.inf


def cheapest(offers: Sequence[Offer]) -> Offer:
    """The first, unless another one is clearly cheaper. (The first is this node's own choice.)"""
    first, best = offers[0], min(offers, key=lambda offer: offer.cost_s)
    saved_s = first.cost_s - best.cost_s
    is_clear = best.cost_s < _CLEARLY * first.cost_s and saved_s > _CLEARLY_S
    return best if is_clear else first


class VariantJob:
    """A ``TuneJob`` in the form that is chosen first. ``own``: this node's profile. ``make``: the job in one
    form; ``maps``: its features at a cut, for texts that take so many bytes raw.
    """

    def __init__(
        self,
        spec: TuneSpec,
        own: str,
        *,
        make: Callable[[Variant], TuneJob],
        maps: Callable[[Variant, int, int], FeatureMaps],
        store: MeshStore,
        choice: FetchOrCompute,
        directory: Path,
        digest: str,
        shelf_dir: Path,
        checkpoint_dir: Path,
        datasets_dir: Path | None,
        n_layers: int,
        width: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._own = own
        self._make = make
        self._maps = maps
        self._store = store
        self._choice = choice
        self._directory = directory
        self._digest = digest
        self._shelf_dir = shelf_dir
        self._checkpoint_dir = checkpoint_dir
        self._datasets_dir = datasets_dir
        self._n_layers = n_layers
        self._width = width
        self._clock = clock
        self._job: TuneJob | None = None
        self._variant = Variant(own)
        self.progress = Snapshot(epochs=spec.epochs)
        self._choosing = self._chosen()

    @property
    def output(self) -> Output:
        return self._job.output if self._job is not None else Output()

    def step(self) -> TuneEvent:
        """See ``TuneJob.step``."""
        if self._job is None:
            try:
                next(self._choosing)
            except StopIteration as end:
                self._variant = end.value
                self._job = self._make(self._variant)
            return TuneEvent(self.progress)
        try:
            event = self._job.step()
        except MissingFeaturesError as error:
            if self._variant.profile == self._own:
                raise
            text = f"not all features come as {self._variant.profile} ({error}); starting over with own ones"
            _log.warning("tuning %s: %s", self._spec.adapter, text)
            self._job.close()
            self._variant = Variant(self._own)
            self._job = self._make(self._variant)
            event = TuneEvent(replace(self._job.progress, text=text), text=text)
        self.progress = event.progress
        return event

    def close(self) -> None:
        self._choosing.close()
        if self._job is not None:
            self._job.close()

    # ── the choice ──────────────────────────────────────────────────────────────────────────────────

    def _chosen(self) -> Generator[None, None, Variant]:
        own = Variant(self._own)
        asking = self._store.ask([], 0)
        while asking is not None and not asking.wait(_WAIT_S):
            yield
        said = asking.answer if asking is not None else None
        others = [
            profile for profile in (said[1].profiles if said is not None else ()) if profile != self._own
        ]
        variants = [own, *(Variant(profile) for profile in others[:_PROFILES_MAX])]
        if self._spec.feature_error:
            variants = [own, *(Variant(v.profile, codec) for v in variants for codec in _CODECS)]
        if len(variants) == 1 or self._spec.top_layers is None:
            return own
        records, held_out = records_of(self._spec, self._datasets_dir)
        yield
        if (begun := self._begun(variants, records, held_out)) is not None:
            return begun
        texts = list(self._sample(records))
        n_tokens = len(records.items) * sum(map(len, texts)) / max(1, len(texts))
        offers = []
        for variant in variants:
            offer = yield from self._offer(variant, texts, n_tokens)
            if offer is not None:
                offers.append(offer)
        best = cheapest(offers)
        if best.variant != own:
            _log.info(
                "tuning %s: reads features as %s %s, which peers have (about %.2g s; own ones %.2g s)",
                self._spec.adapter,
                best.variant.profile,
                best.variant.codec or "",
                best.cost_s,
                offers[0].cost_s,
            )
        return best.variant

    def _begun(
        self, variants: Sequence[Variant], records: Records, held_out: Records | None
    ) -> Variant | None:
        """The form in which this job was trained, or begun, before; its codec is in its checkpoint."""
        digests: Mapping[str, str] = {
            profile: spec_digest(
                self._spec,
                records.sha256,
                held_out.sha256 if held_out is not None else "",
                f"{self._digest} {profile}",
            )
            for profile in dict.fromkeys(variant.profile for variant in variants)
        }
        try:
            card = read_card(self._shelf_dir / self._spec.adapter)
        except ConfigError:
            card = None
        for profile, digest in digests.items():
            if card is not None and card.spec_digest == digest:
                return Variant(profile)
        for profile, digest in digests.items():
            if (self._checkpoint_dir / digest).is_dir():
                return Variant(profile)
        return None

    def _sample(self, records: Records) -> Generator[tuple[int, ...], None, None]:
        every = max(1, len(records.items) // _SAMPLE)
        some = records.some(range(0, len(records.items), every)[:_SAMPLE])
        tokens = TuneTokens(self._directory, self._spec.max_tokens)
        invocation = tokens.invocation() if self._spec.method == "alora" else ()
        for example in encoded(some, tokens, invocation, skip_bad=True):
            yield example.ids

    def _offer(
        self, variant: Variant, texts: Sequence[tuple[int, ...]], n_tokens: float
    ) -> Generator[None, None, Offer | None]:
        """``None``: the task does not accept so large an error."""
        assert self._spec.top_layers is not None
        cut = self._n_layers - self._spec.top_layers
        n_bytes = int(4 * self._width * n_tokens)
        try:
            space = self._maps(variant, cut, n_bytes).space
        except ConfigError:
            return None
        if variant.codec is not None and variant.codec not in _accepted(self._spec.feature_error):
            return None
        n_bytes = (
            n_bytes
            * bytes_of(space.codec, BLOCK_TOKENS, self._width)
            // (bytes_of("raw", BLOCK_TOKENS, self._width))
        )
        keys = [key for text in texts for key in space.keys(text)]
        missing = self._store.missing(keys)
        n_there, fetch_s = len(set(keys)) - len(missing), 0.0
        asking = self._store.ask(missing, n_bytes) if missing else None
        while asking is not None and not asking.wait(_WAIT_S):
            yield
        if asking is not None and asking.answer is not None:
            claims, said = asking.answer
            if said.expected_s is not None:
                fetch_s = self._choice.fetch_s(said.expected_s)
            n_there += sum(claims)
        return Offer(
            variant,
            variant.profile == self._own,
            n_there / max(1, len(set(keys))),
            fetch_s,
            self._choice.compute_s(int(n_tokens), cut),
        )


def _accepted(error: float) -> Sequence[str]:
    # The roundest one that may be; those before it in order are more exact.
    roundest = choose_codec(error, math.inf).codec
    return _CODECS[: _CODECS.index(roundest) + 1]
