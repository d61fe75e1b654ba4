"""``edgemesh cleanup``: what could go, and that nothing goes before it is said."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mesh.messages.files import AdapterHeld
from node.cli.main import cli
from node.files.file_list import FileList
from node.files.leftovers import find_leftovers, remove_leftover
from node.files.library import Library
from node.state import StateDir
from tests.unit.adapters_made import put_adapter

LONG_AGO_S = 90 * 24 * 3600.0


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    monkeypatch.setenv("EDGEMESH_STATE_DIR", str(tmp_path))
    return StateDir(tmp_path)


def put(path: Path, n_bytes: int, *, age_s: float = LONG_AGO_S) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(n_bytes))
    at = time.time() - age_s
    for one in (path, path.parent):
        os.utime(one, (at, at))
    return path


def put_pulled(state: StateDir, name: str, *, age_s: float) -> AdapterHeld:
    """An adapter that another node gave, ``age_s`` ago."""
    there = state.path / "there"
    put_adapter(there, name, weights=name.encode())
    held = Library(there).look({}).shelf[name]
    library = Library(state.adapters_dir, quota_bytes=10**9, now=lambda: time.time() - age_s)
    partial = library.partial()
    for file in (there / name).iterdir():
        (partial / file.name).write_bytes(file.read_bytes())
    assert library.install(held, FileList.of(partial.iterdir()), partial, is_wanted=False) is None
    return held


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def fill(state: StateDir) -> dict[str, Path]:
    """By name: what should go, and with a ``+`` what should stay."""
    put_pulled(state, "unused", age_s=LONG_AGO_S)
    put_pulled(state, "used", age_s=60)
    put_adapter(state.adapters_dir, "own")
    Library(state.adapters_dir, now=lambda: time.time() - LONG_AGO_S).look({})
    slot = state.path / "meshes/home/nodes/0"
    put(slot / "features/a.pack", 700)
    put(slot / "node.json", 1)
    running = state.path / "meshes/home/nodes/1"
    put(running / "features/a.pack", 700)
    (running / "lock").write_text("1\n")  # a process that is surely there
    return {
        "data": put(state.datasets_dir / "old.jsonl", 100),
        "+data": put(state.datasets_dir / "new.jsonl", 100, age_s=60),
        "checkpoint": put(state.features_dir / "checkpoints/dead/0.safetensors", 200),
        "+checkpoint": put(state.features_dir / "checkpoints/live/0.safetensors", 200, age_s=60),
        "fetching": put(state.models_dir / ".tiny-1.peers-ab.fetching/model.safetensors", 900),
        "+fetching": put(state.models_dir / ".tiny-2.peers-ab.fetching/model.safetensors", 900, age_s=60),
        "features": slot / "features/a.pack",
        "+features": running / "features/a.pack",
        "unused": state.adapters_dir / "unused",
        "+used": state.adapters_dir / "used",
        "+own": state.adapters_dir / "own",
    }


def test_what_nobody_uses_is_found_and_what_may_be_in_use_is_not(state: StateDir) -> None:
    paths = fill(state)
    for leftover in find_leftovers(state, model="tiny", unused_s=30 * 24 * 3600.0):
        remove_leftover(state, leftover)
    for name, path in paths.items():
        assert path.exists() == name.startswith("+"), name


def test_without_yes_nothing_changes(state: StateDir) -> None:
    paths = fill(state)
    done = invoke("cleanup")
    assert done.exit_code == 0 and "nothing was removed: add --yes" in done.stderr
    assert all(path.exists() for path in paths.values())
    rows = json.loads(invoke("cleanup", "--json").stdout)
    assert {row["kind"] for row in rows} == {
        "adapter", "checkpoint", "data set", "feature maps", "unfinished model"
    }  # fmt: skip
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)
    assert not any(row["removed"] for row in rows)


def test_with_yes_it_goes_and_kinds_can_be_kept(state: StateDir) -> None:
    paths = fill(state)
    done = invoke("cleanup", "--yes", "--keep", "data set")
    assert done.exit_code == 0 and "freed" in done.stderr
    assert paths["data"].exists() and not paths["checkpoint"].exists()
    assert "nothing to clean up" in invoke("cleanup", "--keep", "data set").stderr


def test_models_go_only_where_no_node_runs(state: StateDir) -> None:
    for slug in ("tiny", "other"):
        directory = state.models_dir / slug
        put(directory / "model.safetensors", 50)
        manifest = {
            "name": slug, "display": slug, "source": "", "source_sha256": None, "weights_sha256": "",
            "weight_bytes": 50, "file_bytes": {"model.safetensors": 50},
        }  # fmt: skip
        (directory / "manifest.json").write_text(json.dumps(manifest))
    (found,) = find_leftovers(state, model="tiny", unused_s=0)
    assert (found.kind, found.name) == ("model", "other")
    lock = state.path / "meshes/home/nodes/0/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("1\n")
    assert find_leftovers(state, model="tiny", unused_s=0) == []
