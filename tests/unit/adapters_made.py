"""Adapter directories for tests that need no model: right in form, and worth nothing."""

from __future__ import annotations

import json
from pathlib import Path

from node.durable import replace_directory

__all__ = ["put_adapter"]


def put_adapter(
    shelf: Path, name: str, *, weights: bytes = b"w", card: dict[str, object] | None = None
) -> Path:
    """As ``tune`` does it: written beside, moved into place."""
    draft = shelf / f".{name}.draft"
    draft.mkdir(parents=True)
    (draft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    header = json.dumps({"__metadata__": {"w": weights.hex()}}).encode()
    (draft / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    if card is not None:
        (draft / "edgemesh.json").write_text(json.dumps(card))
    replace_directory(draft, shelf / name)
    return shelf / name
