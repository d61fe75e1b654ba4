"""The link between a node and its compute process: blocks in order, bounded, and every failure a miss."""

from __future__ import annotations

import os
import random
import socket
import time

import pytest

from mesh.errors import DecodeError
from node.compute.features import link as link_module
from node.compute.features.link import (
    CODEC,
    HEAD_BYTES,
    KEYS_MAX,
    PAYLOAD_BYTES_MAX,
    Came,
    Fetch,
    MeshLink,
    Over,
    Tally,
    Tier,
    Want,
    frame_head,
    frame_sizes,
    split_keys,
)
from tests.link_world import Peers, linked


def blocks(n: int, n_bytes: int = 1000, seed: int = 0) -> dict[bytes, bytes]:
    rng = random.Random(seed)
    return {rng.randbytes(32): rng.randbytes(rng.randint(1, n_bytes)) for _ in range(n)}


def all_of(fetch: Fetch) -> dict[bytes, bytes]:
    assert fetch.wait(len(fetch.keys), 10)
    return {key: bytes(payload) for key, payload in fetch.take(fetch.keys).items()}


def test_blocks_come_as_they_are_and_what_nobody_has_is_a_miss() -> None:
    held, absent = blocks(100), list(blocks(10, seed=1))
    keys = [*list(held)[:50], *absent, *list(held)[50:]]
    with linked(Peers(held)) as link:
        fetch = link.want(keys, 10)
        assert all_of(fetch) == held
        assert fetch.is_over and fetch.take(keys) == {}, "given once"


def test_the_first_blocks_can_be_used_while_the_others_are_under_way() -> None:
    held = blocks(32)
    peers = Peers(held)
    with linked(peers) as link:
        fetch = link.want(list(held), 10)
        assert fetch.wait(8, 10) and set(fetch.keys[:8]) == set(fetch.take(fetch.keys[:8]))
        assert fetch.wait(32, 10)
        assert peers.read_keys == list(held), "in the order asked"


def test_who_has_what_and_how_long_it_takes_is_answered_without_reading() -> None:
    held, absent = blocks(3), list(blocks(1, seed=1))
    peers = Peers(held, profiles=["fp32 here", "int8 there", "fp32 here"])
    with linked(peers) as link:
        asking = link.ask([*held, *absent], 4_000_000_000)
        assert asking.wait(10) and asking.answer is not None
        claims, said = asking.answer
        assert claims == [True, True, True, False] and peers.read_keys == []
        assert said.expected_s == pytest.approx(3.001) and said.profiles == ("fp32 here", "int8 there")
        nobody = link.ask(absent, 1000)
        assert nobody.wait(10) and nobody.answer is not None and nobody.answer[1].expected_s is None


def test_waiting_is_bounded_and_what_does_not_come_is_a_miss() -> None:
    held = blocks(8)
    peers = Peers(held)
    peers.gate.clear()
    with linked(peers) as link:
        fetch = link.want(list(held), 0.05)
        began = time.monotonic()
        assert not fetch.wait(1, 0.01) and time.monotonic() - began < 1
        assert fetch.wait(8, 10) and fetch.take(fetch.keys) == {}, "the node gives up in time"
        peers.gate.set()
        assert all_of(link.want(list(held), 10)) == held, "the next request is served"


def test_who_does_not_take_blocks_stops_the_node_and_loses_them_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "_HELD_BYTES_MAX", 1_000_000)
    monkeypatch.setattr(link_module, "_STAND_STILL_S", 0.2)
    rng = random.Random(0)
    held = {rng.randbytes(32): bytes(200_000) for _ in range(200)}
    peers = Peers(held)
    peers.batch = 1
    with linked(peers) as link:
        forgotten = link.want(list(held)[:150], 20)
        assert forgotten.wait(5, 10)
        # 1 MB is held, 4 MB wait before the socket: the rest is not even read.
        assert len(peers.read_keys) < 75
        others = list(held)[150:154]
        assert all_of(link.want(others, 10)) == {key: held[key] for key in others}
        assert forgotten.is_over


