"""A prefix on its way here from another node, or from this node's disk: asked about, fetched, put in place.

    asking ─▶ nobody has enough of it, or reading is quicker ───────────────▶ over
      └─────▶ coming ─▶ all parts in place, or as many whole blocks as came ─▶ over
                  └──▶ it comes so slowly that reading the rest is quicker ──▶ over

Parts come in the order of layers, so that a pass through the first layers may begin while the last ones are
still on their way; a long prefix in windows of ``_WINDOW_BLOCKS``, so that an end in the middle leaves the
windows before. Nothing here waits but ``wait_for``, and that for a bounded time. A part that is missing,
damaged or of another shape ends the prefix before its block; nobody sees a block that is not whole.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.errors import DecodeError
from node.compute.backbone.deltas import Adapter
from node.compute.features.entry import Encoded
from node.compute.features.key import BLOCK_TOKENS
from node.compute.features.kv import decoded, fill
from node.compute.features.link import Asked
from node.compute.serve.prefix_keys import CODEC, Part, PrefixKeys
from node.compute.serve.prefixes import Prefixes, Reading

__all__ = ["Arrival", "Asking", "Beginning", "Coming", "Costs", "Source"]

log = logging.getLogger(__name__)

# 1,024 tokens: of SmolLM2 47 MB.
_WINDOW_BLOCKS = 16
# Fewer are read here sooner than anybody is asked.
_BLOCKS_MIN = 2
# Predictions are off; what is expected to be a little faster may not be.
_MARGIN = 1.25
_ASK_WITHIN_S = 0.25
# Nobody waits longer than reading would have taken, nor than this.
_WITHIN_S_MAX, _WITHIN_S_MIN = 10.0, 0.25
# How fast a link is nobody knows before something has come over it, and it may have become faster. A prefix
# is fetched on trial if that takes at most so many times as long as reading it; what comes too slowly is
# given up.
_TRY_FACTOR = 3.0
_TRY_EVERY_S = 60.0
# From when on it can be told how fast it comes: a share of what reading takes, but not less than so long.
_JUDGED_AFTER, _JUDGED_AFTER_S_MIN = 0.1, 0.05
# So long a pass stands still for the next part; then it is given up, so that messages are seen.
_GAP_S = 0.5
# Putting in place what has come, beside what the link takes: decoding and one copy.
_PLACE_BYTES_PER_S = 1e9


class Asking(Protocol):
    """See ``node.compute.features.link.Asking``."""

    def wait(self, timeout_s: float) -> bool: ...

    @property
    def answer(self) -> tuple[list[bool], Asked] | None: ...


class Coming(Protocol):
    """See ``node.compute.features.link.Fetch``."""

    @property
    def n_settled(self) -> int: ...

    def wait(self, n_keys: int, timeout_s: float) -> bool: ...

    def take(self, keys: Iterable[bytes]) -> dict[bytes, memoryview]: ...

    def close(self) -> None: ...


class Source(Protocol):
    """Where entries are read from; neither call waits. ``MeshLink`` is one."""

    def ask(self, keys: Sequence[bytes], n_bytes: int, within_s: float = ...) -> Asking: ...

    def want(self, keys: Sequence[bytes], within_s: float) -> Coming: ...


@dataclass(slots=True)
class Costs:
    """What reading a token costs here, as recent passes went, and when a fetch was tried all the same."""

    row_s: float
    slowdown: float = 1.0
    clock: Callable[[], float] = time.monotonic
    tried_at: float = float("-inf")

    def saw(self, n_rows: int, took_s: float) -> None:
        self.row_s += 0.3 * (self.slowdown * took_s / n_rows - self.row_s)

    def may_try(self) -> bool:
        """Whether to try what is expected to be too slow: now and then, as nothing else corrects that."""
        if self.clock() - self.tried_at < _TRY_EVERY_S:
            return False
        self.tried_at = self.clock()
        return True


@dataclass(frozen=True, slots=True)
class _Plan:
    parts: list[Part]
    level: int
    """Layers below this one come."""
    n_blocks: int
    n_bytes: int
    expected_s: float
    read_s: float
    """What reading the same here would take."""

    @property
    def saves_s(self) -> float:
        return self.read_s - _MARGIN * self.expected_s


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a sequence could use."""

    ids: Sequence[int]
    adapter: Adapter | None
    reuse_max: int
    """Tokens from this one on are computed whatever is known."""


