"""The simulator keeps its own promises: shown with a tiny core, so that real ones may rely on it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from mesh.core import FOREVER, Broadcast, Effect, Fact, Message, Notify, Save, Send
from mesh.facts import LinkDown, LinkUp
from mesh.ids import Epoch, NodeId
from mesh.messages import EpochHint, EpochSeen, LeaseRecord, NodeState
from tests.sim.faults import CALM, draw_faults
from tests.sim.world import Birth, World


class Parrot:
    """Says a numbered lease once a second, and repeats all it hears as facts."""

    def __init__(self, birth: Birth) -> None:
        self.me = birth.node
        self.boot = birth.boot
        seen = birth.disk.get("count")
        self.count = seen.epoch.term if isinstance(seen, EpochSeen) else 0
        self.wake_at = birth.now + 1.0
        self.is_late: list[float] = []

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        assert now < self.wake_at, "the tick that was due comes first"
        return [Notify((message, sender))]

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        assert now < self.wake_at, "the tick that was due comes first"
        return []

    def tick(self, now: float) -> list[Effect]:
        assert now >= self.wake_at, "no tick before its time"
        self.is_late.append(now - self.wake_at)
        self.wake_at = now + 1.0
        self.count += 1
        epoch = Epoch(self.count, self.me)
        return [
            Save("count", EpochSeen(epoch=epoch)),
            Broadcast(LeaseRecord(kind="lease", epoch=epoch, ttl_s=1.0, beat=self.count)),
            Send(NodeId("node-0"), EpochHint(seen=epoch)),
        ]

    @property
    def state(self) -> NodeState:
        return NodeState(node=self.me, state="online", incarnation=1, boot=self.boot)


def _parrots(seed: int, n_nodes: int = 3, **changes: object) -> World:
    world = World(seed, n_nodes=n_nodes, build=Parrot, faults=replace(CALM, **changes))  # type: ignore[arg-type]
    world.start_all()
    return world


def _heard(world: World, kind: type) -> dict[str, list[object]]:
    heard: dict[str, list[object]] = {node: [] for node in world.hosts}
    for entry in world.history:
        if isinstance(entry.what, tuple) and isinstance(entry.what[0], kind):
            heard[entry.node].append(entry.what[0])
    return heard


def test_one_topic_is_one_order_for_all_readers() -> None:
    world = _parrots(1, n_nodes=4, delay_s_mean=0.5)
    world.run(3)
    orders = _heard(world, LeaseRecord)
    start = {node: len(order) for node, order in orders.items()}
    world.run(40)
    world.run(5)
    whole = next(iter(_heard(world, LeaseRecord).values()))
    assert len(whole) > 100
    for node, order in _heard(world, LeaseRecord).items():
        tail = order[start[node] :]
        first = whole.index(tail[0])
        common = min(len(tail), len(whole) - first)
        assert tail[:common] == whole[first : first + common]


def test_reordering_is_more_than_delay() -> None:
    world = _parrots(1, n_nodes=2, delay_s_mean=1.5, reorder=True)
    world.run(60)
    beats = [lease.beat for lease in _heard(world, LeaseRecord)["node-1"] if lease.node == "node-0"]  # type: ignore[attr-defined]
    assert beats != sorted(beats)


def test_what_was_saved_outlives_the_process_and_nothing_else_does() -> None:
    world = _parrots(2)
    world.run(10.5)
    first = world.hosts[NodeId("node-1")].life
    assert first is not None
    count = first.core.count  # type: ignore[attr-defined]
    world.restart("node-1")
    second = world.hosts[NodeId("node-1")].life
    assert second is not None and second.boot != first.boot
    assert second.core.count == count  # type: ignore[attr-defined]
    assert second.now() != first.now(), "a new life reads a new clock"


def test_a_stopped_process_learns_the_time_before_it_reads() -> None:
    world = _parrots(3)
    world.run(5)
    world.pause("node-0", 2.5)
    world.run(10)  # Parrot asserts the order itself
    life = world.hosts[NodeId("node-0")].life
    assert life is not None and max(life.core.is_late) > 1.4  # type: ignore[attr-defined]


def test_a_crash_between_two_effects_keeps_the_save_and_sends_nothing() -> None:
    world = _parrots(4, crash_amid_p=0.2)
    world.run(120)
    saved = sum(isinstance(e.what, Save) for e in world.history)
    sent = sum(isinstance(e.what, Send) for e in world.history)
    assert saved > sent > 0
    assert sum(host.n_lives for host in world.hosts.values()) > 10


def test_a_will_is_published_for_a_killed_process_and_not_after_a_restart_of_the_broker() -> None:
    world = _parrots(5)
    world.run(5)
    world.kill("node-2")
    world.run(1)
    assert [state.node for state in _heard(world, NodeState)["node-0"]] == ["node-2"]  # type: ignore[attr-defined]
    site = world.network.brokers["site"]
    world.network.restart_broker(site, keeps_retained=False, down_s=0.5)
    world.run(5)
    assert not [row for row, _ in site.retained if row == "STATE"]
    assert len(_heard(world, NodeState)["node-0"]) == 1


def test_a_newcomer_hears_what_is_retained() -> None:
    world = _parrots(6, n_nodes=2)
    world.run(3)
    world.kill("node-1")
    world.run(5)
    world.kill("node-0")
    world.run(1)
    heard_before = len(_heard(world, LeaseRecord)["node-1"])
    world.start("node-1")
    world.run(0.9)  # before its own first lease
    heard = _heard(world, LeaseRecord)["node-1"][heard_before:]
    assert [lease.node for lease in heard] == ["node-0"]  # type: ignore[attr-defined]


def test_a_cut_off_node_hears_nothing_and_comes_back() -> None:
    world = _parrots(7)
    world.run(5)
    world.cut_off("node-1", 10)
    world.run(1)
    before = len(_heard(world, LeaseRecord)["node-1"])
    world.run(8.5)
    assert len(_heard(world, LeaseRecord)["node-1"]) == before
    world.run(5)
    assert len(_heard(world, LeaseRecord)["node-1"]) > before


def test_qos_1_may_come_twice_and_qos_0_may_vanish_by_the_same_seed() -> None:
    world = _parrots(8, duplicate_p=0.3)
    world.run(30)
    beats = [lease.beat for lease in _heard(world, LeaseRecord)["node-1"] if lease.node == "node-0"]  # type: ignore[attr-defined]
    assert len(beats) > len(set(beats)) > 20


def test_the_same_seed_tells_the_same_story() -> None:
    def story(seed: int) -> str:
        world = World(seed, n_nodes=5, build=Parrot, faults=draw_faults(Random(seed)))
        world.start_all()
        world.unleash()
        world.run(60)
        return world.history.digest()

    assert [story(seed) for seed in range(5)] == [story(seed) for seed in range(5)]
    assert len({story(seed) for seed in range(5)}) == 5


def test_link_facts_reach_the_core_in_turn() -> None:
    facts: list[Fact] = []

    class Listener:
        wake_at = FOREVER

        def __init__(self, birth: Birth) -> None:
            pass

        def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
            return []

        def learn(self, fact: Fact, now: float) -> list[Effect]:
            facts.append(type(fact))
            return []

        def tick(self, now: float) -> list[Effect]:
            raise AssertionError("never due")

    world = World(9, n_nodes=1, build=Listener, faults=CALM)
    world.start_all()
    world.run(3)
    for keeps in (True, False):
        world.network.restart_broker(world.network.brokers["site"], keeps_retained=keeps, down_s=1.0)
        world.run(5)
    assert facts == [LinkUp, LinkDown, LinkUp, LinkDown, LinkUp]
