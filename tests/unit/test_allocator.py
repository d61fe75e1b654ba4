"""Memory of batches stays in the process from one to the next, where the C library gives it back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BATCHES = """
import resource
from collections import deque
from mesh.transport.bulk.allocator import keep_freed_memory
if {keeps}:
    keep_freed_memory()
held = deque(maxlen=4)
for _ in range(20):
    held.append(bytearray(1 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    held.append(bytearray(1 << 20))
    if len(held) == 4:
        held.clear()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, keeps: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", BATCHES.format(keeps=keeps)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed pages back like that")
def test_batches_that_come_and_go_take_no_pages_from_the_system() -> None:
    assert faults(keeps=False) > 10 * max(1, faults(keeps=True))
