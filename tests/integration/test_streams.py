"""The data plane on loopback: real TLS, real sockets, and the people who misuse them."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mesh.errors import ConfigError, DecodeError, UnreachableError, WrongKeyError
from mesh.ids import Boot, NodeId
from mesh.messages import PeerHello
from mesh.transport import streams
from mesh.transport.identity import Identity, MeshKey, issue, issue_client
from mesh.transport.streams import DEFAULT_PORT, PeerClient, PeerServer

LOOPBACK = ("127.0.0.1",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Identity]:
    """Certificates of one mesh."""
    key, directory = MeshKey.create("home", bytes(range(32))), tmp_path_factory.mktemp("home")
    return lambda name: issue(key, name, directory)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """A certificate of another mesh that has the same name."""
    return issue(MeshKey.create("home", bytes(32)), "pi", Path(tmp_path_factory.mktemp("other")))


@pytest.fixture
async def client(home: Callable[[str], Identity]) -> AsyncIterator[PeerClient]:
    async with PeerClient(home("asker").client_context()) as client:
        yield client


def hello_of(node: str, peers: dict[str, str] | None = None) -> PeerHello:
    return PeerHello(
        node=NodeId(node), boot=Boot("b1"), incarnation=3, mesh="home", port=1, addresses=["127.0.0.1"],
        broker_epoch=2, broker_host=NodeId("pi"), broker_addresses=["127.0.0.1"], broker_port=8883,
        broker_connected=True, peers=peers or {},
    )  # fmt: skip


def server_of(identity: Identity, says: PeerHello | None = None, *, port: int = 0) -> PeerServer:
    hello = says or hello_of(identity.name)
    return PeerServer(identity.server_context(), lambda: hello, hosts=LOOPBACK, port=port)


async def eventually(is_true: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not is_true():  # noqa: ASYNC110 - what is waited for is a count, not an event
            await asyncio.sleep(0.01)


async def test_a_member_hears_who_the_node_is(home: Callable[[str], Identity], client: PeerClient) -> None:
    async with server_of(home("pi")) as server:
        assert await client.hello("127.0.0.1", server.port, 5) == hello_of("pi")
        assert await client.hello("localhost", server.port, 5) == hello_of("pi")  # a seed may be a name


async def test_a_client_is_no_node_and_gets_nothing_here(
    home: Callable[[str], Identity], tmp_path: Path
) -> None:
    """``edgemesh mqtt`` gives its certificates away; the data plane is for members."""
    shell = issue_client(MeshKey.create("home", bytes(range(32))), "shell", tmp_path)
    async with server_of(home("pi")) as server, PeerClient(shell.client_context()) as client:
        with pytest.raises(UnreachableError, match="403"):
            await client.hello("127.0.0.1", server.port, 5)


async def test_who_asks_the_wrong_mesh_learns_that_the_key_is_wrong(
    stranger: Identity, client: PeerClient
) -> None:
    async with server_of(stranger) as server:
        with pytest.raises(WrongKeyError, match="join code"):
            await client.hello("127.0.0.1", server.port, 5)


async def test_who_is_not_a_member_gets_no_answer_and_one_line_in_the_log(
    home: Callable[[str], Identity],
    stranger: Identity,
    client: PeerClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    curious = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    curious.check_hostname, curious.verify_mode = False, ssl.CERT_NONE
    impostor = stranger.client_context()
    impostor.verify_mode = ssl.CERT_NONE
    async with server_of(home("pi")) as server:
        for context in (curious, impostor):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
            writer.write(b"GET /hello HTTP/1.1\r\nHost: pi\r\n\r\n")
            answer = b""
            try:
                async with asyncio.timeout(5):
                    answer = await reader.read()
            except (ssl.SSLError, ConnectionError):
                pass
            assert answer == b""
            writer.close()
        assert [record.levelname for record in caplog.records if "join code" in record.message] == ["WARNING"]
        assert await client.hello("127.0.0.1", server.port, 5) == hello_of("pi")


async def test_a_member_cannot_speak_in_another_members_name(
    home: Callable[[str], Identity], client: PeerClient
) -> None:
    async with server_of(home("pi"), hello_of("jetson")) as server:
        with pytest.raises(DecodeError, match="jetson"):
            await client.hello("127.0.0.1", server.port, 5)


async def test_an_endless_answer_is_cut_off(home: Callable[[str], Identity], client: PeerClient) -> None:
    long_winded = hello_of("pi", peers={f"n{k}": "x" * 300 for k in range(256)})
    async with server_of(home("pi"), long_winded) as server:
        with pytest.raises(DecodeError, match="more than"):
            await client.hello("127.0.0.1", server.port, 5)


async def test_a_closed_port_is_unreachable_at_once(client: PeerClient) -> None:
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        await client.hello("127.0.0.1", closed_port(), 5)
    assert time.monotonic() - began < 1


async def test_a_silent_port_is_unreachable_in_time(client: PeerClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="within"):
            await client.hello("127.0.0.1", silent.getsockname()[1], 0.3)
        assert time.monotonic() - began < 2


async def test_an_address_that_cannot_be_one_is_unreachable(client: PeerClient) -> None:
    for nonsense in ("", "not a host", "1.2.3.4.5", "%%", "fe80::zz", "x" * 300, "a/b", "ü\0"):
        with pytest.raises(UnreachableError):
            await client.hello(nonsense, 1, 2)
    with pytest.raises(UnreachableError):
        await client.hello("127.0.0.1", 70_000, 2)


async def test_the_server_survives_garbage(home: Callable[[str], Identity], client: PeerClient) -> None:
    member = home("vandal").client_context()
    async with server_of(home("pi")) as server:
        for context, garbage in (
            (None, b"GET /hello HTTP/1.1\r\n\r\n"),
            (None, bytes(range(256)) * 64),
            (None, b"\x16\x03\x01\xff\xff" + b"\0" * 5000),
            (member, b"\0\xff" * 5000 + b"\r\n\r\n"),
            (member, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"),
            (member, b"GET /hello HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n"),
            (member, b"POST /hello HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"z" * 200_000),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
            writer.write(garbage)
            if context is None:
                writer.write_eof()
            answer = b""
            try:
                async with asyncio.timeout(5):
                    answer = await reader.read()
            except (ssl.SSLError, ConnectionError):
                pass
            writer.close()
            assert b"incarnation" not in answer
        assert await client.hello("127.0.0.1", server.port, 5) == hello_of("pi")
        await eventually(lambda: server.n_connections == 1)  # the client's, kept for the next question


async def test_who_dawdles_is_cut_off(
    home: Callable[[str], Identity], client: PeerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "IDLE_TIMEOUT_S", 0.4)
    monkeypatch.setattr(streams, "HANDSHAKE_TIMEOUT_S", 0.4)
    member = home("sloth").client_context()
    async with server_of(home("pi")) as server:

        async def life_s(context: ssl.SSLContext | None, first: bytes, drip: bytes) -> float:
            """How long the server bears with this client."""
            began = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
            ended = asyncio.create_task(reader.read())
            try:
                writer.write(first)
                async with asyncio.timeout(5):
                    while not ended.done():
                        writer.write(drip)
                        await asyncio.wait([ended], timeout=0.05)
            finally:
                writer.transport.abort()
                await asyncio.gather(ended, return_exceptions=True)
            return time.monotonic() - began

        lives_s = await asyncio.gather(
            life_s(None, b"", b""),  # connects and says nothing
            life_s(None, b"\x16\x03\x01", b""),  # begins a handshake
            life_s(member, b"", b""),  # a member that says nothing
            life_s(member, b"GET /hello HTTP/1.1\r\n", b"X: y\r\n"),  # a header without end
            life_s(member, b"GET /hello HTTP/1.1\r\nHost: pi\r\n\r\nGET /hel", b"l"),  # stops at the second
        )
        assert max(lives_s) < 3, lives_s
        assert await client.hello("127.0.0.1", server.port, 5) == hello_of("pi")


async def test_connections_of_one_address_are_bounded_and_counted_back(
    home: Callable[[str], Identity], client: PeerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CONNECTIONS_PER_ADDRESS_MAX", 8)
    async with server_of(home("pi")) as server:
        crowd = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(30)]
        refused = [asyncio.create_task(reader.read()) for reader, _ in crowd]
        await eventually(lambda: sum(task.done() for task in refused) == 22)
        assert server.n_connections == 8
        with pytest.raises(UnreachableError):
            await client.hello("127.0.0.1", server.port, 1)
        for _, writer in crowd:
            writer.close()
        await asyncio.gather(*refused, return_exceptions=True)
        await eventually(lambda: server.n_connections == 0)
        assert await client.hello("127.0.0.1", server.port, 5) == hello_of("pi")


async def test_nodes_on_one_machine_do_not_clash(home: Callable[[str], Identity], client: PeerClient) -> None:
    wanted = closed_port()
    names = ["n1", "n2", "n3"]
    async with server_of(home("n1"), port=wanted) as one, server_of(home("n2"), port=wanted) as two:
        everywhere = PeerServer(home("n3").server_context(), lambda: hello_of("n3"), port=wanted)
        async with everywhere as three:  # listens on all addresses, loopback among them
            assert one.port == wanted
            assert len({one.port, two.port, three.port}) == 3
            answers = [await client.hello("127.0.0.1", server.port, 5) for server in (one, two, three)]
            assert [answer.node for answer in answers] == names
    assert DEFAULT_PORT == 8470  # the README tells people to open it


async def test_all_chosen_addresses_answer_on_one_port(
    home: Callable[[str], Identity], client: PeerClient
) -> None:
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    server = PeerServer(home("pi").server_context(), lambda: hello_of("pi"), hosts=hosts, port=0)
    async with server:
        for host in hosts:
            assert await client.hello(host, server.port, 5) == hello_of("pi")
        with pytest.raises(UnreachableError):
            await client.hello("127.0.0.4", server.port, 1)


async def test_an_address_of_another_machine_cannot_be_listened_on(home: Callable[[str], Identity]) -> None:
    with pytest.raises(ConfigError, match="address of this machine"):
        async with PeerServer(home("pi").server_context(), lambda: hello_of("pi"), hosts=("203.0.113.9",)):
            pass
    server = PeerServer(
        home("pi").server_context(), lambda: hello_of("pi"), hosts=("203.0.113.9", "127.0.0.1"), port=0
    )
    async with server:
        assert server.port


async def test_a_probe_finds_the_address_that_works_and_leaves_nothing_behind(
    home: Callable[[str], Identity], client: PeerClient
) -> None:
    tasks_before = len(asyncio.all_tasks())
    async with server_of(home("pi")) as server:
        tasks_serving = len(asyncio.all_tasks())
        with socket.create_server(("127.0.0.9", server.port)):  # takes connections, says nothing
            addresses = ("127.0.0.9", "127.0.0.8", "not a host", "127.0.0.1")
            began = time.monotonic()
            hello, address = await client.probe(addresses, server.port, NodeId("pi"), timeout_s=5)
        assert (hello, address) == (hello_of("pi"), "127.0.0.1")
        assert time.monotonic() - began < 2
        # The server keeps one task for the connection that stays in the client's pool.
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks_serving + 1)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks_before)


async def test_a_probe_tells_the_most_telling_failure(
    home: Callable[[str], Identity], stranger: Identity, client: PeerClient
) -> None:
    with pytest.raises(UnreachableError, match="no address"):
        await client.probe((), 1, timeout_s=1)
    async with server_of(home("pi")) as server:
        with pytest.raises(UnreachableError, match="is pi, not jetson"):
            await client.probe(LOOPBACK, server.port, NodeId("jetson"), timeout_s=2)
    async with server_of(stranger) as server:
        with pytest.raises(WrongKeyError):
            await client.probe(("127.0.0.8", "127.0.0.1"), server.port, timeout_s=2)


async def test_a_cancelled_probe_ends_at_once(client: PeerClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        probe = asyncio.create_task(client.probe(LOOPBACK, silent.getsockname()[1], timeout_s=30))
        await asyncio.sleep(0)
        probe.cancel()
        async with asyncio.timeout(2):
            with pytest.raises(asyncio.CancelledError):
                await probe


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