class Arrival:
    """Of the whole blocks that a sequence begins with. ``room_bytes``: what may be on its way just now."""

    def __init__(
        self,
        begins: Beginning,
        prefixes: Prefixes,
        keys: PrefixKeys,
        costs: Costs,
        room_bytes: Callable[[], int],
    ) -> None:
        adapter = begins.adapter
        self.ids = list(begins.ids[: begins.reuse_max // BLOCK_TOKENS * BLOCK_TOKENS])
        self.is_over = False
        self.is_broken = False
        """Less came than those who began early had seen."""
        self.is_late = False
        """Somebody who had begun early waited in vain for a while: it is not seen before it is whole."""
        self.reading: Reading | None = None
        self.source_name = ""
        self.n_tokens, self.n_bytes = 0, 0
        """That have come."""
        self._prefixes, self._keys, self._costs = prefixes, keys, costs
        self._room_bytes = room_bytes
        cut = keys.n_layers if adapter is None else min(adapter.first_layer, keys.n_layers)
        top = keys.level(cut)
        self._n_known, best = prefixes.known(self.ids, adapter, len(self.ids))
        self._n_known = self._n_known // BLOCK_TOKENS * BLOCK_TOKENS if top == keys.n_layers else 0
        self._known_value = best
        levels = {top, *(keys.level(at) for at in prefixes.cuts if at < top)} - {0}
        self._levels = sorted(levels, reverse=True)
        self._asked: list[tuple[str, Source, Asking]] = []
        self._offered: list[Part] = []
        self._plan: _Plan | None = None
        self._coming: Coming | None = None
        self._n_placed = 0
        self._began_at = 0.0
        self._n_blocks = 0
        self._left: Counter[range | None] = Counter()
        self._early: list[Reading] = []
        if not levels or (len(self.ids) - best) < _BLOCKS_MIN * BLOCK_TOKENS:
            self.is_over = True

    @property
    def planned_bytes(self) -> int:
        return self._plan.n_bytes if self._plan is not None else 0

    @property
    def keys(self) -> list[bytes]:
        """Of all parts that were to come."""
        return [part.key for part in self._plan.parts] if self._plan is not None else []

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────

    def ask(self, sources: Sequence[tuple[str, Source]]) -> None:
        if self.is_over:
            return
        keys = self._keys
        for group in keys.below(self._levels[0]):
            self._offered += keys.parts(group, self.ids)
        for level in self._levels:
            if level < keys.n_layers:
                self._offered += keys.parts(level, self.ids)
        names = [part.key for part in self._offered]
        n_bytes = sum(keys.bytes_of(part) for part in self._offered)
        self._asked = [(name, s, s.ask(names, n_bytes, within_s=_ASK_WITHIN_S)) for name, s in sources]

    def _decide(self) -> None:
        """Everybody has answered: the source whose plan saves most, or none."""
        found: list[tuple[str, Source, _Plan]] = []
        for name, source, asking in self._asked:
            answer = asking.answer
            if answer is None or answer[1].expected_s is None:
                continue
            claimed = {part.key for part, is_there in zip(self._offered, answer[0], strict=True) if is_there}
            for level in self._levels:
                plan = self._plan_of(level, claimed, answer[1].expected_s)
                if plan is not None and plan.read_s > 0:
                    found.append((name, source, plan))
        self._asked, self._offered = [], []
        chosen = self._chosen(found)
        if chosen is None:
            self.is_over = True
            return
        self.source_name, source, plan = chosen
        within_s = min(max(plan.read_s, _WITHIN_S_MIN), _WITHIN_S_MAX)
        stop = plan.n_blocks * BLOCK_TOKENS
        self._plan, self._n_blocks = plan, plan.n_blocks
        self._left = Counter(part.group for part in plan.parts)
        self.reading = self._prefixes.expect_states(self.ids[:stop], plan.level, self._n_known)
        if self.reading is None:
            self.is_over = True
            return
        self._began_at = self._costs.clock()
        self._coming = source.want([part.key for part in plan.parts], within_s)
        log.info(
            "prefix_fetch from=%s tokens=%d..%d layers=%d bytes=%d expected_s=%.3f read_s=%.3f",
            *(self.source_name, self._n_known, stop, plan.level, plan.n_bytes, plan.expected_s, plan.read_s),
        )

    def _chosen(self, found: Sequence[tuple[str, Source, _Plan]]) -> tuple[str, Source, _Plan] | None:
        if not found:
            return None
        best = max(found, key=lambda it: it[2].saves_s)
        if best[2].saves_s > 0:
            return best
        best = min(found, key=lambda it: it[2].expected_s / it[2].read_s)
        is_near = best[2].expected_s <= _TRY_FACTOR * best[2].read_s
        return best if is_near and self._costs.may_try() else None

    def _plan_of(self, level: int, claimed: set[bytes], claimed_s: float) -> _Plan | None:
        """What of the layers below ``level`` would come, of as many whole blocks as are there."""
        keys = self._keys
        offered = [
            part
            for part in self._offered
            if (part.group is not None and part.group.stop <= level)
            or (part.group is None and part.cut == level < keys.n_layers)
        ]
        first = self._n_known // BLOCK_TOKENS if level == keys.n_layers else 0
        if level < keys.n_layers and self._n_known:
            return None
        missing = [part.block for part in offered if part.key not in claimed and part.block >= first]
        n_blocks = min(missing, default=len(self.ids) // BLOCK_TOKENS)
        parts = sorted((part for part in offered if first <= part.block < n_blocks), key=_order)
        if not parts:
            return None
        n_bytes = sum(keys.bytes_of(part) for part in parts)
        if n_bytes > self._room_bytes():
            return None
        all_bytes = sum(keys.bytes_of(part) for part in self._offered if part.key in claimed)
        value = n_blocks * BLOCK_TOKENS * level / keys.n_layers - self._known_value
        expected_s = claimed_s * n_bytes / max(all_bytes, 1) + n_bytes / _PLACE_BYTES_PER_S
        return _Plan(parts, level, n_blocks, n_bytes, expected_s, value * self._costs.row_s)

    # ── coming ──────────────────────────────────────────────────────────────────────────────────────

    def step(self, place_bytes_max: int) -> None:
        """Take what has come, up to so many bytes. Never waits."""
        if self._asked:
            if not all(asking.wait(0) for _, _, asking in self._asked):
                return
            self._decide()
        if self._coming is not None:
            self._place(place_bytes_max)
        if self._coming is not None and self._is_too_slow():
            self._give_up()

    def wait(self, timeout_s: float) -> None:
        """Until something has changed, at most so long."""
        for _, _, asking in self._asked:
            if not asking.wait(0):
                asking.wait(timeout_s)
                return
        if self._coming is not None:
            self._coming.wait(self._n_placed + 1, timeout_s)

    def _place(self, bytes_max: int) -> None:
        plan, coming, reading = self._plan, self._coming, self.reading
        assert plan is not None and coming is not None and reading is not None
        n_settled, n_bytes = coming.n_settled, 0
        while self._n_placed < n_settled and n_bytes < bytes_max:
            part = plan.parts[self._n_placed]
            self._n_placed += 1
            self._left[part.group] -= 1
            payload = coming.take([part.key]).get(part.key)
            if part.block >= self._n_blocks:
                continue
            if payload is None or not self._put(reading, part, payload):
                self._ends_before(part.block)
                if self.is_over:
                    return
            else:
                n_bytes += len(payload)
                self.n_bytes += len(payload)
        if self._n_placed == len(plan.parts):
            self._finish()

    def _put(self, reading: Reading, part: Part, payload: memoryview) -> bool:
        """Whether it is what was asked for."""
        try:
            rows = decoded(Encoded.read(payload), CODEC, self._keys.width_of(part))
        except DecodeError as error:
            log.warning("prefix_damaged from=%s error=%s; it is read here", self.source_name, error)
            return False
        if part.group is not None:
            fill(reading.states, part.group, part.start, rows)
        else:
            reading.keep(part.cut, part.start, rows)
        return True

    def _is_too_slow(self) -> bool:
        """Whether the rest takes longer to come than all of it to be read, as it has come so far."""
        plan, coming = self._plan, self._coming
        assert plan is not None and coming is not None
        took_s = self._costs.clock() - self._began_at
        if took_s < max(_JUDGED_AFTER * plan.read_s, _JUDGED_AFTER_S_MIN):
            return False
        share = coming.n_settled / len(plan.parts)
        return took_s * (1 - share) > share * max(plan.read_s, _WITHIN_S_MIN)

    def _give_up(self) -> None:
        assert self._plan is not None
        log.info(
            "prefix_slow from=%s parts=%d of %d", self.source_name, self._n_placed, len(self._plan.parts)
        )
        missing = (part.block for part in self._plan.parts[self._n_placed :])
        self._ends_before(min(self._n_blocks, *missing))
        if not self.is_over:
            self._finish()

    def _ends_before(self, block: int) -> None:
        self._n_blocks = block
        for early in self._early:
            early.is_broken = True
        self._early.clear()
        self.is_broken = True
        if block * BLOCK_TOKENS <= self._n_known:
            self.close()

    def _finish(self) -> None:
        assert self.reading is not None
        self.n_tokens = self._n_blocks * BLOCK_TOKENS - self._n_known
        self._prefixes.arrived(self.reading, self._n_blocks * BLOCK_TOKENS)
        for early in self._early:
            early.is_whole = True
        self._early.clear()
        if self._coming is not None:
            self._coming.close()
        self._coming = None
        self.is_over = True

    def close(self) -> None:
        """Let go of everything that is not whole."""
        for early in self._early:
            early.is_broken = True
        self._early.clear()
        if self._coming is not None:
            self._coming.close()
        self._coming, self._asked = None, []
        if not self.is_over and self.reading is not None:
            self._prefixes.drop(self.reading)
        self.is_over = True

    # ── beginning early ─────────────────────────────────────────────────────────────────────────────

    def has_begun(self, tokens_min: int) -> bool:
        """Whether a sequence may see it now, and go on as its layers come: what it needs first is there, and
        it sees all where it is (a copy would be made too early)."""
        if self._plan is None or self.is_over or self.is_broken or self.is_late or self._n_known:
            return False
        first = self._plan.parts[0].group
        return self._n_blocks * BLOCK_TOKENS >= tokens_min and not self._left[first]

    def let_begin(self, reading: Reading) -> None:
        """``reading`` sees this one before it is whole."""
        self._early.append(reading)

    def wait_for(self, layer: int) -> bool:
        """Whether the states in ``layer`` are all there, after waiting for them; bounded by the request."""
        while not self.is_over and not self.is_broken:
            assert self._plan is not None
            if layer >= self._plan.level:
                return True
            group = next(group for group in self._keys.groups if layer in group)
            if not self._left[group]:
                return True
            n_before = self._n_placed
            self.wait(_GAP_S)
            self.step(1)
            if self._n_placed == n_before:
                self.is_late = True
                return False
        return not self.is_broken


def _order(part: Part) -> tuple[int, int, int]:
    """Windows, then the rows that enter the cut, then the layers from below."""
    return part.block // _WINDOW_BLOCKS, -1 if part.group is None else part.group.start, part.block
