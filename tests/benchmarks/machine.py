"""What the machine allows: the limits that benchmarks print beside what they measure."""

from __future__ import annotations

import time

import torch

__all__ = ["memory_gb_s"]


def memory_gb_s() -> float:
    """How fast all threads together read memory: the best of three sums over 256 MB."""
    block = torch.ones(64 * 1024 * 1024)
    best_s = float("inf")
    for _ in range(3):
        start_s = time.perf_counter()
        block.sum()
        best_s = min(best_s, time.perf_counter() - start_s)
    return block.nbytes / best_s / 1e9
