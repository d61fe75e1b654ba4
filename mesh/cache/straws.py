"""Which nodes own which arc: a weighted lottery that every node draws alike.

The key space is cut into ``N_ARCS`` equal arcs. For each arc every node draws two straws, exponential lengths
made from a hash of arc and node and divided by the node's weight; the shortest first straw owns the arc, and
so does the shortest second one. Each is won in exact proportion to weight. Where one node wins both, its
second place goes to the node with the shortest straw of either kind when straws are divided by weight to
the power of 7/4: that gives the heavy nodes back what they lose by such ties, which are theirs mostly.

All three are minima over straws that depend on one node alone. So a node that joins takes what it wins, a
node that leaves gives up what it had, and next to nothing moves between the others (measured in ADR 0016).

The same numbers on every machine: integers, and of floats only + - × ÷ and the square root, which IEEE 754
rounds exactly. The logarithm is a series of those, because libraries differ in its last bit.

Rendezvous: Thaler and Ravishankar, 1998; weights by exponentials: Efraimidis and Spirakis, 2006; straws:
Weil et al., "CRUSH", SC 2006.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["ARC_BITS", "LOAD_MAX", "NOBODY", "N_ARCS", "deal"]

ARC_BITS = 18
N_ARCS = 1 << ARC_BITS
# The share of a node with n arcs is right to 1/√n: 1.1 % for one of 64 equal ones, at 1 MiB for a view.

NOBODY = 0xFFFF
"""In a table: the second place in a mesh of one node."""

LOAD_MAX = 1.25
"""No node gets more than this times its share, rounded up to whole arcs. Chance comes near it only where the
share is under a hundred arcs; what is over goes to the next straws."""

_CHUNK = 1 << 14  # arcs at a time: what is in work stays in the processor's cache

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.uint16]
Arcs = npt.NDArray[np.intp]


def deal(names: Sequence[str], weights: Sequence[int]) -> Places:
    """The owners of all arcs.

    Shapes: the result is (2, ``N_ARCS``), indices into ``names`` (sorted, at most 65,535), ``NOBODY`` where
    there is no second node. ``weights``: bytes, each at least 1.

    Cost: about 20 ms of one core per node: a shell that has others to serve deals in a thread.
    """
    assert len(names) == len(weights) < NOBODY and all(weight >= 1 for weight in weights)
    owners = np.full((2, N_ARCS), NOBODY, np.uint16)
    if len(names) > 1:
        for start in range(0, N_ARCS, _CHUNK):
            owners[:, start : start + _CHUNK] = _deal_chunk(start, names, weights)
        _bound(owners, names, weights)
    elif names:
        owners[0] = 0
    return owners


def straws(arcs: Words, name: str) -> Words:
    """Both straws of a node for each arc, as 32-bit numbers: (2, arcs). The larger, the shorter the straw."""
    hashed = _mix(arcs + np.uint64(_seed(name)))
    return np.stack((hashed >> np.uint64(32), hashed & np.uint64(0xFFFFFFFF)))


def tie_weight(weight: float) -> float:
    """``weight`` to the power of 7/4, in operations that round alike everywhere."""
    root = float(np.sqrt(weight))
    return weight * root * float(np.sqrt(root))


class _Minimum:
    """The least cost so far for each arc, and whose it is; the first to reach it keeps it."""

    def __init__(self, size: int) -> None:
        self.cost = np.full(size, np.inf)
        self.owner = np.full(size, NOBODY, np.uint16)

    def within(self, straw: Words, weight: float) -> Arcs:
        """Where the straw may cost less. Spares the logarithm of the others: ``-ln u >= 1 - u``."""
        at_least = ((2.0**32 - 0.5) - straw) * (2.0**-32 * (1.0 - 1e-9))  # less than rounding could hide
        return np.flatnonzero(at_least < self.cost * weight)

    def offer(self, arcs: Arcs, cost: Floats, owner: Places) -> tuple[Arcs, Floats, Places]:
        """Take what costs less; what it replaced comes back, or else what was offered."""
        wins = cost < self.cost[arcs]
        back_cost = np.where(wins, self.cost[arcs], cost)
        back_owner = np.where(wins, self.owner[arcs], owner)
        self.cost[arcs] = np.where(wins, cost, self.cost[arcs])
        self.owner[arcs] = np.where(wins, owner, self.owner[arcs])
        return arcs, back_cost, back_owner


def _deal_chunk(start: int, names: Sequence[str], weights: Sequence[int]) -> Places:
    arcs = np.arange(start, start + _CHUNK, dtype=np.uint64)
    places = (_Minimum(_CHUNK), _Minimum(_CHUNK))
    # For ties: the two shortest, so that one is left when the winner of both straws is passed over.
    spare, second_spare = _Minimum(_CHUNK), _Minimum(_CHUNK)
    # From the heaviest: then few of those that follow can win anything.
    for index in sorted(range(len(names)), key=lambda index: (-weights[index], index)):
        weight = float(weights[index])
        both = straws(arcs, names[index])
        for place, straw in zip(places, both, strict=True):
            near = place.within(straw, weight)
            place.offer(near, minus_log(straw[near]) / weight, np.full(len(near), index, np.uint16))
        shorter = np.maximum(*both)
        near = second_spare.within(shorter, tie_weight(weight))
        cost = minus_log(shorter[near]) / tie_weight(weight)
        second_spare.offer(*spare.offer(near, cost, np.full(len(near), index, np.uint16)))
    first, second = (place.owner for place in places)
    other = np.where(spare.owner == first, second_spare.owner, spare.owner)
    return np.stack((first, np.where(second == first, other, second)))


def _bound(owners: Places, names: Sequence[str], weights: Sequence[int]) -> None:
    """Give away, in place, what a node has over ``LOAD_MAX`` times its share: its longest straws first."""
    counts = np.bincount(owners.ravel(), minlength=len(names))
    most = np.ceil(np.array(shares(weights)) * LOAD_MAX)
    seeds = np.array([_seed(name) for name in names], np.uint64)
    divisors = np.array(weights, np.float64)
    # From the heaviest, so that what is given away does not come to a node that was looked at already.
    over = [int(index) for index in np.flatnonzero(counts > most)]
    for node in sorted(over, key=lambda index: (-weights[index], index)):
        kinds, arcs = np.nonzero(owners == node)
        shorter = np.maximum(*straws(arcs.astype(np.uint64), names[node]))
        longest = np.lexsort((kinds, arcs, shorter))[: int(counts[node] - most[node])]
        for kind, arc in zip(kinds[longest], arcs[longest], strict=True):
            words = _mix(seeds + np.uint64(arc))
            cost = minus_log(np.maximum(words >> np.uint64(32), words & np.uint64(0xFFFFFFFF))) / divisors
            cost[(counts >= most) | (np.arange(len(names)) == owners[1 - kind, arc])] = np.inf
            taker = int(np.argmin(cost))
            if cost[taker] == np.inf:
                break  # nobody has room
            owners[kind, arc] = taker
            counts[node] -= 1
            counts[taker] += 1


def shares(weights: Sequence[int]) -> list[float]:
    """How many arc places each node should have: in proportion, but no more than all arcs once.

    A node with more than half of all the quota cannot use it: both copies of a block on one node are one.
    """
    share = [0.0] * len(weights)
    places, total = 2.0 * N_ARCS, sum(weights)
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        share[index] = min(float(N_ARCS), places * weights[index] / total)
        places -= share[index]
        total -= weights[index]
    return share


def _seed(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8, person=b"edgemesh-ring").digest()
    return int.from_bytes(digest, "little")


def _mix(words: Words) -> Words:
    """Splitmix64 (Steele, Lea and Flood, 2014): every bit in decides every bit out."""
    words = words * np.uint64(0x9E3779B97F4A7C15)  # arrays of integers wrap round
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def minus_log(halves: Words) -> Floats:
    """``-ln((x + 0.5) / 2**32)`` of 32-bit integers, to 13 digits, the same on every machine.

    ``x = m · 2**e`` with m from 1/√2 to √2; ``ln m = 2 (s + s³/3 + s⁵/5 + …)``, ``s = (m-1)/(m+1)``, at
    most 0.172.
    """
    mantissa, exponent = np.frexp((halves.astype(np.float64) + 0.5) * 2.0**-32)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, 1.0 / 15.0)
    for odd in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return -(exponent * 0.6931471805599453 + 2.0 * s * series)
