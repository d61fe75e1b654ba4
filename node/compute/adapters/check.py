"""``python -m node.compute.adapters.check ADAPTER MODEL SHA256 NAME``: does an adapter fit this backbone?

A process of its own, because it imports torch, which commands do without. It loads the adapter as a node
would and prints the card it should have as JSON; or says on stderr what is wrong, and ends with 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from mesh.errors import ConfigError
from node.compute.adapters.card import Card, read_card, read_config
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.files import load_adapter

__all__ = ["card_of", "main"]


def card_of(directory: Path, model: Path, sha256: str, name: str) -> Card:
    """
    Raises:
        ConfigError: It is no adapter, or not one for this backbone.
    """
    adapter = load_adapter(directory, BackboneFacts.of(model, sha256))
    card = read_card(directory)
    if card is not None:
        return replace(card, name=name, backbone_sha256=sha256)
    return Card(
        name=name,
        digest=adapter.digest,
        method=str(read_config(directory).get("peft_type", "peft")).lower(),
        task="classify" if adapter.head is not None else "generate",
        first_layer=adapter.first_layer,
        top_layers=adapter.n_layers - adapter.first_layer,
        labels=adapter.head.labels if adapter.head is not None else (),
        backbone_sha256=sha256,
        bytes=sum(path.stat().st_size for path in directory.iterdir() if path.is_file()),
    )


def main() -> int:
    directory, model, sha256, name = sys.argv[1:]
    try:
        print(json.dumps(asdict(card_of(Path(directory), Path(model), sha256, name))))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
