"""Where tests and benchmarks keep what is expensive to make."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["ROOT", "models_dir"]

ROOT = Path(__file__).resolve().parents[1]


def models_dir() -> Path:
    """Converted models: the demo's own place unless ``EDGEMESH_TEST_STATE`` names another."""
    return Path(os.environ.get("EDGEMESH_TEST_STATE", ROOT / ".demo" / "state")) / "models"
