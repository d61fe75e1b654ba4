"""Which version of an adapter is the newest: the same everywhere, whatever is heard in which order."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mesh.agreement.versions import FilesChanged, Newest, OwnFiles, Versions, rank_of
from mesh.core import Broadcast, Notify
from mesh.facts import LinkDown, LinkUp, MemberChanged
from mesh.ids import NodeId
from mesh.messages import FilesHeld, NodeForgotten, PullAdapter, RemoveAdapter
from mesh.messages.files import AdapterHeld, AdapterPull, AdapterRemoved

ME, NODES = NodeId("me"), [NodeId(name) for name in ("a", "b", "c")]

digests = st.sampled_from(["1" * 64, "2" * 64, "3" * 64])
names = st.sampled_from(["spam", "tone"])
held = st.builds(
    AdapterHeld,
    name=names,
    version=st.integers(1, 4),
    digest=digests,
    manifest_bytes=st.just(9),
    bytes=st.just(9),
)
removed = st.builds(AdapterRemoved, name=names, version=st.integers(1, 4), left_s=st.floats(0, 1e6))
said = st.builds(
    FilesHeld,
    node=st.sampled_from(NODES),
    incarnation=st.just(1),
    adapters=st.lists(held, max_size=4),
    removed=st.lists(removed, max_size=3),
)


def heard(messages: list[FilesHeld]) -> Versions:
    versions = Versions(ME)
    for message in messages:
        versions.receive(message, message.node, 0.0)
    return versions


def best(messages: list[FilesHeld]) -> dict[str, tuple[int, bool, str]]:
    """By another way: everything that was ever said, and the highest of each name."""
    ranks: dict[str, tuple[int, bool, str]] = {}
    for message in messages:
        entries = [(one.name, rank_of(one.version, one.digest)) for one in message.adapters]
        entries += [(one.name, rank_of(one.version, None)) for one in message.removed]
        for name, rank in entries:
            ranks[name] = max(ranks.get(name, rank), rank)
    return ranks


@given(st.lists(said, max_size=8), st.randoms(use_true_random=False))
def test_every_node_comes_to_the_same_newest_whatever_the_order_and_however_often(
    messages: list[FilesHeld], random: object
) -> None:
    again = [*messages, *messages]
    random.shuffle(again)  # type: ignore[attr-defined]
    one, other = heard(messages).newest, heard(again).newest
    assert {name: newest.rank for name, newest in one.items()} == best(messages)
    assert {name: newest.rank for name, newest in other.items()} == best(messages)
    for name, newest in one.items():
        left_s = [
            removal.left_s
            for message in messages
            for removal in message.removed
            if newest.held is None and (removal.name, removal.version) == (name, newest.version)
        ]
        if left_s:
            assert newest.left_s == other[name].left_s == min(left_s), (
                "repeating it makes nothing live longer"
            )


@given(st.integers(1, 9), digests, digests)
def test_ranks_are_a_total_order_and_a_removal_is_over_what_it_removes(v: int, a: str, b: str) -> None:
    assert (rank_of(v, a) < rank_of(v, b)) == (a < b) and (rank_of(v, a) == rank_of(v, b)) == (a == b)
    assert rank_of(v, a) < rank_of(v, None) < rank_of(v + 1, a)


def files(node: NodeId, *adapters: AdapterHeld, incarnation: int = 1) -> FilesHeld:
    return FilesHeld(node=node, incarnation=incarnation, adapters=list(adapters))


def version(number: int, digest: str = "1") -> AdapterHeld:
    return AdapterHeld(name="spam", version=number, digest=digest * 64, manifest_bytes=9, bytes=9)


def test_two_made_at_once_are_decided_by_their_digest() -> None:
    a, b = NODES[:2]
    one, other = files(a, version(4, "1")), files(b, version(4, "2"))
    for order in ([one, other], [other, one]):
        assert heard(order).newest["spam"] == Newest(4, version(4, "2"))


def test_a_number_is_not_given_twice_because_its_holder_is_away() -> None:
    versions = heard([files(NODES[0], version(7))])
    versions.receive(NodeForgotten(node=NODES[0]), NODES[0], 0.0)
    assert versions.newest["spam"].version == 7 and versions.holders("1" * 64) == []


def test_who_is_gone_is_no_holder_and_is_one_again_when_it_is_back() -> None:
    versions = heard([files(NODES[0], version(1)), files(NODES[1], version(1))])
    assert versions.holders("1" * 64) == NODES[:2]
    assert versions.learn(MemberChanged(NODES[0], "dead", 1), 0.0) == [Notify(FilesChanged())]
    assert versions.holders("1" * 64) == [NODES[1]]
    versions.learn(MemberChanged(NODES[0], "alive", 2), 0.0)
    assert versions.holders("1" * 64) == NODES[:2]


def test_nobody_speaks_for_another_and_an_earlier_life_is_not_heard() -> None:
    versions = Versions(ME)
    assert versions.receive(files(NODES[0], version(1)), NODES[1], 0.0) == []
    versions.receive(files(NODES[0], version(2), incarnation=5), NODES[0], 0.0)
    assert versions.receive(files(NODES[0], version(1), incarnation=4), NODES[0], 0.0) == []
    assert [one.version for one in versions.of(NODES[0]).adapters] == [2]  # type: ignore[union-attr]


def test_what_time_alone_changes_is_no_news() -> None:
    versions = Versions(ME)
    one = replace(files(NODES[0], version(1)), removed=[AdapterRemoved(name="tone", version=1, left_s=100.0)])
    assert versions.receive(one, NODES[0], 0.0) == [Notify(FilesChanged())]
    later = replace(
        one,
        removed=[AdapterRemoved(name="tone", version=1, left_s=50.0)],
        pulls=[AdapterPull(name="x", digest="1" * 64, done_bytes=1, bytes=2)],
    )
    assert versions.receive(later, NODES[0], 0.0) == []
    assert versions.receive(files(NODES[0]), NODES[0], 0.0) == [Notify(FilesChanged())]


def test_what_is_here_is_said_once_linked_and_again_on_each_new_link() -> None:
    versions, own = Versions(ME), files(ME, version(1))
    assert versions.learn(OwnFiles(own), 0.0) == []
    assert versions.learn(LinkUp(1, None), 0.0) == [Broadcast(own)]
    newer = files(ME, version(2))
    assert versions.learn(OwnFiles(newer), 0.0) == [Broadcast(newer)]
    versions.learn(LinkDown(), 0.0)
    assert versions.learn(LinkUp(2, None), 0.0) == [Broadcast(newer)]
    assert versions.newest["spam"].version == 2, "own versions count"
    assert versions.holders("1" * 64) == [], "and are not to be pulled from oneself"


def test_what_commands_ask_goes_to_the_shell() -> None:
    for message in (PullAdapter(name="spam", digest="1" * 64), RemoveAdapter(name="spam", version=1)):
        assert Versions(ME).receive(message, NodeId("client"), 0.0) == [Notify(message)]


def test_a_flood_of_names_finds_an_end() -> None:
    versions = Versions(ME)
    for k in range(20):
        node = NodeId(f"n{k}")
        adapters = [replace(version(1), name=f"a{k}-{j}") for j in range(512)]
        versions.receive(files(node, *adapters), node, 0.0)
    assert len(versions.newest) <= 4096
