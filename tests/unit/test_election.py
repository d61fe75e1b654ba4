"""Each input of one election, and what it must not change."""

from __future__ import annotations

from random import Random

import pytest

from mesh.agreement.election import TERM_MAX, Election, ElectionConfig, Role, promise_of
from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.core import FOREVER, Broadcast, Effect, Notify, Save, Send
from mesh.facts import Deposed, Elected, Followed, Leaving, LinkDown, LinkUp, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId
from mesh.messages import EpochHint, EpochSeen, LeaseKind, LeaseRecord, StaleCommand

ME, LOWER, HIGHER = NodeId("m"), NodeId("a"), NodeId("z")
UP = LinkUp(broker_epoch=1, host=None)


def record(kind: LeaseKind, term: int, node: NodeId, beat: int = 0, ttl_s: float = 2.5) -> LeaseRecord:
    return LeaseRecord(kind=kind, epoch=Epoch(term, node), ttl_s=ttl_s, beat=beat)


def follower(seen: Epoch = EPOCH_ZERO, *, is_linked: bool = True, may_coordinate: bool = True) -> Election:
    election = Election(me=ME, fence=Fence(seen), rng=Random(0), now=0.0, may_coordinate=may_coordinate)
    if is_linked:
        election.learn(UP, 0.0)
    return election


def candidate() -> Election:
    """Claims 1@m at 1.0."""
    election = follower()
    election.tick(1.0)
    assert election.role is Role.CANDIDATE
    return election


def coordinator() -> Election:
    """Coordinates as 1@m since 1.1; its claim left at 1.0, its first beat at 1.1."""
    election = candidate()
    election.receive(record("claim", 1, ME), ME, 1.1)
    assert election.role is Role.COORDINATOR
    return election


def facts(effects: list[Effect]) -> list[object]:
    return [effect.fact for effect in effects if isinstance(effect, Notify)]


def test_a_claim_is_durable_before_it_is_sent() -> None:
    effects = follower(Epoch(6, HIGHER)).tick(1.0)
    assert effects == [
        Save(FENCE_KEY, EpochSeen(epoch=promise_of(7))),
        Broadcast(record("claim", 7, ME)),
    ]


def test_the_own_claim_heard_first_wins() -> None:
    effects = candidate().receive(record("claim", 1, ME), ME, 1.1)
    assert effects == [
        Save(FENCE_KEY, EpochSeen(epoch=Epoch(1, ME))),
        Notify(Elected(Epoch(1, ME))),
        Broadcast(record("lease", 1, ME, beat=1)),
    ]


@pytest.mark.parametrize("other", [LOWER, HIGHER])
def test_anothers_claim_heard_first_wins_whichever_name_is_higher(other: NodeId) -> None:
    election = candidate()
    effects = election.receive(record("claim", 1, other), other, 1.1)
    assert facts(effects) == [Followed(Epoch(1, other))]
    assert Save(FENCE_KEY, EpochSeen(epoch=Epoch(1, other))) in effects
    assert election.receive(record("claim", 1, ME), ME, 1.1) == []
    assert (election.role, election.coordinator) == (Role.FOLLOWER, other)


@pytest.mark.parametrize("other", [LOWER, HIGHER])
def test_the_second_claim_of_a_term_changes_nothing(other: NodeId) -> None:
    election = coordinator()
    assert election.receive(record("claim", 1, other), other, 1.2) == []
    assert election.coordinator == ME
    led = follower()
    led.receive(record("claim", 1, NodeId("k")), NodeId("k"), 0.1)
    assert led.receive(record("claim", 1, other), other, 0.2) == []
    assert led.coordinator == "k"


def test_a_claim_whose_echo_is_overdue_is_followed_by_one_of_the_next_term() -> None:
    election = candidate()
    effects = election.tick(election.wake_at)
    assert Broadcast(record("claim", 2, ME)) in effects
    assert election.receive(record("claim", 1, ME), ME, election.wake_at - 0.1) == []
    assert election.role is Role.CANDIDATE


def test_an_echo_that_comes_after_the_lease_would_be_over_elects_nobody() -> None:
    election = candidate()
    effects = election.receive(record("claim", 1, ME), ME, 1.0 + 2.5 - 0.3)
    assert facts(effects) == []
    assert Broadcast(record("claim", 2, ME)) in effects


def test_the_lease_counts_from_the_sending_of_the_last_beat_that_came_back() -> None:
    election = coordinator()
    election.receive(record("lease", 1, ME, beat=1), ME, 1.7)  # sent at 1.1
    for at in (1.8, 2.5, 3.2):
        assert election.tick(at) == [Broadcast(record("lease", 1, ME, beat=round((at - 0.4) / 0.7)))]
    assert election.wake_at == pytest.approx(1.1 + 2.5 - 0.3)
    assert facts(election.tick(election.wake_at)) == [Deposed(Epoch(1, ME))]
    assert (election.role, election.coordinator) == (Role.FOLLOWER, None)


