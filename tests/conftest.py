"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.places import models_dir

# Before any test imports torch: beside busy neighbours (other tests, for one) its waiting threads would
# spin on the cores the working ones need. The compute process adapts instead, see ``node.compute.threads``.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@pytest.fixture(scope="session")
def model_directory() -> Path:
    """The catalogue's default model, fetched and converted at first use. Mark such tests ``model``."""
    from node.compute.convert import convert
    from node.compute.models import DEFAULT_MODEL, prepare, resolve

    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    return directory
