"""What adapters change in a frozen model, for rows that belong to different adapters in one pass.

Every PEFT method that is served comes down to a few numbers beside a frozen matrix W, row by row:

    y = out_scale * (W (in_scale * x) + B (A x) + D x) + bias

LoRA and VeRA are A and B; DoRA adds out_scale; IA3 is a scale alone; what multiplies W (OFT, LoHa, ...) is
a dense difference D; LayerNorm tuning replaces a norm's weight. All of it is float32, whatever W is: the
noise of bf16 comes close to what a small adapter does.

A pass has two kinds of rows. The long segments of prompts go through their adapter's matrices on their
own. The single rows of many answers would pay more for calling than for computing: the matrices of all
adapters that are present are laid side by side once, and two batched products per matrix serve every row.
They stay laid out while the same adapters stay in the batch. A row only ever meets its own adapter's
numbers, and padding never meets a row.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NOTHING", "Adapter", "AdapterRows", "ClassHead", "Delta", "Dense", "Norm", "Slot", "Up"]

Slot = Literal["qkv", "out", "gate_up", "down", "head"]
"""The stacked matrices of a block, as ``node.compute.backbone.llama`` has them, and the output head."""

Norm = Literal["attention", "mlp", "final"]

_BLOCK_SLOTS: tuple[Slot, ...] = ("qkv", "out", "gate_up", "down")
_BLOCK_NORMS: tuple[Norm, ...] = ("attention", "mlp")

ForScript = tuple[list[Any], list[Any], list[Any], list[Any], list[Any], list[Any]]
"""What ``node.compute.backbone.step`` does to a block's four products, matrix by matrix."""

NOTHING: ForScript = ([], [], [], [], [], [])

# A segment of more rows than this is worth products of its own; so is an adapter with more rows than that
# in all (padding every other adapter to its number of rows would cost more than it saves).
_SHORT_ROWS = 4
_SHARED_ROWS = 16
# Layouts kept: of the batch as it is, and as it was before somebody joined or left, or of those with a head
# of their own. Each is a copy of the matrices of the adapters in it, beside what the shelf counts.
_LAYOUTS_MAX = 2
# Which row is whose; a few numbers each. A step has one for the pass and one for the head.
_PLANS_MAX = 16

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, eq=False)
class Up:
    """B of one module, whose rows are ``start`` and following ones of the stacked matrix.

    Shapes: b (d_out of the module, r), the scale (alpha / r) multiplied in.
    """

    start: int
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """D of one module. Shapes: weight (d_out of the module, d_in)."""

    start: int
    weight: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What one adapter changes in one stacked matrix.

    Shapes:
        a:         (sum of r, d_in)  A of each module in ``ups``, one after another
        out_scale: (d_out,)
        in_scale:  (d_in,)
        bias:      (d_out,)  the difference to the frozen bias
    """

    a: Tensor | None = None
    ups: tuple[Up, ...] = ()
    dense: tuple[Dense, ...] = ()
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        several = [up.b for up in self.ups] + [dense.weight for dense in self.dense]
        return several + [t for t in (self.a, self.out_scale, self.in_scale, self.bias) if t is not None]


@dataclass(frozen=True, slots=True, eq=False)
class ClassHead:
    """A saved classification head. Shapes: weight (labels, d)."""

    weight: Tensor
    labels: tuple[str, ...]

    def logits(self, rows: Tensor) -> Tensor:
        """Shapes: rows (n, d) of a ``Pass`` -> (n, labels), float32."""
        return F.linear(rows.float(), self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, ready to be applied to any rows. Immutable: whoever runs with it keeps it."""

    name: str
    first_layer: int
    """Its cut: no layer below is changed. The number of layers if only the final norm or heads are."""
    n_bytes: int
    """What it holds in memory."""
    deltas: Mapping[tuple[int, Slot], Delta] = field(default_factory=dict)
    """By layer; the head counts as layer ``n_layers``."""
    norms: Mapping[tuple[int, Norm], Tensor] = field(default_factory=dict)
    """Weights (d,) that stand in for the frozen ones; the final norm counts as layer ``n_layers``."""
    digest: str = ""
    n_layers: int = 0
    """Of the backbone it is for."""
    head: ClassHead | None = None
    invocation: tuple[int, ...] | None = None
    """Tokens from which on an activated LoRA applies; ``None``: it always does."""
    completes: bool = False
    """It learned to go on from plain prompts, so a prompt for it is no message in a chat."""

    def active_from(self, prompt: Sequence[int]) -> int:
        """The first position of ``prompt`` the adapter applies to, as PEFT has it: where its invocation
        last begins. ``len(prompt)`` if it does not occur: then the adapter stays off in the answer, too.

        Rows before it go through the pass with no adapter, so their states are everybody's.
        """
        if self.invocation is None:
            return 0
        n = len(self.invocation)
        for start in range(len(prompt) - n, -1, -1):
            if tuple(prompt[start : start + n]) == self.invocation:
                return start
        return len(prompt)