def test_an_old_echo_repeated_does_not_lengthen_the_lease() -> None:
    election = coordinator()
    election.receive(record("lease", 1, ME, beat=1), ME, 1.2)
    before = election._held_until
    for beat in (0, 1, 7):
        assert election.receive(record("lease", 1, ME, beat=beat), ME, 1.3) == []
    assert election._held_until == before


def test_beats_without_echo_are_bounded() -> None:
    election = coordinator()
    for _ in range(100):
        election.learn(UP, 1.2)
    assert len(election._sent_at) <= 16


@pytest.mark.parametrize("kind", ["claim", "lease"])
def test_a_higher_epoch_deposes_the_coordinator(kind: LeaseKind) -> None:
    election = coordinator()
    effects = election.receive(record(kind, 2, LOWER), LOWER, 1.3)
    assert facts(effects) == [Deposed(Epoch(1, ME)), Followed(Epoch(2, LOWER))]
    assert election.coordinator == LOWER


def test_of_two_coordinators_of_one_term_the_higher_epoch_stays() -> None:
    election = coordinator()
    assert election.receive(record("lease", 1, LOWER, beat=9), LOWER, 1.3) == []
    effects = election.receive(record("lease", 1, HIGHER, beat=9), HIGHER, 1.3)
    assert facts(effects) == [Deposed(Epoch(1, ME)), Followed(Epoch(1, HIGHER))]


def test_beats_are_obeyed_once_each() -> None:
    election = follower()
    election.receive(record("lease", 3, HIGHER, beat=5), HIGHER, 0.1)
    due = election.wake_at
    for beat in (5, 4, 0):
        assert election.receive(record("lease", 3, HIGHER, beat=beat), HIGHER, 0.5) == []
    assert election.wake_at == due
    assert election.receive(record("lease", 3, HIGHER, beat=6), HIGHER, 0.5) == []
    assert election.wake_at > due


def test_a_stale_lease_is_answered_with_one_hint_a_second() -> None:
    election = follower(Epoch(9, HIGHER))
    stale = record("lease", 3, LOWER, beat=5)
    assert election.receive(stale, LOWER, 0.1) == [Send(LOWER, EpochHint(seen=Epoch(9, HIGHER)))]
    assert election.receive(stale, LOWER, 0.2) == []
    assert election.coordinator is None
    assert len(election.receive(stale, LOWER, 1.2)) == 1


def test_a_stale_lease_is_not_answered_while_a_newer_coordinator_speaks() -> None:
    election = follower()
    election.receive(record("lease", 9, HIGHER, beat=5), HIGHER, 0.1)
    assert election.receive(record("lease", 3, LOWER, beat=5), LOWER, 0.1) == []
    assert election.coordinator == HIGHER


@pytest.mark.parametrize("hint", [EpochHint(seen=Epoch(8, LOWER)), StaleCommand(seen=Epoch(8, LOWER))])
def test_a_coordinator_that_learns_of_a_higher_epoch_claims_above_it(hint: EpochHint | StaleCommand) -> None:
    effects = coordinator().receive(hint, LOWER, 1.3)
    assert effects == [
        Notify(Deposed(Epoch(1, ME))),
        Save(FENCE_KEY, EpochSeen(epoch=promise_of(9))),
        Broadcast(record("claim", 9, ME)),
    ]


def test_hints_change_nothing_for_followers_or_when_they_are_old_or_absurd() -> None:
    assert follower().receive(EpochHint(seen=Epoch(8, LOWER)), LOWER, 0.1) == []
    election = coordinator()
    for seen in (Epoch(1, LOWER), Epoch(1, ME), Epoch(TERM_MAX + 1, LOWER)):
        assert election.receive(EpochHint(seen=seen), LOWER, 1.2) == []
    assert election.coordinator == ME


def test_a_coordinator_whose_own_worker_obeys_a_higher_epoch_steps_down() -> None:
    election = coordinator()
    election._fence.raise_to(Epoch(2, HIGHER))
    assert facts(election.tick(election.wake_at)) == [Deposed(Epoch(1, ME))]
    assert election.role is Role.FOLLOWER


def test_a_claim_overtaken_by_a_higher_epoch_is_not_granted_but_repeated_above_it() -> None:
    election = candidate()
    election._fence.raise_to(Epoch(5, HIGHER))
    effects = election.receive(record("claim", 1, ME), ME, 1.1)
    assert facts(effects) == []
    assert Broadcast(record("claim", 6, ME)) in effects


