"""What a node and its compute process say to each other, as frames over the child's standard streams.

    node ──Load──▶ child ──Loading*──▶ node          then ──Ready──▶ or ──LoadFailed──▶ (and the child ends)
    node ──Generate──▶ child ──Text*──▶ ──Ended──▶ node
    node ──Stop──▶ child                             its ``Ended`` follows, between two tokens

A frame is its length (4 bytes, big-endian) and one message in msgpack. End of the stream is goodbye.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal

from mesh.errors import DecodeError
from mesh.ids import TaskId
from mesh.messages import Submit
from mesh.wire import FRAME_BYTES_MAX, Codec

__all__ = [
    "CODEC",
    "LENGTH_BYTES",
    "Ended",
    "Generate",
    "Load",
    "LoadFailed",
    "Loading",
    "Ready",
    "Stop",
    "Text",
    "frame",
    "frame_size",
    "read_frame",
]

LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Prepare ``model`` (fetch and convert it if need be) and load it."""

    model: str
    models_dir: str
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = None
    """Most threads to compute with; ``None``: as many as there are physical cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    task: TaskId
    attempt: int
    submit: Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    task: TaskId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How far preparation is, in words; ``fraction`` (0 to 1) where it is known."""

    text: str
    fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    model: str
    context_tokens: int
    slots: int
    device: str
    digest: str
    """SHA-256 of the weights; of nothing for ``echo``."""
    also_called: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """``is_permanent``: trying again changes nothing before the operator does something."""

    reason: str
    is_permanent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    task: TaskId
    attempt: int
    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt's outcome, less what only the node knows (its id and the epoch)."""

    task: TaskId
    attempt: int
    state: Literal["done", "failed", "rejected", "cancelled"]
    text: str = ""
    finish_reason: str | None = None
    reason: str | None = None
    n_prompt_tokens: int = 0
    n_tokens: int = 0
    ttft_s: float | None = None
    service_s: float = 0.0


CODEC = Codec([Load, Generate, Stop, Loading, Ready, LoadFailed, Text, Ended])


def frame(message: object) -> bytes:
    payload = CODEC.encode(message)
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def frame_size(head: bytes) -> int:
    """How many bytes follow the length ``head``.

    Raises:
        DecodeError: More than any frame has: the stream has lost its step.
    """
    size = int.from_bytes(head, "big")
    if size > FRAME_BYTES_MAX:
        raise DecodeError(f"a frame of {size} bytes; at most {FRAME_BYTES_MAX} are sent")
    return size


def read_frame(stream: BinaryIO) -> object | None:
    """The next message, waiting for it; ``None`` at the end of the stream.

    Raises:
        DecodeError: The stream does not hold a frame here.
    """
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    size = frame_size(head)
    payload = stream.read(size)
    return CODEC.decode(payload) if len(payload) == size else None
