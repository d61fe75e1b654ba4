"""How long a read will take is expected as recent reads went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.cache.pace import Pace


@pytest.mark.parametrize(("wait_s", "bytes_per_s"), [(0.001, 100e6), (0.05, 2e6), (0.2, 20e6)])
def test_a_steady_link_is_learned_from_small_and_large_reads(wait_s: float, bytes_per_s: float) -> None:
    pace = Pace()
    for _ in range(60):
        for n_bytes in (1000, 4_000_000):
            pace.read(n_bytes, wait_s + n_bytes / bytes_per_s)
    for n_bytes in (10_000, 1_000_000, 50_000_000):
        assert pace.expected_s(n_bytes) == pytest.approx(wait_s + n_bytes / bytes_per_s, rel=0.3)


def test_a_link_that_becomes_slow_is_noticed_within_a_dozen_reads() -> None:
    pace = Pace()
    for _ in range(50):
        pace.read(1_000_000, 0.01)
    for _ in range(12):
        pace.read(1_000_000, 1.0)
    assert pace.expected_s(1_000_000) > 0.7


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(-1, 1e6)), max_size=40), st.integers(0, 1 << 40))
def test_whatever_was_read_the_expectation_is_a_time(reads: list[tuple[int, float]], n_bytes: int) -> None:
    pace = Pace()
    for size, length_s in reads:
        pace.read(size, length_s)
    assert 0 <= pace.expected_s(n_bytes) < float("inf")
