"""Features of peers, fetched ahead of their use: lots that come next are under way while one is decoded.

    ask ──▶ answered: which keys peers have, and how long reading them should take
        ──▶ each lot, when it is within reach: fetch or compute?  ──▶ prefetch ──▶ settled, or given up

Nothing here waits for longer than it is told to. A lot that does not come in good time is given up and
computed, and the estimate of the next ones knows of it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from node.compute.features.choice import FetchOrCompute, Verdict
from node.compute.features.link import KEYS_MAX, Asking
from node.compute.features.mesh_store import MeshStore

__all__ = ["Ahead"]

_log = logging.getLogger(__name__)

Text = tuple[int, ...]

# Under way beside the lot in use: at 1 Gbit/s a third of a second's worth.
_AHEAD_BYTES = 40 << 20
# A lot is waited for this long, or so many times what it should take.
_PATIENCE_S = 2.0
_PATIENCE = 8.0


@dataclass(slots=True)
class _Lot:
    """Texts that are read together."""

    texts: Sequence[Text]
    keys: list[bytes] = field(default_factory=list)
    """Those to be had from peers, of texts that can be had whole."""
    n_tokens: int = 0
    """Of these texts."""
    n_bytes: int = 0
    verdict: Verdict | None = None
    begun_at: float = 0.0
    waited_from: float | None = None
    came_at: float | None = None

    @property
    def is_fetched(self) -> bool:
        return self.verdict is not None and self.verdict.side == "fetch"


class Ahead:
    """``keys``: of every text. ``block_bytes``: about what a block of so many tokens takes. ``n_layers``: how
    many are run to compute a row; ``None`` where that is impossible."""

    def __init__(
        self,
        store: MeshStore,
        choice: FetchOrCompute,
        keys: Mapping[Text, Sequence[bytes]],
        *,
        block_bytes: Callable[[int], int],
        block_tokens: int,
        n_layers: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._choice = choice
        self._keys = keys
        self._n_layers = n_layers
        self._clock = clock
        self._lots: list[_Lot] = []
        self._n_begun = 0
        self._settled_at = 0.0
        self._claimed: set[bytes] = set()
        self._bytes_of: dict[bytes, int] = {}
        for text, its in keys.items():
            for at, key in enumerate(its):
                self._bytes_of[key] = block_bytes(min(block_tokens, len(text) - at * block_tokens))
        missing = store.missing(list(self._bytes_of))
        self._asking: list[tuple[Sequence[bytes], Asking]] = []
        for start in range(0, len(missing), KEYS_MAX):
            part = missing[start : start + KEYS_MAX]
            asking = store.ask(part, sum(self._bytes_of[key] for key in part))
            if asking is not None:
                self._asking.append((part, asking))
        self._expected_s: float | None = None
        self._is_answered = not self._asking
        self.verdict: Verdict | None = None
        """The newest choice."""
        self.n_texts = 0
        """So many can be had from peers."""

    def is_answered(self, wait_s: float) -> bool:
        """Whether it is known who has what, after waiting at most so long for it."""
        if self._is_answered:
            return True
        if not all(asking.wait(wait_s) for _, asking in self._asking):
            return False
        for part, asking in self._asking:
            if asking.answer is None:
                continue
            claims, said = asking.answer
            self._claimed.update(key for key, is_claimed in zip(part, claims, strict=True) if is_claimed)
            if said.expected_s is not None:
                self._expected_s = (self._expected_s or 0.0) + said.expected_s
        self._is_answered = True
        return True

    def arrange(self, lots: Sequence[Sequence[Text]]) -> None:
        """What is going to be read, in this order."""
        self._lots = [_Lot(texts) for texts in lots]
        # A key that two lots have in common is fetched with the first.
        seen: set[bytes] = set()
        for lot in self._lots:
            for text in lot.texts if self._claimed else ():
                absent = [key for key in self._keys[text] if not self._store.local.has(key)]
                if not absent or not self._claimed.issuperset(absent):
                    continue
                self.n_texts += 1
                lot.n_tokens += len(text)
                new = [key for key in absent if key not in seen]
                seen.update(new)
                lot.keys += new
            lot.n_bytes = sum(self._bytes_of[key] for key in lot.keys)

    def reach(self, number: int) -> None:
        """Lot ``number`` is up next: see that it and those behind it are under way, where that is best."""
        under_way = sum(lot.n_bytes for lot in self._lots[number : self._n_begun] if lot.is_fetched)
        while self._n_begun < len(self._lots) and (self._n_begun <= number or under_way < _AHEAD_BYTES):
            lot = self._lots[self._n_begun]
            self._n_begun += 1
            if not lot.keys:
                continue
            lot.verdict = self._verdict(lot)
            lot.begun_at = self._clock()
            if lot.is_fetched:
                self._store.prefetch(lot.keys)
                under_way += lot.n_bytes

    def is_settled(self, number: int, wait_s: float) -> bool:
        """Whether what comes for lot ``number`` has come, after waiting at most so long for it."""
        lot = self._lots[number]
        if not lot.is_fetched:
            return True
        if self._store.wait(lot.keys, wait_s):
            lot.came_at = self._store.changed_at(lot.keys)
            return True
        assert lot.verdict is not None
        now = self._clock()
        lot.waited_from = lot.waited_from or now
        if now - lot.waited_from < max(_PATIENCE_S, _PATIENCE * lot.verdict.fetch_s):
            return False
        _log.warning(
            "features_late waited_s=%.1f blocks=%d; computing them", now - lot.begun_at, len(lot.keys)
        )
        return True

    def keys(self, number: int) -> frozenset[bytes]:
        """What is fetched for lot ``number``."""
        lot = self._lots[number]
        return frozenset(lot.keys) if lot.is_fetched else frozenset()

    def end(self, number: int, lacking: Collection[bytes]) -> None:
        """Lot ``number`` was read; these keys of it have not come."""
        lot = self._lots[number]
        if not lot.is_fetched:
            return
        self._store.give_up(lot.keys)
        now = self._clock()
        end = now if lot.came_at is None else min(lot.came_at, now)
        took_s = end - max(lot.begun_at, self._settled_at)
        self._settled_at = max(self._settled_at, end)
        share = 1 - len(lacking) / len(lot.keys)
        self._choice.fetched(self._share_s(lot), took_s, share)

    @property
    def text(self) -> str:
        """What is fetched and why, for people; empty where nothing is."""
        if self.verdict is None:
            return ""
        n_tokens = sum(lot.n_tokens for lot in self._lots)
        fetch_s = self._choice.fetch_s(self._expected_s)
        compute_s = math.inf if self._n_layers is None else self._choice.compute_s(n_tokens, self._n_layers)
        whole = Verdict(self.verdict.side, fetch_s, compute_s, self.verdict.is_trial)
        verb = "fetching" if whole.side == "fetch" else "computing"
        return f"{verb} {self.n_texts} texts that peers have: {whole.text}"

    def close(self) -> None:
        """Nothing more is wanted."""
        for lot in self._lots[: self._n_begun]:
            if lot.is_fetched:
                self._store.give_up(lot.keys)

    def _verdict(self, lot: _Lot) -> Verdict:
        fetch_s = self._choice.fetch_s(self._share_s(lot))
        compute_s = math.inf
        if self._n_layers is not None:
            compute_s = self._choice.compute_s(lot.n_tokens, self._n_layers)
        verdict = self._choice.decide(fetch_s, compute_s)
        self.verdict = verdict
        return verdict

    def _share_s(self, lot: _Lot) -> float:
        """What the node expects for this lot; without an estimate, a moment: trying tells."""
        whole = sum(self._bytes_of[key] for key in self._claimed)
        return (self._expected_s or 0.0) * lot.n_bytes / max(1, whole)