def test_a_cancelled_request_is_not_read_to_its_end() -> None:
    held = blocks(64)
    peers = Peers(held)
    peers.gate.clear()
    with linked(peers) as link:
        link.want(list(held), 10).close()
        asking = link.ask(list(held), 1)
        assert asking.wait(10), "the node has heard both"
        peers.gate.set()
        other = blocks(8, seed=2)
        peers.blocks |= other
        assert all_of(link.want(list(other), 10)) == other
        assert peers.read_keys == list(other)


def test_tallies_arrive() -> None:
    peers = Peers()
    with linked(peers) as link:
        link.tell(Tally(memory=Tier(hits=3, n_bytes=5, saved_s=0.5), computed=2, fetch_s=0.1))
        assert link.ask([bytes(32)], 1).wait(10)
    assert peers.tallies == [Tally(memory=Tier(hits=3, n_bytes=5, saved_s=0.5), computed=2, fetch_s=0.1)]


# ── a node that is gone, or says what it may not ────────────────────────────────────────────────────


def alone() -> tuple[MeshLink, socket.socket]:
    ours, theirs = socket.socketpair()
    return MeshLink(theirs), ours


def test_a_dead_link_is_a_miss_now_and_later() -> None:
    link, node = alone()
    fetch, asking = link.want([bytes(32)], 10), link.ask([bytes(32)], 1, within_s=10)
    node.close()
    assert fetch.wait(1, 10) and fetch.take([bytes(32)]) == {}
    assert asking.wait(10) and asking.answer is None
    assert not link.is_up and link.want([bytes(32)], 10).is_over and link.ask([bytes(32)], 1).wait(0)
    link.close()


@pytest.mark.parametrize(
    "said",
    [
        b"\xff" * 8,
        frame_head(Came(request=1, sizes=(7,)), 5) + bytes(5),
        frame_head(Came(request=1, sizes=(-5, 10)), 5) + bytes(5),
        frame_head(Came(request=1, sizes=(1, 1, 1)), 3) + bytes(3),
        frame_head(Want(request=1, within_s=1.0), 32) + bytes(32),
        (3).to_bytes(4, "big") + bytes(4) + b"???",
    ],
)
def test_nonsense_from_the_node_ends_the_link_and_gives_no_block(said: bytes) -> None:
    link, node = alone()
    fetch = link.want([bytes(32)], 10)
    node.sendall(said)
    assert fetch.wait(1, 10) and fetch.take([bytes(32)]) == {} and not link.is_up
    link.close()
    node.close()


def test_an_answer_of_another_request_is_no_answer() -> None:
    link, node = alone()
    fetch = link.want([bytes(32)], 10)
    node.sendall(frame_head(Came(request=77, sizes=(3,)), 3) + b"abc" + frame_head(Over(request=1)))
    assert fetch.wait(1, 10) and fetch.take([bytes(32)]) == {} and link.is_up
    link.close()
    node.close()


def test_a_descriptor_that_is_no_socket_is_no_link() -> None:
    read, write = os.pipe()
    assert MeshLink.of(read) is None
    os.close(write)


@pytest.mark.parametrize("sizes", [(1 << 30, 0), (0, PAYLOAD_BYTES_MAX + 1)])
def test_no_frame_is_larger_than_agreed(sizes: tuple[int, int]) -> None:
    with pytest.raises(DecodeError):
        frame_sizes(b"".join(size.to_bytes(4, "big") for size in sizes))


@pytest.mark.parametrize("n_bytes", [31, 33, 32 * (KEYS_MAX + 1)])
def test_what_is_no_list_of_keys_is_refused(n_bytes: int) -> None:
    with pytest.raises(DecodeError):
        split_keys(bytes(n_bytes))


def test_frames_say_their_own_size() -> None:
    head = frame_head(Over(request=3), 17)
    n_head, n_payload = frame_sizes(head[:HEAD_BYTES])
    assert (n_payload, CODEC.decode(head[HEAD_BYTES:])) == (17, Over(request=3))
    assert n_head == len(head) - HEAD_BYTES
