"""Texts in, features out: what the store has is fetched, the rest is computed, encoded, kept and decoded.

Computed features go through encode and decode like those that were stored, and are computed in passes of one
shape (``node.compute.features.shape``). So what comes out is the same to the last bit whether it was in the
cache or not, whatever else was asked for at the same time.

    maps = FeatureMaps(backbone, space, store)
    features = maps.read(texts)                 # all at once, or
    reading = maps.reading(texts)               # in steps, so that others get their turn:
    while not reading.step(): ...
    features = reading.take()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mesh.errors import ConfigError, DecodeError
from node.compute.backbone.contract import Backbone, Segment
from node.compute.features.ahead import Ahead
from node.compute.features.choice import FetchOrCompute
from node.compute.features.codec import CODECS
from node.compute.features.entry import Encoded, bytes_of
from node.compute.features.key import BLOCK_TOKENS, FeatureSpace
from node.compute.features.mesh_store import MeshStore
from node.compute.features.shape import PASS_ROWS, Numerics, Piece, filled, packed, prove
from node.compute.features.store import Entry, FeatureStore

__all__ = ["CodecBoundError", "FeatureMaps", "MissingFeaturesError", "Reading"]

_log = logging.getLogger(__name__)

# Computed entries are kept once there are this many bytes of them or this many seconds of work: packs become
# neither tiny nor is much lost when the process is killed.
_FLUSH_BYTES = 8 << 20
_FLUSH_S = 3.0
# Keys asked for at once: 256 blocks of 64 tokens are 40 MB of raw features at d = 576. What comes from peers
# is asked for in smaller lots, so that the next ones come while one is decoded.
_FETCH_KEYS = 256
_PEER_KEYS = 64
# A step waits no longer for peers: others have their turn in between.
_WAIT_S = 0.01
# Features of several texts are computed in common passes: while peers are waited for, only whole ones.
_MEANWHILE_TOKENS = 4 * PASS_ROWS


class MissingFeaturesError(ConfigError):
    """This node cannot compute features, and nobody has them."""


class CodecBoundError(ConfigError):
    """The codec is further off on these texts than the task accepts."""


class FeatureMaps:
    """Features at one cut in one space.

    ``backbone``: ``None`` on a node that holds only the layers from the cut on. ``numerics``: what ``prove``
    found for the backbone; it must be what the space says. ``error_bound``: of the relative error of 99 in
    100 rows of every text; ``None`` = whatever the codec's certificate says. ``choice`` learns what fetching
    and computing take, and decides between them where ``store`` reads from peers. ``width``: of a row, where
    there is no backbone to say it.

    Raises:
        ConfigError: The backbone cannot stop at this cut, or computes otherwise than the space says.
    """

    def __init__(
        self,
        backbone: Backbone | None,
        space: FeatureSpace,
        store: FeatureStore,
        *,
        numerics: Numerics | None = None,
        error_bound: float | None = None,
        choice: FetchOrCompute | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if space.kind != "hidden":
            raise ConfigError(f"feature maps are of kind 'hidden', not {space.kind!r}")
        if space.codec not in CODECS:
            raise ConfigError(f"no feature codec {space.codec!r}: take one of {', '.join(CODECS)}")
        if backbone is not None:
            if not 0 <= space.cut <= backbone.n_layers:
                raise ConfigError(f"cut {space.cut} of a model of {backbone.n_layers} layers")
            numerics = numerics or prove(backbone)
            if (numerics.text, backbone.precision) != (space.numerics, space.precision):
                raise ConfigError(
                    f"this device computes features as {numerics.text} ({backbone.precision}), and those "
                    f"asked for are {space.numerics} ({space.precision}): their last bits differ"
                )
        self.space = space
        self.hits = 0
        """Texts, and below tokens and seconds, whose features were found."""
        self.misses = 0
        self.tokens_found = 0
        self.tokens_fetched = 0
        """Of those found: from peers."""
        self.tokens_computed = 0
        self.seconds_computing = 0.0
        self.seconds_saved = 0.0
        self._backbone = backbone
        self._numerics = numerics
        self._store = store
        self._codec = CODECS[space.codec]
        self._error_bound = error_bound
        self._choice = choice
        self._width = backbone.width if backbone is not None else width
        self._clock = clock

    @property
    def width(self) -> int:
        """Numbers in one row; 0 as long as nobody has said."""
        return self._width or 0

    def read(
        self, texts: Sequence[Sequence[int]], progress: Callable[[float], None] | None = None
    ) -> list[Tensor]:
        """Shapes: (T_i, d) float32 of each text, in order. ``progress``: told the share done after each pass.

        Raises:
            MissingFeaturesError, CodecBoundError: See there.
        """
        reading = self.reading(texts)
        while not reading.step():
            if progress is not None:
                progress(reading.fraction)
        return reading.take()

    def pinned(self, texts: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        """While entered, the features of ``texts`` are not evicted on this node."""
        return self._store.pinned([key for text in texts for key in self.space.keys(text)])

    def reading(self, texts: Sequence[Sequence[int]], *, keep: bool = True) -> Reading:
        """The same in steps. ``keep=False`` only sees to it that the store has them; nothing to ``take``."""
        return Reading(self, texts, keep)


class Reading:
    """One request on its way: first all fetching, then passes over what was not there."""

    def __init__(self, maps: FeatureMaps, texts: Sequence[Sequence[int]], keep: bool) -> None:
        self._maps = maps
        # Equal texts are one.
        self._order = [tuple(text) for text in texts]
        self._texts = list(dict.fromkeys(self._order))
        self._keys = {text: maps.space.keys(text) for text in self._texts}
        self._keep = keep
        self._done: dict[tuple[int, ...], Tensor] = {}
        self._n_done = 0
        self._n_tokens = sum(map(len, self._texts))
        self._ahead: Ahead | None = None
        self._steps = self._run()
        self._is_over = False

    @property
    def text(self) -> str:
        """What is fetched from peers and why, for people; empty where nothing is."""
        return self._ahead.text if self._ahead is not None else ""

    @property
    def fraction(self) -> float:
        return self._n_done / self._n_tokens if self._n_tokens else 1.0

    def step(self) -> bool:
        """One pass, or one lot of keys; ``True`` once nothing is left to do."""
        if not self._is_over:
            self._is_over = next(self._steps, None) is None
        return self._is_over

    def take(self) -> list[Tensor]:
        assert self._is_over and self._keep, "step until nothing is left, and ask to keep"
        return [self._done[text] for text in self._order]

    def close(self) -> None:
        """Not wanted any more."""
        self._is_over = True
        self._steps.close()

    # ── fetching ────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> Generator[bool, None, None]:
        maps = self._maps
        keys = [key for keys in self._keys.values() for key in keys]
        with maps._store.pinned(keys):
            ahead = self._ahead = self._look_ahead()
            try:
                while ahead is not None and not ahead.is_answered(_WAIT_S):
                    yield True
                lots = list(self._lots(_FETCH_KEYS if ahead is None else _PEER_KEYS))
                if ahead is not None:
                    ahead.arrange(lots)
                missing: list[tuple[int, ...]] = []
                for number, lot in enumerate(lots):
                    if ahead is not None:
                        ahead.reach(number)
                        missing = yield from self._wait(ahead, number, missing)
                    missing += self._fetch(number, lot)
                    yield True
                yield from self._compute(missing)
            finally:
                if ahead is not None:
                    ahead.close()

    def _look_ahead(self) -> Ahead | None:
        """``None`` where all is here, or there are no peers to ask."""
        maps, store = self._maps, self._maps._store
        if not isinstance(store, MeshStore) or maps._choice is None or maps._width is None:
            return None
        if not store.is_linked or not store.missing([key for keys in self._keys.values() for key in keys]):
            return None
        codec, width = maps.space.codec, maps._width
        return Ahead(
            store,
            maps._choice,
            self._keys,
            block_bytes=lambda n: bytes_of(codec, n, width),
            block_tokens=BLOCK_TOKENS,
            n_layers=maps.space.cut if maps._backbone is not None else None,
            clock=maps._clock,
        )

    def _wait(
        self, ahead: Ahead, number: int, missing: list[tuple[int, ...]]
    ) -> Generator[bool, None, list[tuple[int, ...]]]:
        """Until lot ``number`` has come; meanwhile what nobody has is computed. Gives back what is left."""
        computing: Generator[bool, None, None] | None = None
        while not ahead.is_settled(number, 0.0 if computing is not None else _WAIT_S):
            if computing is None and sum(map(len, missing)) >= _MEANWHILE_TOKENS and self._maps._backbone:
                computing, missing = self._compute(missing), []
            if computing is not None and next(computing, None) is None:
                computing = None
            yield True
        if computing is not None:
            yield from computing
        return missing

    def _lots(self, n_keys_max: int) -> Iterator[list[tuple[int, ...]]]:
        lot: list[tuple[int, ...]] = []
        n_keys = 0
        for text in self._texts:
            lot.append(text)
            n_keys += len(self._keys[text])
            if n_keys >= n_keys_max:
                yield lot
                lot, n_keys = [], 0
        if lot:
            yield lot

    def _fetch(self, number: int, lot: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Those of the texts that are not all there."""
        maps = self._maps
        wanted = self._ahead.keys(number) if self._ahead is not None else frozenset()
        found = maps._store.get([key for text in lot for key in self._keys[text]])
        missing = []
        came: set[bytes] = set()
        at = 0
        for text in lot:
            keys = self._keys[text]
            entries = found[at : at + len(keys)]
            at += len(entries)
            whole = [entry for entry in entries if entry is not None]
            came.update(key for key, entry in zip(keys, entries, strict=True) if entry is not None)
            if len(whole) < len(entries):
                missing.append(text)
                continue
            if not self._decode(text, [entry.encoded for entry in whole]):
                if isinstance(maps._store, MeshStore):
                    maps._store.local.forget(keys)  # a peer's mistake must not stay here
                missing.append(text)
                continue
            maps.hits += 1
            maps.tokens_found += len(text)
            if not wanted.isdisjoint(keys):
                maps.tokens_fetched += len(text)
            maps.seconds_saved += sum(entry.recompute_s for entry in whole)
        if self._ahead is not None:
            self._ahead.end(number, wanted - came)
        maps.misses += len(missing)
        return missing

    def _decode(self, text: tuple[int, ...], entries: Sequence[Encoded]) -> bool:
        """Whether the entries are features of ``text``; otherwise they are a miss."""
        maps = self._maps
        sizes = [min(BLOCK_TOKENS, len(text) - start) for start in range(0, len(text), BLOCK_TOKENS)]
        if [entry.n for entry in entries] != sizes or any(
            entry.codec != maps.space.codec for entry in entries
        ):
            _log.warning("stored features of another shape than their text; computing them again")
            return False
        if maps._width is not None and any(entry.d != maps._width for entry in entries):
            _log.warning("stored features of another width than the model; computing them again")
            return False
        self._check_bound(entries)
        if self._keep:
            d = maps._width if maps._width is not None else entries[0].d if entries else 0
            x = torch.empty(len(text), d)
            start = 0
            try:
                for entry in entries:
                    maps._codec.decode(entry, d, x[start : start + entry.n])
                    start += entry.n
            except DecodeError as error:
                _log.warning("stored features do not decode (%s); computing them again", error)
                return False
            self._done[text] = x
        self._n_done += len(text)
        return True

    def _check_bound(self, entries: Sequence[Encoded]) -> None:
        bound = self._maps._error_bound
        for entry in entries:
            if bound is not None and entry.certificate.relative_p99 > bound:
                raise CodecBoundError(
                    f"codec {entry.codec} may be off by {entry.certificate.relative_p99:.3g} on these texts, "
                    f"and the task accepts {bound:g}: accept more, or take codec "
                    f"{'int8 or raw' if entry.codec == 'int4' else 'raw'}"
                )

    # ── computing ───────────────────────────────────────────────────────────────────────────────────

    def _compute(self, texts: Sequence[tuple[int, ...]]) -> Generator[bool, None, None]:
        if not texts:
            return
        maps = self._maps
        backbone, numerics = maps._backbone, maps._numerics
        if backbone is None:
            n_tokens = sum(map(len, texts))
            raise MissingFeaturesError(
                f"the features of {len(texts)} texts ({n_tokens} tokens) at layer {maps.space.cut} are not "
                "in the cache, and this node holds no layers below it: run the task on a node with the whole "
                "model first, or give this one the memory for it"
            )
        assert numerics is not None
        for text in texts:
            if len(text) > backbone.context_tokens:
                raise ConfigError(
                    f"a text has {len(text)} tokens and the model takes {backbone.context_tokens}: shorten it"
                )
        states: dict[int, Any] = {}
        rows: dict[int, list[Tensor]] = {}
        waiting: dict[bytes, Entry] = {}
        n_waiting, flushed_at = 0, maps._clock()
        for pieces in packed([len(text) for text in texts], numerics.is_packed):
            started_at = maps._clock()
            x = self._pass(backbone, numerics, pieces, texts, states)
            pass_s, n_rows = maps._clock() - started_at, sum(piece.n for piece in pieces)
            pace_s = pass_s / n_rows
            if maps._choice is not None:
                maps._choice.computed(n_rows, maps.space.cut, pass_s)
            start = 0
            for piece in pieces:
                rows.setdefault(piece.text, []).append(x[start : start + piece.n])
                start += piece.n
                text = texts[piece.text]
                if piece.stop < len(text):
                    continue
                states.pop(piece.text, None)
                parts = rows.pop(piece.text)
                entries = self._encode(text, parts[0] if len(parts) == 1 else torch.cat(parts), pace_s)
                if not self._decode(text, [entry.encoded for entry in entries.values()]):
                    raise AssertionError("what was just encoded decodes")
                waiting |= entries
                n_waiting += sum(entry.encoded.n_bytes for entry in entries.values())
            spent_s = maps._clock() - started_at
            maps.seconds_computing += spent_s
            maps.tokens_computed += sum(piece.n for piece in pieces)
            if n_waiting >= _FLUSH_BYTES or maps._clock() - flushed_at >= _FLUSH_S:
                maps._store.put(waiting)
                waiting, n_waiting, flushed_at = {}, 0, maps._clock()
            yield True
        maps._store.put(waiting)

    def _pass(
        self,
        backbone: Backbone,
        numerics: Numerics,
        pieces: Sequence[Piece],
        texts: Sequence[tuple[int, ...]],
        states: dict[int, Any],
    ) -> Tensor:
        """The features of ``pieces``, one after another."""
        segments = []
        for piece in pieces:
            text = texts[piece.text]
            if piece.start == 0:
                states[piece.text] = backbone.states(len(text))
            segments.append(Segment(states[piece.text], text[piece.start : piece.stop]))
        threads = torch.get_num_threads()
        if numerics.threads is not None and numerics.threads != threads:
            torch.set_num_threads(numerics.threads)
        try:
            x = backbone.features(filled(backbone, segments), self._maps.space.cut)
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
        return x.float().cpu()

    def _encode(self, text: tuple[int, ...], x: Tensor, pace_s: float) -> Mapping[bytes, Entry]:
        entries = {}
        for at, key in enumerate(self._keys[text]):
            block = x[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
            try:
                encoded = self._maps._codec.encode(block, has_sink=at == 0)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            entries[key] = Entry(encoded, pace_s * len(block))
        return entries
