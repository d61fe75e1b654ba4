"""Rows of many adapters in one product, held against one row at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.compute.backbone.deltas import Adapter, AdapterRows, ClassHead, Delta, Dense, Up
from tests.reference.lora import linear_by_loop

D_IN = 12
MODULES = [(0, 10), (10, 4), (14, 4)]
"""Start and rows of the modules stacked in the matrix, as q, k and v are."""
D_OUT = 18


def random_delta(seed: int, ranks: Sequence[int], extras: frozenset[str] = frozenset()) -> Delta:
    """``ranks``: of each module, 0 where it is not adapted."""
    g = torch.Generator().manual_seed(seed)
    ups = tuple(
        Up(start, torch.randn(rows, r, generator=g))
        for (start, rows), r in zip(MODULES, ranks, strict=True)
        if r
    )
    return Delta(
        torch.randn(sum(ranks), D_IN, generator=g) if ups else None,
        ups,
        (Dense(10, torch.randn(4, D_IN, generator=g)),) if "dense" in extras else (),
        torch.randn(D_OUT, generator=g) if "out_scale" in extras else None,
        torch.randn(D_IN, generator=g) if "in_scale" in extras else None,
        torch.randn(D_OUT, generator=g) if "bias" in extras else None,
    )


def adapter(name: str, delta: Delta | None) -> Adapter:
    return Adapter(name, 0, 0, {} if delta is None else {(0, "qkv"): delta})


def run(parts: Sequence[tuple[Adapter | None, int]], x: Tensor, weight: Tensor) -> Tensor:
    rows = AdapterRows.of(parts)
    if rows is None:
        return F.linear(x, weight)
    return rows.linear(0, "qkv", lambda y: F.linear(y, weight), x)


deltas = st.builds(
    random_delta,
    st.integers(0, 1000),
    st.lists(st.sampled_from([0, 1, 2, 5, 8, 33]), min_size=3, max_size=3),
    st.frozensets(st.sampled_from(["dense", "out_scale", "in_scale", "bias"]), max_size=2),
)
mixes = st.tuples(
    st.lists(st.none() | deltas, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(-1, 4), st.sampled_from([0, 1, 1, 1, 2, 3, 9])), min_size=1, max_size=24),
)


@settings(max_examples=60, deadline=None)
@given(mixes)
def test_any_mix_of_rows_ranks_and_kinds_equals_the_loop(
    mix: tuple[list[Delta | None], list[tuple[int, int]]],
) -> None:
    found, parts = mix
    adapters = [adapter(f"a{at}", delta) for at, delta in enumerate(found)]
    mine = [(None if at < 0 else adapters[at % len(adapters)], n) for at, n in parts]
    n_rows = sum(n for _, n in mine)
    generator = torch.Generator().manual_seed(n_rows)
    x, weight = (
        torch.randn(n_rows, D_IN, generator=generator),
        torch.randn(D_OUT, D_IN, generator=generator),
    )
    if not n_rows:
        return
    of_rows = [a.deltas.get((0, "qkv")) if a else None for a, n in mine for _ in range(n)]
    before = x.clone()
    expected = linear_by_loop(weight, x, of_rows)
    assert torch.allclose(run(mine, x, weight).double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(x, before), "the input is the residual stream: nobody may change it"


class TestManyAdapters:
    ONES = torch.ones(D_OUT, D_IN)

    @pytest.mark.parametrize("rows_each", [1, 2, 20])
    def test_a_row_without_adapter_keeps_every_bit(self, rows_each: int) -> None:
        some = [adapter(f"s{at}", random_delta(at, (4, 4, 4), frozenset({"out_scale"}))) for at in range(3)]
        parts = [(some[0], rows_each), (None, 1), (some[1], 1), (None, 2), (some[2], 1)]
        x = torch.randn(rows_each + 5, D_IN)
        weight = torch.randn(D_OUT, D_IN)
        changed, frozen = run(parts, x, weight), F.linear(x, weight)
        for row in (rows_each, rows_each + 2, rows_each + 3):
            assert torch.equal(changed[row], frozen[row])

    def test_a_neighbour_full_of_infinities_changes_nothing_of_mine(self) -> None:
        """Masking by zeros would: zero times infinity is no number."""
        mine = adapter("mine", random_delta(1, (2, 0, 2)))
        broken = random_delta(2, (2, 0, 2))
        assert broken.a is not None
        broken.a.fill_(float("inf"))
        x, weight = torch.randn(2, D_IN), torch.randn(D_OUT, D_IN)
        tame = adapter("other", random_delta(3, (2, 0, 2)))
        beside_tame = run([(mine, 1), (tame, 1)], x, weight)[0]
        beside_broken = run([(mine, 1), (adapter("broken", broken), 1)], x, weight)[0]
        assert torch.equal(beside_tame, beside_broken)

    def test_a_single_row_keeps_every_bit_whoever_sits_beside_it(self) -> None:
        """Of its change; of the frozen product, where the backbone's precision promises the same."""
        mine = adapter("mine", random_delta(1, (8, 0, 8)))
        others = [adapter(f"o{at}", random_delta(at + 5, (8, 0, 8))) for at in range(15)]
        x = torch.randn(16, D_IN)
        results = []
        for n in (0, 1, 2, 7, 15):
            rows = AdapterRows.of([(mine, 1), *((other, 1) for other in others[:n])])
            assert rows is not None
            results.append(rows.linear(0, "qkv", lambda y: torch.zeros(len(y), D_OUT), x[: n + 1])[0])
        assert all(torch.equal(results[0], other) for other in results[1:])

    def test_half_precision_rows_are_changed_in_float32(self) -> None:
        mine, other = adapter("m", random_delta(1, (8, 8, 8))), adapter("o", random_delta(2, (8, 8, 8)))
        x = torch.randn(2, D_IN).bfloat16()
        rows = AdapterRows.of([(mine, 1), (other, 1)])
        assert rows is not None
        found = rows.linear(0, "qkv", lambda y: torch.zeros(2, D_OUT, dtype=torch.bfloat16), x)
        expected = linear_by_loop(
            torch.zeros(D_OUT, D_IN), x.float(), [a.deltas[0, "qkv"] for a in (mine, other)]
        )
        assert found.dtype is torch.bfloat16
        assert torch.equal(found, expected.bfloat16())

    def test_layers_that_nobody_adapts_call_the_frozen_matrix_alone(self) -> None:
        mine, other = adapter("m", random_delta(1, (1, 1, 1))), adapter("o", random_delta(2, (1, 1, 1)))
        rows = AdapterRows.of([(mine, 1), (other, 1)])
        assert rows is not None
        answer = torch.zeros(2, D_OUT)
        assert rows.linear(3, "qkv", lambda y: answer, torch.zeros(2, D_IN)) is answer

    def test_nobody_with_an_adapter_means_no_work(self) -> None:
        assert AdapterRows.of([(None, 3), (None, 1)]) is None


