"""The address book under forged announcements: real servers, real TLS, rumours from nobody in particular."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.core import Fact
from mesh.facts import PeerHeard, PeerSilent
from mesh.ids import Boot, NodeId
from mesh.messages import PeerHello
from mesh.transport.identity import Identity, MeshKey, issue
from mesh.transport.streams import PeerClient, PeerServer
from node import peers
from node.peers import Peers

KEY = MeshKey.create("home", bytes(range(32)))
PI = NodeId("pi")
NOWHERE = ("127.0.0.2",)  # refuses at once: nothing listens there on the ports used here


def server_of(identity: Identity) -> PeerServer:
    hello = PeerHello(
        node=identity.name, boot=Boot("b1"), incarnation=1, mesh="home", port=1, addresses=["127.0.0.1"],
        broker_epoch=0, broker_host=None, broker_addresses=[], broker_port=0, broker_connected=False,
        peers={},
    )  # fmt: skip
    return PeerServer(identity.server_context(), lambda: hello, hosts=("127.0.0.1",), port=0)


class Learned:
    def __init__(self) -> None:
        self.facts: asyncio.Queue[Fact] = asyncio.Queue()

    async def next(self) -> Fact:
        async with asyncio.timeout(10):
            return await self.facts.get()


@pytest.fixture
def learned() -> Learned:
    return Learned()


@pytest.fixture
async def book(tmp_path: Path, learned: Learned) -> AsyncIterator[Peers]:
    async with PeerClient(issue(KEY, "me", tmp_path).client_context()) as client:
        book = Peers(me=NodeId("me"), client=client, seeds=(), learn=learned.facts.put_nowait)
        running = asyncio.create_task(book.run())
        yield book
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_a_forged_announcement_does_not_hide_a_node_that_answers(
    tmp_path: Path, book: Peers, learned: Learned
) -> None:
    async with server_of(issue(KEY, PI, tmp_path)) as server:
        book.sighted(PI, ["127.0.0.1"], server.port)
        assert isinstance(await learned.next(), PeerHeard)
        for forged in range(3):
            book.sighted(PI, NOWHERE, 1 + forged)
            assert isinstance(await learned.next(), PeerHeard), "still where it was"
        book.gone(PI)  # a goodbye can be forged, too
        assert isinstance(await learned.next(), PeerHeard)
        assert book.vouched == {PI: f"127.0.0.1:{server.port}"}


async def test_a_node_that_moved_is_found_at_its_new_place(
    tmp_path: Path, book: Peers, learned: Learned
) -> None:
    async with server_of(issue(KEY, PI, tmp_path)) as server:
        book.sighted(PI, ["127.0.0.1"], server.port)
        assert isinstance(await learned.next(), PeerHeard)
    async with server_of(issue(KEY, PI, tmp_path)) as server:
        book.sighted(PI, ["127.0.0.1"], server.port)
        assert isinstance(await learned.next(), PeerHeard)
        assert book.vouched == {PI: f"127.0.0.1:{server.port}"}


async def test_rumours_are_bounded_not_passed_on_and_never_delay_known_nodes(
    tmp_path: Path, book: Peers, learned: Learned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "RUMOURS_MAX", 100)
    async with server_of(issue(KEY, PI, tmp_path)) as server:
        book.sighted(PI, ["127.0.0.1"], server.port)
        assert isinstance(await learned.next(), PeerHeard)
        for forged in range(1000):
            book.sighted(NodeId(f"forged-{forged}"), NOWHERE, 1)
        book.ask([PI])
        before_ours = 0
        while isinstance(await learned.next(), PeerSilent):
            before_ours += 1
        assert before_ours <= peers.PROBES_AT_ONCE_MAX, "those under way"
        assert list(book.vouched) == [PI]
        assert len(book._rumoured) <= 100
        newcomer = server_of(issue(KEY, "newcomer", tmp_path))
        async with newcomer:  # however full the book is
            book.sighted(NodeId("newcomer"), ["127.0.0.1"], newcomer.port)
            while not isinstance(fact := await learned.next(), PeerHeard):
                pass
            assert fact.hello.node == "newcomer"
