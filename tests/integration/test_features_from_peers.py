"""Features over a real link, from peers that are right, late, wrong or gone: always the same bits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from node.compute.backbone.contract import Backbone, Segment
from node.compute.backbone.load import load_backbone
from node.compute.features import ahead, mesh_store
from node.compute.features.choice import FetchOrCompute
from node.compute.features.codec import CODECS
from node.compute.features.key import FeatureSpace
from node.compute.features.link import MeshLink
from node.compute.features.maps import _PEER_KEYS, FeatureMaps, MissingFeaturesError
from node.compute.features.mesh_store import MeshStore
from node.compute.features.shape import Numerics, prove
from node.compute.features.store import LocalStore
from tests.link_world import Peers, linked
from tests.tiny import tiny_llama

ROW_LAYER_S = 1e-4  # of a device that is slow enough for fetching to be worth it


class Counted:
    """A backbone that counts the passes it makes."""

    def __init__(self, inner: Backbone) -> None:
        self._inner = inner
        self.n_passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def features(self, segments: list[Segment], cut: int) -> Tensor:
        self.n_passes += 1
        return self._inner.features(segments, cut)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that answer are not given up, however slow this machine is."""
    monkeypatch.setattr(ahead, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(mesh_store, "_ANSWER_S", 60.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tiny_llama(tmp_path_factory.mktemp(f"base-{seed}"), seed=seed) for seed in (0, 1)]


@lru_cache(maxsize=8)
def loaded(base: Path, precision: str) -> tuple[Backbone, Numerics]:
    backbone = load_backbone(base, precision=precision)
    return backbone, prove(backbone, 1)


def texts(seed: int = 0, n: int = 24, longest: int = 150) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, 107) for _ in range(rng.randint(1, longest))] for _ in range(n)]


class Node:
    """One that reads, with all parts but the mesh itself."""

    def __init__(
        self, base: Path, link: MeshLink | None, *, precision: str = "fp32", cut: int = 3, codec: str = "raw"
    ) -> None:
        backbone, self.numerics = loaded(base, precision)
        self.backbone = Counted(backbone)
        self.choice = FetchOrCompute(ROW_LAYER_S)
        self.local = LocalStore(None, 1 << 26, 0)
        self.store = MeshStore(self.local, link, self.choice, backbone.n_layers)
        self.space = FeatureSpace(
            base.name, backbone.precision, "t", cut, "hidden", self.numerics.text, codec
        )

    def maps(self, *, holds_all: bool = True, clock: Callable[[], float] = time.monotonic) -> FeatureMaps:
        return FeatureMaps(
            cast(Backbone, self.backbone) if holds_all else None,
            self.space,
            self.store,
            numerics=self.numerics,
            choice=self.choice,
            width=self.backbone.width,
            clock=clock,
        )

    def held(self, some: list[list[int]]) -> dict[bytes, bytes]:
        """Computes the features of ``some``, as a peer that keeps them would give them."""
        self.maps().read(some)
        keys = [key for text in some for key in self.space.keys(text)]
        return {
            key: bytes(entry.encoded.payload)
            for key, entry in zip(keys, self.local.get(keys), strict=True)
            if entry
        }


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Each with each other once at least: no code knows of more than two of them.
@pytest.mark.parametrize(
    ("precision", "codec", "cut", "base"),
    [
        ("fp32", "raw", 2, 0),
        ("fp32", "int8", 5, 1),
        ("fp32", "int4", 2, 0),
        ("bf16", "raw", 5, 0),
        ("bf16", "int8", 2, 0),
        ("bf16", "int4", 5, 1),
        ("int8", "raw", 2, 1),
        ("int8", "int8", 5, 0),
        ("int8", "int4", 2, 0),
    ],
)
def test_what_a_peer_computed_equals_what_is_computed_here(
    precision: str, codec: str, cut: int, base: int, bases: list[Path]
) -> None:
    some = texts(base, n=12)
    options: dict[str, Any] = {"precision": precision, "cut": cut, "codec": codec}
    first = Node(bases[base], None, **options)
    peers = Peers(first.held(some))
    with linked(peers) as link:
        second = Node(bases[base], link, **options)
        maps = second.maps()
        found = maps.read(some)
    assert second.backbone.n_passes == 0 and maps.tokens_fetched == sum(map(len, some))
    assert (maps.hits, maps.misses) == (len(some), 0)
    computed = Node(bases[base], None, **options).maps().read(some)
    assert equal(found, computed)


