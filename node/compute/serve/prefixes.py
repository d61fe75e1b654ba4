"""Beginnings of prompts that somebody has read before: nobody reads them again below the cut.

What a sequence leaves in the layers depends on its tokens and, from its adapter's first layer on, on the
adapter. So for another sequence that begins with the same tokens

* under the same adapter (or both under none) the states of all layers are right as they are;
* under another, those below both first layers are. The rows entering the lower of the two were kept, and
  the layers from there on are computed from them: with the top 4 of 30 adapted, a seventh of the work.

States are never changed and, but for short ones, never copied: the new sequence sees them where the reader
left them, while that one may still be writing behind them. What is shared is found by a chain of hashes over
blocks of 64 tokens (the one feature maps are called by) and then token by token. An adapter's states are
its digest's, not its name's: one trained anew finds nothing of its predecessor (llama.cpp issue 26207 is
what happens otherwise).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from node.compute.backbone.attention import Place
from node.compute.backbone.contract import KeyValues
from node.compute.backbone.deltas import Adapter
from node.compute.backbone.llama import LlamaBackbone
from node.compute.features.key import BLOCK_TOKENS, FeatureSpace

__all__ = ["PREFIX_BYTES", "SEEN_TOKENS_MIN", "Prefixes", "Reading", "kept_rows"]

# States of 11,000 tokens of SmolLM2 in float32: a few long conversations, or dozens that begin alike.
PREFIX_BYTES = 512_000_000

# Sharing saves the copy and its memory, and costs every later token a second, small product per layer. Below
# this many tokens the copy is the cheaper of the two (12 MB of SmolLM2's states, 3 ms).
SEEN_TOKENS_MIN = 256

# Each beginning is compared with those it may replace; more would only be tiny ones.
_READINGS_MAX = 512

# What any one sequence keeps for adapters of other cuts: each takes 5 % of the states of SmolLM2.
_CUTS_MAX = 8

# Blocks are named within this process only, so nothing but the tokens needs to be in their names.
_CHAIN = FeatureSpace("", "", "", 0, "kv", "", "")


class _Memory:
    """The states one sequence has written. Others may see them after it has ended."""

    __slots__ = ("_row_bytes", "_states")

    def __init__(self, states: KeyValues, top: int) -> None:
        self._states = states
        self._row_bytes: dict[int, int] = {}  # by first position of its own, for all layers that begin there
        for keys, start in zip(states.keys[:top], states.starts, strict=False):
            size = 2 * keys.shape[0] * keys.shape[2] * keys.element_size()
            self._row_bytes[start] = self._row_bytes.get(start, 0) + size

    @property
    def n_bytes(self) -> int:
        states = self._states
        # On an accelerator all the room is taken at once, on a CPU what was written.
        stop = states.length if states.cos.device.type == "cpu" else states.capacity
        return sum(max(0, stop - start) * size for start, size in self._row_bytes.items())


@dataclass(eq=False, slots=True)
class Reading:
    """One sequence's tokens and what they left in the layers, while it runs and afterwards."""

    states: KeyValues
    ids: list[int]
    """What is to be found here: the tokens others may share."""
    adapter: Adapter | None
    """Under which those tokens are read."""
    enters: int
    """Where the rows that were read before under another adapter go on."""
    entering: Tensor | None
    """(n, d): those rows, of the positions after ``states.length``."""
    hidden: dict[int, list[Tensor]]
    """By cut the rows entering it, from the first position on without a gap."""
    n_reused: int
    """Tokens not read again, or only from ``enters`` on."""
    _memory: _Memory
    _owners: list[_Memory | None]
    """Of each layer whose memory the first positions are in; ``None``: its own."""
    top: int
    """Layers below this one are there; fewer than all if it came from another node."""
    _blocks: list[bytes] = field(default_factory=list)
    is_running: bool = True
    is_whole: bool = True
    """``False``: the states it says to have are still on their way here, or those it sees are."""
    is_broken: bool = False
    """What it sees will not become whole: whoever goes on it has to begin anew."""

    @property
    def n_ready(self) -> int:
        """How many of its tokens are in all layers."""
        return min(self.states.length, len(self.ids))

    @property
    def n_entering(self) -> int:
        return 0 if self.entering is None else len(self.entering)

    def take_entering(self, n: int) -> Tensor:
        """The next ``n`` rows that go on at ``enters``."""
        assert self.entering is not None
        taken, left = self.entering[:n], self.entering[n:]
        self.entering = left if len(left) else None
        return taken

    def keep(self, cut: int, at: int, rows: Tensor) -> None:
        """``rows`` (n, d) entered ``cut``, of positions ``at`` and following."""
        pieces = self.hidden.setdefault(cut, [])
        if len(pieces) > 64:  # single rows of an answer
            pieces[:] = [torch.cat(pieces)]
        have = self.n_kept(cut)
        if have < at:
            return  # a gap: what follows it is of no use
        new = rows[have - at :]
        if len(new):
            pieces.append(new.clone())  # not a view that keeps a whole pass alive

    def n_kept(self, cut: int) -> int:
        """Of how many positions the rows entering ``cut`` are there."""
        return sum(map(len, self.hidden.get(cut, ())))

    def rows(self, cut: int, start: int, stop: int) -> list[Tensor]:
        """The kept rows of positions ``start`` to ``stop``, in pieces, as far as they are kept."""
        found, at = [], 0
        for piece in self.hidden.get(cut, ()):
            if at < stop and at + len(piece) > start:
                found.append(piece[max(0, start - at) : stop - at])
            at += len(piece)
        return found


