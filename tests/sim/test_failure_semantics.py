"""``docs/failure-semantics.md`` names tests; each must exist, or the promise is a wish."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_the_promises_name_exists() -> None:
    text = (ROOT / "docs" / "failure-semantics.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert not missing


def test_every_promise_names_a_test() -> None:
    text = (ROOT / "docs" / "failure-semantics.md").read_text()
    rows = re.findall(r"^\| \*\*(P\d+)\*\* \|.*?\|(.*)\|$", text, re.MULTILINE)
    assert len(rows) >= 14
    assert not [name for name, held_by in rows if "::" not in held_by and "the same" not in held_by]
