"""The top layers for serving, loaded when the first text comes: a node that only tunes does without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mesh.errors import ConfigError
from mesh.units import bytes_text
from node.compute.backbone.contract import KeyValues, Pass, Segment
from node.compute.backbone.deltas import Adapter
from node.compute.backbone.llama import CONTEXT_TOKENS_MAX, LlamaBackbone
from node.profile import memory_free_bytes

__all__ = ["TopBackbone"]


class TopBackbone:
    """As ``LlamaBackbone`` from layer ``first_layer`` on, in the format that ``use`` was told last.

    Rows must be computed on as they began: above features of an 8-bit model its own 8-bit layers follow.
    """

    def __init__(self, directory: Path, config: Any, device: str, top_layers: int) -> None:
        self.n_layers: int = config.num_hidden_layers
        self.first_layer = max(0, self.n_layers - top_layers)
        self.width: int = config.hidden_size
        self.context_tokens: int = min(config.max_position_embeddings, CONTEXT_TOKENS_MAX)
        self.device = device
        self._directory = directory
        self._config = config
        self._loaded: LlamaBackbone | None = None

    @property
    def precision(self) -> str:
        """Empty as long as nothing is loaded."""
        return self._loaded.precision if self._loaded is not None else ""

    @property
    def held_bytes(self) -> int:
        return self._loaded.held_bytes if self._loaded is not None else 0

    def use(self, precision: str) -> None:
        """Have the layers in this format.

        Raises:
            ConfigError: There is no such format, or no memory for it now.
        """
        if self.precision == precision:
            return
        if precision not in ("fp32", "bf16", "fp16", "int8", "int4"):
            raise ConfigError(f"features of an unknown weight format {precision[:40]!r}: update this node")
        self._loaded = None
        needed, free = self._needed_bytes(), memory_free_bytes()
        if needed > free:
            raise ConfigError(
                f"the top {self.n_layers - self.first_layer} layers need {bytes_text(needed)}, "
                f"{bytes_text(free)} free: end other programs, or hold fewer layers (--top-layers)"
            )
        self._loaded = LlamaBackbone(
            self._directory, self._config, self.device, precision, first_layer=self.first_layer
        )

    def _needed_bytes(self) -> int:
        """While they are read: in float32, whatever they become."""
        config, d = self._config, self.width
        head_dim = getattr(config, "head_dim", None) or d // config.num_attention_heads
        attention = 2 * d * head_dim * (config.num_attention_heads + config.num_key_value_heads)
        layer = attention + 3 * d * config.intermediate_size
        return int(4 * (self.n_layers - self.first_layer) * layer)

    def states(self, capacity: int) -> KeyValues:
        return self._here.states(capacity)

    def forward(self, segments: Sequence[Segment]) -> Pass:
        found: Pass = self._here.forward(segments)
        return found

    def logits(self, rows: Tensor, adapters: Sequence[Adapter | None] = ()) -> Tensor:
        return self._here.logits(rows, adapters)

    @property
    def _here(self) -> LlamaBackbone:
        assert self._loaded is not None, "use() comes first"
        return self._loaded
