"""What this device says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from node.profile import VitalsReader, memory_free_bytes, physical_cores, profile


def test_the_profile_describes_this_machine() -> None:
    found = profile()
    assert found.hostname and len(found.system.split()) == 2
    assert found.n_cpus >= 1 and found.memory_bytes > 2**26
    assert 1 <= physical_cores() <= found.n_cpus


def test_vitals_count_the_compute_process_too() -> None:
    reader = VitalsReader()
    alone = reader.read()
    code = "print('up', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline(), "it runs, and has its memory"
    try:
        both = reader.read(child.pid)
    finally:
        child.communicate(b"\n")
    assert both.rss_bytes > alone.rss_bytes + 2**20
    assert alone.memory_free_bytes > 0 and 0 <= alone.cpu_percent <= 100


def test_a_compute_process_that_has_just_ended_counts_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert VitalsReader().read(child.pid).rss_bytes > 0


def test_a_container_s_limit_bounds_the_free_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert memory_free_bytes(tmp_path) == 150_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_free_bytes(tmp_path) > 150_000


def test_it_never_imports_torch() -> None:
    code = "import node.profile, node.compute.models, node.worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0
