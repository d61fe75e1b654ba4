"""Where a tuning job's feature maps come from: one backbone (or none), one store, any cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from node.compute.backbone.contract import Backbone
from node.compute.features.choice import FetchOrCompute
from node.compute.features.codec import choose_codec
from node.compute.features.key import space_for
from node.compute.features.maps import FeatureMaps
from node.compute.features.shape import Numerics
from node.compute.features.store import FeatureStore

__all__ = ["FeatureSource", "MapsFactory"]

MapsFactory = Callable[..., FeatureMaps]
"""Called as ``FeatureSource`` is: ``(cut, error=…, n_bytes=…, codec=…)``."""


@dataclass(frozen=True, slots=True)
class FeatureSource:
    """Makes ``FeatureMaps``.

    ``backbone``: ``None`` on a node that holds the top layers only; ``numerics`` are then those of the nodes
    whose features it reads. ``store_bytes``: what the store may hold; with what a task needs, it decides how
    far features are rounded where the task accepts that.
    """

    backbone: Backbone | None
    store: FeatureStore
    backbone_digest: str
    tokenizer_digest: str
    numerics: Numerics
    precision: str
    store_bytes: int
    choice: FetchOrCompute | None = None
    """What learns whether to fetch or to compute; one for all cuts."""
    width: int | None = None
    """Of a row, where there is no backbone to say it."""

    def __call__(
        self, cut: int, *, error: float = 0.0, n_bytes: int = 0, codec: str | None = None
    ) -> FeatureMaps:
        """Maps for adapters whose first layer is ``cut``.

        ``error``: relative error accepted (0: none). ``n_bytes``: what the features take raw. ``codec``:
        what an earlier attempt had, as one run never mixes codecs.

        Raises:
            ConfigError: See ``FeatureMaps`` and ``choose_codec``.
        """
        chosen = codec or choose_codec(error, n_bytes / max(1, self.store_bytes)).codec
        space = space_for(
            cut,
            cut,
            backbone_digest=self.backbone_digest,
            precision=self.precision,
            tokenizer_digest=self.tokenizer_digest,
            numerics=self.numerics.text,
            codec=chosen,
        )
        bound = None if chosen == "raw" else error
        return FeatureMaps(
            self.backbone,
            space,
            self.store,
            numerics=self.numerics,
            error_bound=bound,
            choice=self.choice,
            width=self.width,
        )