@dataclass(frozen=True, slots=True)
class _Found:
    reading: Reading
    n: int
    """Tokens in common that are there."""
    n_coming: int
    """The same once it has read what it is reading."""
    below: int
    """Layers below this one are the same for both."""


class Prefixes:
    """What has been read, most recently used last, within ``budget_bytes``.

    ``cuts``: first layers of the adapters there are; whoever reads keeps the rows entering them.
    """

    def __init__(self, backbone: LlamaBackbone, budget_bytes: int = PREFIX_BYTES) -> None:
        self._backbone = backbone
        self._n_layers = backbone.n_layers
        self.budget_bytes = budget_bytes
        self._cuts: tuple[int, ...] = ()
        self._readings: dict[Reading, None] = {}
        self._by_block: dict[bytes, dict[Reading, None]] = {}

    # ── what is kept ────────────────────────────────────────────────────────────────────────────────

    @property
    def cuts(self) -> tuple[int, ...]:
        return self._cuts

    def expect(self, cuts: Collection[int]) -> None:
        """Adapters with these first layers are there: keep what enters them from now on."""
        inner = sorted({cut for cut in cuts if 0 < cut < self._n_layers}, reverse=True)
        self._cuts = tuple(inner[:_CUTS_MAX])

    def keep_at(self, readings: Iterable[Reading]) -> tuple[int, ...]:
        """The layers whose entering rows somebody in this pass shall keep."""
        most = max((self._cut(reading.adapter) for reading in readings), default=0)
        return tuple(cut for cut in self._cuts if cut <= most)

    def keep(self, reading: Reading, at: int, kept: Mapping[int, Tensor]) -> None:
        """By layer rows of the positions ``at`` and following, to be kept as far as others may use them."""
        for cut, rows in kept.items():
            if cut <= self._cut(reading.adapter):
                reading.keep(cut, at, rows)

    @property
    def held_bytes(self) -> int:
        """Of all that has ended and is kept, and of what runs and may be shared."""
        memories: set[_Memory] = set()
        hidden = 0
        for reading in self._readings:
            memories.add(reading._memory)
            memories.update(owner for owner in set(reading._owners) if owner is not None)
            hidden += sum(piece.nbytes for pieces in reading.hidden.values() for piece in pieces)
        return hidden + sum(memory.n_bytes for memory in memories)

    def __len__(self) -> int:
        return len(self._readings)

    # ── a sequence's life ───────────────────────────────────────────────────────────────────────────

    def open(
        self,
        ids: Sequence[int],
        adapter: Adapter | None,
        *,
        capacity: int,
        reuse_max: int,
        n_shared: int,
        early: Reading | None = None,
    ) -> Reading | None:
        """States for a sequence that begins with ``ids``, holding what is known of them.

        ``reuse_max``: tokens from this one on are computed whatever is known. ``n_shared``: of so many tokens
        others may make use. ``None``: another sequence is just reading the same tokens; ask again when it
        has come further. ``early``: one of ``expect_states`` that may be seen before it is whole; then the
        result is not whole before that is.
        """
        found = list(self._find(ids, adapter, reuse_max, early))
        whole = max((f for f in found if f.below == self._n_layers), key=lambda f: f.n, default=None)
        n_whole = whole.n if whole else 0
        part = max((f for f in found if f.below < self._n_layers), key=lambda f: f.n * f.below, default=None)
        if part is not None and part.n < n_whole + BLOCK_TOKENS:
            part = None
        best = part.n if part else n_whole
        if any(f.reading.is_running and f.n_coming >= max(f.n, best) + BLOCK_TOKENS for f in found):
            return None
        reading = self._begin(ids, adapter, capacity, whole if n_whole else None, part, n_shared)
        reading.is_whole = all(f.reading.is_whole for f in (whole, part) if f is not None and f.n)
        self._touch(f.reading for f in (whole, part) if f is not None)
        self._readings[reading] = None
        self._register(reading)
        return reading

    def known(self, ids: Sequence[int], adapter: Adapter | None, reuse_max: int) -> tuple[int, float]:
        """Tokens whose states of all layers are here, and the best there is or is being read: in tokens,
        those of which only some layers are known counted by their share."""
        found = list(self._find(ids, adapter, reuse_max))
        n_whole = max((f.n for f in found if f.below == self._n_layers), default=0)
        return n_whole, max((max(f.n, f.n_coming) * f.below / self._n_layers for f in found), default=0.0)

    def expect_states(self, ids: Sequence[int], top: int, n_known: int) -> Reading | None:
        """Room for states of ``ids`` in the layers below ``top`` that come from elsewhere.

        Those of the first ``n_known`` tokens are here already; ``None`` if they are not any more. Whoever
        begins alike waits for the others, until ``arrived`` or ``drop``.
        """
        assert not n_known or top == self._n_layers, "what is known is known in all layers"
        whole = None
        if n_known:
            found = (f for f in self._find(ids, None, n_known) if f.below == self._n_layers)
            whole = max(found, key=lambda f: f.n, default=None)
            if whole is None or whole.n < n_known:
                return None
        reading = self._begin(ids, None, len(ids), whole, None, len(ids), top=top)
        reading.is_whole = False
        self._readings[reading] = None
        self._register(reading)
        return reading

    def arrived(self, reading: Reading, n: int) -> None:
        """The first ``n`` tokens of what was expected are there, in all layers below its ``top``."""
        assert not reading.is_whole and n <= reading.states.capacity
        reading.states.length = n
        reading.is_whole = True
        self.close(reading, reading.ids[:n])

    def drop(self, reading: Reading) -> None:
        """Forget it as if it had never been."""
        reading.is_running = False
        if reading in self._readings:
            self._drop(reading)

    def close(self, reading: Reading, ids: Sequence[int]) -> None:
        """The sequence has ended; ``ids`` are all the tokens that others may share."""
        if not reading.is_whole:
            self.drop(reading)
            return
        reading.is_running = False
        reading.entering = None
        reading.ids = list(ids[: reading.states.length])
        for cut, pieces in reading.hidden.items():
            if len(pieces) > 1:
                reading.hidden[cut] = [torch.cat(pieces)]
        self._unregister(reading)
        if len(reading.ids) < BLOCK_TOKENS or self._is_covered(reading):
            del self._readings[reading]
        else:
            for other in [o for o in self._readings if o is not reading and self._covers(reading, o)]:
                self._drop(other)
            self._register(reading)
            self._touch([reading])
        self._make_room()

    def clear(self) -> None:
        """Forget all that has ended."""
        for reading in [reading for reading in self._readings if not reading.is_running]:
            self._drop(reading)

    # ── finding ─────────────────────────────────────────────────────────────────────────────────────

    def _cut(self, adapter: Adapter | None) -> int:
        return self._n_layers if adapter is None else min(adapter.first_layer, self._n_layers)

    def _alike(self, one: Adapter | None, other: Adapter | None) -> int:
        """The layers below the result do the same under both."""
        if one is other or (one and other and one.digest and one.digest == other.digest):
            return self._n_layers
        return min(self._cut(one), self._cut(other))

    def _find(
        self, ids: Sequence[int], adapter: Adapter | None, most: int, early: Reading | None = None
    ) -> Iterable[_Found]:
        """Whoever shares a block with ``ids``, longest first, until nothing better can follow."""
        seen: set[Reading] = set()
        blocks = _CHAIN.keys(ids[: most // BLOCK_TOKENS * BLOCK_TOKENS])
        for at in range(len(blocks) - 1, -1, -1):
            start, is_best = at * BLOCK_TOKENS, False
            for reading in self._by_block.get(blocks[at], ()):
                if reading in seen:
                    continue
                seen.add(reading)
                below = min(self._alike(adapter, reading.adapter), reading.top)
                if not below:
                    continue
                # The next whole block differs or is not there, so no more than two need be looked at.
                stop = min(most, start + 2 * BLOCK_TOKENS)
                common = start + _common(ids[start:stop], reading.ids[start:stop])
                n = min(common, reading.n_ready)
                if not reading.is_whole:
                    n = common if reading is early else 0
                if below < self._n_layers:
                    n = min(n, reading.n_kept(below))
                    goes_on = below in self._cuts and reading.n_kept(below) >= reading.states.length
                    coming = common if goes_on else n
                else:
                    coming = common
                    is_best = is_best or n == common
                yield _Found(reading, n if n >= BLOCK_TOKENS else 0, coming, below)
            if is_best:
                return

    def _begin(
        self,
        ids: Sequence[int],
        adapter: Adapter | None,
        capacity: int,
        whole: _Found | None,
        part: _Found | None,
        n_shared: int,
        *,
        top: int | None = None,
    ) -> Reading:
        layers = self._n_layers
        donors = [part if part is not None and at < part.below else whole for at in range(layers)]
        shared: list[Place | None] = []
        owners: list[_Memory | None] = []
        copied: list[tuple[int, int, Place]] = []
        for layer, donor in enumerate(donors):
            places = donor.reading.states.seen(layer, donor.n) if donor else []
            first = places[0] if places else None
            if donor is None or first is None or first[0].shape[1] < SEEN_TOKENS_MIN:
                first = None
            shared.append(first)
            owners.append(
                (donor.reading._owners[layer] or donor.reading._memory)
                if donor and first is not None
                else None
            )
            at = 0
            for place in places:
                if place is not first:
                    assert donor is None or donor.reading.is_whole, "what is not there cannot be copied"
                    copied.append((layer, at, place))
                at += place[0].shape[1]
        states = self._backbone.states(capacity, shared)
        for layer, at, (keys, values) in copied:
            states.append(layer, at, keys, values)
        n_whole = whole.n if whole else 0
        states.length = n_whole
        entering, hidden = None, {}
        if part is not None:
            entering = torch.cat(part.reading.rows(part.below, n_whole, part.n))
        for cut in self._cuts:
            if cut <= self._cut(adapter):
                # Up to the lower cut both are right; above it only the one under the same adapter.
                source = part if part is not None and cut <= part.below else whole
                if source is not None:
                    hidden[cut] = source.reading.rows(cut, 0, source.n)
        return Reading(
            states=states,
            ids=list(ids[:n_shared]),
            adapter=adapter,
            enters=part.below if part else 0,
            entering=entering,
            hidden=hidden,
            n_reused=part.n if part else n_whole,
            top=layers if top is None else top,
            _memory=_Memory(states, layers if top is None else top),
            _owners=owners,
        )

    # ── keeping ─────────────────────────────────────────────────────────────────────────────────────

    def _register(self, reading: Reading) -> None:
        whole = len(reading.ids) // BLOCK_TOKENS * BLOCK_TOKENS
        reading._blocks = _CHAIN.keys(reading.ids[:whole])
        for block in reading._blocks:
            self._by_block.setdefault(block, {})[reading] = None

    def _unregister(self, reading: Reading) -> None:
        for block in reading._blocks:
            there = self._by_block[block]
            del there[reading]
            if not there:
                del self._by_block[block]
        reading._blocks = []

    def _touch(self, readings: Iterable[Reading]) -> None:
        for reading in readings:
            if reading in self._readings:
                self._readings[reading] = self._readings.pop(reading)

    def _covers(self, one: Reading, other: Reading) -> bool:
        """Whether all that ``other`` (which has ended) can give, ``one`` gives as well."""
        return (
            not other.is_running
            and self._alike(one.adapter, other.adapter) == self._n_layers
            and one.top >= other.top
            and len(other.ids) <= len(one.ids)
            and one.ids[: len(other.ids)] == other.ids
            and all(one.n_kept(cut) >= min(other.n_kept(cut), len(other.ids)) for cut in other.hidden)
        )

    def _is_covered(self, reading: Reading) -> bool:
        return any(
            len(other.ids) > len(reading.ids) and self._covers(other, reading)
            for other in self._readings
            if other is not reading and not other.is_running
        )

    def _make_room(self) -> None:
        """Let those go that were not used for longest, until the rest fits."""
        ended = [reading for reading in self._readings if not reading.is_running]
        while ended and (self.held_bytes > self.budget_bytes or len(self._readings) > _READINGS_MAX):
            self._drop(ended.pop(0))

    def _drop(self, reading: Reading) -> None:
        self._unregister(reading)
        del self._readings[reading]


def kept_rows(
    kept: Mapping[int, Tensor], enters: Sequence[int], sizes: Sequence[int], at: int
) -> dict[int, Tensor]:
    """By layer the rows of segment number ``at`` in ``Pass.kept``, which holds all that were below it."""
    order = sorted(range(len(enters)), key=lambda number: enters[number])  # as the pass puts them
    found = {}
    for layer, rows in kept.items():
        if enters[at] < layer:
            before = order[: order.index(at)]
            start = sum(sizes[number] for number in before)
            found[layer] = rows[start : start + sizes[at]]
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(one), len(other))
    if list(one[:n]) == list(other[:n]):
        return n
    return next(at for at in range(n) if one[at] != other[at])
