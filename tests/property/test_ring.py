"""Promises of the ring's cores, over whatever hypothesis thinks of."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.cache.bloom import contains
from mesh.cache.catalogue import Catalogues, CatalogueWriter
from mesh.cache.moves import errands
from mesh.cache.ring import Ring, RingEpoch, RingSpec, RingView
from mesh.cache.straws import LOAD_MAX, N_ARCS, shares
from mesh.ids import Epoch, NodeId

NAMES = [NodeId(f"n{index}") for index in range(6)]
KEYS = st.binary(min_size=32, max_size=32)
QUOTAS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2**50), min_size=1)

_CLAIMS = st.builds(Epoch, st.integers(1, 3), st.sampled_from(NAMES))
EPOCHS = st.builds(RingEpoch, _CLAIMS, st.integers(0, 3))


@settings(max_examples=25, deadline=None)
@given(quotas=QUOTAS, keys=st.lists(KEYS, min_size=1, max_size=20))
def test_any_ring_gives_every_key_its_owners_within_the_bound_on_load(
    quotas: dict[NodeId, int], keys: list[bytes]
) -> None:
    view = RingView(RingSpec.of(RingEpoch(Epoch(1, NAMES[0]), 1), quotas))
    for key in keys:
        owners = view.owners(key)
        assert len(owners) == len(set(owners)) == min(2, len(quotas)) and set(owners) <= set(quotas)
    assert sum(map(view.arcs_of, quotas)) == min(2, len(quotas)) * N_ARCS
    if len(quotas) > 2:
        for node, share in zip(view.members, shares(list(view.quotas.values())), strict=True):
            assert view.arcs_of(node) <= math.ceil(LOAD_MAX * share)


@settings(max_examples=15, deadline=None)
@given(specs=st.lists(st.tuples(EPOCHS, QUOTAS), min_size=2, max_size=5), data=st.data())
def test_rings_converge_whatever_arrives_in_whatever_order(
    specs: list[tuple[RingEpoch, dict[NodeId, int]]], data: st.DataObject
) -> None:
    views = [RingView(RingSpec.of(epoch, quotas)) for epoch, quotas in specs]
    ends = []
    for _ in range(2):
        ring = Ring()
        for view in data.draw(st.permutations(views + views)):
            before = ring.view
            ring.take(view)
            assert ring.view is not None and (before is None or ring.view.spec.rank >= before.spec.rank)
        ends.append(ring.view and ring.view.spec)
    assert ends[0] == ends[1] == max((view.spec for view in views), key=lambda spec: spec.rank)


@settings(max_examples=15, deadline=None)
@given(before=QUOTAS, after=QUOTAS, keys=st.lists(KEYS, min_size=1, max_size=10, unique=True), data=st.data())
def test_when_all_do_their_errands_every_owner_has_what_any_member_held(
    before: dict[NodeId, int], after: dict[NodeId, int], keys: list[bytes], data: st.DataObject
) -> None:
    ring = Ring()
    for change, quotas in enumerate((before, after)):
        ring.take(RingView(RingSpec.of(RingEpoch(Epoch(1, NAMES[0]), change), quotas)))
    assert ring.view is not None
    for key in keys:
        holders = data.draw(st.sets(st.sampled_from(sorted(after))))

        def claims(node: NodeId, key: bytes, holders: set[NodeId] = holders) -> bool:
            return node in holders  # catalogues do not change within one round

        sent = [to for node in sorted(holders) for to in errands(key, node, ring, claims)]
        owners = set(ring.view.owners(key))
        if holders:
            assert owners <= holders | set(sent)
        assert not set(sent) & holders, "nobody is sent what it has"
        if holders & set(ring.sources(key)):
            assert len(sent) == len(set(sent)), "and nobody is sent anything twice"


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(("add", "drop", "tell", "rewrite")), st.integers(0, 15)), max_size=60
    ),
    pool=st.lists(KEYS, min_size=16, max_size=16, unique=True),
)
def test_a_catalogue_never_denies_what_is_held(steps: list[tuple[str, int]], pool: list[bytes]) -> None:
    writer, reader = CatalogueWriter(1, 0), Catalogues()
    held: set[bytes] = set()
    for step, index in [*steps, ("tell", 0)]:
        match step:
            case "add":
                held.add(pool[index])
                writer.add(pool[index])
            case "drop":
                held.discard(pool[index])
                writer.drop(pool[index])
            case "rewrite":
                writer.rewrite(salt=index)
            case _:
                message = writer.next_version()
                if message is not None:
                    reader.take(NAMES[0], message, 0.0)
                    whole = writer.whole()
                    assert all(reader.claims(NAMES[0], key) for key in held)
                    assert all(contains(whole.bits, key, whole.salt) for key in held)
