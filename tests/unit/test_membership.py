"""Each transition of a member, by what it takes and by what must not cause it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.agreement.membership import (
    INCARNATION_KEY,
    INCARNATION_MAX,
    Membership,
    MembershipConfig,
    Standing,
    suspicion_s,
)
from mesh.core import FOREVER, Broadcast, Effect, Notify, Save
from mesh.facts import (
    HostRefused,
    Leaving,
    LinkDown,
    LinkUp,
    MemberChanged,
    MemberRefused,
    OwnInfo,
    OwnReport,
    OwnStanding,
    Superseded,
)
from mesh.ids import Boot, NodeId
from mesh.messages import NodeForgotten, NodeInfo, NodeReport, NodeStanding, NodeState

ME, PI = NodeId("me"), NodeId("pi")
UP = LinkUp(broker_epoch=1, host=None)


def state(node: str, what: NodeStanding = "online", incarnation: int = 1, boot: str = "b") -> NodeState:
    return NodeState(node=NodeId(node), state=what, incarnation=incarnation, boot=Boot(boot))


def info(node: str, incarnation: int = 1, **changes: Any) -> NodeInfo:
    plain = NodeInfo(
        node=NodeId(node),
        incarnation=incarnation,
        hostname=node,
        version="0.1.0",
        protocol_min=1,
        protocol_max=1,
        addresses=[],
        port=7000,
        system="Linux",
        device="cpu",
        n_cpus=4,
        memory_bytes=1 << 30,
        model=None,
        adapters=[],
        slots=1,
    )
    return replace(plain, **changes)


def report(node: str, incarnation: int = 1) -> NodeReport:
    return NodeReport(
        node=NodeId(node),
        incarnation=incarnation,
        ready=True,
        activity="idle",
        running=0,
        cpu_percent=1.0,
        memory_free_bytes=1,
        rss_bytes=1,
        tokens_per_s=0.0,
    )


class Mesh:
    """One membership, and everything it told."""

    def __init__(self, *others: str, config: MembershipConfig | None = None) -> None:
        self.core = Membership(me=state("me", incarnation=5), info=info("me"), now=0.0, config=config)
        self.told: list[object] = []
        self.learn(UP, 0.0)
        for other in others:
            self.hear(state(other), 0.0)
        self.told.clear()

    def hear(self, message: Any, now: float, sender: str | None = None) -> list[Effect]:
        return self._note(self.core.receive(message, NodeId(sender or message.node), now))

    def learn(self, fact: object, now: float) -> list[Effect]:
        return self._note(self.core.learn(fact, now))

    def wait(self, until: float, reporting: str = "", every_s: float = 1.0, since: float = 0.0) -> None:
        """Time passes; the named nodes report."""
        now = since
        while now < until:
            next_report = now + every_s
            while self.core.wake_at < min(next_report, until):
                self._note(self.core.tick(self.core.wake_at))
            now = min(next_report, until)
            for node in reporting.split():
                self.hear(report(node, self.core.members[NodeId(node)].incarnation), now)

    def standing(self, node: str = "pi") -> Standing | None:
        member = self.core.members.get(NodeId(node))
        return member.standing if member else None

    def _note(self, effects: list[Effect]) -> list[Effect]:
        self.told += [effect.fact for effect in effects if isinstance(effect, Notify)]
        return effects


def changed(standing: str, incarnation: int = 1, node: str = "pi") -> MemberChanged:
    return MemberChanged(NodeId(node), standing, incarnation)


# ── alive, suspect, dead ────────────────────────────────────────────────────────────────────────────


def test_silence_leads_to_doubt_after_three_seconds_and_to_a_verdict_after_five() -> None:
    mesh = Mesh("pi")
    mesh.wait(2.99)
    assert mesh.standing() is Standing.ALIVE
    mesh.wait(4.99, since=2.99)
    assert mesh.standing() is Standing.SUSPECT
    mesh.wait(5.01, since=4.99)
    assert mesh.standing() is Standing.DEAD
    assert mesh.told == [changed("suspect"), changed("dead")]
    assert mesh.core.alive == [ME]


def test_reports_keep_a_node_alive() -> None:
    mesh = Mesh("pi")
    mesh.wait(60.0, reporting="pi")
    assert mesh.told == []
    assert mesh.core.members[PI].report == report("pi")


def test_a_last_will_leads_to_a_verdict_after_one_second() -> None:
    mesh = Mesh("pi")
    mesh.hear(state("pi", "offline"), 0.5)
    assert mesh.standing() is Standing.SUSPECT
    mesh.wait(1.6, since=0.5)
    assert mesh.told == [changed("suspect"), changed("dead")]


def test_the_host_of_a_broker_that_refuses_is_dead_two_seconds_after_the_mesh_has_another() -> None:
    """Its last will died with its broker. Without this the verdict would take five seconds."""
    mesh = Mesh("pi", "host")
    mesh.learn(LinkDown(), 10.0)
    mesh.learn(HostRefused(NodeId("host")), 10.05)
    mesh.learn(UP, 10.6)
    mesh.wait(12.5, reporting="pi", since=10.6)
    assert mesh.standing("host") is Standing.SUSPECT
    mesh.wait(12.7, reporting="pi", since=12.5)
    assert mesh.standing("host") is Standing.DEAD
    assert mesh.standing("pi") is Standing.ALIVE


def test_a_host_that_lost_only_its_broker_is_alive_as_soon_as_it_reports_again() -> None:
    mesh = Mesh("host")
    mesh.learn(LinkDown(), 10.0)
    mesh.learn(HostRefused(NodeId("host")), 10.05)
    mesh.learn(UP, 10.6)
    mesh.hear(report("host"), 11.2)
    assert mesh.standing("host") is Standing.ALIVE


def test_nobody_can_make_a_node_doubt_itself_or_a_stranger_by_a_refusal() -> None:
    mesh = Mesh("pi")
    assert mesh.learn(HostRefused(ME), 1.0) == []
    assert mesh.learn(HostRefused(NodeId("unknown")), 1.0) == []
    assert mesh.standing("unknown") is None


def test_a_will_repeated_does_not_put_off_the_verdict() -> None:
    mesh = Mesh("pi")
    for at in (0.5, 0.9, 1.4):
        mesh.hear(state("pi", "offline"), at)
    mesh.wait(1.6, since=1.4)
    assert mesh.standing() is Standing.DEAD


def test_a_goodbye_is_believed_at_once_and_for_good() -> None:
    mesh = Mesh("pi")
    mesh.hear(state("pi", "left"), 0.5)
    assert mesh.told == [changed("left")]
    for late in (state("pi"), state("pi", "offline"), report("pi"), state("pi", "left")):
        assert mesh.hear(late, 0.6) == []
    assert mesh.standing() is Standing.LEFT


@pytest.mark.parametrize("late", [state("pi", "offline", 1, "old"), state("pi", "left", 1, "old")])
def test_a_late_will_does_not_kill_a_newer_session(late: NodeState) -> None:
    mesh = Mesh()
    mesh.hear(state("pi", "online", 2, "new"), 0.1)
    before = dict(mesh.core.members)
    assert mesh.hear(late, 0.2) == []
    assert mesh.core.members == before


def test_of_two_lives_of_one_incarnation_the_higher_boot_counts() -> None:
    mesh = Mesh()
    mesh.hear(state("pi", boot="k"), 0.1)
    assert mesh.hear(state("pi", "offline", boot="a"), 0.2) == []
    mesh.hear(state("pi", boot="z"), 0.3)
    assert mesh.core.members[PI].boot == "z"
    assert mesh.standing() is Standing.ALIVE


@pytest.mark.parametrize("wait_s", [3.5, 7.0], ids=["suspect", "dead"])
def test_a_report_refutes_doubt_and_verdict(wait_s: float) -> None:
    mesh = Mesh("pi")
    mesh.wait(wait_s)
    mesh.hear(report("pi"), wait_s)
    assert mesh.told[-1] == changed("alive")
    assert mesh.core.alive == [ME, PI]


@pytest.mark.parametrize("wait_s", [3.5, 7.0], ids=["suspect", "dead"])
def test_a_new_life_ends_doubt_and_verdict(wait_s: float) -> None:
    mesh = Mesh("pi")
    mesh.wait(wait_s)
    mesh.hear(state("pi", incarnation=2), wait_s)
    assert mesh.told[-1] == changed("alive", 2)


def test_the_brokers_memory_of_a_dead_node_does_not_revive_it() -> None:
    mesh = Mesh("pi")
    mesh.hear(info("pi"), 0.1)
    mesh.wait(7.0)
    assert mesh.hear(state("pi"), 7.0) == []
    assert mesh.hear(info("pi"), 7.0) == []
    assert mesh.standing() is Standing.DEAD


def test_the_same_state_repeated_is_no_sign_of_life() -> None:
    mesh = Mesh("pi")
    assert mesh.hear(state("pi"), 2.9) == []
    mesh.wait(3.1, since=2.9)
    assert mesh.standing() is Standing.SUSPECT


def test_a_report_of_an_older_life_is_no_sign_of_life() -> None:
    mesh = Mesh()
    mesh.hear(state("pi", incarnation=4), 0.0)
    mesh.wait(3.5)
    assert mesh.hear(report("pi", 3), 3.5) == []
    assert mesh.standing() is Standing.SUSPECT


def test_a_node_may_be_known_by_its_reports_before_its_state() -> None:
    mesh = Mesh()
    mesh.hear(report("pi", 3), 0.1)
    mesh.hear(state("pi", incarnation=3), 0.2)
    assert mesh.told == [changed("alive", 3)]
    assert mesh.core.members[PI].boot == "b"


def test_info_that_comes_before_the_state_is_kept_and_older_info_does_not_replace_it() -> None:
    mesh = Mesh()
    newer = info("pi", 2, model="new")
    for message in (info("pi", 1), newer, info("pi", 1), state("pi", incarnation=2), info("pi", 1)):
        mesh.hear(message, 0.1)
    assert mesh.core.members[PI].info == newer


def test_draining_is_told_and_is_not_death() -> None:
    mesh = Mesh("pi")
    mesh.hear(state("pi", "draining"), 0.5)
    assert mesh.told == [changed("alive")]
    assert mesh.core.members[PI].state == "draining"


def test_a_node_found_offline_is_shown_dead_and_then_forgotten() -> None:
    mesh = Mesh()
    mesh.hear(state("pi", "offline"), 0.0)
    assert mesh.told == [changed("dead")]
    mesh.wait(599.0)
    assert mesh.standing() is Standing.DEAD
    mesh.wait(604.0, since=599.0)
    assert mesh.standing() is None


def test_a_cleared_topic_forgets_only_the_departed() -> None:
    mesh = Mesh("pi", "rock")
    mesh.hear(state("pi", "left"), 0.1)
    for node in ("pi", "rock", "me"):
        assert mesh.hear(NodeForgotten(node=NodeId(node)), 0.2) == []
    assert sorted(mesh.core.members) == ["me", "rock"]


@pytest.mark.parametrize(
    "message",
    [state("pi", "offline"), state("new"), info("pi", model="x"), report("pi"), NodeForgotten(node=PI)],
)
def test_nobody_speaks_for_another(message: object) -> None:
    mesh = Mesh("pi")
    before = dict(mesh.core.members)
    assert mesh.hear(message, 0.5, sender="mallory") == []
    assert mesh.core.members == before


def test_absurd_incarnations_are_not_believed() -> None:
    mesh = Mesh("pi")
    absurd = INCARNATION_MAX + 1
    for message in (state("pi", incarnation=absurd), report("pi", absurd), info("pi", absurd)):
        assert mesh.hear(message, 0.1) == []
    assert mesh.hear(state("me", "offline", absurd), 0.1) == []
    assert mesh.core.state.incarnation == 5


# ── hearing badly ───────────────────────────────────────────────────────────────────────────────────


def test_silence_while_the_link_was_down_says_nothing() -> None:
    mesh = Mesh("pi")
    mesh.learn(LinkDown(), 1.0)
    assert mesh.core.wake_at == FOREVER
    assert mesh.core.tick(500.0) == []
    mesh.learn(UP, 500.0)
    mesh.wait(502.9, since=500.0)
    assert mesh.told == []
    mesh.wait(505.1, since=502.9)
    assert mesh.told == [changed("suspect"), changed("dead")]


def test_a_suspect_gets_a_whole_new_hearing_after_a_break() -> None:
    mesh = Mesh("pi")
    mesh.wait(3.5)
    mesh.learn(LinkDown(), 3.5)
    mesh.learn(UP, 10.0)
    mesh.wait(14.9, since=10.0)
    assert mesh.standing() is Standing.SUSPECT
    mesh.wait(15.1, since=14.9)
    assert mesh.standing() is Standing.DEAD


def test_a_process_that_stood_still_judges_nobody_for_it() -> None:
    mesh = Mesh("pi", "rock")
    assert mesh.core.tick(60.0) == []
    assert mesh.standing() is Standing.ALIVE
    mesh.wait(65.1, since=60.0)
    assert mesh.standing() is Standing.DEAD


@pytest.mark.parametrize(
    ("by_will", "n_silent", "n_others", "expected_s"),
    [
        (False, 1, 1, 2.0),  # of two others or fewer, none is a crowd
        (False, 2, 2, 2.0),
        (False, 1, 3, 2.0),
        (False, 2, 3, 4.0),
        (False, 2, 4, 2.0),  # half is not more than half
        (False, 3, 4, 4.0),
        (False, 100, 100, 4.0),
        (True, 100, 100, 1.0),  # a will is the broker's word, not our hearing
    ],
)
def test_suspicion(by_will: bool, n_silent: int, n_others: int, expected_s: float) -> None:
    assert suspicion_s(by_will, n_silent, n_others, MembershipConfig()) == expected_s


def test_when_most_fall_silent_for_six_seconds_nobody_dies() -> None:
    mesh = Mesh("a", "b", "c", "d")
    mesh.wait(6.0, reporting="a")
    for node in "bcd":
        mesh.hear(report(node), 6.0)
    assert {fact.standing for fact in mesh.told if isinstance(fact, MemberChanged)} == {"suspect", "alive"}
    assert mesh.core.alive == ["a", "b", "c", "d", "me"]


def test_doubting_oneself_delays_no_single_failure_and_no_real_disaster_for_ever() -> None:
    single = Mesh("a", "b", "c", "d")
    single.wait(5.1, reporting="b c d")
    assert single.standing("a") is Standing.DEAD
    disaster = Mesh("a", "b", "c", "d")
    disaster.wait(7.1, reporting="d")
    assert disaster.core.alive == ["d", "me"]
    assert [disaster.standing(node) for node in "abc"] == [Standing.DEAD] * 3


# ── about this node ─────────────────────────────────────────────────────────────────────────────────


def test_a_new_link_hears_who_we_are() -> None:
    core = Membership(me=state("me", incarnation=5), info=info("me", 1), now=0.0)
    who = [Broadcast(state("me", incarnation=5)), Broadcast(info("me", 5))]
    assert core.learn(UP, 0.0) == [*who, Notify(changed("alive", 5, "me"))]
    core.learn(LinkDown(), 1.0)
    assert core.learn(UP, 2.0) == who


@pytest.mark.parametrize("rumour", ["offline", "left"])
@pytest.mark.parametrize(("incarnation", "boot"), [(5, "b"), (5, "z"), (8, "a")])
def test_a_rumour_of_our_death_is_refuted_durably_first(
    rumour: NodeStanding, incarnation: int, boot: str
) -> None:
    mesh = Mesh()
    effects = mesh.hear(state("me", rumour, incarnation, boot), 0.5)
    refuted = state("me", "online", incarnation + 1)
    assert effects == [
        Save(INCARNATION_KEY, refuted),
        Broadcast(refuted),
        Broadcast(info("me", incarnation + 1)),
        Notify(changed("alive", incarnation + 1, "me")),
    ]
    assert mesh.core.state == refuted


def test_a_late_will_in_our_topic_is_overwritten_without_a_new_incarnation() -> None:
    mesh = Mesh()
    effects = mesh.hear(state("me", "offline", 4, "old"), 0.5)
    assert effects == [Broadcast(state("me", incarnation=5)), Broadcast(info("me", 5))]


def test_our_own_echoes_cause_nothing() -> None:
    mesh = Mesh()
    mesh.hear(state("me", "offline", 5), 0.5)
    for message in (state("me", incarnation=6), state("me", incarnation=5), info("me", 6), report("me", 6)):
        assert mesh.hear(message, 0.6) == []
    assert mesh.core.members[ME].report is None


@pytest.mark.parametrize(("incarnation", "boot"), [(6, "a"), (5, "z")])
def test_the_older_of_two_processes_with_one_identity_stops(incarnation: int, boot: str) -> None:
    mesh = Mesh("pi")
    assert mesh.hear(state("me", "online", incarnation, boot), 0.5) == [Notify(Superseded(boot))]
    assert mesh.core.wake_at == FOREVER
    assert mesh.hear(state("me", "offline", incarnation, boot), 0.6) == []
    assert mesh.learn(OwnReport(report("me")), 0.7) == []
    assert mesh.learn(UP, 0.8) == []


@pytest.mark.parametrize(("incarnation", "boot"), [(4, "z"), (5, "a")])
def test_the_newer_of_two_processes_with_one_identity_says_so(incarnation: int, boot: str) -> None:
    mesh = Mesh()
    effects = mesh.hear(state("me", "online", incarnation, boot), 0.5)
    assert effects == [Broadcast(state("me", incarnation=5)), Broadcast(info("me", 5))]


def test_two_clones_end_as_one_within_two_messages() -> None:
    clones = [Membership(me=state("me", boot=boot), info=info("me"), now=0.0) for boot in "pq"]
    topic = [effect for clone in clones for effect in clone.learn(UP, 0.0)]
    over: list[str] = []
    for _ in range(3):
        said, topic = topic, []
        for effect in said:
            if isinstance(effect, Broadcast):
                for clone in clones:
                    topic += clone.receive(effect.message, ME, 0.1)
            elif isinstance(effect.fact, Superseded):
                over.append(effect.fact.boot)
    assert over == ["q"]
    assert topic == []


def test_own_info_report_and_standing_are_published_under_our_incarnation() -> None:
    mesh = Mesh()
    assert mesh.learn(OwnInfo(info("me", 0, model="m")), 0.1) == [Broadcast(info("me", 5, model="m"))]
    assert mesh.learn(OwnReport(report("me", 0)), 0.2) == [Broadcast(report("me", 5))]
    draining = mesh.learn(OwnStanding("draining"), 0.3)
    assert draining == [Broadcast(state("me", "draining", 5)), Notify(changed("alive", 5, "me"))]
    assert mesh.learn(OwnStanding("draining"), 0.4) == []
    assert mesh.learn(OwnReport(report("pi")), 0.5) == []


def test_nothing_is_published_without_a_link_and_all_of_it_with_the_next() -> None:
    mesh = Mesh()
    mesh.learn(LinkDown(), 0.1)
    assert mesh.learn(OwnInfo(info("me", model="m")), 0.2) == []
    assert mesh.learn(OwnReport(report("me")), 0.2) == []
    assert Broadcast(info("me", 5, model="m")) in mesh.learn(UP, 0.3)


@pytest.mark.parametrize("goodbye", [Leaving(), OwnStanding("left")])
def test_a_goodbye_of_ours_is_not_refuted_by_its_echo(goodbye: object) -> None:
    mesh = Mesh()
    effects = mesh.learn(goodbye, 0.1)
    assert effects == [Broadcast(state("me", "left", 5)), Notify(changed("left", 5, "me"))]
    assert mesh.hear(state("me", "left", 5), 0.2) == []
    assert mesh.learn(UP, 0.3) == []


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_table_refuses_newcomers_and_says_so_once() -> None:
    mesh = Mesh("a", "b", config=MembershipConfig(members_max=3, forget_after_s=1.0))
    for n in range(50):
        mesh.hear(info(f"n{n}"), 0.1)
        mesh.hear(state(f"n{n}"), 0.1)
    assert mesh.told == [MemberRefused(NodeId("n0"))]
    assert len(mesh.core.members) == 3
    assert len(mesh.core._early_info) <= 3
    mesh.hear(state("a", "left"), 0.2)
    mesh.wait(4.1, reporting="b", since=0.2)
    mesh.hear(state("late"), 4.1)
    assert sorted(mesh.core.members) == ["b", "late", "me"]


@pytest.mark.parametrize("wrong", [{"silence_s": 0.0}, {"stall_s": float("nan")}, {"members_max": 0}])
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MembershipConfig(**wrong)


nodes = st.sampled_from(["me", "pi", "rock", "nuc"])
incarnations = st.one_of(st.integers(0, 7), st.just(2**53 - 1))
standings = st.sampled_from(["online", "draining", "offline", "left"])
messages = st.one_of(
    st.builds(
        state,
        nodes,
        st.sampled_from(["online", "draining", "offline", "left"]),
        incarnations,
        st.sampled_from("abz"),
    ),
    st.builds(info, nodes, incarnations),
    st.builds(report, nodes, incarnations),
    st.builds(lambda node: NodeForgotten(node=NodeId(node)), nodes),
)
inputs = st.one_of(
    messages,
    st.sampled_from([UP, LinkDown(), Leaving(), OwnStanding("draining"), OwnReport(report("me"))]),
    st.sampled_from([0.1, 1.1, 3.0, 30.0, 700.0]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(inputs, max_size=60))
def test_no_sequence_of_inputs_breaks_a_promise(sequence: list[Any]) -> None:
    core = Membership(
        me=state("me", incarnation=2), info=info("me"), now=0.0, config=MembershipConfig(members_max=3)
    )
    now, durable, over = 0.0, 2, False
    standing: dict[str, tuple[str, int]] = {}
    for step in sequence:
        if isinstance(step, float):
            now += step
            effects = core.tick(now)
            assert core.wake_at > now, "a tick does all that is due"
        elif isinstance(step, LinkUp | LinkDown | Leaving | OwnStanding | OwnReport):
            effects = core.learn(step, now)
        else:
            before = core.members.get(step.node)
            effects = core.receive(step, step.node, now)
            after = core.members.get(step.node)
            if before and after:
                assert after.life >= before.life, "no older life comes back"
        assert not (over and effects), "said after the end"
        for effect in effects:
            match effect:
                case Save(record=NodeState(incarnation=incarnation)):
                    assert incarnation > durable
                    durable = incarnation
                case Broadcast(message=message):
                    assert message.node == ME
                    assert message.incarnation == durable, "durable before it is said"
                case Notify(fact=MemberChanged(node=node, standing=what, incarnation=incarnation)):
                    standing[node] = (what, incarnation)
                    over = over or (node == ME and what == "left")
                case Notify(fact=Superseded()):
                    over = True
        assert len(core.members) <= 3
        for node, member in core.members.items():
            assert node == ME or standing[node] == (member.standing.value, member.incarnation), "told"
        assert core.alive == sorted(core.alive)


@settings(max_examples=200, deadline=None)
@given(st.lists(messages, max_size=20))
def test_hearing_everything_twice_is_hearing_it_once(heard: list[Any]) -> None:
    others = [message for message in heard if message.node != ME]
    once, twice = Mesh(), Mesh()
    for message in others:
        once.hear(message, 0.5)
        twice.hear(message, 0.5)
        twice.hear(message, 0.5)
        assert once.core.members == twice.core.members
