"""How the compute process reads from the mesh: what is said over a socket pair, and the child's end of it.

    child ──Want, keys──▶ node     ──Came, blocks──▶ child … ──Over──▶ child        in the order of the keys
    child ──Ask, keys──▶ node      ──Asked, a byte for each key──▶ child
    child ──Cancel──▶ node         the rest of an answer is not wanted any more
    child ──Tally──▶ node          what the child's tiers have done since it started

A frame is two lengths (4 bytes each, big-endian), a head in msgpack, and a payload as it is: keys one after
another, or blocks. The node has checked the blocks' digests.

Nothing here raises because of the mesh: what does not come in time, comes cut short, or cannot come since
the link is down, is a miss. One thread writes and one reads, so that whoever computes never waits for a
socket. Blocks that nobody takes are bounded: the reader stops, and with it, by the socket, the node.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from queue import Full, Queue

from mesh.errors import DecodeError
from mesh.wire import FRAME_BYTES_MAX, Codec
from node.compute.features.key import KEY_BYTES

__all__ = [
    "CODEC",
    "HEAD_BYTES",
    "KEYS_MAX",
    "PAYLOAD_BYTES_MAX",
    "Ask",
    "Asked",
    "Asking",
    "Came",
    "Cancel",
    "Fetch",
    "MeshLink",
    "Over",
    "Tally",
    "Tier",
    "Want",
    "frame_head",
    "frame_sizes",
    "joined",
    "split_keys",
]

log = logging.getLogger(__name__)

HEAD_BYTES = 8
KEYS_MAX = 1 << 14
"""Of one request: a million tokens, and 512 KiB of keys."""
PAYLOAD_BYTES_MAX = 16 << 20
"""Of one frame: two of the largest blocks, or many small ones."""

# Asked for and not taken yet. The reader stops above that, so a request may exceed it by one frame.
_HELD_BYTES_MAX = 256 << 20
# So long may blocks lie untaken while the reader stands still; then the oldest request loses its own.
_STAND_STILL_S = 10.0
# An answer that does not end: the node is given this long beyond what the request allowed.
_GRACE_S = 1.0
_WRITES_MAX = 64
_SOCKET_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Read these blocks; the keys follow."""

    request: int
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Who has these, and how long would reading ``n_bytes`` of them take? The keys follow."""

    request: int
    n_bytes: int
    """All of them together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """Blocks that were found at one place, their bytes, and the seconds of computing that this spared."""

    hits: int = 0
    n_bytes: int = 0
    saved_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Since the process started."""

    memory: Tier = Tier()
    disk: Tier = Tier()
    mesh: Tier = Tier()
    computed: int = 0
    """Blocks that no tier had."""
    computing_s: float = 0.0
    fetches: int = 0
    """Requests for which fetching was chosen, and below computing, where there was a choice."""
    computes: int = 0
    fetch_s: float | None = None
    """What the newest choice expected of either."""
    compute_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Came:
    """The next blocks of an answer follow; a size of 0 is a miss."""

    request: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Nothing more comes; what has not come is a miss."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A byte for each key follows: whether a peer says that it has it."""

    request: int
    expected_s: float | None = None
    """For those that somebody has; ``None``: nobody knows, or nobody has any."""
    profiles: tuple[str, ...] = ()
    """How the peers compute features, ``precision numerics`` of each; see ``node.compute.features.shape``."""


CODEC = Codec([Want, Ask, Cancel, Tally, Came, Over, Asked])


def frame_head(message: object, n_payload_bytes: int = 0) -> bytes:
    """What goes before a payload of so many bytes on the wire."""
    head = CODEC.encode(message)
    return len(head).to_bytes(4, "big") + n_payload_bytes.to_bytes(4, "big") + head


def frame_sizes(start: bytes) -> tuple[int, int]:
    """Sizes in bytes of the head and the payload that follow ``start``.

    Raises:
        DecodeError: More than any frame has: the stream has lost its step.
    """
    head, payload = int.from_bytes(start[:4], "big"), int.from_bytes(start[4:HEAD_BYTES], "big")
    if head > FRAME_BYTES_MAX or payload > PAYLOAD_BYTES_MAX:
        raise DecodeError(f"a frame of {head} + {payload} bytes")
    return head, payload


def joined(keys: Sequence[bytes]) -> bytes:
    """As ``split_keys`` reads them."""
    assert all(len(key) == KEY_BYTES for key in keys), "keys are digests"
    return b"".join(keys)


def split_keys(payload: bytes) -> list[bytes]:
    """Raises:
    DecodeError: These are no keys, or too many.
    """
    n, rest = divmod(len(payload), KEY_BYTES)
    if rest or n > KEYS_MAX:
        raise DecodeError(f"{len(payload)} bytes are no list of at most {KEYS_MAX} keys")
    return [payload[at : at + KEY_BYTES] for at in range(0, len(payload), KEY_BYTES)]


