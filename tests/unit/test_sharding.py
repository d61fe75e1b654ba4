"""The core that shares out the mesh's memory: whose ring counts, who is in it, and what is said when."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.cache.facts import DrawView, RingChanged, ViewDrawn
from mesh.cache.ring import RingConfig, RingEpoch, RingSpec, RingView
from mesh.cache.sharding import RING_KEY, Sharding, ShardingConfig
from mesh.core import Broadcast, Effect, Notify, Save
from mesh.facts import Deposed, Elected, LinkDown, LinkUp, MemberChanged, OwnInfo
from mesh.ids import Epoch, NodeId
from mesh.messages import CatalogueWhole, RingRecord
from tests.sim.engine import info_of

ME, A, B, C = (NodeId(name) for name in ("me", "a", "b", "c"))
GIB = 2**30
CLAIM = Epoch(5, ME)
LINK = LinkUp(broker_epoch=0, host=None)


def sharding(quota: int = GIB, records: dict[str, Any] | None = None, fence: Fence | None = None) -> Sharding:
    return Sharding(
        me=ME,
        info=info_of(ME, cache_bytes=quota),
        life=1,
        fence=fence or Fence(),
        records=records or {},
        rng=Random(1),
        now=0.0,
        config=ShardingConfig(ring=RingConfig(settle_s=2.0, grace_s=5.0)),
    )


def record(epoch: Epoch, change: int, *nodes: NodeId) -> RingRecord:
    return RingRecord(epoch=epoch, change=change, quotas=dict.fromkeys(nodes, GIB))


def told(core: Sharding, message: RingRecord, now: float = 0.0) -> list[Effect]:
    return core.receive(message, message.epoch.node, now)


def meet(core: Sharding, node: NodeId, now: float, quota: int = GIB) -> list[Effect]:
    """A node is alive and says what it gives."""
    info = core.receive(info_of(node, cache_bytes=quota), node, now)
    return [*info, *core.learn(MemberChanged(node, "alive", 0), now)]


def published(effects: list[Effect]) -> list[RingRecord]:
    said = [effect.message for effect in effects if isinstance(effect, Broadcast)]
    return [message for message in said if isinstance(message, RingRecord)]


def facts(effects: list[Effect], kind: type) -> list[Any]:
    return [effect.fact for effect in effects if isinstance(effect, Notify) and isinstance(effect.fact, kind)]


def coordinator() -> Sharding:
    """Elected at 0, with ``ME`` and ``A`` in its first ring, made at 2; drawn."""
    core = sharding()
    core.learn(LINK, 0.0)
    core.learn(Elected(CLAIM), 0.0)
    meet(core, A, 0.0)
    (made,) = published(core.tick(2.0))
    assert made == record(CLAIM, 1, A, ME)
    core.learn(ViewDrawn(RingView(RingSpec.read(made))), 2.1)
    return core


# ── whose ring counts ───────────────────────────────────────────────────────────────────────────────


def test_a_newer_ring_is_on_disk_before_it_is_drawn_and_drawn_before_it_counts() -> None:
    core, epoch = sharding(), Epoch(3, A)
    effects = told(core, record(epoch, 1, A, ME))
    kinds = [effect.key if isinstance(effect, Save) else type(effect) for effect in effects]
    assert kinds == [FENCE_KEY, RING_KEY, Notify], "who obeys a coordinator obeys no lower one afterwards"
    (draw,) = facts(effects, DrawView)
    assert core.epoch is None and core.spec == draw.spec
    view = RingView(draw.spec)
    assert facts(core.learn(ViewDrawn(view), 0.1), RingChanged) == [RingChanged(view)]
    assert core.epoch == RingEpoch(epoch, 1) and core.ring.view is view


@pytest.mark.parametrize(
    ("message", "sender"),
    [
        (record(Epoch(2, B), 9, B), B),  # of an older claim, though it counts further
        (record(Epoch(3, A), 1, ME), A),  # an older change
        (record(Epoch(3, A), 2, A, ME), A),  # the same
        (record(Epoch(9, B), 9, B), C),  # another node speaks for the coordinator
        (record(Epoch(2**49, B), 9, B), B),  # no count
        (record(Epoch(9, B), 2**49, B), B),
    ],
)
def test_what_is_not_newer_changes_nothing(message: RingRecord, sender: NodeId) -> None:
    core = sharding()
    told(core, record(Epoch(3, A), 2, A, ME))
    before = core.spec
    assert core.receive(message, sender, 1.0) == [] and core.spec == before


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            record,
            st.builds(Epoch, st.integers(1, 3), st.sampled_from([A, B])),
            st.integers(0, 3),
            st.sampled_from([A, B, C]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_all_nodes_end_with_the_same_ring_in_whatever_order_it_came(
    records: list[RingRecord], rng: Random
) -> None:
    newest = max((RingSpec.read(one) for one in records), key=lambda spec: spec.rank)
    for _ in range(2):
        core, arriving = sharding(), [*records, *records]
        rng.shuffle(arriving)
        for one in arriving:
            told(core, one)
        assert core.spec == newest


def test_after_a_restart_a_node_goes_on_with_the_ring_its_disk_knows() -> None:
    kept = record(Epoch(3, A), 7, A, ME)
    core = sharding(records={RING_KEY: kept})
    assert core.wake_at == 0.0
    (draw,) = facts(core.tick(0.0), DrawView)
    assert draw.spec == RingSpec.read(kept)
    assert told(core, record(Epoch(2, B), 8, B)) == []


def test_another_number_for_the_same_members_is_not_drawn_again() -> None:
    core = sharding()
    told(core, record(Epoch(3, A), 1, A, ME))
    core.learn(ViewDrawn(RingView(RingSpec.read(record(Epoch(3, A), 1, A, ME)))), 0.1)
    effects = told(core, record(Epoch(4, B), 2, A, ME), 0.2)
    assert not facts(effects, DrawView) and len(facts(effects, RingChanged)) == 1
    assert core.epoch == RingEpoch(Epoch(4, B), 2) and not core.ring.earlier, "nothing has moved"


def test_a_view_drawn_late_does_not_replace_a_newer_one() -> None:
    core = sharding()
    old, new = record(Epoch(3, A), 1, A), record(Epoch(3, A), 2, A, ME)
    told(core, old)
    told(core, new)
    core.learn(ViewDrawn(RingView(RingSpec.read(new))), 0.1)
    assert core.learn(ViewDrawn(RingView(RingSpec.read(old))), 0.2) == []
    assert core.epoch == RingEpoch(Epoch(3, A), 2)


# ── the coordinator ─────────────────────────────────────────────────────────────────────────────────


def test_only_who_is_elected_makes_a_ring() -> None:
    core = sharding()
    core.learn(LINK, 0.0)
    assert not published(meet(core, A, 0.0)) and core.wake_at == float("inf")
    core.learn(Elected(CLAIM), 0.0)
    assert published(core.tick(2.0)) == [record(CLAIM, 1, A, ME)]
    core.learn(Deposed(CLAIM), 3.0)
    assert not published(meet(core, B, 3.0)) and core.wake_at == float("inf")


def test_a_new_coordinator_numbers_the_ring_it_finds_anew() -> None:
    core = sharding()
    core.learn(LINK, 0.0)
    told(core, record(Epoch(3, A), 7, A, ME))
    assert published(core.learn(Elected(CLAIM), 0.0)) == [record(CLAIM, 8, A, ME)]


def test_a_coordinator_that_has_obeyed_a_higher_claim_makes_nothing() -> None:
    fence = Fence()
    core = sharding(fence=fence)
    core.learn(LINK, 0.0)
    core.learn(Elected(CLAIM), 0.0)
    fence.raise_to(Epoch(6, A))
    meet(core, A, 0.0)
    assert core.tick(9.0) == [] and core.spec is None


def test_a_member_of_whom_nothing_is_known_yet_stays_in_the_ring() -> None:
    """The new coordinator hears that it lives before it hears what it gives."""
    core = coordinator()
    told(core, record(Epoch(6, B), 9, A, B, ME), 3.0)
    core.learn(MemberChanged(B, "alive", 0), 3.0)
    effects = core.learn(Elected(Epoch(7, ME)), 3.0)
    assert published(effects) == [record(Epoch(7, ME), 10, A, B, ME)]
    assert published(core.receive(info_of(B, cache_bytes=0), B, 4.0)) == [record(Epoch(7, ME), 11, A, ME)]


def test_who_came_and_went_in_the_term_of_another_is_judged_anew() -> None:
    core = coordinator()
    core.learn(MemberChanged(A, "dead", 0), 3.0)
    core.learn(Deposed(CLAIM), 4.0)
    core.learn(MemberChanged(A, "alive", 0), 5.0)
    core.learn(MemberChanged(A, "dead", 0), 99.0)
    later = Epoch(6, ME)
    assert published(core.learn(Elected(later), 100.0)) == [record(later, 2, A, ME)], "its grace begins now"
    assert published(core.tick(105.0)) == [record(later, 3, ME)]


def test_what_this_node_gives_may_change() -> None:
    core = coordinator()
    effects = core.learn(OwnInfo(info_of(ME, cache_bytes=0)), 3.0)
    assert published(effects) == [record(CLAIM, 2, A)]


def test_a_coordinator_says_the_ring_again_to_a_new_broker_and_others_do_not() -> None:
    core = coordinator()
    core.learn(LinkDown(), 3.0)
    assert not published(meet(core, B, 3.5)), "nobody would hear it"
    assert published(core.learn(LINK, 4.0))[0] == record(CLAIM, 1, A, ME)
    core.learn(Deposed(CLAIM), 5.0)
    core.learn(LinkDown(), 6.0)
    assert not published(core.learn(LINK, 7.0))


def test_a_coordinator_corrects_an_older_ring_on_the_topic_unless_its_own_comes_after_it() -> None:
    core = coordinator()
    own = core.spec
    assert own is not None
    assert told(core, record(Epoch(4, A), 9, A), 10.0) == [] and core.wake_at == 11.0
    assert published(core.tick(11.0)) == [own.record()]
    told(core, record(Epoch(4, A), 9, A), 20.0)
    told(core, own.record(), 20.5)
    assert core.wake_at == float("inf")


# ── readers ─────────────────────────────────────────────────────────────────────────────────────────


def full(life: int = 1) -> CatalogueWhole:
    """Claims about half of all keys, as a full one does by mistake for few."""
    return CatalogueWhole(life=life, version=1, salt=0, n_keys=1, bits=b"\xff" * 256 + bytes(256))


def test_readers_ask_owners_first_and_those_in_doubt_last_and_never_themselves() -> None:
    core = sharding()
    told(core, record(Epoch(3, A), 1, A, B))
    core.learn(ViewDrawn(RingView(RingSpec.read(record(Epoch(3, A), 1, A, B)))), 0.1)
    for node in (C, A, B):
        core.learn(MemberChanged(node, "alive", 0), 0.2)
        core.receive(full(), node, 0.3)
    key = next(
        key
        for key in (index.to_bytes(32, "little") for index in range(100_000))
        if core.catalogues.claims(A, key)
    )
    assert core.ring.view is not None
    first, second = core.ring.view.owners(key)
    assert core.holders(key, 1.0) == [first, second, C]
    core.learn(MemberChanged(first, "suspect", 0), 1.0)
    assert core.holders(key, 1.0) == [second, C, first]
    core.learn(MemberChanged(first, "dead", 0), 1.0)
    assert core.holders(key, 1.0) == [second, C], "nobody waits for the dead"
    assert core.receive(full(), first, 2.0) == [] and core.catalogues.version(first) == (-1, -1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([A, B, C]), st.floats(0.0, 3.0)), max_size=40))
def test_no_timer_is_left_in_the_past(steps: list[tuple[int, NodeId, float]]) -> None:
    core, now = sharding(), 0.0
    for kind, node, wait_s in steps:
        now += wait_s
        core.tick(now)
        assert core.wake_at > now
        match kind:
            case 0:
                core.learn(LINK, now)
            case 1:
                core.learn(LinkDown(), now)
            case 2:
                core.learn(Elected(Epoch(int(now) + 1, ME)), now)
            case 3:
                core.learn(Deposed(CLAIM), now)
            case 4:
                meet(core, node, now)
            case 5:
                core.learn(MemberChanged(node, "dead", 0), now)
            case 6:
                told(core, record(Epoch(int(now) + 1, node), 1, node), now)
            case 7:
                core.receive(CatalogueWhole(life=2, version=0, salt=0, n_keys=0, bits=bytes(512)), node, now)
