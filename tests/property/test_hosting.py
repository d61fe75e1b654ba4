"""Promises of ``mesh.agreement.hosting``, each over many seeds and every small mesh size."""

from __future__ import annotations

from random import Random

import pytest

from mesh.agreement.hosting import PEERS_MAX, Hosting
from mesh.core import Notify
from mesh.facts import BrokerRef, PeerHeard, PeerSilent, UseBroker
from mesh.ids import Boot, NodeId
from mesh.messages import PeerHello
from tests.property.hosting_world import HostingWorld

SEEDS = range(90)  # ten of every size from 1 to 9


def size_of(seed: int) -> int:
    return 1 + seed % 9


def test_nodes_that_start_together_agree_on_one_broker_within_three_seconds() -> None:
    for seed in SEEDS:
        world = HostingWorld(size_of(seed), seed, stagger_s=0.3 * (seed % 3))
        world.run(4.0)
        assert world.agreed() is not None, f"{seed=}"


def test_a_dead_host_is_replaced_and_all_survivors_move() -> None:
    for seed in SEEDS:
        world = HostingWorld(max(2, size_of(seed)), seed)
        world.run(4.0)
        first = world.agreed()
        assert first is not None and first.host is not None, f"{seed=}"
        world.kill(first.host)
        world.run(5.0)
        second = world.agreed()
        assert second is not None and second.epoch > first.epoch, f"{seed=}"


def test_two_brokers_born_on_two_sides_of_a_split_become_one_after_it_heals() -> None:
    for seed in SEEDS:
        world = HostingWorld(max(2, size_of(seed)), seed)
        for k in range(max(2, size_of(seed))):
            world.sides[NodeId(f"node-{k}")] = k % 2
        world.run(4.0)
        assert len(world.brokers) == 2, f"{seed=}: each side has a broker of its own"
        for node in world.sides:
            world.sides[node] = 0
        world.run(15.0)
        assert world.agreed() is not None, f"{seed=}"
        assert len(world.brokers) == 1, f"{seed=}: the outranked broker has stopped"


def test_a_node_that_cannot_host_leaves_it_to_the_others() -> None:
    for seed in SEEDS:
        world = HostingWorld(max(2, size_of(seed)), seed)
        world.refuses_to_host.add(NodeId("node-0"))
        world.run(8.0)
        agreed = world.agreed()
        assert agreed is not None and agreed.host != NodeId("node-0"), f"{seed=}"


def test_a_restarted_host_joins_the_broker_that_replaced_its_own() -> None:
    for seed in SEEDS:
        world = HostingWorld(max(2, size_of(seed)), seed)
        world.run(4.0)
        first = world.agreed()
        assert first is not None and first.host is not None
        world.kill(first.host)
        world.run(world.rng.uniform(0.0, 3.0))
        world.restart(first.host)
        world.run(8.0)
        assert world.agreed() is not None, f"{seed=}"


def test_a_calm_mesh_keeps_its_broker() -> None:
    for seed in range(40):
        world = HostingWorld(size_of(seed), seed)
        world.run(4.0)
        agreed, n_hosted = world.agreed(), world.n_hosted
        world.run(60.0)
        assert (world.agreed(), world.n_hosted) == (agreed, n_hosted), f"{seed=}"


def test_without_the_outranking_rule_a_healed_split_would_keep_two_brokers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checker can fail: this plants the bug that the merge test must catch."""
    monkeypatch.setattr(BrokerRef, "outranks", lambda self, other: False)
    world = HostingWorld(4, 1)
    for k in range(4):
        world.sides[NodeId(f"node-{k}")] = k % 2
    world.run(4.0)
    for node in world.sides:
        world.sides[node] = 0
    world.run(15.0)
    assert world.agreed() is None


def test_the_sites_own_broker_is_used_and_nothing_is_hosted() -> None:
    site = BrokerRef(epoch=0, host=None, addresses=("broker.lan",), port=8883)
    core = Hosting(me=NodeId("a"), rng=Random(0), now=0.0, external=site)
    assert core.tick(0.0) == [Notify(UseBroker(site))]
    assert core.wake_at == float("inf")


def test_rumours_make_room_for_a_peer_that_proved_to_be_there() -> None:
    """Anybody on the network can announce thousands of nodes; none of them ever answers."""
    core = Hosting(me=NodeId("me"), rng=Random(1), now=0.0)
    for k in range(2 * PEERS_MAX):
        core.learn(PeerSilent(NodeId(f"forged-{k}")), 0.1)
    hello = PeerHello(
        node=NodeId("pi"), boot=Boot("b"), incarnation=1, mesh="home", port=1, addresses=["10.0.0.1"],
        broker_epoch=3, broker_host=NodeId("pi"), broker_addresses=["10.0.0.1"], broker_port=8883,
        broker_connected=True, peers={},
    )  # fmt: skip
    core.learn(PeerHeard(hello, "10.0.0.1"), 0.2)
    assert core.broker is not None and core.broker.host == "pi"
