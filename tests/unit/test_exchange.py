"""How catalogues get about: what is said when, what is fetched when, and that all end with the truth."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.cache.catalogue import CatalogueConfig
from mesh.cache.exchange import Exchange, ExchangeConfig
from mesh.cache.facts import CatalogueFetched, CatalogueRefused, FetchCatalogue, HeldChanged
from mesh.core import FOREVER, Broadcast, Effect, Notify
from mesh.ids import NodeId
from mesh.messages import CatalogueDelta, CatalogueVersion, CatalogueWhole

ME, A, B, C = (NodeId(name) for name in ("me", "a", "b", "c"))


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def keys(first: int, n: int = 1) -> tuple[bytes, ...]:
    return tuple(key(number) for number in range(first, first + n))


def exchange(me: NodeId = ME, life: int = 1, *, is_linked: bool = True, **config: Any) -> Exchange:
    one = Exchange(me=me, life=life, rng=Random(f"{me}/{life}"), config=ExchangeConfig(**config))
    if is_linked:
        one.on_link(True, 0.0)
    return one


def said(effects: list[Effect]) -> list[Any]:
    return [effect.message for effect in effects if isinstance(effect, Broadcast)]


def asked(effects: list[Effect]) -> list[NodeId]:
    facts = [effect.fact for effect in effects if isinstance(effect, Notify)]
    return [fact.node for fact in facts if isinstance(fact, FetchCatalogue)]


def version(life: int, number: int) -> CatalogueVersion:
    return CatalogueVersion(life=life, version=number)


EMPTY = CatalogueWhole(life=1, version=1, salt=0, n_keys=0, bits=bytes(512))


# ── what is said ────────────────────────────────────────────────────────────────────────────────────


def test_the_first_change_is_told_at_once_and_those_after_it_together() -> None:
    one = exchange()
    (whole,) = said(one.on_held(HeldChanged(added=keys(0)), 10.0))
    assert isinstance(whole, CatalogueWhole) and whole.version == 1
    assert said(one.on_held(HeldChanged(added=keys(1)), 10.1)) == []
    assert said(one.on_held(HeldChanged(added=keys(2, 3), dropped=keys(0)), 10.2)) == []
    assert one.wake_at == 10.5
    (delta,) = said(one.tick(10.5))
    assert isinstance(delta, CatalogueDelta) and (delta.version, delta.n_keys) == (2, 4)
    assert one.wake_at == FOREVER, "a node at rest says nothing"


def test_what_comes_and_goes_between_two_versions_is_never_told() -> None:
    one = exchange()
    one.on_held(HeldChanged(added=keys(0)), 10.0)
    one.on_held(HeldChanged(added=keys(1)), 10.1)
    one.on_held(HeldChanged(dropped=keys(1)), 10.2)
    assert one.tick(10.5) == [] and one.wake_at == FOREVER


def test_a_large_catalogue_is_announced_and_not_sent() -> None:
    one = exchange(told_bytes=1024)
    assert isinstance(said(one.on_held(HeldChanged(added=keys(0, 400)), 10.0))[0], CatalogueWhole)
    assert said(one.on_held(HeldChanged(added=keys(400, 2000)), 11.0)) == [version(1, 2)]
    assert one.whole().n_keys == 2400


def test_nothing_is_told_without_a_link_and_all_of_it_with_the_next() -> None:
    one = exchange(is_linked=False)
    assert one.on_held(HeldChanged(added=keys(0)), 1.0) == [] and one.wake_at == FOREVER
    assert said(one.on_held(HeldChanged(added=keys(1)), 2.0)) == []
    (whole,) = said(one.on_link(True, 3.0))
    assert whole.n_keys == 2
    one.on_link(False, 4.0)
    assert said(one.on_link(True, 5.0)) == [version(1, 1)], "the broker may be new; a version costs nothing"


def test_an_empty_store_says_so_once_for_it_may_have_held_something_in_an_earlier_life() -> None:
    one = exchange(life=3)
    (whole,) = said(one.on_held(HeldChanged(), 1.0))
    assert (whole.life, whole.version, whole.n_keys) == (3, 1, 0)
    assert said(one.on_held(HeldChanged(), 9.0)) == []


def test_an_older_catalogue_on_the_topic_is_corrected_unless_the_last_comes_after_it() -> None:
    one = exchange(life=2)
    (whole,) = said(one.on_held(HeldChanged(added=keys(0)), 10.0))
    one.on_echo(replace(whole, life=1, version=9), 20.0)
    assert one.wake_at == 21.0
    assert said(one.tick(21.0)) == [version(2, 1)]
    one.on_echo(replace(whole, life=1, version=9), 30.0)
    one.on_echo(whole, 30.1)
    assert one.wake_at == FOREVER


def test_once_in_an_hour_the_filter_is_made_anew_with_what_changes_then() -> None:
    one = exchange(rewrite_s=100.0)
    (first,) = said(one.on_held(HeldChanged(added=keys(0, 50)), 0.0))
    assert isinstance(said(one.on_held(HeldChanged(added=keys(50)), 50.0))[0], CatalogueDelta)
    (again,) = said(one.on_held(HeldChanged(added=keys(51)), 101.0))
    assert isinstance(again, CatalogueWhole) and again.salt != first.salt and again.n_keys == 52
    assert one.wake_at == FOREVER, "a mesh at rest is left alone"


# ── what is fetched ─────────────────────────────────────────────────────────────────────────────────


def test_who_has_missed_a_version_fetches_the_whole_once() -> None:
    one = exchange()
    delta = CatalogueDelta(life=1, version=5, n_keys=1, flips=b"")
    assert asked(one.on_said(A, delta, 10.0)) == [A]
    assert asked(one.on_said(A, replace(delta, version=6), 10.1)) == [], "one is on its way"
    one.on_fetched(CatalogueFetched(A, replace(EMPTY, version=6)), 10.2)
    assert one.catalogues.version(A) == (1, 6) and one.wake_at == FOREVER
    assert one.on_said(A, replace(delta, version=7), 10.3) == []
    assert one.catalogues.version(A) == (1, 7)


def test_what_came_too_late_for_the_fetch_is_fetched_again_after_a_second() -> None:
    one = exchange()
    assert asked(one.on_said(A, version(1, 5), 10.0)) == [A]
    assert asked(one.on_said(A, version(1, 6), 10.1)) == []
    assert asked(one.on_fetched(CatalogueFetched(A, replace(EMPTY, version=5)), 10.2)) == []
    assert one.wake_at == 11.0 and asked(one.tick(11.0)) == [A]
    one.on_fetched(CatalogueFetched(A, replace(EMPTY, version=6)), 11.1)
    assert one.wake_at == FOREVER
    assert asked(one.on_said(A, version(1, 9), 11.5)) == [] and one.wake_at == 12.0, "once a second"


def test_a_node_that_does_not_answer_is_asked_ever_more_rarely() -> None:
    one, now, times = exchange(fetch_s=1.0, fetch_s_max=8.0), 0.0, []
    one.on_said(A, version(1, 5), now)
    for _ in range(6):
        assert one.on_fetched(CatalogueFetched(A, None), now) == []
        now = one.wake_at
        times.append(now)
        assert asked(one.tick(now)) == [A]
    assert times == [1.0, 3.0, 7.0, 15.0, 23.0, 31.0]


def test_a_newcomer_asks_a_few_at_a_time_and_a_fetch_without_an_end_holds_up_nobody_for_ever() -> None:
    one = exchange(fetches=2, patience_s=30.0)
    assert [asked(one.on_said(node, version(1, 1), 0.0)) for node in (A, B, C)] == [[A], [B], []]
    assert one.wake_at == 30.0
    assert asked(one.on_fetched(CatalogueFetched(A, EMPTY), 1.0)) == [C]
    assert one.wake_at == 30.0 and asked(one.tick(30.0)) == [B]


def test_a_version_that_is_known_or_older_is_no_news() -> None:
    one = exchange()
    one.on_said(A, replace(EMPTY, life=2, version=3), 0.0)
    for old in (version(2, 3), version(2, 1), version(1, 99)):
        assert one.on_said(A, old, 1.0) == []


def test_a_refused_catalogue_is_told_once_until_a_good_one_comes() -> None:
    one = exchange()
    liar = replace(EMPTY, bits=b"\xff" * 512)
    assert one.on_said(A, liar, 0.0) == [Notify(CatalogueRefused(A))]
    assert one.on_said(A, replace(liar, version=2), 1.0) == []
    assert one.on_said(A, replace(EMPTY, version=3), 2.0) == []
    assert one.on_said(A, replace(liar, version=4), 3.0) == [Notify(CatalogueRefused(A))]


def test_more_nodes_than_there_is_room_for_cost_no_memory() -> None:
    one = Exchange(
        me=ME,
        life=1,
        rng=Random(0),
        config=ExchangeConfig(fetches=1),
        catalogues=CatalogueConfig(nodes_max=3),
    )
    for index in range(20):
        one.on_said(NodeId(f"n{index}"), version(1, 1), 0.0)
    assert len(one._behind) == 3


def test_who_has_left_is_not_asked_and_its_answer_changes_nothing() -> None:
    one = exchange()
    assert asked(one.on_said(A, version(1, 1), 0.0)) == [A]
    one.forget(A)
    assert one.wake_at == FOREVER
    assert one.on_fetched(CatalogueFetched(A, EMPTY), 1.0) == [] and one.catalogues.version(A) == (-1, -1)


@pytest.mark.parametrize(
    "bad", [{"tell_s": 0.0}, {"fetch_s": -1.0}, {"patience_s": float("inf")}, {"fetches": 0}]
)
def test_bounds_must_be_positive(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive"):
        ExchangeConfig(**bad)


# ── all together ────────────────────────────────────────────────────────────────────────────────────

steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "drop", "break", "restart"]),
        st.integers(1, 60),
        st.booleans(),
        st.floats(0.0, 1.5),
    ),
    max_size=15,
)


@settings(max_examples=40, deadline=None)
@given(steps)
def test_a_reader_that_misses_any_of_it_ends_with_what_the_writer_holds(
    steps: list[tuple[str, int, bool, float]],
) -> None:
    """What is lost is lost with the reader's link, so the last word, which is retained, comes in the end."""
    reader, writer = exchange(), exchange(A, told_bytes=600)
    held: set[bytes] = set()
    now, life, n_made, retained = 0.0, 1, 0, None
    for step, n, is_lost, wait_s in steps:
        now += wait_s
        effects: list[Effect] = writer.tick(now)
        match step:
            case "add":
                added = keys(n_made, n)
                n_made += n
                held |= set(added)
                effects += writer.on_held(HeldChanged(added=added), now)
            case "drop":
                dropped = tuple(sorted(held)[:n])
                held -= set(dropped)
                effects += writer.on_held(HeldChanged(dropped=dropped), now)
            case "break":
                writer.on_link(False, now)
                effects += writer.on_link(True, now)
            case "restart":
                life += 1
                writer = exchange(A, life, told_bytes=600)
                effects += writer.on_held(HeldChanged(added=tuple(sorted(held))), now)
        for message in said(effects):
            retained = message
            if not is_lost:
                carry(reader, writer, reader.on_said(A, message, now), now)
    for message in said(writer.tick(now + 1.0)):
        retained = message
    for _ in range(8):
        now += 60.0
        if retained is not None:
            carry(reader, writer, reader.on_said(A, retained, now), now)
        carry(reader, writer, reader.tick(now), now)
    if retained is not None:
        whole = writer.whole()
        assert reader.catalogues.version(A) == (whole.life, whole.version)
        assert all(reader.catalogues.claims(A, one) for one in held)
        assert reader.wake_at == FOREVER


def carry(reader: Exchange, writer: Exchange, effects: list[Effect], now: float) -> None:
    """Fetch what is asked for; the data plane answers with the last version told."""
    for node in asked(effects):
        carry(reader, writer, reader.on_fetched(CatalogueFetched(node, writer.whole()), now), now)
