"""What a node and its compute process say to each other, as frames over the child's standard streams.

    node ──Load──▶ child ──Loading*──▶ node          then ──Ready──▶ or ──LoadFailed──▶ (and the child ends)
    node ──Run──▶ child ──Text*──▶ or ──Progress*──▶ then ──Ended──▶ node
    node ──Stop──▶ child                             its ``Ended`` follows, between two steps
    node ──Pause──▶ child, later ──Resume──▶         between two steps; it keeps what it has and takes no slot
    child ──NeedFeatures──▶ node, later ──FeaturesGiven──▶   feature maps it cannot compute itself
    child ──Adapters──▶ node                         whenever the adapters it can serve have changed
    child ──Rates──▶ node                            once it has measured itself, if Ready brought a guess

A frame is its length (4 bytes, big-endian) and one message in msgpack. End of the stream is goodbye.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal

from mesh.errors import DecodeError
from mesh.ids import TaskId
from mesh.messages import FeaturesHeld, FeaturesSpec, NodeRates, Output, Submit, TaskProgress
from mesh.wire import FRAME_BYTES_MAX, Codec

__all__ = [
    "CODEC",
    "LENGTH_BYTES",
    "Adapters",
    "Ended",
    "FeaturesGiven",
    "Hold",
    "Load",
    "LoadFailed",
    "Loading",
    "NeedFeatures",
    "Pause",
    "Precision",
    "Profiled",
    "Progress",
    "Rates",
    "Ready",
    "Resume",
    "Run",
    "Stop",
    "Text",
    "frame",
    "frame_size",
    "read_frame",
]

LENGTH_BYTES = 4

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Hold = Literal["auto", "all", "top"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Prepare ``model`` (fetch and convert it if need be) and load it."""

    model: str
    models_dir: str
    adapters_dir: str
    """One directory an adapter, as ``peft`` writes it; new ones are noticed."""
    datasets_dir: str
    """Tuning data by their SHA-256."""
    features_dir: str
    """Checkpoints of tuning jobs; feature maps, too, where there is no ``maps_dir``."""
    precision: Precision | Literal["auto"] = "auto"
    deadline_pressure: float = 0.0
    """Share of recent attempts that ran out of time: how much speed is worth when ``auto`` chooses."""
    threads: int | None = None
    """Most threads to compute with; ``None``: as many as there are physical cores."""
    adapter_bytes: int = 512_000_000
    """Most memory for adapters; those not in use leave first."""
    feature_memory_bytes: int = 512_000_000
    feature_disk_bytes: int = 4_000_000_000
    slowdown: float = 1.0
    """Play a device so many times slower."""
    hold: Hold = "auto"
    """``top``: never load more than the ``top_layers`` highest layers; ``auto``: only if all find no room."""
    top_layers: int = 4
    maps_dir: str = ""
    """Where feature maps lie, which the node shares with others."""
    link_fd: int | None = None
    """Descriptor of this process's end of the link to the mesh, see ``node.compute.features.link``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Do one attempt of a task, whatever its kind."""

    task: TaskId
    attempt: int
    submit: Submit
    budget_s: float | None = None
    """What is left of the deadline now, ``None`` without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    task: TaskId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Let the attempt, a generation, stand still until ``Resume``."""

    task: TaskId
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    task: TaskId
    attempt: int


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
    precision: str = "fp32"
    """Of the weights while they compute, such as ``int8``; by phase where phases differ."""
    precision_reason: str = ""
    """Why, for people."""
    adapters: tuple[str, ...] = ()
    also_called: tuple[str, ...] = ()
    rates: NodeRates | None = None
    """How fast it works, measured at an earlier start or guessed; slowed as asked."""
    can_pause: bool = False
    """Whether it obeys ``Pause``."""
    top_layers: int | None = None
    """It holds so many layers at the top, for the reason in ``precision_reason``; ``None``: all of them."""
    features_profile: str | None = None
    """Precision and numerics of the feature maps it computes; ``None``: none, or not proven yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """``is_permanent``: trying again changes nothing before the operator does something."""

    reason: str
    is_permanent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Names of the adapters this process can serve now."""

    names: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast it works, better known than before."""

    rates: NodeRates


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """How it computes feature maps, proven just now; see ``Ready.features_profile``."""

    profile: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a tuning attempt is; the newest replaces what was not sent yet."""

    progress: TaskProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedFeatures:
    """The attempt goes on once the mesh has these feature maps; ``FeaturesGiven`` says so, or why not."""

    task: TaskId
    attempt: int
    round: int
    """Counts what the attempt has asked for, from 0."""
    spec: FeaturesSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesGiven:
    """``made``: how to ask the mesh for them; ``None``: nobody can make them, and ``reason`` says why."""

    task: TaskId
    attempt: int
    round: int
    made: FeaturesHeld | None = None
    reason: str | None = None


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
    output: Output | None = None


CODEC = Codec(
    [
        *(Load, Run, Stop, Pause, Resume, FeaturesGiven, Loading, Ready, LoadFailed, Adapters, Rates),
        *(Text, Profiled, Progress, NeedFeatures, Ended),
    ]
)


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
