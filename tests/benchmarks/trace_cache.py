"""A cache of half the working set, replaying which blocks real requests ask for.

``--trace FILE``: JSON lines with ``hash_ids``, one per prefix block (Mooncake's conversation trace, FAST
'25, or any like it). Without it a generated workload: conversations that grow, under shared system prompts;
so it runs anywhere, under another metric name and against no target.

mooncake_hit_percent   blocks found, of all asked for, by the rule of our store with room for half of them
hit_infinite_percent   the same with room for everything: the limit

Detail: hits in a row from the start of each prompt (what a key/value cache can use), seconds of computing
saved where later blocks cost more, other budgets, and other rules of eviction: LRU, S3-FIFO (Yang et al.,
SOSP 2023), W-TinyLFU (Einziger et al., 2017), and Belady's, which knows the future. ``gdsf by place`` is
told what each block really costs; it lets go of the beginnings of prompts, which cost least, and with them
of all hits in a row. That is why our store is told the mean of a pass.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Protocol

from node.compute.features.gdsf import Gdsf
from tests.benchmarks.report import Metric, Options, main

Requests = Sequence[Sequence[int]]

BUDGETS = (0.02, 0.1, 0.25, 0.5)
BLOCK_TOKENS = 512
# The cost of a block grows with what stands before it: SmolLM2-135M spends 270 MFLOP a token on weights and
# 69 kFLOP
# per token attended to.
FLOP_PER_TOKEN, FLOP_PER_PAIR = 270e6, 69e3


def block_cost_s(position: int) -> float:
    """Seconds of a 1 TFLOP/s device for the block at that place in a prompt."""
    return BLOCK_TOKENS * (FLOP_PER_TOKEN + FLOP_PER_PAIR * BLOCK_TOKENS * (position + 0.5)) / 1e12


def equal_cost_s(position: int) -> float:
    """What our store is told: the pace of the whole pass, the same for all its blocks."""
    return 1.0


class Cache(Protocol):
    def has(self, key: int) -> bool: ...
    def use(self, key: int, position: int) -> None:
        """It was read if it is there; it has been computed, and may be kept, if not."""


class GdsfCache:
    """As ``node.compute.features.store`` keeps its memory. Blocks are of one size."""

    def __init__(self, n_blocks: int, cost: Callable[[int], float]) -> None:
        self._n_blocks, self._cost = n_blocks, cost
        self._order: Gdsf[int] = Gdsf()

    def has(self, key: int) -> bool:
        return key in self._order

    def use(self, key: int, position: int) -> None:
        order = self._order
        if key in order:
            order.use(key)
            return
        cost_s = self._cost(position)
        if len(order) >= self._n_blocks:
            least = next(iter(order.least()))
            if order.value(least) > order.value_of(1, cost_s):
                return
            order.let_go(least)
        order.add(key, 1, cost_s)


class LruCache:
    def __init__(self, n_blocks: int) -> None:
        self._n_blocks = n_blocks
        self._keys: OrderedDict[int, None] = OrderedDict()

    def has(self, key: int) -> bool:
        return key in self._keys

    def use(self, key: int, position: int) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._n_blocks:
            self._keys.popitem(last=False)


class S3Fifo:
    """A tenth for what is new, nine tenths for what was asked for again, and names of what was turned
    away."""

    def __init__(self, n_blocks: int) -> None:
        self._small_max = max(1, n_blocks // 10)
        self._n_blocks = n_blocks
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}

    def has(self, key: int) -> bool:
        return key in self._uses

    def use(self, key: int, position: int) -> None:
        if key in self._uses:
            self._uses[key] = min(self._uses[key] + 1, 3)
            return
        while len(self._uses) >= self._n_blocks:
            self._evict()
        (self._main if key in self._ghosts else self._small).append(key)
        self._ghosts.pop(key, None)
        self._uses[key] = 0

    def _evict(self) -> None:
        if self._small and (len(self._small) >= self._small_max or not self._main):
            key = self._small.popleft()
            if self._uses[key] > 0:
                self._uses[key] = 0
                self._main.append(key)
                return
            self._ghosts[key] = None
            if len(self._ghosts) > self._n_blocks:
                self._ghosts.popitem(last=False)
        else:
            key = self._main.popleft()
            if self._uses[key] > 0:
                self._uses[key] -= 1
                self._main.append(key)
                return
        del self._uses[key]


class TinyLfu:
    """LRU of one hundredth, then LRU entered only by what was asked for more often than what must leave."""

    def __init__(self, n_blocks: int) -> None:
        self._window_max = max(1, n_blocks // 100)
        self._main_max = max(1, n_blocks - self._window_max)
        self._window: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}  # exact, where the real one has a sketch
        self._n_uses, self._n_uses_max = 0, 10 * n_blocks

    def has(self, key: int) -> bool:
        return key in self._window or key in self._main

    def use(self, key: int, position: int) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        self._n_uses += 1
        if self._n_uses >= self._n_uses_max:
            self._uses = {key: n // 2 for key, n in self._uses.items() if n > 1}
            self._n_uses = sum(self._uses.values())
        if key in self._main:
            self._main.move_to_end(key)
            return
        self._window[key] = None
        self._window.move_to_end(key)
        if len(self._window) > self._window_max:
            newcomer, _ = self._window.popitem(last=False)
            if len(self._main) >= self._main_max:
                oldest = next(iter(self._main))
                if self._uses.get(newcomer, 0) <= self._uses.get(oldest, 0):
                    return
                self._main.popitem(last=False)
            self._main[newcomer] = None


def replay(requests: Requests, cache: Cache) -> tuple[float, float, float]:
    """Shares, of all blocks asked for: found; found with all before it in its prompt; and of seconds,
    saved."""
    n_blocks = n_hits = n_in_a_row = 0
    cost_s = saved_s = 0.0
    for blocks in requests:
        is_in_a_row = True
        for position, key in enumerate(blocks):
            is_hit = cache.has(key)
            is_in_a_row &= is_hit
            n_blocks, n_hits, n_in_a_row = n_blocks + 1, n_hits + is_hit, n_in_a_row + is_in_a_row
            cost_s += block_cost_s(position)
            saved_s += block_cost_s(position) * is_hit
        for position, key in enumerate(blocks):
            cache.use(key, position)
    return n_hits / n_blocks, n_in_a_row / n_blocks, saved_s / cost_s


def belady(requests: Requests, n_blocks: int) -> float:
    """Hits of whoever lets go of what is asked for again last of all."""
    asked = [key for blocks in requests for key in blocks]
    next_at, later = [0] * len(asked), {}
    for turn in range(len(asked) - 1, -1, -1):
        next_at[turn] = later.get(asked[turn], len(asked))
        later[asked[turn]] = turn
    held: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    n_hits = 0
    for turn, key in enumerate(asked):
        n_hits += key in held
        held[key] = next_at[turn]
        heapq.heappush(furthest, (-next_at[turn], key))
        while len(held) > n_blocks:
            at, last = heapq.heappop(furthest)
            if held.get(last) == -at:
                del held[last]
    return n_hits / len(asked)


def read_trace(path: Path) -> list[list[int]]:
    with path.open() as lines:
        return [json.loads(line)["hash_ids"] for line in lines if line.strip()]


def made_up(seed: int, n_requests: int) -> list[list[int]]:
    """Conversations, each turn of which asks for all blocks of the turns before it and some new ones; one
    in three begins with one of twenty system prompts, whose popularity is Zipf's."""
    rng, fresh = Random(seed), iter(range(10**9))
    prompts = [[next(fresh) for _ in range(rng.randrange(1, 20))] for _ in range(20)]
    weights = [1 / (rank + 1) for rank in range(20)]
    open_ones: list[list[int]] = []
    requests = []
    for _ in range(n_requests):
        if open_ones and rng.random() < 0.55:
            index = min(int(rng.expovariate(1 / 100)), len(open_ones) - 1)  # mostly those of late
            talk = open_ones[-1 - index]
        else:
            talk = list(rng.choices(prompts, weights)[0]) if rng.random() < 1 / 3 else []
            open_ones.append(talk)
        talk += [next(fresh) for _ in range(min(int(rng.lognormvariate(2.0, 1.2)) + 1, 200))]
        requests.append(list(talk))
    return requests


