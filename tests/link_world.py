"""A compute process's link to a mesh, in one process: what peers have is a dictionary, the link is real."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

from mesh.digests import Buffer, digest_of
from mesh.transport.bulk.blobs import Block
from node.cache.link import LinkServer
from node.compute.features.link import MeshLink, Tally

__all__ = ["Peers", "linked"]


class Peers:
    """What others have; see ``node.cache.link.Reads``. Attributes may be changed at any time."""

    def __init__(self, blocks: Mapping[bytes, Buffer] | None = None, profiles: Sequence[str] = ()) -> None:
        self.blocks = dict(blocks or {})
        self.profiles = tuple(profiles)
        self.false_claims: set[bytes] = set()
        self.read_keys: list[bytes] = []
        """What was asked for, in order."""
        self.gate = threading.Event()
        """Nothing comes before it is set."""
        self.gate.set()
        self.n_free: int | None = None
        """So many keys are answered even so."""
        self.batch = 8
        self.s_per_byte = 1e-9
        self.tallies: list[Tally] = []

    def claimed(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.blocks or key in self.false_claims for key in keys]

    def expected_s(self, n_bytes: int) -> float:
        return 1e-3 + n_bytes * self.s_per_byte

    async def read(
        self, keys: Sequence[bytes], *, within_s: float = 10.0
    ) -> AsyncGenerator[list[Block | None], None]:
        for at in range(0, len(keys), self.batch):
            if self.n_free is None or len(self.read_keys) >= self.n_free:
                await asyncio.to_thread(self.gate.wait, within_s)
            part = keys[at : at + self.batch]
            self.read_keys += part
            found = [self.blocks.get(key) for key in part]
            yield [
                None if payload is None else Block(key, digest_of(payload), payload)
                for key, payload in zip(part, found, strict=True)
            ]


@contextlib.contextmanager
def linked(peers: Peers) -> Iterator[MeshLink]:
    """The child's end; the node's is served by a loop of its own thread."""
    ours, theirs = socket.socketpair()
    loop = asyncio.new_event_loop()
    server = LinkServer(peers, profiles=lambda: peers.profiles, on_tally=peers.tallies.append)
    serving = loop.create_task(server.serve(ours))
    thread = threading.Thread(target=loop.run_until_complete, args=(serving,))
    thread.start()
    link = MeshLink(theirs)
    try:
        yield link
    finally:
        link.close()
        thread.join(5)
        assert not thread.is_alive(), "the node's end ends with the child's"
        loop.close()
