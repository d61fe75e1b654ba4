"""``edgemesh adapters``: what people and scripts see, and the next step when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mesh.errors import UnreachableError
from mesh.ids import Boot, NodeId
from mesh.messages import FilesHeld, NodeState
from mesh.messages.files import AdapterHeld, AdapterRemoved
from mesh.transport.bus import Heard
from node.cli.main import cli
from node.files import asking
from node.files.asking import MeshFiles
from node.files.file_list import FileEntry, FileList
from node.files.library import Library
from node.state import StateDir
from tests.unit.adapters_made import put_adapter

BASE = "b" * 64
SPAM = AdapterHeld(
    name="spam", version=3, digest="5" * 64, manifest_bytes=9, bytes=2_000_000, base=BASE, method="lora",
    task="classify", first_layer=26, metric=0.9731, weights="a1" * 32,
)  # fmt: skip


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    monkeypatch.setenv("EDGEMESH_STATE_DIR", str(tmp_path))
    return StateDir(tmp_path)


def files_of(**said: FilesHeld) -> MeshFiles:
    """What a client would have heard."""
    files = MeshFiles()
    for name, held in said.items():
        node = NodeId(name)
        files.feed(Heard(NodeState(node=node, state="online", incarnation=1, boot=Boot("x")), node))
        files.feed(Heard(replace(held, node=node), node))
    return files


def held_by(*adapters: AdapterHeld, removed: tuple[AdapterRemoved, ...] = ()) -> FilesHeld:
    return FilesHeld(
        node=NodeId("x"), incarnation=1, adapters=list(adapters), removed=list(removed), base=BASE
    )


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Callable[[MeshFiles], None]:
    def put(files: MeshFiles) -> None:
        async def answer(*args: Any) -> MeshFiles:
            return files

        monkeypatch.setattr(asking, "mesh_files", answer)

    return put


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["adapters", *arguments])


def test_the_list_says_which_version_is_where_and_keeps_what_it_said_before(
    state: StateDir, mesh: Callable[[MeshFiles], None]
) -> None:
    put_adapter(state.adapters_dir, "mine")
    older = replace(SPAM, version=2, digest="4" * 64)
    mesh(files_of(pi=held_by(SPAM, older), nano=held_by(older)))
    mine, spam = json.loads(invoke("list", "--json").stdout)
    assert (mine["name"], mine["here"], mine["version"], mine["nodes"]) == ("mine", True, None, [])
    assert (spam["version"], spam["nodes"], spam["here"]) == (3, ["pi"], False)
    assert (spam["task"], spam["metric"], spam["digest"]) == ("classify", 0.9731, "a1" * 32)
    old_fields = {
        "name", "task", "method", "top_layers", "first_layer", "labels", "bytes", "metric", "digest",
        "trouble",
    }  # fmt: skip
    assert old_fields <= set(spam) and old_fields <= set(mine)
    assert [row["name"] for row in json.loads(invoke("list", "--here", "--json").stdout)] == ["mine"]


def test_without_a_mesh_this_device_is_listed_and_it_is_said(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(*args: Any) -> MeshFiles:
        raise UnreachableError("no node answers")

    monkeypatch.setattr(asking, "mesh_files", silent)
    put_adapter(state.adapters_dir, "mine")
    done = invoke("list", "--json")
    assert done.exit_code == 0 and "only this device is listed: no node answers" in done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["mine"]


def test_removed_adapters_and_those_of_nodes_that_left_are_not_listed(
    state: StateDir, mesh: Callable[[MeshFiles], None]
) -> None:
    gone = AdapterRemoved(name="spam", version=3, left_s=10.0)
    files = files_of(pi=held_by(SPAM), nano=held_by(removed=(gone,)))
    mesh(files)
    assert json.loads(invoke("list", "--json").stdout) == []
    files = files_of(pi=held_by(SPAM))
    files.feed(Heard(NodeState(node=NodeId("pi"), state="left", incarnation=2, boot=Boot("x")), NodeId("pi")))
    mesh(files)
    assert json.loads(invoke("list", "--json").stdout) == []


def test_show_tells_how_it_was_made_its_files_and_who_has_which_version(
    state: StateDir, mesh: Callable[[MeshFiles], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = FileList((FileEntry("adapter_model.safetensors", 2_000_000, b"7" * 32),))
    card = json.dumps({"labels": ["ham", "spam"], "top_layers": 4, "spec_digest": "e" * 64, "name": "evil"})

    async def details(*args: Any) -> tuple[FileList, bytes]:
        return listed, card.encode()

    monkeypatch.setattr(asking, "adapter_details", details)
    mesh(files_of(pi=held_by(SPAM), nano=held_by(replace(SPAM, version=2, digest="4" * 64))))
    told = json.loads(invoke("show", "spam", "--json").stdout)
    assert (told["name"], told["version"], told["labels"], told["top_layers"]) == (
        "spam",
        3,
        ["ham", "spam"],
        4,
    )
    assert [(one["version"], one["nodes"]) for one in told["versions"]] == [(3, ["pi"]), (2, ["nano"])]
    assert told["files"][0]["bytes"] == 2_000_000
    words = invoke("show", "spam").stdout
    assert "ham, spam" in words and "adapter_model.safetensors" in words and "nano" in words


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "other"), 2, "there are: spam"),
        (("pull", "spam"), 2, "start one with `edgemesh join`"),
        (("push", "spam"), 2, "start one with `edgemesh join`"),
        (("rm", "other", "--here"), 2, "see `edgemesh adapters list --here`"),
        (("rm", "../x", "--here"), 2, "see `edgemesh adapters list --here`"),
        (("pull", "spam", "--as", "../x"), 2, "--as must be"),
    ],
)
def test_every_mistake_has_a_next_step(
    arguments: tuple[str, ...], code: int, words: str, state: StateDir, mesh: Callable[[MeshFiles], None]
) -> None:
    mesh(files_of(pi=held_by(SPAM)))
    done = invoke(*arguments)
    assert done.exit_code == code and words in done.stderr, done.stderr


def test_a_version_that_nobody_has_is_answered_with_those_there_are() -> None:
    files = files_of(pi=held_by(SPAM, replace(SPAM, version=2, digest="4" * 64)))
    assert files.find("spam", 2).digest == "4" * 64 and files.find("spam").version == 3
    with pytest.raises(Exception, match="there are: 3, 2"):
        files.find("spam", 9)


def test_removing_here_leaves_the_others_alone(state: StateDir) -> None:
    put_adapter(state.adapters_dir, "spam")
    Library(state.adapters_dir).look({})
    done = invoke("rm", "spam", "--here", "--json")
    assert json.loads(done.stdout) == {"name": "spam", "version": None, "left_on": []}
    assert not (state.adapters_dir / "spam").exists()
    here = Library(state.adapters_dir).look({})
    assert (here.removed, dict(here.declined)) == ((), {"spam": 1})
