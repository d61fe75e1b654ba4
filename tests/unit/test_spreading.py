"""A node that could serve an adapter pulls it when those who have it are busy, and only then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import pytest

from coordinator.cluster import Node
from coordinator.scheduler import Mode, Scheduler
from coordinator.spreading import AGAIN_S, Spreading
from mesh.agreement.versions import Versions
from mesh.core import FOREVER, Send
from mesh.ids import NodeId
from mesh.messages import FilesHeld, PullAdapter, Submit
from mesh.messages.files import AdapterHeld
from tests.unit.test_placement import Books, node

BASE = "b" * 64
HELD = AdapterHeld(name="spam", version=2, digest="5" * 64, manifest_bytes=9, bytes=4_000_000, base=BASE)


def busy(name: str, running: int = 2, **fields: object) -> Node:
    one = node(name, **fields)  # type: ignore[arg-type]
    assert one.report is not None
    return replace(one, report=replace(one.report, running=running))


@dataclass
class Mesh:
    """Real books, and of the scheduler what ``Spreading`` reads."""

    books: Books
    mode: Mode = Mode.ACTIVE

    def __post_init__(self) -> None:
        self.cluster = self.books.cluster
        self.versions = Versions(NodeId("me"))
        self.spreading = Spreading(cast(Scheduler, self), self.versions)
        for known in self.cluster:
            if known.info is not None:
                self.says(known.id, has="spam" in known.info.adapters)

    def waiting(self) -> object:
        return self.books.ledger.waiting()

    def says(self, name: str, *, has: bool = False, base: str | None = BASE) -> None:
        files = FilesHeld(node=NodeId(name), incarnation=1, adapters=[HELD] if has else [], base=base)
        self.versions.receive(files, files.node, 0.0)

    def asked(self, now: float) -> list[str]:
        sent = self.spreading.tick(now)
        assert all(isinstance(one, Send) for one in sent)
        messages = {one.to: one.message for one in sent if isinstance(one, Send)}
        assert set(messages.values()) <= {PullAdapter(name="spam", digest=HELD.digest)}
        return sorted(messages)


def mesh(*nodes: Node, **submit: object) -> Mesh:
    found = Mesh(Books(*nodes))
    found.books.add("t1", Submit(prompt="hi", adapter="spam", **submit))  # type: ignore[arg-type]
    return found


def test_the_freest_node_pulls_what_only_busy_ones_have() -> None:
    world = mesh(busy("a", adapters=("spam",)), busy("b", 1), busy("c", 0))
    assert world.asked(0.0) == [], "one that has it may be done in a moment"
    assert world.asked(1.0) == ["c"]
    assert world.asked(2.0) == [], "asked once"
    assert world.asked(2.0 + AGAIN_S) == ["c"], "and again if it did not come"


def test_nobody_pulls_while_one_that_has_it_is_free() -> None:
    assert mesh(busy("a", 1, adapters=("spam",)), busy("b", 0)).asked(1.0) == []


@pytest.mark.parametrize(
    ("base", "told"), [(BASE, ["b"]), ("c" * 64, []), (None, [])], ids=["same", "other", "unknown"]
)
def test_only_a_node_of_the_same_backbone_is_asked(base: str | None, told: list[str]) -> None:
    world = mesh(busy("a", adapters=("spam",)), busy("b", 0))
    world.says("b", base=base)
    assert world.asked(1.0) == told


def test_a_node_with_the_top_layers_only_is_not_asked() -> None:
    top = busy("b", 0)
    assert top.info is not None
    assert (
        mesh(busy("a", adapters=("spam",)), replace(top, info=replace(top.info, holds="top"))).asked(1.0)
        == []
    )


def test_what_could_not_arrive_before_the_deadline_is_not_pulled() -> None:
    assert mesh(busy("a", adapters=("spam",)), busy("b", 0), deadline_s=3.0).asked(1.0) == []
    assert mesh(busy("a", adapters=("spam",)), busy("b", 0), deadline_s=9.0).asked(1.0) == ["b"]


def test_what_was_removed_or_never_was_is_not_pulled() -> None:
    world = mesh(busy("a"), busy("b", 0))
    assert world.asked(1.0) == []


def test_who_follows_asks_nobody() -> None:
    world = mesh(busy("a", adapters=("spam",)), busy("b", 0))
    world.mode = Mode.FOLLOWING
    assert world.spreading.wake_at == FOREVER and world.asked(1.0) == []
