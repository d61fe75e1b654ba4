"""Machines with a directory each: whatever is made, removed and lost among them, they come together."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.agreement.versions import OwnFiles, Versions
from mesh.facts import LinkUp, MemberChanged
from mesh.ids import NodeId
from mesh.messages import FilesHeld
from node.files.distribution import wanted
from node.files.file_list import FileList
from node.files.library import Library
from tests.unit.adapters_made import put_adapter

BASE = "b" * 64
NODES = ("a", "b", "c")
NAMES = ("spam", "tone")

on_node, on_name = st.sampled_from(NODES), st.sampled_from(NAMES)
steps = st.one_of(
    st.tuples(st.just("make"), on_node, on_name, st.integers(0, 5)),
    st.tuples(st.just("remove"), on_node, on_name, st.none()),
    st.tuples(st.just("leave"), on_node, st.none(), st.none()),
    st.tuples(st.just("return"), on_node, st.none(), st.none()),
    st.tuples(st.just("exchange"), st.none(), st.none(), st.none()),
)


class Machine:
    def __init__(self, directory: Path, name: str) -> None:
        self.id = NodeId(name)
        self.at = 1e6
        self.shelf = directory / name
        self.library = Library(self.shelf, quota_bytes=10**9, now=lambda: self.at, uptime=lambda: self.at)
        self.versions = Versions(self.id)
        self.versions.learn(LinkUp(1, None), 0.0)
        self.is_here = True

    def look(self) -> FilesHeld:
        self.at += 1
        here = self.library.look(dict(self.versions.newest), BASE)
        held = FilesHeld(
            node=self.id, incarnation=1, adapters=list(here.adapters), removed=list(here.removed), base=BASE
        )
        self.versions.learn(OwnFiles(held), 0.0)
        return held

    def pull_from(self, others: list[Machine]) -> bool:
        """Whether anything came."""
        here = self.library.look(dict(self.versions.newest), BASE)
        came = False
        for held in wanted(self.versions.newest, here, BASE, "auto"):
            for other in others:
                source = other.library.version_path(held.digest)
                if other.is_here and other is not self and source.exists():
                    partial = self.library.partial()
                    for path in source.iterdir():
                        shutil.copy(path, partial)
                    files = FileList.of(partial.iterdir())
                    assert files.blob.digest.hex() == held.digest, "a version is what its digest says"
                    came |= self.library.install(held, files, partial, is_wanted=False) is None
                    break
        return came


class Mesh:
    def __init__(self, directory: Path) -> None:
        self.machines = [Machine(directory, name) for name in NODES]
        self.gone: dict[str, int] = {}
        """Versions that were removed, by name, as far as anybody said."""

    def machine(self, name: str) -> Machine:
        return next(machine for machine in self.machines if machine.id == name)

    def step(self, what: str, node: Any, name: Any, seed: Any) -> None:
        if what == "exchange":
            self.exchange()
            return
        machine = self.machine(node)
        match what:
            case "make":
                put_adapter(machine.shelf, name, weights=bytes([seed]) * 8)
                machine.look()
            case "remove" if (newest := machine.versions.newest.get(name)) is not None and newest.held:
                machine.library.remove(name, newest.version)
                machine.look()
                self.gone[name] = max(self.gone.get(name, 0), newest.version)
            case "leave" | "return":
                machine.is_here = what == "return"
                for other in self.machines:
                    standing = "alive" if machine.is_here else "dead"
                    other.versions.learn(MemberChanged(machine.id, standing, 1), 0.0)

    def exchange(self) -> None:
        """Everybody who is here hears everybody who is here, until nothing changes."""
        for _ in range(20):
            here = [machine for machine in self.machines if machine.is_here]
            said = [machine.look() for machine in here]
            for machine in here:
                for message in said:
                    machine.versions.receive(message, message.node, 0.0)
                machine.look()
            if not any([machine.pull_from(self.machines) for machine in here]):
                break
        else:
            raise AssertionError("they never come to rest")
        self.check([machine for machine in self.machines if machine.is_here])

    def check(self, here: list[Machine]) -> None:
        shelves = [machine.library.look(dict(machine.versions.newest), BASE).shelf for machine in here]
        for shelf in shelves:
            found = {name: (held.version, held.digest) for name, held in shelf.items()}
            first = {name: (held.version, held.digest) for name, held in shelves[0].items()}
            assert found == first, "all who are here serve the same"
        for machine in here:
            on_disk = {path.name for path in machine.shelf.iterdir() if not path.name.startswith(".")}
            assert on_disk == set(shelves[0]), "and nothing else"


@contextmanager
def a_mesh() -> Iterator[Mesh]:
    with tempfile.TemporaryDirectory() as directory:
        yield Mesh(Path(directory))


@settings(max_examples=20, deadline=None)
@given(st.lists(steps, max_size=12))
def test_machines_come_to_serve_the_same_and_what_was_removed_stays_away(todo: list[Any]) -> None:
    with a_mesh() as mesh:
        for step in todo:
            mesh.step(*step)
        for node in NODES:
            mesh.step("return", node, None, None)
        mesh.exchange()
        for machine in mesh.machines:
            shelf = machine.library.look(dict(machine.versions.newest), BASE).shelf
            for name, version in mesh.gone.items():
                assert name not in shelf or shelf[name].version > version