class Fetch:
    """Blocks on their way. All methods are for one thread, that which asked; ``close`` when done with it."""

    def __init__(self, link: MeshLink, request: int, keys: Sequence[bytes], until: float) -> None:
        self.keys = tuple(keys)
        self._link = link
        self._request = request
        self._until = until
        # Below: written by the reader, under the link's lock.
        self._n_settled = 0
        self._held: dict[bytes, memoryview] = {}
        self._n_held_bytes = 0
        self._is_over = False
        self.changed_at = until
        """When something came last, or its end."""

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        with self._link._changed:
            return self._look()

    @property
    def n_settled(self) -> int:
        """So many of the first keys have come or are known not to come."""
        with self._link._changed:
            return len(self.keys) if self._look() else self._n_settled

    def wait(self, n_keys: int, timeout_s: float) -> bool:
        """Whether the first ``n_keys`` are settled, after waiting at most so long for it."""
        until = self._link._clock() + timeout_s
        with self._link._changed:
            while not self._look() and self._n_settled < n_keys:
                left_s = min(until, self._until) - self._link._clock()
                if left_s <= 0 and not self._look():
                    return False
                self._link._changed.wait(max(left_s, 0.0))
            return True

    def take(self, keys: Iterable[bytes]) -> dict[bytes, memoryview]:
        """Those that have come. They are given once, and then no longer held here."""
        with self._link._changed:
            found = {key: self._held.pop(key) for key in keys if key in self._held}
            self._free(sum(map(len, found.values())))
        return found

    def close(self) -> None:
        """No more of it is wanted."""
        with self._link._changed:
            was_over = self._look()
            self._give_up()
        if not was_over:
            self._link._send(Cancel(request=self._request))

    def _look(self) -> bool:
        if not self._is_over and self._link._clock() >= self._until:
            self._is_over = True
        return self._is_over

    def _give_up(self) -> None:
        self._is_over = True
        self._held.clear()
        self._free(self._n_held_bytes)
        self._link._fetches.pop(self._request, None)

    def _free(self, n_bytes: int) -> None:
        self._n_held_bytes -= n_bytes
        self._link._n_held_bytes -= n_bytes
        if n_bytes:
            self._link._changed.notify_all()


class Asking:
    """A question on its way."""

    def __init__(self, link: MeshLink, until: float) -> None:
        self._link = link
        self._until = until
        self._answer: tuple[list[bool], Asked] | None = None
        self._is_over = False

    def wait(self, timeout_s: float) -> bool:
        """Whether there is an answer, or none will come, after waiting at most so long for it."""
        until = self._link._clock() + timeout_s
        with self._link._changed:
            while not self._is_over:
                now = self._link._clock()
                if now >= self._until:
                    self._is_over = True
                elif now >= until:
                    return False
                else:
                    self._link._changed.wait(min(until, self._until) - now)
            return True

    @property
    def answer(self) -> tuple[list[bool], Asked] | None:
        """For each key whether somebody says to have it; ``None``: there is no answer."""
        with self._link._changed:
            return self._answer


