"""How fast one node is: what it measured of itself, or what such a node usually is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh.messages import NodeInfo

__all__ = ["PARTS", "Rates", "rates_of"]

PARTS: Final = ("adapter_load", "features", "prefill", "decode", "tune", "fetch")
"""Parts of a service time, in the order of every array of parts. The first two are spared by reuse; what is
fetched takes the place of ``features``."""

FETCH_BYTES_PER_S: Final = 20e6
"""Of feature maps from other nodes, before any were: a home network's radio, half of what it says it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Tokens per second with nothing else running, as others see the node (an emulated slowdown included).

    >>> Rates(decode_tokens_per_s=20).scaled(0.5).decode_tokens_per_s
    10.0
    """

    prefill_tokens_per_s: float = 100.0
    decode_tokens_per_s: float = 10.0
    row_cost: float = 0.2
    """A step with ``n`` rows takes ``1 + (n - 1) * row_cost`` of a step alone."""
    features_tokens_per_s: float = 100.0
    tune_tokens_per_s: float = 100.0
    """Forward and backward."""
    adapter_load_s: float = 0.1
    fetch_bytes_per_s: float = FETCH_BYTES_PER_S
    emulated_slowdown: float = 1.0
    """Only told to people; it is in the other numbers already."""
    is_measured: bool = True
    """``False``: a guess by the kind of device. Nothing is refused on the strength of a guess."""

    def __post_init__(self) -> None:
        speeds = (
            self.prefill_tokens_per_s,
            self.decode_tokens_per_s,
            self.features_tokens_per_s,
            self.tune_tokens_per_s,
            self.fetch_bytes_per_s,
            self.emulated_slowdown,
        )
        if not all(0 < speed < float("inf") for speed in speeds):
            raise ValueError(f"rates must be positive and finite, got {self}")
        if not (0 <= self.row_cost < float("inf") and 0 <= self.adapter_load_s < float("inf")):
            raise ValueError(f"row_cost and adapter_load_s must be finite and not negative, got {self}")

    @property
    def unit_s(self) -> tuple[float, ...]:
        """Seconds per unit of work, in the order of ``PARTS``."""
        return (
            self.adapter_load_s,
            1 / self.features_tokens_per_s,
            1 / self.prefill_tokens_per_s,
            1 / self.decode_tokens_per_s,
            1 / self.tune_tokens_per_s,
            1 / self.fetch_bytes_per_s,
        )

    def scaled(self, speed: float) -> Rates:
        """The same node ``speed`` times as fast."""
        return Rates(
            prefill_tokens_per_s=self.prefill_tokens_per_s * speed,
            decode_tokens_per_s=self.decode_tokens_per_s * speed,
            row_cost=self.row_cost,
            features_tokens_per_s=self.features_tokens_per_s * speed,
            tune_tokens_per_s=self.tune_tokens_per_s * speed,
            adapter_load_s=self.adapter_load_s / speed,
            fetch_bytes_per_s=self.fetch_bytes_per_s,
            emulated_slowdown=self.emulated_slowdown,
            is_measured=self.is_measured,
        )


# A small model (0.1 to 1 B) on four cores, and on a card of the last years. Only the first tasks on a node
# that measured nothing are placed by these; then the corrections have learned.
_CPU: Final = Rates(is_measured=False)
_ACCELERATED: Final = Rates(
    prefill_tokens_per_s=5000.0,
    decode_tokens_per_s=60.0,
    row_cost=0.02,
    features_tokens_per_s=5000.0,
    tune_tokens_per_s=2000.0,
    is_measured=False,
)


def rates_of(info: NodeInfo) -> Rates:
    """What a node says of itself, or a guess by its device where it says nothing."""
    guess = _ACCELERATED if info.device in ("cuda", "mps") else _CPU
    said = info.rates
    if said is None:
        return guess
    features = said.features_tokens_per_s or said.prefill_tokens_per_s
    return Rates(
        prefill_tokens_per_s=said.prefill_tokens_per_s,
        decode_tokens_per_s=said.decode_tokens_per_s,
        row_cost=said.row_cost,
        features_tokens_per_s=features,
        # A backward pass costs about two forward passes; a node that trains nothing is never asked to.
        tune_tokens_per_s=said.tune_tokens_per_s or features / 3,
        adapter_load_s=said.adapter_load_s,
        emulated_slowdown=said.emulated_slowdown,
        is_measured=said.origin != "guessed",
    )
