"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.threads import wait_gently

wait_gently()  # before any test imports torch: the machine may be busy, with other tests for one

ROOT = Path(__file__).resolve().parents[1]


def models_dir() -> Path:
    """Where tests and benchmarks keep converted models: the demo's own place unless told otherwise."""
    return Path(os.environ.get("EDGEMESH_TEST_STATE", ROOT / ".demo" / "state")) / "models"


@pytest.fixture(scope="session")
def model_directory() -> Path:
    """The catalogue's default model, fetched and converted at first use. Mark such tests ``model``."""
    from node.convert import convert
    from node.models import DEFAULT_MODEL, prepare, resolve

    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    return directory