def measure(options: Options) -> Iterator[Metric]:
    n_requests = 1_000 if options.quick else 8_000
    requests: Requests = read_trace(options.trace) if options.trace else made_up(options.seed, n_requests)
    requests = requests[: options.limit or (2_000 if options.quick else None)]
    n_asked, n_distinct = sum(map(len, requests)), len({key for blocks in requests for key in blocks})
    limit = 1 - n_distinct / n_asked
    half = GdsfCache(n_distinct // 2, equal_cost_s)
    found, in_a_row, saved = replay(requests, half)
    name = "mooncake_hit_percent" if options.trace else "made_up_hit_percent"
    yield Metric(
        name, 100 * found, "%", ">= 30" if options.trace else None, 1,
        {
            "limit": round(100 * limit, 2),
            "in a row": round(100 * in_a_row, 2),
            "seconds saved": round(100 * saved, 2),
            "blocks": n_asked,
            "distinct": n_distinct,
        },
    )  # fmt: skip
    yield Metric("hit_infinite_percent", 100 * limit, "%")
    for budget in BUDGETS:
        n_blocks = int(budget * n_distinct)
        rules: dict[str, Cache] = {
            "gdsf": GdsfCache(n_blocks, equal_cost_s),
            "gdsf by place": GdsfCache(n_blocks, block_cost_s),
            "lru": LruCache(n_blocks),
            "s3-fifo": S3Fifo(n_blocks),
            "tinylfu": TinyLfu(n_blocks),
        }
        shares = {name: replay(requests, cache) for name, cache in rules.items()}
        detail = {name: " / ".join(f"{100 * share:.2f}" for share in three) for name, three in shares.items()}
        detail["belady"] = f"{100 * belady(requests, n_blocks):.2f}"
        detail["columns"] = "hits / in a row / seconds saved"
        yield Metric(f"hit_percent_{int(100 * budget)}", 100 * shares["gdsf"][0], "%", None, 1, detail)


if __name__ == "__main__":
    sys.exit(main("hits of a cache of half the working set", measure, takes_trace=True))
