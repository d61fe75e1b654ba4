"""Reads one HTTP/1.1 answer straight into the memory it is for. Pure: bytes in, by ``buffer`` and ``filled``.

aiohttp's client costs a copy and a wake-up per 64 KiB, about half of what TLS costs (ADR 0018). The server
is ours, so this reads only what it writes: a status line, few short headers, a body of stated length.
Anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mesh.errors import DecodeError

__all__ = ["HEAD_BYTES_MAX", "Answer", "AnswerReader", "Room"]

HEAD_BYTES_MAX = 4096
"""Ours are about 250."""
_SPARE_BYTES = 4096

_STATUS = re.compile(rb"HTTP/1\.1 ([2-5]\d\d)(?: [^\r\n]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([\x20-\x7e]*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer. Names of fields are in lower case."""

    status: int
    fields: Mapping[str, str]
    length: int

    @property
    def keeps_open(self) -> bool:
        return self.fields.get("connection", "").lower() != "close"


Room = Callable[[Answer], memoryview]
"""Where the body is to go, decided from the head. Raises DecodeError to refuse it."""


class AnswerReader:
    """One answer. ``room`` must return a writable view of exactly ``answer.length`` bytes."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._head = bytearray(HEAD_BYTES_MAX)
        self._n_head = 0
        self._spare = memoryview(bytearray(_SPARE_BYTES))
        self._body: memoryview | None = None
        self.answer: Answer | None = None
        self.n_body = 0
        """Bytes of the body so far, from its beginning: they are good even if the rest never comes."""

    @property
    def is_done(self) -> bool:
        return self.answer is not None and self.n_body == self.answer.length

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._body is None:
            return memoryview(self._head)[self._n_head :]
        return self._body[self.n_body :] if not self.is_done else self._spare

    def filled(self, n_bytes: int) -> None:
        """``n_bytes`` were put into ``buffer()``.

        Raises:
            DecodeError: Not an answer we accept, or more than it announced.
        """
        if self.is_done:
            raise DecodeError("more bytes than were announced")
        if self._body is not None:
            self.n_body += n_bytes
            return
        before, self._n_head = self._n_head, self._n_head + n_bytes
        end = self._head.find(b"\r\n\r\n", max(0, before - 3), self._n_head)
        if end < 0:
            if self._n_head == HEAD_BYTES_MAX:
                raise DecodeError(f"a head of more than {HEAD_BYTES_MAX} bytes")
            return
        self.answer = _parse(bytes(self._head[:end]))
        self._body = self._room(self.answer)
        assert len(self._body) == self.answer.length, "room for the body, no more and no less"
        rest = memoryview(self._head)[end + 4 : self._n_head]
        if len(rest) > self.answer.length:
            raise DecodeError("more bytes than were announced")
        self._body[: len(rest)] = rest
        self.n_body = len(rest)


def _parse(head: bytes) -> Answer:
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise DecodeError(f"not an HTTP/1.1 answer: {first[:40]!r}")
    fields: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise DecodeError(f"not a header: {line[:40]!r}")
        name = field[1].decode().lower()
        if name in fields:
            raise DecodeError(f"two headers {name}")
        fields[name] = field[2].decode().rstrip()
    if "transfer-encoding" in fields or "content-encoding" in fields:
        raise DecodeError("a body that is not sent as it is")
    length = fields.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) <= 15):
        raise DecodeError("a body without its length")
    return Answer(int(status[1]), fields, int(length))
