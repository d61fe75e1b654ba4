"""How fast this node works, as far as it can be known without measuring now: kept, or guessed.

What ``self_benchmark`` measured is kept beside the model, by all it depends on, so that the next start has
it at once. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mesh.messages import NodeRates
from mesh.messages.node import RATE_MAX, RATED_TOP_LAYERS, SLOWDOWN_MAX
from node import __version__
from node.compute.backbone.precision import Speed, machine_key
from node.durable import write_durably

__all__ = [
    "RATES",
    "TUNE_PASSES",
    "RatedAs",
    "echo_rates",
    "guessed_rates",
    "read_rates",
    "slowed",
    "write_rates",
]

log = logging.getLogger(__name__)

RATES = "rates.json"
"""File in a prepared model's directory."""

_KEPT_MAX = 16  # ways to run one model on one machine: formats times numbers of threads that were tried

# Where nothing was measured. Decoding reads every weight once a token, and a small board's memory gives
# about this much; a prompt's token costs a third, and a further row a third of a step (SmolLM2 on two cores:
# 0.2 to 0.4).
_GUESSED_BYTES_PER_S = 5e9
_GUESSED_PREFILL = 3.0
_GUESSED_ROW_COST = 0.33
_GUESSED_LOAD_S = 0.1
TUNE_PASSES = 2.2
"""Forward passes that a forward and a backward one take."""
_ECHO_TOKENS_PER_S = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedAs:
    """What measured rates are true for."""

    digest: str
    """SHA-256 of the weights."""
    precision: str
    device: str
    threads: int

    @property
    def key(self) -> str:
        """The machine and this program's version included."""
        return json.dumps({**asdict(self), "machine": machine_key(), "version": __version__}, sort_keys=True)


def read_rates(home: Path, rated_as: RatedAs) -> NodeRates | None:
    """What was measured on a calm machine for exactly this; ``None`` if nothing was."""
    try:
        return NodeRates(**_stored(home)[rated_as.key])
    except (KeyError, TypeError, ValueError):
        return None


def write_rates(home: Path, rated_as: RatedAs, rates: NodeRates) -> None:
    """Kept beside the model, whole or not at all; a full disk is a line in the log."""
    stored = _stored(home)
    stored.pop(rated_as.key, None)
    stored[rated_as.key] = asdict(rates)
    newest = dict(list(stored.items())[-_KEPT_MAX:])
    try:
        write_durably(home / RATES, (json.dumps(newest, indent=2) + "\n").encode())
    except OSError as error:
        log.warning("measured rates could not be kept in %s: %s", home, error)


def _stored(home: Path) -> dict[str, Any]:
    try:
        stored = json.loads((home / RATES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def guessed_rates(weight_bytes: int, n_layers: int, can_tune: bool, speed: Speed | None = None) -> NodeRates:
    """Before anything was measured; ``speed``: what the weight format was measured to do, if it was.

    ``weight_bytes``: what a decoding step reads.
    """
    decode = speed.decode_tok_s if speed else _GUESSED_BYTES_PER_S / max(1, weight_bytes)
    prefill = speed.prefill_tok_s if speed else _GUESSED_PREFILL * decode
    below = max(1, n_layers - RATED_TOP_LAYERS)
    top = min(n_layers, RATED_TOP_LAYERS)
    return NodeRates(
        prefill_tokens_per_s=_rate(prefill),
        decode_tokens_per_s=_rate(decode),
        row_cost=_GUESSED_ROW_COST,
        features_tokens_per_s=_rate(prefill * n_layers / below) if can_tune else None,
        tune_tokens_per_s=_rate(prefill * n_layers / top / TUNE_PASSES) if can_tune else None,
        adapter_load_s=_GUESSED_LOAD_S if can_tune else 0.0,
        origin="guessed",
    )


def echo_rates(tokens_per_s: float | None) -> NodeRates:
    """Of the built-in model: it gives words by the clock, to any number of answers at once."""
    return NodeRates(
        prefill_tokens_per_s=RATE_MAX,
        decode_tokens_per_s=_rate(tokens_per_s or _ECHO_TOKENS_PER_S),
        row_cost=0.0,
    )


def slowed(rates: NodeRates, slowdown: float) -> NodeRates:
    """As others see a node that plays a device ``slowdown`` times slower."""
    assert 1 <= slowdown <= SLOWDOWN_MAX

    def slow(rate: float | None) -> float | None:
        return None if rate is None else rate / slowdown

    return replace(
        rates,
        prefill_tokens_per_s=rates.prefill_tokens_per_s / slowdown,
        decode_tokens_per_s=rates.decode_tokens_per_s / slowdown,
        features_tokens_per_s=slow(rates.features_tokens_per_s),
        tune_tokens_per_s=slow(rates.tune_tokens_per_s),
        adapter_load_s=rates.adapter_load_s * slowdown,
        emulated_slowdown=slowdown,
    )


def _rate(tokens_per_s: float) -> float:
    """Within what may be said."""
    return min(max(tokens_per_s, 1e-6), RATE_MAX)