def test_absurd_terms_are_not_obeyed_and_the_last_term_is_not_passed() -> None:
    election = follower()
    assert election.receive(record("lease", TERM_MAX + 1, HIGHER), HIGHER, 0.1) == []
    at_the_end = follower(Epoch(TERM_MAX, HIGHER))
    assert at_the_end.tick(1.0) == []
    assert at_the_end.wake_at == FOREVER


def test_a_lease_of_a_thousand_years_is_waited_for_thirty_seconds() -> None:
    election = follower()
    election.receive(record("lease", 1, HIGHER, ttl_s=3e10), HIGHER, 0.0)
    assert election.wake_at < 32.0


def test_nobody_claims_without_a_link() -> None:
    election = follower(is_linked=False)
    assert election.wake_at == FOREVER
    assert election.tick(100.0) == []
    linked = candidate()
    linked.learn(LinkDown(), 1.05)
    assert (linked.role, linked.wake_at) == (Role.FOLLOWER, FOREVER)
    assert linked.receive(record("claim", 1, ME), ME, 1.06) == []
    assert linked.role is Role.FOLLOWER


def test_a_coordinator_keeps_its_lease_over_a_short_break_and_says_so_on_return() -> None:
    election = coordinator()
    assert election.learn(LinkDown(), 1.2) == []
    assert election.wake_at == pytest.approx(1.0 + 2.5 - 0.3)
    assert election.learn(UP, 2.0) == [Broadcast(record("lease", 1, ME, beat=2))]
    assert election.coordinator == ME


def test_a_follower_waits_about_a_second_for_the_coordinator_after_a_break() -> None:
    election = follower()
    election.receive(record("lease", 3, HIGHER, beat=5), HIGHER, 0.1)
    election.learn(LinkDown(), 0.2)
    election.learn(UP, 7.0)
    assert 8.0 <= election.wake_at <= 8.2
    election.receive(record("lease", 3, HIGHER, beat=6), HIGHER, 7.1)
    assert election.wake_at >= 9.6


def test_a_node_that_may_not_coordinate_never_claims_but_notices_the_silence() -> None:
    election = follower(may_coordinate=False)
    election.receive(record("lease", 3, HIGHER, beat=5), HIGHER, 0.1)
    assert election.tick(election.wake_at) == []
    assert (election.coordinator, election.wake_at) == (None, FOREVER)


def test_a_coordinator_that_leaves_resigns_and_never_claims_again() -> None:
    election = coordinator()
    effects = election.learn(Leaving(), 1.2)
    assert effects == [Notify(Deposed(Epoch(1, ME))), Broadcast(record("resigned", 1, ME, beat=2))]
    assert election.receive(record("resigned", 1, ME, beat=2), ME, 1.3) == []
    assert election.tick(1e6) == []
    assert election.role is Role.FOLLOWER


def test_a_late_beat_does_not_bring_back_a_coordinator_that_resigned() -> None:
    election = follower()
    election.receive(record("lease", 3, HIGHER, beat=5), HIGHER, 0.1)
    election.receive(record("resigned", 3, HIGHER, beat=6), HIGHER, 0.2)
    assert election.coordinator is None
    assert election.wake_at < 0.5
    assert election.receive(record("lease", 3, HIGHER, beat=5), HIGHER, 0.21) == []
    assert election.coordinator is None


def test_the_lowest_alive_id_claims_first() -> None:
    config = ElectionConfig()
    waits = {}
    for me in ("b", "f", "k"):
        election = Election(me=NodeId(me), fence=Fence(), rng=Random(1), now=0.0, config=config)
        for other in ("b", "f", "k"):
            election.learn(MemberChanged(NodeId(other), "alive", 1), 0.0)
        election.learn(MemberChanged(NodeId("b"), "dead", 1), 0.0) if me != "b" else None
        election.learn(UP, 0.0)
        waits[me] = election.wake_at
    assert waits["f"] == waits["b"] < waits["k"]
    assert waits["k"] - waits["f"] == pytest.approx(config.rank_step_s)


def test_a_mesh_of_thousands_does_not_queue_up_by_rank_for_minutes() -> None:
    election = follower()
    for n in range(5000):
        election.learn(MemberChanged(NodeId(f"a{n}"), "alive", 1), 0.0)
    election.learn(UP, 0.0)
    assert election.wake_at < 2.0
    assert len(election._ranked) <= 4096


@pytest.mark.parametrize(
    "lengths",
    [{"beat_every_s": 1.2}, {"ttl_s": 1.0}, {"margin_s": 0.0}, {"ttl_s": float("nan")}, {"rank_step_s": 0.0}],
)
def test_lengths_that_do_not_fit_are_refused(lengths: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        ElectionConfig(**lengths)
