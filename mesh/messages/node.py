"""Who is here and how it is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mesh.ids import Boot, NodeId
from mesh.messages.checks import check_count, check_id, check_seconds, check_text

__all__ = [
    "RATED_TOP_LAYERS",
    "RATE_MAX",
    "SLOWDOWN_MAX",
    "Drain",
    "NodeForgotten",
    "NodeInfo",
    "NodeRates",
    "NodeReport",
    "NodeStanding",
    "NodeState",
    "PeerHello",
    "RateOrigin",
]

NodeStanding = Literal["online", "draining", "offline", "left"]

RateOrigin = Literal["measured", "busy", "guessed"]
"""``measured`` on a calm machine, perhaps at an earlier start; ``busy``: measured beside other work, so lower
than it may be, and measured again; ``guessed`` from the size of the model, until it is measured."""

RATE_MAX = 1e9  # tokens/s; a rate above is no rate
SLOWDOWN_MAX = 1000.0
RATED_TOP_LAYERS = 4
"""How many layers at the top ``NodeRates.tune_tokens_per_s`` is for: what is trained without a trial."""

MODEL_NAMES_MAX = 8
ADDRESSES_MAX = 16  # a laptop with VPNs and containers shows about ten
ADAPTERS_MAX = 1024  # 64 KiB of names, retained once a node


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """Retained; the broker publishes the ``offline`` one as last will when the connection breaks.

    ``incarnation`` grows with every start of the node and every time it refutes a rumour of its
    death, so a will that arrives late cannot kill a newer session.
    """

    node: NodeId
    state: NodeStanding
    incarnation: int
    boot: Boot

    def __post_init__(self) -> None:
        check_id("node", self.node)
        check_count("incarnation", self.incarnation)
        check_text("boot", self.boot, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeForgotten:
    """Clears a departed node's retained topics."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRates:
    """How fast a node does each kind of work with nothing else to do: a part of ``NodeInfo``.

    What a coordinator expects before it has seen the node work. All of it is as others see the node: a
    node that only plays a slower one (``--slowdown``) gives the slower rates.
    """

    prefill_tokens_per_s: float
    """Tokens of a prompt."""
    decode_tokens_per_s: float
    """Tokens of one answer that is alone."""
    row_cost: float
    """What each further answer adds to a step, as a share of a step alone: n answers at once take
    1 + (n - 1) * ``row_cost`` times as long a step as one."""
    features_tokens_per_s: float | None = None
    """Tokens through the layers below the top ``RATED_TOP_LAYERS``, forward; ``None``: it tunes nothing."""
    tune_tokens_per_s: float | None = None
    """Tokens through the top ``RATED_TOP_LAYERS``, forward and backward, head left out; ``None`` as above."""
    adapter_load_s: float = 0.0
    """To have an adapter in memory that is on disk."""
    emulated_slowdown: float = 1.0
    """How many times slower than it is the node plays; 1 = it plays nothing."""
    origin: RateOrigin = "measured"

    def __post_init__(self) -> None:
        for name in _RATES:
            rate: float | None = getattr(self, name)
            if rate is not None and not 0 < rate <= RATE_MAX:
                raise ValueError(f"{name} must be above 0 and at most {RATE_MAX:g}, got {rate}")
        if not 0 <= self.row_cost <= 100:
            raise ValueError(f"row_cost must be from 0 to 100, got {self.row_cost}")
        check_seconds("adapter_load_s", self.adapter_load_s)
        if not 1 <= self.emulated_slowdown <= SLOWDOWN_MAX:
            raise ValueError(
                f"emulated_slowdown must be from 1 to {SLOWDOWN_MAX:g}, got {self.emulated_slowdown}"
            )


_RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "features_tokens_per_s", "tune_tokens_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """Retained: what the node is. Changes rarely."""

    node: NodeId
    incarnation: int
    hostname: str
    version: str
    protocol_min: int
    protocol_max: int
    addresses: list[str]
    port: int
    """Where the node's data plane listens (mutual TLS)."""
    system: str
    """Such as ``Linux aarch64``."""
    device: str
    """What computes: ``cpu``, ``cuda``, ``mps``, or ``none`` with ``--no-compute``."""
    n_cpus: int
    memory_bytes: int
    model: str | None
    """Name of the backbone this node serves (or will, once loaded)."""
    adapters: list[str]
    slots: int
    """How many attempts the node runs at once; 0 = takes no work."""
    context_tokens: int | None = None
    """Longest prompt plus completion the model takes, once known."""
    also_called: list[str] = field(default_factory=list)
    """Other names a task may ask for ``model`` by, such as ``SmolLM2-135M-Instruct``."""
    precision: str | None = None
    """Of the weights while they compute, such as ``int8``, once known; by phase where phases differ."""
    precision_reason: str | None = None
    """Why, in words."""
    rates: NodeRates | None = None
    """How fast it works, once it can; ``None`` from a node that does not say."""
    can_pause: bool = False
    """Lets one generation stand still for another, see ``Assign.pauses``."""
    cache_bytes: int = 0
    """How many bytes it gives to the mesh's memory; 0 = it only reads."""
    holds: Literal["all", "top"] = "all"
    """``top``: it has the upper layers of ``model`` only, so it computes no feature maps."""
    top_layers: int | None = None
    """Of a node that holds the top: so many layers at most."""
    features_profile: str | None = None
    """Precision and numerics of the feature maps it computes, once known: two nodes with the same profile
    compute the same bits, so one may use the other's."""

    def __post_init__(self) -> None:
        check_id("node", self.node)
        check_count("incarnation", self.incarnation)
        check_count("port", self.port, 65535)
        check_count("slots", self.slots, 1024)
        for name in self.also_called:
            check_text("also_called", name, 256)
        if len(self.also_called) > MODEL_NAMES_MAX:
            raise ValueError("too many names of one model")
        check_text("precision", self.precision, 200)
        check_text("precision_reason", self.precision_reason, 2000)
        check_count("cache_bytes", self.cache_bytes)
        check_count("top_layers", self.top_layers or 0, 1024)
        check_text("features_profile", self.features_profile, 512)
        if len(self.addresses) > ADDRESSES_MAX or len(self.adapters) > ADAPTERS_MAX:
            raise ValueError("too many addresses or adapters in one node's info")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """Every second, not retained: proof of life and how the node is doing now."""

    node: NodeId
    incarnation: int
    ready: bool
    """Able to start an attempt now: model loaded, not draining."""
    activity: str
    """What it does, in words: ``loading SmolLM2-135M-Instruct (43 %)``, ``idle``, ``2 tasks``."""
    running: int
    cpu_percent: float
    memory_free_bytes: int
    rss_bytes: int
    tokens_per_s: float
    """Generated by this node over the last few seconds, all tasks together."""
    temperature_c: float | None = None

    def __post_init__(self) -> None:
        check_id("node", self.node)
        check_count("incarnation", self.incarnation)
        check_text("activity", self.activity, 200)
        check_seconds("tokens_per_s", self.tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """An operator asks a node to finish what it runs and take nothing new, or to resume.

    With ``leave`` it also stops when idle.
    """

    on: bool
    leave: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHello:
    """What a node answers on its data plane: who it is, and which broker it uses.

    The receiver asks each advertised address for it before believing the advertisement.
    """

    node: NodeId
    boot: Boot
    incarnation: int
    mesh: str
    port: int
    addresses: list[str]
    broker_epoch: int
    """0 = this node knows no broker yet."""
    broker_host: NodeId | None
    broker_addresses: list[str]
    broker_port: int
    broker_connected: bool
    peers: dict[str, str]
    """Other nodes it can vouch for: id -> ``host:port`` of their data plane."""

    def __post_init__(self) -> None:
        check_id("node", self.node)
        check_count("port", self.port, 65535)
        check_count("broker_port", self.broker_port, 65535)
        check_count("broker_epoch", self.broker_epoch)
        if max(len(self.addresses), len(self.broker_addresses)) > ADDRESSES_MAX or len(self.peers) > 256:
            raise ValueError("too many addresses or peers in one hello")
