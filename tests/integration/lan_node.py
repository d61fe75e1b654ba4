"""One device of a test network: announces, watches, answers and asks; prints what it sees as JSON lines.

    python -m tests.integration.lan_node pi --serve --ask 10.77.0.1:8470

With ``--mute`` it runs no mDNS but prints every multicast packet it hears, and whether it names the node.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

from mesh.errors import EdgemeshError
from mesh.ids import Boot, MeshName, NodeId
from mesh.messages import PeerHello
from mesh.transport.adverts import Advert, Gone, Sighting
from mesh.transport.discovery import Discovery, local_addresses
from mesh.transport.identity import MeshKey, issue
from mesh.transport.streams import PeerClient, PeerServer

KEY = MeshKey.create("home", bytes(range(32)))


def tell(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def live(options: argparse.Namespace) -> None:
    node, interfaces = NodeId(options.node), tuple(options.interfaces) or None
    with tempfile.TemporaryDirectory() as directory:
        identity = issue(KEY, node, Path(directory))

        def hello() -> PeerHello:
            return PeerHello(
                node=node, boot=Boot("b1"), incarnation=1, mesh="home", port=server.port,
                addresses=list(local_addresses(interfaces)), broker_epoch=0, broker_host=None,
                broker_addresses=[], broker_port=0, broker_connected=False, peers={},
            )  # fmt: skip

        async with (
            PeerServer(identity.server_context(), hello) as server,
            PeerClient(identity.client_context()) as client,
            Discovery(advert(node, server.port), interfaces) as discovery,
        ):
            tell("ready", port=server.port)
            async with asyncio.TaskGroup() as group:
                if options.ask:
                    host, _, port = options.ask.rpartition(":")
                    group.create_task(ask(client, (host.strip("[]"),), int(port)))
                async for news in discovery.sightings():
                    if isinstance(news, Gone):
                        tell("gone", node=news.node)
                        continue
                    tell("sighting", node=news.advert.node, addresses=news.addresses)
                    group.create_task(ask_seen(client, news))


def advert(node: NodeId, port: int) -> Advert:
    return Advert(
        mesh=MeshName("home"),
        fingerprint=KEY.fingerprint,
        node=node,
        boot=Boot("b1"),
        incarnation=1,
        port=port,
    )


async def ask_seen(client: PeerClient, seen: Sighting) -> None:
    await ask(client, seen.addresses, seen.advert.port)


async def ask(client: PeerClient, addresses: tuple[str, ...], port: int) -> None:
    try:
        hello, address = await client.probe(addresses, port, timeout_s=5)
        tell("hello", node=hello.node, address=address)
    except EdgemeshError as error:
        tell("failed", code=error.code, text=str(error))


def eavesdrop(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind(("", 5353))
        group = struct.pack("4s4s", socket.inet_aton("224.0.0.251"), socket.inet_aton(local_addresses()[0]))
        ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        tell("ready", port=5353)
        while True:
            packet, (address, _) = ear.recvfrom(9000)
            tell("packet", address=address, names_it=name.encode() in packet)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("node")
    parser.add_argument("--interfaces", nargs="*", default=[])
    parser.add_argument("--ask")
    parser.add_argument("--mute", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if options.mute:
        eavesdrop(options.node)
    else:
        asyncio.run(live(options))


if __name__ == "__main__":
    main()