class MeshLink:
    """The child's end. ``sock`` is a connected stream; ``clock``: monotonic seconds."""

    def __init__(self, sock: socket.socket, clock: Callable[[], float] = time.monotonic) -> None:
        self._socket = sock
        self._clock = clock
        self._changed = threading.Condition()
        self._requests = count(1)
        self._fetches: dict[int, Fetch] = {}
        self._asking: dict[int, tuple[int, Asking]] = {}
        self._n_held_bytes = 0
        self._is_up = True
        self._writes: Queue[tuple[object, bytes] | None] = Queue(_WRITES_MAX)
        sock.settimeout(None)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        self._threads = [
            threading.Thread(target=run, name=f"link.{name}", daemon=True)
            for name, run in (("read", self._read), ("write", self._write))
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def of(cls, descriptor: int) -> MeshLink | None:
        """The end that the node has left open for us as ``descriptor``; ``None`` if there is none."""
        try:
            sock = socket.socket(fileno=descriptor)
            sock.set_inheritable(False)  # it is for nobody that we start
            return cls(sock)
        except OSError as error:
            log.warning("no link to the mesh (%s): features of other nodes are not read", error)
            return None

    @property
    def is_up(self) -> bool:
        return self._is_up

    def want(self, keys: Sequence[bytes], within_s: float) -> Fetch:
        """Have these read, in this order; returns at once. What is not there ``within_s`` is a miss."""
        assert len(keys) <= KEYS_MAX
        request = next(self._requests)
        fetch = Fetch(self, request, keys, self._clock() + within_s + _GRACE_S)
        with self._changed:
            for number in [n for n, old in self._fetches.items() if old._look() and not old._n_held_bytes]:
                del self._fetches[number]
            self._fetches[request] = fetch
        if not keys or not self._send(Want(request=request, within_s=within_s), joined(keys)):
            with self._changed:
                fetch._give_up()
        return fetch

    def ask(self, keys: Sequence[bytes], n_bytes: int, within_s: float = 0.5) -> Asking:
        """Who has these, ``n_bytes`` in all; returns at once."""
        assert len(keys) <= KEYS_MAX
        request = next(self._requests)
        asking = Asking(self, self._clock() + within_s)
        with self._changed:
            self._asking = {
                number: (n, other) for number, (n, other) in self._asking.items() if not other._is_over
            }
            self._asking[request] = (len(keys), asking)
        if not self._send(Ask(request=request, n_bytes=n_bytes), joined(keys)):
            with self._changed:
                asking._is_over = True
        return asking

    def tell(self, tally: Tally) -> None:
        self._send(tally)

    def close(self) -> None:
        self._down("closed")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)
        self._socket.close()

    # ── the two threads ─────────────────────────────────────────────────────────────────────────────

    def _send(self, message: object, payload: bytes = b"") -> bool:
        """Whether it is on its way. A node that does not read for so long is as good as none."""
        if not self._is_up:
            return False
        try:
            self._writes.put_nowait((message, payload))
        except Full:
            return False
        return True

    def _write(self) -> None:
        try:
            while (item := self._writes.get()) is not None:
                message, payload = item
                self._socket.sendall(frame_head(message, len(payload)))
                if payload:
                    self._socket.sendall(payload)
        except OSError as error:
            self._down(str(error))

    def _read(self) -> None:
        try:
            while True:
                head, payload = frame_sizes(bytes(self._exactly(HEAD_BYTES)))
                message = CODEC.decode(bytes(self._exactly(head)))
                self._take(message, self._exactly(payload))
                self._wait_for_room()
        except (OSError, EOFError, DecodeError) as error:
            self._down(str(error))

    def _exactly(self, n_bytes: int) -> memoryview:
        content = memoryview(bytearray(n_bytes))
        at = 0
        while at < n_bytes:
            n = self._socket.recv_into(content[at:])
            if not n:
                raise EOFError("the node closed it")
            at += n
        return content

    def _take(self, message: object, payload: memoryview) -> None:
        """Raises:
        DecodeError: The node said what it may not.
        """
        with self._changed:
            match message:
                case Came(request=request, sizes=sizes):
                    if sum(sizes) != len(payload) or any(size < 0 for size in sizes):
                        raise DecodeError(f"blocks of {sum(sizes)} bytes in {len(payload)}")
                    fetch = self._fetches.get(request)
                    if fetch is not None:
                        self._settle(fetch, sizes, payload)
                case Over(request=request):
                    fetch = self._fetches.get(request)
                    if fetch is not None:
                        fetch._is_over, fetch.changed_at = True, self._clock()
                case Asked(request=request):
                    n_keys, asking = self._asking.pop(request, (0, None))
                    if asking is not None:
                        if n_keys == len(payload):
                            asking._answer = ([bool(flag) for flag in payload], message)
                        asking._is_over = True
                case _:
                    raise DecodeError(f"the node does not say {type(message).__name__}")
            self._changed.notify_all()

    def _settle(self, fetch: Fetch, sizes: Sequence[int], payload: memoryview) -> None:
        first, end = fetch._n_settled, fetch._n_settled + len(sizes)
        if end > len(fetch.keys):
            raise DecodeError("more blocks than were wanted")
        start = 0
        for key, size in zip(fetch.keys[first:end], sizes, strict=True):
            if size:
                fetch._held[key] = payload[start : start + size]
                fetch._n_held_bytes += size
                self._n_held_bytes += size
            start += size
        fetch._n_settled = end
        fetch._is_over = fetch._is_over or end == len(fetch.keys)
        fetch.changed_at = self._clock()

    def _wait_for_room(self) -> None:
        with self._changed:
            full_since = self._clock()
            while self._is_up and self._n_held_bytes > _HELD_BYTES_MAX:
                left_s = full_since + _STAND_STILL_S - self._clock()
                if left_s <= 0:
                    self._drop_oldest()
                    full_since = self._clock()
                else:
                    self._changed.wait(left_s)

    def _drop_oldest(self) -> None:
        oldest = next(fetch for fetch in self._fetches.values() if fetch._n_held_bytes)
        log.warning("link_miss request=%d why=nobody took its blocks", oldest._request)
        oldest._give_up()

    def _down(self, why: str) -> None:
        with self._changed:
            if not self._is_up:
                return
            self._is_up = False
            for fetch in self._fetches.values():
                fetch._is_over = True  # what came may still be taken
            for _, asking in self._asking.values():
                asking._is_over = True
            self._asking.clear()
            self._changed.notify_all()
        if why != "closed":
            log.warning("link_down why=%s; features of other nodes are not read", why)
        try:
            self._writes.put_nowait(None)
        except Full:
            self._writes.get_nowait()
            self._writes.put_nowait(None)
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end is gone already
