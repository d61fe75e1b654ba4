"""One token of many sequences: their attention as one product, and a block as one script call.

A step of sixteen answers is four matrix products a layer, and was four hundred and eighty small attentions
beside them, which took as long. Here the states of short sequences lie in the slots of one ``Slab``, so one
call attends all of them: shorter ones are masked to the longest. A sequence that sees another's states, or
is longer than a slot, is attended on its own as before.

Between the products of one layer stand some sixty small operations on a few rows. Called from Python each
costs two or three times what it does, so they are one TorchScript function.
"""

from __future__ import annotations

import heapq
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from node.compute.backbone.formats import IN_DIGITS, Int8Linear
from node.compute.backbone.linear import FloatLinear, Linear

__all__ = ["Seat", "Slab", "Slabs", "Step", "block_script"]

# Sequences side by side; more go into another slab, and are one more call.
_SLOTS = 16
# Room of a slot is a power of two between these; longer sequences have memory of their own. One attention
# of that many positions takes long enough that calling it does not matter.
_SLOT_TOKENS_MIN = 128
_SLOT_TOKENS_MAX = 1024
# What is seen is rounded up to a multiple of this, by a mask: sums then run in one order whether a longer
# neighbour is there or not, so that a row's result has the same bits alone and in company.
_STOP_TOKENS = 64
# Address space of one slab at most. Memory is only what was written, and goes back with each slot.
_SLAB_BYTES_MAX = 1 << 30
_PAGE_BYTES = mmap.PAGESIZE

_ATTENTION = """
def attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, layer: int, heads: int, kv_heads: int, caches: List[Tensor],
    rows: List[Tensor], ats: List[Tensor], seats: List[Tensor], masks: List[Optional[Tensor]],
    bounds: List[List[int]]
) -> Tensor:
    n, head_dim = qkv.size(0), cos.size(2)
    by_head = qkv.view(n, heads + 2 * kv_heads, head_dim)
    qk = by_head.narrow(1, 0, heads + kv_heads)
    turned = qk.roll([head_dim // 2], [2]).mul_(sin)
    qk.mul_(cos).add_(turned)
    new = qkv.narrow(1, heads * head_dim, 2 * kv_heads * head_dim)
    q = by_head.narrow(1, 0, heads).view(n, kv_heads, heads // kv_heads, head_dim)
    result = q
    if len(caches) > 1:
        result = torch.empty(n, heads * head_dim, dtype=qkv.dtype)
    for i in range(len(caches)):
        first, m, stop = bounds[i]
        mine = new
        asking = q
        if len(caches) > 1:
            mine = new.index_select(0, rows[i])
            asking = q.index_select(0, rows[i])
        cached = caches[i]
        cached.view(-1, 2 * kv_heads * head_dim).index_copy_(0, ats[i].select(0, layer), mine)
        if seats[i].numel():
            spread = torch.zeros(m, kv_heads, heads // kv_heads, head_dim, dtype=qkv.dtype)
            asking = spread.index_copy_(0, seats[i], asking)
        seen = cached.select(1, layer).narrow(0, first, m).narrow(1, 0, stop)
        keys, values = seen.select(2, 0).transpose(1, 2), seen.select(2, 1).transpose(1, 2)
        found = torch.ops.aten.scaled_dot_product_attention(asking, keys, values, masks[i]).reshape(m, -1)
        if seats[i].numel():
            found = found.index_select(0, seats[i])
        if len(caches) > 1:
            result.index_copy_(0, rows[i], found)
        else:
            result = found
    return result
"""

_BLOCK = """
def block(
    x: Tensor, norms: List[Tensor], eps: float, weights: List[Packed], biases: List[Optional[Tensor]],
    cos: Tensor, sin: Tensor, layer: int, heads: int, kv_heads: int, caches: List[Tensor], rows: List[Tensor],
    ats: List[Tensor], seats: List[Tensor], masks: List[Optional[Tensor]], bounds: List[List[int]]
) -> Tensor:
    d = [x.size(1)]
    qkv = linear(torch.rms_norm(x, d, norms[0], eps), weights[0], biases[0])
    attended = attention(qkv, cos, sin, layer, heads, kv_heads, caches, rows, ats, seats, masks, bounds)
    x = linear(attended, weights[1], biases[1]).add_(x)
    both = linear(torch.rms_norm(x, d, norms[1], eps), weights[2], biases[2])
    gate, up = both.chunk(2, 1)
    return linear(torch.ops.aten.silu(gate).mul_(up), weights[3], biases[3]).add_(x)
"""

_LINEARS = {
    Int8Linear: (
        "__torch__.torch.classes.quantized.LinearPackedParamsBase",
        IN_DIGITS
        + """
def linear(x: Tensor, packed: Packed, bias: Optional[Tensor]) -> Tensor:
    y = in_digits(x, packed)
    if bias is not None:
        y.add_(bias)
    return y
""",
    ),
    FloatLinear: (
        "Tensor",
        """
def linear(x: Tensor, packed: Packed, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
""",
    ),
}


@cache
def attention_script() -> Any:
    return torch.jit.CompilationUnit(_ATTENTION).attention


@cache
def _script(kind: type[Linear]) -> Any:
    packed, linear = _LINEARS[kind]
    source = (
        (linear + _ATTENTION + _BLOCK).replace("Packed,", packed + ",").replace("[Packed]", f"[{packed}]")
    )
    return torch.jit.CompilationUnit(source).block


