"""Whatever comes in whatever order: what an election never does, and what it always does in the end."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.agreement.election import Election, Role
from mesh.agreement.fence import Fence
from mesh.core import Broadcast, Effect, Notify, Save, Send
from mesh.facts import Deposed, Elected, Leaving, LinkDown, LinkUp, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId
from mesh.messages import EpochHint, EpochSeen, LeaseRecord, StaleCommand
from tests.golden.election_bus import ElectionBus

ME = NodeId("m")
nodes = st.sampled_from([NodeId(n) for n in ("a", "m", "z")])
epochs = st.builds(Epoch, st.one_of(st.integers(1, 6), st.sampled_from([2**48, 2**53 - 1])), nodes)
records = st.builds(
    LeaseRecord,
    kind=st.sampled_from(["claim", "lease", "resigned"]),
    epoch=epochs,
    ttl_s=st.sampled_from([0.1, 2.5, 1e300]),
    beat=st.integers(0, 5),
)
hints = st.one_of(st.builds(EpochHint, seen=epochs), st.builds(StaleCommand, seen=epochs))
known = st.one_of(
    st.builds(LinkUp, broker_epoch=st.just(1), host=st.none()),
    st.builds(LinkDown),
    st.builds(MemberChanged, nodes, st.sampled_from(["alive", "suspect", "dead", "left"]), st.just(1)),
    st.just(Leaving()),
)
# "echo" returns what the core itself said, some time later; "obeyed" is its worker, on the same fence.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("message"), st.one_of(records, hints)),
        st.tuples(st.just("fact"), known),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.1, 0.6, 1.0, 3.0, 20.0])),
        st.tuples(st.just("echo"), st.integers(0, 3)),
        st.tuples(st.just("obeyed"), epochs),
    ),
    max_size=60,
)


class Watched:
    """One election whose every effect is checked against the promises."""

    def __init__(self) -> None:
        self.fence = Fence()
        self.election = Election(me=ME, fence=self.fence, rng=Random(0), now=0.0)
        self.now = 0.0
        self.disk = EPOCH_ZERO
        self.claimed: set[int] = set()
        self.granted: Epoch | None = None
        self.said: list[LeaseRecord] = []
        self.seen = EPOCH_ZERO
        self.election.learn(LinkUp(broker_epoch=1, host=None), 0.0)

    def step(self, kind: str, what: object) -> None:
        if self.election.wake_at <= self.now:
            self.check(self.election.tick(self.now))
        if kind == "wait":
            assert isinstance(what, float)
            self.now += what
            if self.election.wake_at <= self.now:
                self.check(self.election.tick(self.now))
        elif kind == "message":
            self.check(self.election.receive(what, NodeId("a"), self.now))
        elif kind == "fact":
            self.check(self.election.learn(what, self.now))
        elif kind == "obeyed":
            assert isinstance(what, Epoch)
            self.check(self.fence.raise_to(what))
        elif self.said:
            assert isinstance(what, int)
            self.check(self.election.receive(self.said[-1 - what % len(self.said)], ME, self.now))

    def check(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Save(record=EpochSeen(epoch=epoch)):
                    assert epoch > self.disk, "the fence only rises"
                    self.disk = epoch
                case Broadcast(message=LeaseRecord() as record):
                    self.said.append(record)
                    assert record.epoch.node == ME, "nobody speaks for another"
                    assert record.epoch.term <= self.disk.term, "durable before it is said"
                    if record.kind == "claim":
                        assert record.epoch.term not in self.claimed, "a term is claimed once"
                        self.claimed.add(record.epoch.term)
                    elif record.kind == "lease":
                        assert record.epoch == self.granted, "only a coordinator renews"
                case Notify(fact=Elected(epoch=epoch)):
                    assert self.granted is None and epoch.term in self.claimed
                    self.granted = epoch
                case Notify(fact=Deposed(epoch=epoch)):
                    assert epoch == self.granted
                    self.granted = None
                case Send(to=to):
                    assert to != ME
                case _:
                    pass
        assert self.fence.seen >= self.seen and self.fence.seen == self.disk
        self.seen = self.fence.seen
        assert (self.election.role is Role.COORDINATOR) == (self.granted is not None)
        assert (self.election.coordinator == ME) == (self.granted is not None)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_no_sequence_of_inputs_breaks_a_promise(sequence: list[tuple[str, object]]) -> None:
    watched = Watched()
    for kind, what in sequence:
        watched.step(kind, what)


@settings(max_examples=200, deadline=None)
@given(st.lists(records, max_size=20), st.data())
def test_hearing_everything_twice_is_hearing_it_once(heard: list[LeaseRecord], data: st.DataObject) -> None:
    once, twice = Watched(), Watched()
    for record in heard:
        once.step("message", record)
        twice.step("message", record)
        twice.step("message", record)
        assert once.election.coordinator == twice.election.coordinator
        assert once.fence.seen == twice.fence.seen


CHAOS_SEEDS = range(150)


class ForgetfulBus(ElectionBus):
    """The planted bug: a restarted node does not remember which terms it has used."""

    def start(self, name: str) -> None:
        self.disks.pop(NodeId(name), None)
        super().start(name)


def run_chaos(seed: int, *, broker_forgets: bool, bus_type: type[ElectionBus] = ElectionBus) -> ElectionBus:
    """Twenty faults among two to five nodes, then quiet."""
    chaos = Random(f"election/{seed}")
    names = "a b c d e"[: 2 * chaos.randint(2, 5) - 1].split()
    bus = bus_type(" ".join(names), seed)
    for _ in range(20):
        name = chaos.choice(names)
        fault = chaos.choice(["crash", "cut", "pause", "wipe", "restart", "leave"])
        host = bus.nodes.get(NodeId(name))
        if host is not None and not host.is_paused:
            if fault == "crash":
                bus.crash(name)
            elif fault == "cut" and host.is_linked:
                bus.cut(name)
            elif fault == "pause":
                bus.pause(name)
            elif fault == "leave":
                bus.learn(name, Leaving())
                bus.crash(name)
            elif fault == "restart":
                bus.crash(name)
                bus.start(name)
        if fault == "wipe" and broker_forgets:
            bus.retained = None
        bus.run(chaos.choice([0.005, 0.05, 0.7, 3.0]))
        mend(bus, chaos.choice(names))
    for name in names * 2:  # twice: one may be both paused and cut off
        mend(bus, name)
    bus.run(8.0)
    return bus


def mend(bus: ElectionBus, name: str) -> None:
    host = bus.nodes.get(NodeId(name))
    if host is None:
        bus.start(name)
    elif host.is_paused:
        bus.resume(name)
    elif not host.is_linked:
        bus.link(name)


@pytest.mark.parametrize("broker_forgets", [False, True])
def test_no_epoch_is_granted_twice(broker_forgets: bool) -> None:
    n_elected = 0
    for seed in CHAOS_SEEDS:
        epochs = granted(run_chaos(seed, broker_forgets=broker_forgets))
        n_elected += len(epochs)
        assert len(epochs) == len(set(epochs)), f"{seed=} {epochs}"
    assert n_elected > 3 * len(CHAOS_SEEDS), "the faults did not reach the coordinators"


def test_the_check_finds_nodes_that_forget_the_terms_they_used() -> None:
    runs = [granted(run_chaos(seed, broker_forgets=True, bus_type=ForgetfulBus)) for seed in CHAOS_SEEDS]
    assert any(len(epochs) > len(set(epochs)) for epochs in runs)


def test_a_broker_that_keeps_its_record_grants_each_term_to_one_node() -> None:
    """One that forgets may grant a term twice; the epochs still differ, and the higher one stays."""
    for seed in CHAOS_SEEDS:
        terms = [epoch.split("@")[0] for epoch in granted(run_chaos(seed, broker_forgets=False))]
        assert len(terms) == len(set(terms)), f"{seed=} {terms}"


@pytest.mark.parametrize("broker_forgets", [False, True])
def test_after_the_last_fault_all_follow_one_coordinator(broker_forgets: bool) -> None:
    for seed in CHAOS_SEEDS:
        bus = run_chaos(seed, broker_forgets=broker_forgets)
        assert len(bus.coordinators()) == 1, f"{seed=}"
        assert bus.known() == set(bus.coordinators()), f"{seed=}"


def granted(bus: ElectionBus) -> list[str]:
    return [line.split()[-1] for line in bus.trace if " elected " in line]
