"""Which layers a node loads: what the operator says, or what finds memory; and the numbers as the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from node.compute import __main__ as child
from node.compute.messages import Load
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def why_top(model: Path, **fields: Any) -> str | None:
    load = Load(model="tiny", models_dir="m", adapters_dir="a", datasets_dir="d", features_dir="f", **fields)
    return child._why_top(load, model, model)


def test_auto_holds_all_where_there_is_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "memory_free_bytes", lambda: 10**12)
    assert why_top(model) is None
    assert why_top(model, hold="all") is None


def test_auto_holds_the_top_where_no_format_fits_and_says_the_numbers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "memory_free_bytes", lambda: 5_000_000)
    assert "needs" in (why_top(model) or "") and "4.77 MiB free" in (why_top(model) or "")


@pytest.mark.parametrize("fields", [{"hold": "all"}, {"precision": "fp32"}])
def test_who_asks_for_all_or_for_a_format_gets_it_or_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    monkeypatch.setattr(child, "memory_free_bytes", lambda: 5_000_000)
    with pytest.raises(child._NoMemoryError, match="needs"):
        why_top(model, **fields)


def test_the_top_is_held_where_the_operator_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "memory_free_bytes", lambda: 10**12)
    assert "--hold top" in (why_top(model, hold="top") or "")
