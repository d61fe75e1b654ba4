"""Whole conversations of three elections over one broker; the traces are the protocol's documentation."""

from __future__ import annotations

import pytest

from mesh.facts import Leaving, MemberChanged
from mesh.ids import Epoch, NodeId
from tests.golden.election_bus import ElectionBus


def elected(names: str = "a b c", seed: int = 0) -> tuple[ElectionBus, str]:
    bus = ElectionBus(names, seed)
    bus.run(2.0)
    (coordinator,) = bus.coordinators()
    return bus, coordinator


def test_first_election_of_three() -> None:
    bus = ElectionBus("a b c", seed=1)
    bus.run(1.0)
    assert bus.trace == [
        "0.61 b says claim 1@b",
        "0.62 a followed 1@b",
        "0.62 b elected 1@b",
        "0.62 b says lease 1@b",
        "0.62 c followed 1@b",
    ]


@pytest.mark.parametrize("seed", range(100))
def test_a_mesh_has_its_first_coordinator_within_a_second(seed: int) -> None:
    bus = ElectionBus("a b c", seed)
    bus.run(1.0)
    assert len(bus.coordinators()) == 1
    assert bus.known() == set(bus.coordinators())


@pytest.mark.parametrize("order", ["a b c", "a c b", "b a c", "b c a", "c a b", "c b a"])
def test_of_claims_at_once_the_first_in_the_brokers_order_wins_whatever_the_names(order: str) -> None:
    bus = ElectionBus("a b c")
    bus.now = 0.95
    for name in order.split():
        bus.tick(name)
    bus.run(2.0)
    first, *others = order.split()
    assert bus.facts()[:3] == [f"{name} says claim 1@{name}" for name in (first, *others)]
    assert set(bus.facts()[3:]) == {
        f"{first} elected 1@{first}",
        *(f"{n} followed 1@{first}" for n in others),
    }
    assert len(bus.facts()) == 6


def test_a_coordinator_that_crashes_unnoticed_is_replaced_after_its_ttl() -> None:
    bus, old = elected()
    bus.crash(old)
    bus.run(1.7)
    assert bus.known() == {old}, "within the ttl of its last beat nobody claims"
    bus.run(2.0)
    (new,) = bus.coordinators()
    assert bus.known() == {new}
    assert bus.nodes[NodeId(new)].election.epoch == Epoch(2, NodeId(new))


@pytest.mark.parametrize(("standing", "within_s"), [("dead", 0.4), ("left", 0.4), ("suspect", 1.4)])
def test_a_coordinator_known_to_be_gone_is_replaced_before_its_ttl(standing: str, within_s: float) -> None:
    bus, old = elected()
    bus.crash(old)
    for name in sorted(bus.nodes):
        bus.learn(name, MemberChanged(NodeId(old), standing, 1))
    bus.run(within_s)
    assert len(bus.coordinators()) == 1
    assert bus.known() == set(bus.coordinators())


def test_suspecting_a_coordinator_that_lives_changes_nothing() -> None:
    bus, coordinator = elected()
    said = bus.facts()
    for _ in range(5):
        for name in sorted(bus.nodes):
            bus.learn(name, MemberChanged(NodeId(coordinator), "suspect", 1))
        bus.run(1.3)
    assert bus.facts() == said
    assert bus.coordinators() == [coordinator]


def test_a_coordinator_that_stood_still_steps_down_before_it_says_anything() -> None:
    bus, old = elected()
    bus.pause(old)
    bus.run(10.0)
    (new,) = [name for name in bus.coordinators() if name != old]
    bus.trace.clear()
    bus.resume(old)
    assert bus.facts() == [f"{old} deposed 1@{old}", f"{old} followed 2@{new}"]
    bus.run(5.0)
    assert not [line for line in bus.trace if f"{old} says" in line]
    assert bus.known() == {new}


def test_a_follower_that_stood_still_does_not_depose_the_coordinator() -> None:
    bus, coordinator = elected()
    follower = next(name for name in sorted(bus.nodes) if name != coordinator)
    bus.pause(follower)
    bus.run(10.0)
    said = bus.facts()
    bus.resume(follower)
    bus.run(5.0)
    assert bus.facts() == said
    assert bus.known() == {coordinator}


def test_a_coordinator_that_hears_no_echo_stops_before_the_others_start() -> None:
    bus, old = elected()
    bus.cut(old)
    bus.run(6.0)
    deposed_at = next(float(line.split()[0]) for line in bus.trace if f"{old} deposed" in line)
    claimed_at = next(float(line.split()[0]) for line in bus.trace if "says claim 2@" in line)
    assert deposed_at < claimed_at
    bus.link(old)
    bus.run(1.0)
    (new,) = bus.coordinators()
    assert new != old
    assert bus.known() == {new}


def test_a_short_break_of_the_link_costs_the_coordinator_nothing() -> None:
    bus, coordinator = elected()
    said = bus.facts()
    for name in sorted(bus.nodes):
        bus.cut(name)
    bus.retained = None  # the broker restarted and forgot
    bus.run(0.5)
    for name in sorted(bus.nodes):
        bus.link(name)
    bus.run(5.0)
    assert bus.facts() == said
    assert bus.known() == {coordinator}


def test_a_coordinator_that_leaves_is_replaced_at_once() -> None:
    bus, old = elected()
    bus.learn(old, Leaving())
    bus.crash(old)
    bus.run(0.5)
    assert len(bus.coordinators()) == 1
    assert bus.coordinators() != [old]
    assert bus.known() == set(bus.coordinators())


@pytest.mark.parametrize("is_wiped", [False, True])
def test_terms_grow_over_a_restart_of_everything(is_wiped: bool) -> None:
    bus, _ = elected()
    terms = [1]
    for _ in range(5):
        for name in sorted(bus.nodes):
            bus.crash(name)
        if is_wiped:
            bus.retained = None
        for name in ("a", "b", "c"):
            bus.start(name)
        bus.run(4.0)
        (coordinator,) = bus.coordinators()
        terms.append(bus.nodes[NodeId(coordinator)].election.epoch.term)
    assert terms == sorted(set(terms)), terms


def test_the_record_of_a_dead_coordinator_delays_the_first_election_by_one_ttl_at_most() -> None:
    bus, _ = elected()
    for name in sorted(bus.nodes):
        bus.crash(name)
    bus.disks.clear()
    started_at = bus.now
    for name in ("x", "y"):
        bus.start(name)
    bus.run(5.0)
    elected_at = next(float(line.split()[0]) for line in bus.trace if "elected 2@" in line)
    assert elected_at - started_at < 3.0


def test_a_restarted_coordinator_that_finds_its_own_record_does_not_wait_for_it() -> None:
    bus, old = elected("a")
    bus.crash(old)
    bus.start(old)
    bus.run(0.5)
    assert bus.coordinators() == [old]
    assert bus.nodes[NodeId(old)].election.epoch == Epoch(2, NodeId(old))


def test_a_newcomer_that_obeyed_more_elsewhere_is_led_after_one_more_claim() -> None:
    bus, coordinator = elected()
    newcomer = NodeId("z")
    bus.start("z")
    host = bus.nodes[newcomer]
    host.fence.raise_to(Epoch(40, NodeId("elsewhere")))
    bus.run(1.0)
    assert f"z tells {coordinator} EpochHint 40@elsewhere" in bus.facts()
    assert bus.coordinators() == [coordinator]
    assert bus.known() == {coordinator}
    assert host.election.epoch == Epoch(41, NodeId(coordinator))