def test_what_takes_no_computing_is_not_fetched(bases: list[Path]) -> None:
    """Below the first layer there is the embedding only."""
    some = texts(n=4)
    peers = Peers(Node(bases[0], None, cut=0).held(some))
    with linked(peers) as link:
        found = Node(bases[0], link, cut=0).maps().read(some)
    assert peers.read_keys == []
    assert equal(found, Node(bases[0], None, cut=0).maps().read(some))


def test_no_base_precision_cut_or_codec_is_taken_for_another(bases: list[Path]) -> None:
    some = texts(n=4)
    held: dict[bytes, bytes] = {}
    for precision, cut, codec in (("fp32", 3, "int8"), ("fp32", 2, "raw"), ("bf16", 3, "raw")):
        held |= Node(bases[0], None, precision=precision, cut=cut, codec=codec).held(some)
    held |= Node(bases[1], None).held(some)
    peers = Peers(held)
    with linked(peers) as link:
        node = Node(bases[0], link)
        node.maps().read(some)
    assert node.backbone.n_passes > 0 and peers.read_keys == []


def test_what_peers_have_in_part_is_computed_in_part(bases: list[Path]) -> None:
    some = texts()
    first = Node(bases[0], None)
    held = first.held(some[:16])
    with linked(Peers(held)) as link:
        node = Node(bases[0], link)
        maps = node.maps()
        found = maps.read(some)
        assert (maps.hits, maps.misses) == (16, 8)
        assert maps.tokens_computed == sum(map(len, some[16:]))
        maps.read(some)
        assert maps.hits == 40, "what came is kept in memory"
        assert node.store.tally.mesh.hits == len(held)
    assert equal(found, first.maps().read(some))


def test_a_node_without_lower_layers_reads_them_from_peers_or_says_that_nobody_has_them(
    bases: list[Path],
) -> None:
    some = texts()
    first = Node(bases[0], None)
    peers = Peers(first.held(some))
    with linked(peers) as link:
        found = Node(bases[0], link).maps(holds_all=False).read(some)
        assert equal(found, first.maps().read(some))
        with pytest.raises(MissingFeaturesError):
            Node(bases[0], link).maps(holds_all=False).read(texts(1))


# ── peers that are wrong, late or gone ──────────────────────────────────────────────────────────────


