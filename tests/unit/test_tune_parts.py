"""Parts of one job: how records are split, states averaged and found again; only the arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.compute.features.store import LocalStore
from node.compute.tune.parts import States, averaged, digest_of_state, split

numbers = st.floats(-1e6, 1e6, width=32)


def store() -> LocalStore:
    return LocalStore(None, 1 << 24, 0)


def state(seed: int, n: int = 100_000) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {
        "weight.b": torch.randn(n // 100, 100, generator=source),
        "weight.a": torch.randn(7, generator=source),
        "weight.empty": torch.zeros(0, 3),
    }


# ── records ─────────────────────────────────────────────────────────────────────────────────────────


@given(n=st.integers(0, 300), parts=st.integers(1, 64), seed=st.integers(0, 2**53))
def test_every_record_is_in_one_part_and_parts_are_alike(n: int, parts: int, seed: int) -> None:
    made = split(n, parts, seed)
    assert sorted(number for part in made for number in part) == list(range(n))
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert made == split(n, parts, seed)


def test_the_seed_splits_the_records() -> None:
    assert split(100, 3, 1) != split(100, 3, 2)


# ── the mean ────────────────────────────────────────────────────────────────────────────────────────


@given(rows=st.lists(st.tuples(numbers, st.integers(1, 1000)), min_size=1, max_size=8))
def test_the_mean_is_the_weighted_mean_rounded_once(rows: list[tuple[float, int]]) -> None:
    values, weights = zip(*rows, strict=True)
    mean = averaged([{"w": torch.tensor([value])} for value in values], weights)["w"]
    exact = sum((Fraction(v) * w for v, w in rows), Fraction(0)) / sum(weights)
    scale = max(1.0, max(abs(value) for value in values))
    assert abs(float(mean) - float(exact)) <= abs(float(exact)) * 2**-23 + scale * 1e-14
    assert min(values) <= float(mean) <= max(values) or abs(float(mean) - float(exact)) < scale * 1e-6


@given(value=numbers, weights=st.lists(st.integers(1, 99), min_size=1, max_size=8))
def test_the_mean_of_equal_states_is_that_state_to_the_bit(value: float, weights: list[int]) -> None:
    same = [{"w": torch.tensor([value])} for _ in weights]
    assert torch.equal(averaged(same, weights)["w"], same[0]["w"])


def test_a_part_without_weight_says_nothing() -> None:
    one, other = {"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}
    assert float(averaged([one, other], [3, 0])["w"]) == 1.0


@pytest.mark.parametrize(
    ("states", "weights"),
    [
        ([], []),
        ([{"w": torch.zeros(2)}], [0]),
        ([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], [1, 1]),
        ([{"w": torch.zeros(2)}, {"v": torch.zeros(2)}], [1, 1]),
        ([{"w": torch.zeros(2)}], [1, 1]),
    ],
)
def test_what_are_not_states_of_one_model_have_no_mean(
    states: list[dict[str, torch.Tensor]], weights: list[int]
) -> None:
    with pytest.raises(ValueError, match="states"):
        averaged(states, weights)


# ── on the way ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [100, 65_500, 200_000])  # within a block, just over one, several
def test_a_state_is_found_by_its_digest_to_the_bit(n: int) -> None:
    kept, found_in = state(1, n), store()
    states = States(found_in, kept)
    digest = states.keep(kept, 10.0)
    assert digest == digest_of_state(kept)
    again = States(found_in, state(2, n)).find(digest)  # whose numbers they are does not matter
    assert again is not None and again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert states.find(digest_of_state(state(3, n))) is None


def test_what_is_not_whole_or_another_state_is_as_good_as_none() -> None:
    kept = state(1, 200_000)
    full = store()
    states = States(full, kept)
    digest = states.keep(kept, 1.0)
    keys = states._keys(digest)
    entries = dict(zip(keys, full.get(keys), strict=True))
    for change in ("missing", "swapped"):
        found = {key: entry for key, entry in entries.items() if entry is not None}
        if change == "missing":
            del found[keys[1]]
        else:
            found[keys[0]], found[keys[1]] = found[keys[1]], found[keys[0]]
        damaged = store()
        damaged.put(found)
        assert States(damaged, kept).find(digest) is None, change
    assert States(full, {**kept, "weight.a": torch.zeros(8)}).find(digest) is None, "of another model"
