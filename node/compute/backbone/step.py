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

from node.compute.backbone.formats import IN_DIGITS, Int4Linear, Int8Linear
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

# float32 only: the steps of ``torch.rms_norm`` without its conversions, and bit for bit its result.
_NORM = """
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.mul(x.square().mean([-1], True).add_(eps).rsqrt_()).mul_(weight)
"""

_PLAIN_NORM = """
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rms_norm(x, [x.size(1)], weight, eps)
"""

# ``node.compute.backbone.deltas.Laid.apply`` for what most adapters are: A and B, and nothing else.
_ADAPTED = """
def adapted(
    x: Tensor, y: Tensor, takes: List[Tensor], downs: List[Tensor], ups: List[List[Tensor]],
    spots: List[List[int]], rows: List[Tensor], seats: List[Tensor]
) -> Tensor:
    for i in range(len(downs)):
        taken = x
        if takes[i].numel():
            taken = x.index_select(0, takes[i])
        down = torch.bmm(taken.view(downs[i].size(0), -1, x.size(1)), downs[i])
        for j in range(len(ups[i])):
            b = ups[i][j]
            up = torch.bmm(down.narrow(2, spots[i][2 * j + 1], b.size(1)), b).view(-1, b.size(2))
            into = y.narrow(1, spots[i][2 * j], b.size(2))
            if takes[i].numel():
                if seats[i].numel():
                    up = up.index_select(0, seats[i])
                into.index_add_(0, rows[i], up)
            else:
                into.add_(up)
    return y
"""

_BLOCK = """
def block(
    x: Tensor, norms: List[Tensor], eps: float, weights: List[Packed], biases: List[Optional[Tensor]],
    cos: Tensor, sin: Tensor, layer: int, heads: int, kv_heads: int,
    takes: List[List[Tensor]], downs: List[List[Tensor]], ups: List[List[List[Tensor]]],
    spots: List[List[List[int]]], adapted_rows: List[List[Tensor]], adapted_seats: List[List[Tensor]],
    caches: List[Tensor], rows: List[Tensor],
    ats: List[Tensor], seats: List[Tensor], masks: List[Optional[Tensor]], bounds: List[List[int]]
) -> Tensor:
    has = len(downs) > 0
    normed = norm(x, norms[0], eps)
    qkv = linear(normed, weights[0], biases[0])
    if has:
        qkv = adapted(normed, qkv, takes[0], downs[0], ups[0], spots[0], adapted_rows[0], adapted_seats[0])
    attended = attention(qkv, cos, sin, layer, heads, kv_heads, caches, rows, ats, seats, masks, bounds)
    out = linear(attended, weights[1], biases[1])
    if has:
        out = adapted(attended, out, takes[1], downs[1], ups[1], spots[1], adapted_rows[1], adapted_seats[1])
    x = out.add_(x)
    normed = norm(x, norms[1], eps)
    both = linear(normed, weights[2], biases[2])
    if has:
        both = adapted(normed, both, takes[2], downs[2], ups[2], spots[2], adapted_rows[2], adapted_seats[2])
    gate, up = both.chunk(2, 1)
    inner = torch.ops.aten.silu(gate).mul_(up)
    down = linear(inner, weights[3], biases[3])
    if has:
        down = adapted(inner, down, takes[3], downs[3], ups[3], spots[3], adapted_rows[3], adapted_seats[3])
    return down.add_(x)
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
    Int4Linear: (
        "Tuple[Tensor, Tensor]",
        """
def linear(x: Tensor, packed: Packed, bias: Optional[Tensor]) -> Tensor:
    codes, scales_zeros = packed
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), codes, 32, scales_zeros).to(x.dtype)
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
def _script(kind: type[Linear], dtype: torch.dtype) -> Any:
    packed, linear = _LINEARS[kind]
    norm = _NORM if dtype == torch.float32 else _PLAIN_NORM
    source = (linear + norm + _ATTENTION + _ADAPTED + _BLOCK).replace("Packed,", packed + ",")
    return torch.jit.CompilationUnit(source.replace("[Packed]", f"[{packed}]")).block


def block_script(
    linears: Sequence[Linear], dtype: torch.dtype
) -> tuple[Any, list[Any], list[Tensor | None]] | None:
    """The script of a block of these linears (qkv, out, gate_up, down), their packed weights and biases;
    ``None`` if they are not all of one kind that has a script. ``dtype``: of the rows."""
    kind = type(linears[0])
    packed = [getattr(linear, "packed", None) for linear in linears]
    if (
        kind not in _LINEARS
        or any(type(linear) is not kind for linear in linears)
        or any(p is None for p in packed)
    ):
        return None
    return _script(kind, dtype), packed, [linear.bias for linear in linears]  # type: ignore[attr-defined]


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