def block_script(linears: Sequence[Linear]) -> tuple[Any, list[Any], list[Tensor | None]] | None:
    """The script of a block of these linears (qkv, out, gate_up, down), their packed weights and biases;
    ``None`` if they are not all of one kind that has a script."""
    kind = type(linears[0])
    packed = [getattr(linear, "packed", None) for linear in linears]
    if (
        kind not in _LINEARS
        or any(type(linear) is not kind for linear in linears)
        or any(p is None for p in packed)
    ):
        return None
    return _script(kind), packed, [linear.bias for linear in linears]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A sequence's slot. Whoever holds ``states`` or a view of it keeps the slot.

    Shapes: states (layers, capacity of the slot, 2, kv_heads, head_dim), keys and values.
    """

    slab: Slab
    at: int
    states: Tensor


class Slab:
    """Slots of equal room. Shape: states (slots, layers, capacity, 2, kv_heads, head_dim).

    Zeros where nothing was written, so that what is masked is a number.
    """

    def __init__(self, n_slots: int, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
        self.shape, self._dtype = shape, dtype
        self._slot_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._memory = mmap.mmap(-1, n_slots * self._slot_bytes)
        self.states = torch.frombuffer(self._memory, dtype=dtype).view(n_slots, *shape)
        self._free = list(range(n_slots))

    @property
    def capacity(self) -> int:
        return self.shape[1]

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def take(self) -> Seat:
        at = heapq.heappop(self._free)
        start = at * self._slot_bytes
        # A storage of its own, which lives as long as any view of it: then the slot is free again.
        room = memoryview(self._memory)[start : start + self._slot_bytes]
        states = torch.frombuffer(room, dtype=self._dtype).view(self.shape)
        weakref.finalize(room, self._give_back, at).atexit = False
        return Seat(self, at, states)

    def _give_back(self, at: int) -> None:
        start = -(-at * self._slot_bytes // _PAGE_BYTES) * _PAGE_BYTES
        n_bytes = ((at + 1) * self._slot_bytes - start) // _PAGE_BYTES * _PAGE_BYTES
        if n_bytes > 0 and hasattr(self._memory, "madvise"):
            self._memory.madvise(mmap.MADV_DONTNEED, start, n_bytes)
        heapq.heappush(self._free, at)


class Slabs:
    """The slabs that have sequences, by room of their slots."""

    def __init__(self, n_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._shape = (n_layers, kv_heads, head_dim)
        self._dtype = dtype
        self._open: dict[int, list[weakref.ref[Slab]]] = {}

    def seat(self, capacity: int) -> Seat | None:
        """A slot for ``capacity`` tokens; ``None`` for what is too long for one."""
        n_layers, kv_heads, head_dim = self._shape
        room = max(_SLOT_TOKENS_MIN, 1 << (capacity - 1).bit_length())
        shape = (n_layers, room, 2, kv_heads, head_dim)
        n_slots = min(_SLOTS, _SLAB_BYTES_MAX // (torch.Size(shape).numel() * self._dtype.itemsize))
        if room > _SLOT_TOKENS_MAX or n_slots < 2:
            return None
        slabs = [slab for ref in self._open.get(room, ()) if (slab := ref()) is not None]
        slab = next((slab for slab in slabs if slab.has_room), None)
        if slab is None:
            slab = Slab(n_slots, shape, self._dtype)
            slabs.append(slab)
        self._open[room] = [weakref.ref(slab) for slab in slabs]
        return slab.take()


class Step:
    """Where the one new row of each sequence goes, and what it sees."""

    __slots__ = ("arguments",)

    def __init__(self, seats: Sequence[Seat], lengths: Sequence[int]) -> None:
        """``lengths``: of each sequence before this step."""
        groups: dict[int, list[int]] = {}
        for row, seat in enumerate(seats):
            groups.setdefault(id(seat.slab), []).append(row)
        caches: list[Tensor] = []
        rows_of: list[Tensor] = []
        ats: list[Tensor] = []
        places: list[Tensor] = []
        masks: list[Tensor | None] = []
        bounds: list[list[int]] = []
        for rows in groups.values():
            slab = seats[rows[0]].slab
            n_layers, capacity = slab.shape[:2]
            slots = [seats[row].at for row in rows]
            first, m = min(slots), max(slots) - min(slots) + 1
            caches.append(slab.states)
            rows_of.append(torch.tensor(rows))
            at = torch.tensor([seats[row].at * n_layers * capacity + lengths[row] for row in rows])
            ats.append(at + (torch.arange(n_layers) * capacity)[:, None])
            in_order = slots == list(range(first, first + m))
            places.append(
                torch.tensor([] if in_order else [slot - first for slot in slots], dtype=torch.long)
            )
            stops = [1] * m
            for row, slot in zip(rows, slots, strict=True):
                stops[slot - first] = lengths[row] + 1
            stop = -(-max(stops) // _STOP_TOKENS) * _STOP_TOKENS
            mask = None
            if any(lengths[row] + 1 < stop for row in rows):
                seen = torch.arange(stop) < torch.tensor(stops)[:, None]
                mask = torch.zeros(m, 1, 1, stop, dtype=slab.states.dtype)
                mask.masked_fill_(~seen[:, None, None], float("-inf"))
            masks.append(mask)
            bounds.append([first, m, stop])
        self.arguments = (caches, rows_of, ats, places, masks, bounds)

    @classmethod
    def of(cls, seats: Sequence[Seat | None], lengths: Sequence[int]) -> Step | None:
        """``None`` if one of the sequences has no slot."""
        found = [seat for seat in seats if seat is not None]
        return cls(found, lengths) if len(found) == len(seats) else None

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, layer: int, heads: int, kv_heads: int) -> Tensor:
        """Writes the rows' states and attends. Shapes: qkv (n, (heads + 2 * kv_heads) * head_dim), which is
        changed in place -> (n, heads * head_dim)."""
        found: Tensor = attention_script()(qkv, cos, sin, layer, heads, kv_heads, *self.arguments)
        return found