class TestMemory:
    def test_a_forgotten_adapter_leaves_the_memory(self) -> None:
        mine, other = adapter("m", random_delta(1, (1, 1, 1))), adapter("o", random_delta(2, (1, 1, 1)))
        run([(mine, 1), (other, 1)], torch.zeros(2, D_IN), torch.zeros(D_OUT, D_IN))
        a = mine.deltas[0, "qkv"].a
        assert a is not None
        gone = weakref.ref(a)
        AdapterRows.forget(mine)
        del mine, a
        gc.collect()
        assert gone() is None


class TestNorms:
    @pytest.mark.parametrize("rows_each", [1, 9])
    def test_each_row_has_its_own_adapters_weight(self, rows_each: int) -> None:
        weights = [torch.randn(D_IN) for _ in range(3)]
        tuned = [Adapter(f"n{at}", 0, 0, norms={(1, "mlp"): weight}) for at, weight in enumerate(weights[:2])]
        plain = adapter("p", random_delta(1, (1, 1, 1)))
        parts = [(tuned[0], rows_each), (None, 1), (tuned[1], rows_each), (plain, 1), (tuned[0], 1)]
        rows = AdapterRows.of(parts)
        assert rows is not None
        whose = [weights[0]] * rows_each + [weights[2]] + [weights[1]] * rows_each + [weights[2], weights[0]]
        x = torch.randn(len(whose), D_IN)
        expected = torch.stack([F.rms_norm(r, (D_IN,), w, 1e-5) for r, w in zip(x, whose, strict=True)])
        assert torch.allclose(rows.norm(1, "mlp", weights[2], x, 1e-5), expected, atol=1e-6)


class TestInvocation:
    @pytest.mark.parametrize(
        ("prompt", "start"),
        [
            ([1, 2, 3], 3),  # absent: never
            ([7, 8, 1], 0),
            ([1, 7, 8], 1),
            ([7, 8, 7, 8, 5], 2),  # the last one counts
            ([8, 7], 2),
            ([], 0),
        ],
    )
    def test_applies_from_where_it_last_begins(self, prompt: list[int], start: int) -> None:
        assert Adapter("a", 0, 0, invocation=(7, 8)).active_from(prompt) == start

    def test_an_ordinary_adapter_applies_from_the_start(self) -> None:
        assert Adapter("a", 0, 0).active_from([1, 2, 3]) == 0


def test_a_class_head_scores_in_float32() -> None:
    head = ClassHead(torch.eye(3, D_IN), ("a", "b", "c"))
    rows = torch.randn(2, D_IN).bfloat16()
    assert torch.equal(head.logits(rows), rows[:, :3].float())