def wrong_shape(held: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Each key with the entry of another: whole and right in itself, mostly of another length."""
    return dict(zip(held, [*list(held.values())[1:], next(iter(held.values()))], strict=True))


def cut_short(held: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: payload[:-1] for key, payload in held.items()}


def damaged_head(held: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: payload[:9] + b"\x55" + payload[10:] for key, payload in held.items()}


def no_entries(held: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: b"x" for key in held}


def other_width(held: dict[bytes, bytes]) -> dict[bytes, bytes]:
    from node.compute.features.entry import Encoded

    codec = CODECS["raw"]
    return {
        key: bytes(codec.encode(torch.zeros(Encoded.read(payload).n, 32), has_sink=False).payload)
        for key, payload in held.items()
    }


@pytest.mark.parametrize("spoilt", [wrong_shape, cut_short, damaged_head, no_entries, other_width])
def test_entries_that_are_not_what_was_asked_for_are_misses(spoilt: Any, bases: list[Path]) -> None:
    # Lengths of one block, all different: an entry of another text never fits.
    some = [text[: 2 + at] for at, text in enumerate(texts(n=20)) if len(text) >= 2 + at]
    first = Node(bases[0], None)
    with linked(Peers(spoilt(first.held(some)))) as link:
        node = Node(bases[0], link)
        found = node.maps().read(some)
        assert node.backbone.n_passes > 0
    assert equal(found, first.maps().read(some))


def test_a_catalogue_that_lies_costs_a_miss(bases: list[Path]) -> None:
    some = texts()
    short = [[7] * 8]  # so few rows that computing them takes hardly longer than fetching should
    first = Node(bases[0], None)
    peers = Peers()
    peers.false_claims = set(first.held(some)) | set(first.held(short))
    with linked(peers) as link:
        node, other = Node(bases[0], link), Node(bases[0], link)
        expected_s = node.choice.fetch_s(0.01)
        # By a clock that stands still nothing takes any time: all that is learnt is that nothing came.
        maps = node.maps(clock=lambda: 0.0)
        assert equal(maps.read(some), first.maps().read(some))
        assert (maps.hits, maps.misses) == (0, len(some)) and len(peers.read_keys) > 0
        assert node.choice.fetch_s(0.01) > 3 * expected_s
        peers.read_keys.clear()
        node.maps().read(short)
        assert peers.read_keys == [], "the next request knows of it"
        other.maps().read(short)
        assert peers.read_keys == other.space.keys(short[0]), "and who was not lied to does not"


def test_a_peer_that_is_late_blocks_nobody_and_is_given_up(
    bases: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.2)
    some = texts()
    first = Node(bases[0], None)
    peers = Peers(first.held(some))
    peers.gate.clear()
    with linked(peers) as link:
        node = Node(bases[0], link)
        reading = node.maps().reading(some)
        longest_s = 0.0
        while True:
            began = time.monotonic()
            is_over = reading.step()
            if node.backbone.n_passes:
                break  # a pass takes as long as it takes
            longest_s = max(longest_s, time.monotonic() - began)
            assert not is_over
        while not reading.step():
            pass
        assert equal(reading.take(), first.maps().read(some))
        # It waits for 10 ms; other processes of this machine may take their turn, too.
        assert longest_s < 0.15
        peers.gate.set()


@pytest.mark.parametrize("n_came", [0, 4, 40])
def test_a_link_that_dies_on_the_way_changes_nothing_but_time(
    n_came: int, bases: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = texts(n=40)
    first = Node(bases[0], None)
    peers = Peers(first.held(some))
    peers.batch, peers.n_free = 4, n_came
    peers.gate.clear()
    with linked(peers) as link:
        node = Node(bases[0], link)
        maps = node.maps()
        reading = maps.reading(some)
        while len(peers.read_keys) < n_came or not node.store.waiting():
            assert not reading.step()
        link.close()
        monkeypatch.setattr(ahead, "_PATIENCE_S", 0.2)  # nothing comes any more
        peers.gate.set()
        while not reading.step():
            pass
        assert equal(reading.take(), first.maps().read(some))
        assert maps.hits + maps.misses == len(some) and maps.misses > 0


def test_a_reading_that_is_given_up_leaves_nothing_under_way(bases: list[Path]) -> None:
    some = texts(n=100)
    first = Node(bases[0], None)
    peers = Peers(first.held(some))
    peers.gate.clear()
    with linked(peers) as link:
        node = Node(bases[0], link)
        reading = node.maps().reading(some)
        for _ in range(5):
            reading.step()
        assert node.store.waiting()
        reading.close()
        assert not node.store.waiting()
        peers.gate.set()


# ── the choice ──────────────────────────────────────────────────────────────────────────────────────


def test_from_a_peer_that_is_slower_than_computing_nothing_is_fetched_and_the_choice_is_told(
    bases: list[Path],
) -> None:
    some = texts()
    peers = Peers(Node(bases[0], None).held(some))
    peers.s_per_byte = 1.0
    with linked(peers) as link:
        node = Node(bases[0], link)
        reading = node.maps().reading(some)
        said = set()
        while not reading.step():
            said.add(reading.text)
        assert node.backbone.n_passes > 0 and peers.read_keys == []
        assert any(
            "computing 24 texts that peers have" in text and "fetching them would" in text for text in said
        )
        assert node.store.tally.computes > 0 and node.store.tally.fetches == 0
        assert link.ask([bytes(32)], 1, within_s=30).wait(30), "all before it has arrived"
    assert peers.tallies and peers.tallies[-1].computes > 0, "the node hears of it"


def test_lots_that_come_next_are_under_way_while_one_is_used(bases: list[Path]) -> None:
    some = texts(n=150, longest=60)  # all within reach, as those of a tiny model are
    first = Node(bases[0], None)
    peers = Peers(first.held(some))
    # The first lot comes as soon as it is asked for, the others when the gate opens.
    peers.batch, peers.n_free = _PEER_KEYS, 1
    peers.gate.clear()
    with linked(peers) as link:
        node = Node(bases[0], link)
        reading = node.maps().reading(some)
        while not reading.fraction:
            assert not reading.step()
        keys = [key for text in some for key in node.space.keys(text)]
        assert peers.read_keys == keys[: peers.batch], "one is used"
        later = set(keys) - set(peers.read_keys)
        assert len(later) > peers.batch, "of several lots"
        assert all(node.store.waiting([key]) for key in later)
        peers.gate.set()
        while not reading.step():
            pass
        assert node.backbone.n_passes == 0
