"""What a task read of the mesh's feature maps, in few words: enough to ask any node how much of it it has."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.messages import FeaturesHeld
from mesh.messages.output import SAMPLE_KEYS_MAX
from node.compute.features.entry import bytes_of
from node.compute.features.key import BLOCK_TOKENS
from node.compute.features.maps import FeatureMaps

__all__ = ["features_held"]


def features_held(
    maps: FeatureMaps, texts: Sequence[Sequence[int]], *, top_layers: int, profile: str
) -> FeaturesHeld:
    """``texts``: all of them, each once. ``profile``: how the features are computed."""
    n_tokens = n_bytes = 0
    lengths: dict[int, int] = {}
    for text in texts:
        n_tokens += len(text)
        for start in range(0, len(text), BLOCK_TOKENS):
            n = min(BLOCK_TOKENS, len(text) - start)
            lengths[n] = lengths.get(n, 0) + 1
    if maps.width:
        n_bytes = sum(count * bytes_of(maps.space.codec, n, maps.width) for n, count in lengths.items())
    n_keys = sum(lengths.values())
    every = max(1, -(-n_keys // SAMPLE_KEYS_MAX))
    keys = [key for text in texts for key in maps.space.keys(text)][::every]
    return FeaturesHeld(
        top_layers=top_layers,
        profile=profile,
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        codec=maps.space.codec,
        sample_keys=[key.hex() for key in keys],
        n_found=maps.tokens_found - maps.tokens_fetched,
        n_fetched=maps.tokens_fetched,
        n_computed=maps.tokens_computed,
    )
