"""An adapter's digest, and its card: what PEFT's own files do not say.

    <name>/adapter_config.json         PEFT's: method, rank, modules
           adapter_model.safetensors   PEFT's: the weights
           edgemesh.json               ours, optional: labels, cut, what it was made from

The digest is the adapter's identity: two directories with one digest compute the same. So it covers the
configuration and every tensor, and leaves out what says where the adapter was made
(``base_model_name_or_path``) and what Python's sets put in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from mesh.messages import AdapterCard
from node.compute.adapters.tensors import bytes_of, read_header
from node.durable import write_durably

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Card",
    "digest_of",
    "read_card",
    "read_config",
    "write_card",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "edgemesh.json"

# PEFT writes 2 kB; patterns of ranks by module can grow it. A card is its labels.
JSON_BYTES_MAX = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What ``edgemesh.json`` says."""

    name: str
    digest: str
    """``digest_of`` the directory when the card was written; a card of other weights is worth nothing."""
    method: str
    task: str
    first_layer: int
    top_layers: int
    labels: tuple[str, ...] = ()
    backbone_sha256: str = ""
    spec_digest: str = ""
    """Of the tuning job that made it."""
    metric: float | None = None
    bytes: int = 0
    made: str = ""
    """How, where that is not the usual way."""

    def listing(self) -> AdapterCard:
        """The same as results and listings show it."""
        return AdapterCard(
            name=self.name,
            digest=self.digest,
            method=self.method,
            top_layers=self.top_layers,
            first_layer=self.first_layer,
            bytes=self.bytes,
            task=self.task,
            labels=list(self.labels),
            metric=self.metric,
            made=self.made,
        )


def digest_of(directory: Path) -> str:
    """BLAKE2b-256 of an adapter directory, as hexadecimal digits.

    Raises:
        ConfigError: It holds no adapter, or a damaged one.
    """
    config = read_config(directory)
    config.pop("base_model_name_or_path", None)
    # ``target_modules`` and its kind are sets in PEFT: their order in the file depends on the process.
    unordered = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in config.items()
    }
    canonical = json.dumps(unordered, sort_keys=True, separators=(",", ":")).encode()
    path = directory / WEIGHTS_FILE
    digest = hashlib.blake2b(digest_size=32)
    digest.update(len(canonical).to_bytes(8, "little") + canonical)
    for name, tensor, pieces in bytes_of(path, read_header(path)):
        entry = json.dumps([name, tensor.dtype, list(tensor.shape)], separators=(",", ":")).encode()
        digest.update(len(entry).to_bytes(8, "little") + entry + tensor.n_bytes.to_bytes(8, "little"))
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def read_config(directory: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter.

    Raises:
        ConfigError: It is missing or no JSON object.
    """
    return _read_json(
        directory / CONFIG_FILE, "an adapter is a directory as peft's save_pretrained writes it"
    )


def read_card(directory: Path) -> Card | None:
    """The card, or ``None`` where there is none: an adapter made elsewhere.

    Raises:
        ConfigError: There is one, and it is damaged.
    """
    path = directory / CARD_FILE
    if not path.exists():
        return None
    advice = "remove the file and the adapter is served without its labels' names"
    found = _read_json(path, advice)
    try:
        return Card(
            name=_text(found, "name"),
            digest=_text(found, "digest"),
            method=_text(found, "method"),
            task=_text(found, "task"),
            first_layer=_count(found, "first_layer"),
            top_layers=_count(found, "top_layers"),
            labels=tuple(_labels(found)),
            backbone_sha256=_text(found, "backbone_sha256", ""),
            spec_digest=_text(found, "spec_digest", ""),
            metric=_metric(found),
            bytes=_count(found, "bytes", 0),
            made=_text(found, "made", ""),
        )
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; {advice}") from error


def write_card(directory: Path, card: Card) -> None:
    """Atomic, and durable on return."""
    text = json.dumps(asdict(card), indent=1, sort_keys=True) + "\n"
    write_durably(directory / CARD_FILE, text.encode())


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): {advice}") from error
    if len(content) > JSON_BYTES_MAX:
        raise ConfigError(f"{path} is larger than {JSON_BYTES_MAX:,} bytes: {advice}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {advice}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object: {advice}")
    return found


def _text(found: Mapping[str, Any], key: str, otherwise: str | None = None) -> str:
    value = found.get(key, otherwise)
    if not isinstance(value, str) or len(value) > 1024:
        raise ValueError(f"{key!r} must be a text")
    return value


def _count(found: Mapping[str, Any], key: str, otherwise: int | None = None) -> int:
    value = found.get(key, otherwise)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{key!r} must be a whole number, 0 or more")
    return value


def _labels(found: Mapping[str, Any]) -> list[str]:
    value = found.get("labels", [])
    if not isinstance(value, list) or any(not isinstance(label, str) for label in value):
        raise ValueError("'labels' must be a list of texts")
    return value


def _metric(found: Mapping[str, Any]) -> float | None:
    value = found.get("metric")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError("'metric' must be a number or null")
    return value
