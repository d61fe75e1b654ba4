"""The coordinator's picture of the nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.cluster import Cluster, serves
from mesh.facts import MemberChanged
from mesh.ids import Boot, NodeId
from mesh.messages import NodeForgotten, NodeState
from tests.unit.task_world import info, report

A = NodeId("a")


def cluster_with_a(standing: str = "alive") -> Cluster:
    cluster = Cluster(NodeId("me"))
    cluster.see(info("a"))
    cluster.see(report("a"))
    cluster.change(MemberChanged(A, standing, 1))
    return cluster


@pytest.mark.parametrize(
    ("model", "wanted", "expected"),
    [
        ("a/B-1", None, True),
        ("a/B-1", "a/B-1", True),
        ("a/B-1", "A/b-1", True),
        ("a/B-1", "b-1", True),
        ("B-1", "a/b-1", True),
        ("a/B-1", "c/B-1", False),
        ("a/B-1", "B", False),
        (None, "B-1", False),
        (None, None, True),
    ],
)
def test_a_model_is_known_by_its_full_and_its_short_name(
    model: str | None, wanted: str | None, expected: bool
) -> None:
    assert serves(model, wanted) is expected


@pytest.mark.parametrize("wanted", ["smollm2-135m", "SmolLM2-135M-Instruct", "hub/SmolLM2-135M-Instruct"])
def test_a_model_is_known_by_every_name_its_node_gives(wanted: str) -> None:
    assert serves("smollm2-135m", wanted, ["SmolLM2-135M-Instruct"])
    assert not serves("smollm2-135m", "SmolLM2-360M-Instruct", ["SmolLM2-135M-Instruct"])


@pytest.mark.parametrize(
    ("standing", "present", "may_start"),
    [("alive", True, True), ("suspect", True, False), ("dead", False, False), ("left", False, False)],
)
def test_membership_decides_who_is_there(standing: str, present: bool, may_start: bool) -> None:
    node = cluster_with_a(standing).get(A)
    assert (node.is_present, node.may_start) == (present, may_start)


def test_a_node_that_only_talks_is_no_member() -> None:
    cluster = Cluster(NodeId("me"))
    cluster.see(info("a"))
    cluster.see(report("a"))
    assert cluster.others == []


def test_a_node_that_drains_or_is_not_ready_may_not_start_anything() -> None:
    cluster = cluster_with_a()
    cluster.see(NodeState(node=A, state="draining", incarnation=1, boot=Boot("b")))
    assert not cluster.get(A).may_start
    cluster.see(NodeState(node=A, state="online", incarnation=1, boot=Boot("b")))
    assert cluster.get(A).may_start
    cluster.see(report("a", ready=False))
    assert not cluster.get(A).may_start


def test_words_of_an_earlier_life_change_nothing() -> None:
    cluster = cluster_with_a()
    cluster.change(MemberChanged(A, "alive", 5))
    cluster.see(replace(info("a"), incarnation=5, slots=7))
    cluster.see(replace(info("a"), incarnation=4, slots=1))
    cluster.change(MemberChanged(A, "dead", 4))
    cluster.see(NodeState(node=A, state="draining", incarnation=4, boot=Boot("b")))
    assert cluster.get(A).slots == 7 and cluster.get(A).standing == "alive" and not cluster.get(A).is_draining


def test_nobody_talks_a_node_out_of_its_own_life() -> None:
    cluster = Cluster(NodeId("me"))
    cluster.change(MemberChanged(NodeId("me"), "dead", 9))
    assert cluster.is_present(NodeId("me"))


def test_a_suspect_counts_as_present_but_is_trusted_with_nothing_new() -> None:
    cluster = cluster_with_a("suspect")
    assert cluster.others == [A] and cluster.holders == []


def test_a_forgotten_node_goes_only_when_it_is_not_there() -> None:
    cluster = cluster_with_a()
    cluster.see(NodeForgotten(node=A))
    assert cluster.get(A).info is not None
    cluster.change(MemberChanged(A, "left", 1))
    cluster.see(NodeForgotten(node=A))
    assert cluster.get(A).info is None


def test_the_picture_is_bounded() -> None:
    cluster = Cluster(NodeId("me"))
    for i in range(5000):
        cluster.change(MemberChanged(NodeId(f"n{i}"), "left", 1))
    assert len(list(cluster)) <= 4096
