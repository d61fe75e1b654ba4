"""What this device is and how it is doing. Sole owner of psutil; never imports torch.

Which device computes (``cpu``, ``cuda``, ``mps``) is reported by the compute process once it has looked,
so that a node which does not compute never pays for asking.
"""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Profile", "Vitals", "VitalsReader", "memory_free_bytes", "physical_cores", "profile"]

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Profile:
    """What the device is; does not change while the process lives."""

    hostname: str
    system: str
    """Such as ``Linux aarch64``."""
    n_cpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Vitals:
    """How the device is doing now."""

    cpu_percent: float
    """Of all cores together, since the last reading."""
    memory_free_bytes: int
    rss_bytes: int
    """This process and its compute process."""
    temperature_c: float | None


def profile() -> Profile:
    return Profile(
        hostname=socket.gethostname(),
        system=f"{platform.system()} {platform.machine()}",
        n_cpus=_usable_cpus(),
        memory_bytes=min(psutil.virtual_memory().total, _cgroup_bytes("memory.max") or 2**63),
    )


def memory_free_bytes(cgroup: Path = _CGROUP) -> int:
    """What a new allocation may take: of the machine, and of the container this runs in."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup_bytes("memory.max", cgroup), _cgroup_bytes("memory.current", cgroup)
    if limit is not None and used is not None:
        # The container's page cache counts as used, yet gives way.
        free = min(free, max(0, limit - used + _cgroup_inactive_file_bytes(cgroup)))
    return int(free)


def physical_cores() -> int:
    """Cores worth a computing thread each; hyper-threads share the units that multiply."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, _usable_cpus()))


class VitalsReader:
    """Takes readings; ``cpu_percent`` counts from one reading to the next."""

    def __init__(self) -> None:
        self._self = psutil.Process()
        psutil.cpu_percent()  # the first reading has nothing to compare with and says 0

    def read(self, child_pid: int | None = None) -> Vitals:
        return Vitals(
            cpu_percent=psutil.cpu_percent(),
            memory_free_bytes=memory_free_bytes(),
            rss_bytes=self._self.memory_info().rss + _rss_bytes(child_pid),
            temperature_c=_temperature_c(),
        )


def _rss_bytes(pid: int | None) -> int:
    if pid is None:
        return 0
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it ended a moment ago
        return 0


def _temperature_c() -> float | None:
    """The hottest sensor of the processor, where the system tells."""
    read = getattr(psutil, "sensors_temperatures", None)  # absent on macOS
    if read is None:
        return None
    try:
        sensors = read()
    except OSError:  # a sensor vanished while it was read
        return None
    for chip in ("coretemp", "k10temp", "cpu_thermal", "cpu-thermal", "soc_thermal"):
        readings = [reading.current for reading in sensors.get(chip, []) if reading.current]
        if readings:
            return float(max(readings))
    return None


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cgroup_bytes(name: str, cgroup: Path = _CGROUP) -> int | None:
    try:
        text = (cgroup / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _cgroup_inactive_file_bytes(cgroup: Path) -> int:
    try:
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
