"""How many tokens a text has is learned by kind of task, from what nodes counted."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy.tokens import TokenCounts


def taught(n: int, *, each: float, rate: float, n_texts: int = 1, noise: float = 0.0) -> TokenCounts:
    counts, rng = TokenCounts(), Random(1)
    for _ in range(n):
        n_bytes = rng.choice((20, 60, 200, 700, 3000))
        n_tokens = (each * n_texts + rate * n_bytes) * math.exp(rng.gauss(0, noise))
        counts.learn("generate", n_bytes=n_bytes, n_texts=n_texts, n_tokens=n_tokens)
    return counts


def test_as_long_as_nothing_was_counted_a_token_has_four_bytes() -> None:
    assert TokenCounts().expected("generate", 400, 1) == 100


@pytest.mark.parametrize("n_texts", [1, 7])
@pytest.mark.parametrize(("each", "rate"), [(0.0, 0.25), (33.0, 0.15), (8.0, 0.5), (2.0, 1.0)])
def test_what_comes_with_each_text_is_told_from_what_its_bytes_are(
    each: float, rate: float, n_texts: int
) -> None:
    counts = taught(20, each=each, rate=rate, n_texts=n_texts)
    for n_bytes in (10, 100, 10_000):
        true = each * n_texts + rate * n_bytes
        assert counts.expected("generate", n_bytes, n_texts) == pytest.approx(true, rel=0.1)


def test_the_noise_of_real_texts_averages_out() -> None:
    counts = taught(40, each=33.0, rate=0.2, noise=0.15)
    assert counts.expected("generate", 50, 1) == pytest.approx(43, rel=0.15)
    assert counts.expected("generate", 5000, 1) == pytest.approx(1033, rel=0.15)


def test_texts_that_are_all_alike_are_known_after_two() -> None:
    counts = TokenCounts()
    for _ in range(2):
        counts.learn("score", n_bytes=700, n_texts=4, n_tokens=100)
    assert counts.expected("score", 700, 4) == pytest.approx(100, rel=0.1)


def test_kinds_do_not_disturb_one_another() -> None:
    counts = taught(20, each=30.0, rate=0.25)
    counts.learn("embed", n_bytes=700, n_texts=4, n_tokens=100)
    before = counts.expected("embed", 700, 4)
    for _ in range(50):
        counts.learn("generate", n_bytes=10, n_texts=1, n_tokens=300)
    assert counts.expected("embed", 700, 4) == before


def test_texts_in_another_language_are_noticed_within_twenty() -> None:
    counts = taught(100, each=10.0, rate=0.2)
    for _ in range(20):
        for n_bytes in (50, 1000):
            counts.learn("generate", n_bytes=n_bytes, n_texts=1, n_tokens=10 + n_bytes / 2)
    assert counts.expected("generate", 1000, 1) == pytest.approx(510, rel=0.15)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 1 << 12), st.floats(0, 1e9)), max_size=60),
    st.integers(0, 1 << 30),
    st.integers(0, 1 << 12),
)
def test_whatever_nodes_say_an_estimate_stays_in_bounds(
    lessons: list[tuple[int, int, float]], n_bytes: int, n_texts: int
) -> None:
    counts = TokenCounts()
    for said_bytes, said_texts, n_tokens in lessons:
        counts.learn("score", n_bytes=said_bytes, n_texts=said_texts, n_tokens=n_tokens)
    found = counts.expected("score", n_bytes, n_texts)
    assert n_bytes / 32 <= found * (1 + 1e-9) and found < math.inf
    assert counts.expected("score", n_bytes, 0) <= n_bytes * (1 + 1e-9)