class AdapterRows:
    """Which rows of one pass belong to which adapter, and what that does to them."""

    __slots__ = ("_alone", "_for_script", "_n_rows", "_shared")

    def __init__(self, parts: Sequence[tuple[Adapter | None, int]]) -> None:
        own: list[tuple[Adapter, slice | Tensor]] = []
        short: dict[Adapter, list[int]] = {}
        start = 0
        for adapter, n in parts:
            if adapter is not None and n > _SHORT_ROWS:
                own.append((adapter, slice(start, start + n)))
            elif adapter is not None and n:
                short.setdefault(adapter, []).extend(range(start, start + n))
            start += n
        # One adapter alone needs no layout, unless it has but one row: that row then gets the same bits as
        # it gets in company.
        is_one = len(short) == 1 < len(next(iter(short.values()), ()))
        for adapter in [a for a, rows in short.items() if is_one or len(rows) > _SHARED_ROWS]:
            own.append((adapter, _places(short.pop(adapter))))
        self._n_rows = start
        self._alone = own
        self._shared = _Shared(short, start) if short else None
        self._for_script: dict[int, ForScript | None] = {}

    @classmethod
    def of(cls, parts: Sequence[tuple[Adapter | None, int]]) -> AdapterRows | None:
        """``parts``: adapter and number of rows, segment by segment; ``None`` if nobody has one."""
        if all(adapter is None for adapter, _ in parts):
            return None
        key = tuple(parts)
        found = _recent(_plans, key)
        return found if found is not None else _keep(_plans, key, cls(parts), _PLANS_MAX)

    @staticmethod
    def forget(adapter: Adapter) -> None:
        """Hold nothing of ``adapter`` any more: it left the memory, or another took its name."""
        for key in [key for key in _plans if any(a is adapter for a, _ in key)]:
            del _plans[key]
        for members in [members for members in _layouts if any(a is adapter for a in members)]:
            del _layouts[members]

    def linear(self, layer: int, slot: Slot, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``base(x)`` with every row's own adapter applied. Shapes: (rows, d_in) -> (rows, d_out)."""
        alone = [(a.deltas[layer, slot], rows) for a, rows in self._alone if (layer, slot) in a.deltas]
        stacks = self._shared.stacks(layer, slot) if self._shared else ()
        if not alone and not stacks:
            return base(x)
        scaled = x
        for delta, rows in alone:
            if delta.in_scale is not None:
                scaled = _changed(scaled, x, rows, x[rows].float() * delta.in_scale)
        for stack in stacks:
            if stack.in_scale is not None:
                scaled = _changed(scaled, x, stack.rows, x[stack.rows].float() * stack.in_scale[stack.whose])
        y = base(scaled)
        dtype, y, x = y.dtype, y.float(), x.float()
        for delta, rows in alone:
            _apply(delta, rows, x, y)
        for stack in stacks:
            stack.apply(x, y)
        return y.to(dtype)

    def for_script(self, layer: int, dtype: torch.dtype) -> ForScript | None:
        """What changes in a block whose rows are ``dtype``; ``None`` if it is more than A and B of short
        segments, which is all the script does."""
        if layer not in self._for_script:
            self._for_script[layer] = self._found_for_script(layer, dtype)
        return self._for_script[layer]

    def _found_for_script(self, layer: int, dtype: torch.dtype) -> ForScript | None:
        for adapter, _ in self._alone:
            if any((layer, slot) in adapter.deltas for slot in _BLOCK_SLOTS):
                return None
            if any((layer, which) in adapter.norms for which in _BLOCK_NORMS):
                return None
        if self._shared is None:
            return NOTHING
        if any(self._shared.norm(layer, which) is not None for which in _BLOCK_NORMS):
            return None
        stacks = [self._shared.stacks(layer, slot) for slot in _BLOCK_SLOTS]
        if not any(stacks):
            return NOTHING
        if dtype != torch.float32 or not all(stack.is_low_rank for several in stacks for stack in several):
            return None
        given = [[stack.for_script() for stack in several] for several in stacks]
        takes, downs, ups, spots, rows, seats = (
            [[each[at] for each in several] for several in given] for at in range(len(NOTHING))
        )
        return takes, downs, ups, spots, rows, seats

    def norm(self, layer: int, which: Norm, weight: Tensor, x: Tensor, eps: float) -> Tensor:
        """The root-mean-square norm with every row's own weight. Shapes: (rows, d) -> (rows, d)."""
        y = F.rms_norm(x, weight.shape, weight, eps)
        for adapter, rows in self._alone:
            if (own := adapter.norms.get((layer, which))) is not None:
                y[rows] = F.rms_norm(x[rows].float(), own.shape, own, eps).to(y.dtype)
        if self._shared and (found := self._shared.norm(layer, which)) is not None:
            rows, weights = found
            y[rows] = (F.rms_norm(x[rows].float(), weight.shape, None, eps) * weights).to(y.dtype)
        return y


class _Shared:
    """The short segments: rows of at least two adapters, few each, served by batched products."""

    def __init__(self, rows_of: Mapping[Adapter, list[int]], n_rows: int) -> None:
        # In one order however the rows come, so that the layout outlives who sits where.
        self._members = tuple(sorted(rows_of, key=lambda a: (a.name, a.digest, id(a))))
        self._rows = [rows_of[adapter] for adapter in self._members]
        self._n_rows = n_rows
        self._stacks: dict[tuple[int, Slot], tuple[_Stack, ...]] = {}
        self._norms: dict[tuple[int, Norm], tuple[Tensor, Tensor] | None] = {}
        self._seats: dict[tuple[int, ...], _Seats] = {}

    def stacks(self, layer: int, slot: Slot) -> tuple[_Stack, ...]:
        found = self._stacks.get((layer, slot))
        if found is None:
            # Only here, so that a pass over norms alone pushes nobody's layout out.
            layout = _recent(_layouts, self._members)
            if layout is None:
                layout = _keep(_layouts, self._members, {}, _LAYOUTS_MAX)
            laid = layout.get((layer, slot))
            if laid is None:
                laid = layout[layer, slot] = _lay_out(self._members, layer, slot)
            found = tuple(_Stack(part, self._seated(part.members)) for part in laid)
            self._stacks[layer, slot] = found
        return found

    def norm(self, layer: int, which: Norm) -> tuple[Tensor, Tensor] | None:
        """Rows with a weight of their own, and the weight (d,) of each."""
        if (layer, which) not in self._norms:
            mine = [
                (row, adapter.norms[layer, which])
                for adapter, rows in zip(self._members, self._rows, strict=True)
                if (layer, which) in adapter.norms
                for row in rows
            ]
            places = torch.tensor([row for row, _ in mine])
            weights = [weight for _, weight in mine]
            found = (places.to(weights[0].device), torch.stack(weights)) if mine else None
            self._norms[layer, which] = found
        return self._norms[layer, which]

    def _seated(self, members: tuple[int, ...]) -> _Seats:
        if members not in self._seats:
            device = _device_of(self._members[members[0]])
            self._seats[members] = _Seats([self._rows[m] for m in members], self._n_rows, device)
        return self._seats[members]


class _Seats:
    """Where the rows of some adapters sit in (adapters, most rows of one), and who sits nowhere.

    Shapes: take (adapters * most,) row of x for each seat; rows (n,) of x that have a seat; whose (n,)
    adapter of each; seats (n,) seat of each.
    """

    def __init__(self, rows_of: Sequence[Sequence[int]], n_rows: int, device: torch.device) -> None:
        self.n, self.most = len(rows_of), max(map(len, rows_of))
        take: list[int] = []
        rows: list[int] = []
        whose: list[int] = []
        seats: list[int] = []
        for at, mine in enumerate(rows_of):
            # An empty seat repeats a row of the same adapter; what comes of it is never looked at.
            take += [*mine, *[mine[0]] * (self.most - len(mine))]
            rows += mine
            whose += [at] * len(mine)
            seats += range(at * self.most, at * self.most + len(mine))
        self.is_all = take == list(range(n_rows))
        self.take = torch.tensor(take, device=device)
        self.rows = torch.tensor(rows, device=device)
        self.whose = torch.tensor(whose, device=device)
        self.seats = None if len(seats) == len(take) else torch.tensor(seats, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """One matrix of several adapters of about the same rank, side by side.

    Shapes: a (n, d_in, sum of r); ups: (start, first column of a, b (n, r, d_out of the module));
    out_scale (n, d_out); in_scale (n, d_in); bias (n, d_out).
    """

    members: tuple[int, ...]
    a: Tensor | None
    ups: tuple[tuple[int, int, Tensor], ...]
    dense: tuple[tuple[Dense, ...], ...]
    out_scale: Tensor | None
    in_scale: Tensor | None
    bias: Tensor | None


class _Stack:
    """A layout with the rows of this pass."""

    __slots__ = ("_laid", "_seats", "in_scale", "rows", "whose")

    def __init__(self, laid: _Laid, seats: _Seats) -> None:
        self._laid, self._seats = laid, seats
        self.in_scale, self.rows, self.whose = laid.in_scale, seats.rows, seats.whose

    @property
    def is_low_rank(self) -> bool:
        """A and B are all there is."""
        laid = self._laid
        others = (laid.out_scale, laid.in_scale, laid.bias)
        return laid.a is not None and not any(laid.dense) and all(other is None for other in others)

    def for_script(self) -> tuple[Tensor, Tensor, list[Tensor], list[int], Tensor, Tensor]:
        """``apply`` of a low-rank stack, as the script takes it; an empty tensor stands for "as it is"."""
        laid, seats = self._laid, self._seats
        assert laid.a is not None
        none = seats.take.new_empty(0)
        return (
            none if seats.is_all else seats.take,
            laid.a,
            [b for _, _, b in laid.ups],
            [place for start, column, _ in laid.ups for place in (start, column)],
            seats.rows,
            none if seats.seats is None else seats.seats,
        )

    def apply(self, x: Tensor, y: Tensor) -> None:
        """Change ``y``, the frozen matrix times ``x``, in place."""
        laid, seats = self._laid, self._seats
        if laid.a is not None:
            taken = x if seats.is_all else x[seats.take]
            down = torch.bmm(taken.view(seats.n, seats.most, -1), laid.a)
            for start, column, b in laid.ups:
                up = torch.bmm(down[:, :, column : column + b.shape[1]], b)
                into = y[:, start : start + b.shape[2]]
                if seats.is_all:
                    into += up.view(-1, b.shape[2])
                else:
                    up = up.view(-1, b.shape[2])
                    into.index_add_(0, seats.rows, up if seats.seats is None else up[seats.seats])
        for at, several in enumerate(laid.dense):
            if several:
                mine = seats.rows[seats.whose == at]
                for dense in several:
                    _add_dense(dense, mine, x, y)
        if laid.out_scale is not None:
            y[seats.rows] *= laid.out_scale[seats.whose]
        if laid.bias is not None:
            y[seats.rows] += laid.bias[seats.whose]


_plans: OrderedDict[tuple[tuple[Adapter | None, int], ...], AdapterRows] = OrderedDict()
_layouts: OrderedDict[tuple[Adapter, ...], dict[tuple[int, Slot], tuple[_Laid, ...]]] = OrderedDict()


def _recent(kept: OrderedDict[_K, _V], key: _K) -> _V | None:
    if key not in kept:
        return None
    kept.move_to_end(key)
    return kept[key]


def _keep(kept: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> _V:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
    return value


def _lay_out(members: Sequence[Adapter], layer: int, slot: Slot) -> tuple[_Laid, ...]:
    """Side by side those whose ranks round up to the same power of two, so padding at most doubles."""
    classes: dict[tuple[int, bool, bool, bool], list[int]] = {}
    for at, adapter in enumerate(members):
        if (delta := adapter.deltas.get((layer, slot))) is not None and delta.tensors():
            rank = max((up.b.shape[1] for up in delta.ups), default=0)
            scales = (delta.out_scale is not None, delta.in_scale is not None, delta.bias is not None)
            classes.setdefault((max(rank - 1, 0).bit_length() if rank else -1, *scales), []).append(at)
    return tuple(
        _laid(tuple(found), [members[at].deltas[layer, slot] for at in found]) for found in classes.values()
    )


def _laid(members: tuple[int, ...], deltas: Sequence[Delta]) -> _Laid:
    """Each module's A and B get a place of their own; who does not adapt it has zeros there."""
    ranks: Counter[tuple[int, int]] = Counter()
    for delta in deltas:
        for up in delta.ups:
            module = (up.start, up.b.shape[0])
            ranks[module] = max(ranks[module], up.b.shape[1])
    a: Tensor | None = None
    columns: dict[tuple[int, int], int] = {}
    ups: dict[tuple[int, int], Tensor] = {}
    if ranks:
        some = next(delta.a for delta in deltas if delta.a is not None)
        a = some.new_zeros(len(deltas), some.shape[1], sum(ranks.values()))
        for module in sorted(ranks):
            columns[module] = sum(ranks[other] for other in columns)
            ups[module] = some.new_zeros(len(deltas), ranks[module], module[1])
        for at, delta in enumerate(deltas):
            first = 0
            for up in delta.ups:
                assert delta.a is not None
                module, r = (up.start, up.b.shape[0]), up.b.shape[1]
                column = columns[module]
                a[at, :, column : column + r] = delta.a[first : first + r].T
                ups[module][at, :r] = up.b.T
                first += r
    return _Laid(
        members,
        a,
        tuple((module[0], columns[module], ups[module]) for module in ups),
        tuple(delta.dense for delta in deltas),
        _stacked(delta.out_scale for delta in deltas),
        _stacked(delta.in_scale for delta in deltas),
        _stacked(delta.bias for delta in deltas),
    )


def _stacked(tensors: Iterable[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found) if found else None


def _apply(delta: Delta, rows: slice | Tensor, x: Tensor, y: Tensor) -> None:
    """Change rows of ``y``, the frozen matrix times ``x``, in place."""
    mine = x[rows]
    if delta.a is not None:
        down = F.linear(mine, delta.a)
        first = 0
        for up in delta.ups:
            r = up.b.shape[1]
            y[rows, up.start : up.start + up.b.shape[0]] += F.linear(down[:, first : first + r], up.b)
            first += r
    for dense in delta.dense:
        _add_dense(dense, rows, x, y)
    if delta.out_scale is not None:
        y[rows] *= delta.out_scale
    if delta.bias is not None:
        y[rows] += delta.bias


def _add_dense(dense: Dense, rows: slice | Tensor, x: Tensor, y: Tensor) -> None:
    y[rows, dense.start : dense.start + dense.weight.shape[0]] += F.linear(x[rows], dense.weight)


def _changed(scaled: Tensor, x: Tensor, rows: slice | Tensor, values: Tensor) -> Tensor:
    """``scaled`` with other rows; ``x`` itself is never written to."""
    if scaled is x:
        scaled = x.clone()
    scaled[rows] = values.to(scaled.dtype)
    return scaled


def _places(rows: Sequence[int]) -> slice | Tensor:
    """Rows as a range where they are one."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)


def _device_of(adapter: Adapter) -> torch.device:
    tensors = [t for delta in adapter.deltas.values() for t in delta.tensors()]
    return tensors[0].device
