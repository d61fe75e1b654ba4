"""The node's end of the link over which its compute process reads from the mesh.

What is said is in ``node.compute.features.link``. Answers flow only as fast as the child takes them: the
socket fills up, ``drain`` waits, and nothing more is asked of the peers. A child that says nonsense loses
its link; it then computes what it could have read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from mesh.digests import Buffer
from mesh.errors import DecodeError
from mesh.transport.bulk.blobs import Block
from node.compute.features.link import (
    CODEC,
    HEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    Ask,
    Asked,
    Came,
    Cancel,
    Over,
    Tally,
    Want,
    frame_head,
    frame_sizes,
    split_keys,
)

__all__ = ["LinkServer", "Reads"]

log = logging.getLogger(__name__)

# Requests in progress, and waiting for their turn. The child has a few of each kind of reader.
_AT_ONCE = 4
_REQUESTS_MAX = 64
_WITHIN_S_MAX = 60.0
# Written before the child has to have read some.
_AHEAD_BYTES = 4 << 20
_SOCKET_BYTES = 4 << 20


class Reads(Protocol):
    """See ``node.cache.mesh_cache.MeshCache``."""

    def claimed(self, keys: Sequence[bytes]) -> list[bool]: ...
    def expected_s(self, n_bytes: int) -> float: ...
    def read(
        self, keys: Sequence[bytes], *, within_s: float = ...
    ) -> AsyncGenerator[list[Block | None], None]: ...


class LinkServer:
    """``profiles``: how the peers compute features. ``on_tally`` is told what the child's tiers have done."""

    def __init__(
        self,
        cache: Reads,
        *,
        profiles: Callable[[], Sequence[str]] = tuple,
        on_tally: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self._cache = cache
        self._profiles = profiles
        self._on_tally = on_tally

    async def serve(self, sock: socket.socket) -> None:
        """Until the child closes its end. Raises nothing: without a link, the child computes."""
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except OSError as error:
            log.warning("link_lost why=%s", error)
            sock.close()
            return
        writer.transport.set_write_buffer_limits(high=_AHEAD_BYTES)
        try:
            await _Link(self._cache, self._profiles, self._on_tally, reader, writer).run()
        finally:
            writer.close()


class _Link:
    """One life of it."""

    def __init__(
        self,
        cache: Reads,
        profiles: Callable[[], Sequence[str]],
        on_tally: Callable[[Tally], None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._cache = cache
        self._profiles = profiles
        self._on_tally = on_tally
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()  # a frame is not interrupted by another
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._answers: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        try:
            while True:
                head, size = frame_sizes(await self._reader.readexactly(HEAD_BYTES))
                message = CODEC.decode(await self._reader.readexactly(head))
                await self._on(message, await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            log.debug("link_closed")  # as every child does at its end
        except DecodeError as error:
            log.warning("link_lost why=%s", error)
        finally:
            for task in self._answers.values():
                task.cancel()
            await asyncio.gather(*self._answers.values(), return_exceptions=True)

    async def _on(self, message: object, payload: bytes) -> None:
        """Raises:
        DecodeError: A child does not say that.
        """
        match message:
            case Want(request=request, within_s=within_s):
                keys = split_keys(payload)
                if request in self._answers or not 0 < within_s <= _WITHIN_S_MAX:
                    raise DecodeError(f"request {request} within {within_s:g} s")
                if len(self._answers) >= _REQUESTS_MAX:
                    log.warning("link_miss request=%d why=too many at once", request)
                    await self._send(Over(request=request))
                    return
                answer = asyncio.create_task(self._answer(request, keys, within_s), name=f"link.{request}")
                self._answers[request] = answer
                answer.add_done_callback(lambda _: self._answers.pop(request, None))
            case Ask(request=request, n_bytes=n_bytes):
                await self._send(*self._asked(request, split_keys(payload), n_bytes))
            case Cancel(request=request):
                if request in self._answers:
                    self._answers[request].cancel()
            case Tally():
                self._on_tally(message)
            case _:
                raise DecodeError(f"the compute process does not say {type(message).__name__}")

    def _asked(self, request: int, keys: Sequence[bytes], n_bytes: int) -> tuple[Asked, list[Buffer]]:
        claimed = self._cache.claimed(keys)
        n_claimed = sum(claimed)
        expected_s = self._cache.expected_s(n_bytes * n_claimed // len(keys)) if n_claimed else math.inf
        asked = Asked(
            request=request,
            expected_s=expected_s if math.isfinite(expected_s) else None,
            profiles=tuple(dict.fromkeys(self._profiles())),
        )
        return asked, [bytes(claimed)]

    async def _answer(self, request: int, keys: Sequence[bytes], within_s: float) -> None:
        """What was cancelled needs no ``Over``: the child does not listen any more."""
        try:
            async with (
                asyncio.timeout(within_s),
                self._at_once,
                aclosing(self._cache.read(keys, within_s=within_s)) as lists,
            ):
                async for blocks in lists:
                    for part in _parts(blocks):
                        sizes = tuple(0 if block is None else len(block.payload) for block in part)
                        payload = [block.payload for block in part if block is not None]
                        await self._send(Came(request=request, sizes=sizes), payload)
        except TimeoutError:
            log.info("link_miss request=%d why=not all within %g s", request, within_s)
        except OSError as error:
            log.debug("link_miss request=%d why=%s", request, error)
            return
        except Exception:  # a fault of ours is a miss to the child, like any other
            log.exception("link_miss request=%d", request)
        await self._send(Over(request=request))

    async def _send(self, message: object, payload: Sequence[Buffer] = ()) -> None:
        async with self._turn:
            if self._writer.is_closing():
                return
            self._writer.write(frame_head(message, sum(map(len, payload))))
            for part in payload:
                self._writer.write(part)
            await self._writer.drain()


def _parts(blocks: Sequence[Block | None]) -> list[list[Block | None]]:
    """``blocks`` cut so that each part fits into a frame."""
    parts: list[list[Block | None]] = [[]]
    size = 0
    for block in blocks:
        n_bytes = 0 if block is None else len(block.payload)
        if size + n_bytes > PAYLOAD_BYTES_MAX:
            parts.append([])
            size = 0
        parts[-1].append(block)
        size += n_bytes
    return parts
