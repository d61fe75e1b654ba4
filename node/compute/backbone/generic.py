"""Whatever ``transformers`` can load; correct, one sequence at a time, and slower than our own pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from node.compute.backbone.contract import Pass, Segment
from node.compute.backbone.deltas import Adapter
from node.compute.backbone.linear import compute_dtype, numerics
from node.compute.backbone.llama import CONTEXT_TOKENS_MAX

__all__ = ["GenericBackbone"]


class _GenericStates:
    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.length = 0


class GenericBackbone:
    """Whatever ``transformers`` can load; correct, and slower than our own pass."""

    def __init__(self, directory: Path, device: str, precision: str) -> None:
        self.device = device
        self.precision = precision
        self.numerics = numerics(precision, device)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=compute_dtype(precision),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        self._model.to(device).eval()
        longest = getattr(self._model.config, "max_position_embeddings", None) or CONTEXT_TOKENS_MAX
        self.context_tokens = min(longest, CONTEXT_TOKENS_MAX)
        self._body = self._model.base_model
        self._head = self._model.get_output_embeddings()
        self.n_layers: int = self._model.config.get_text_config().num_hidden_layers
        self.width: int = self._model.config.get_text_config().hidden_size
        self.weight_bytes = self.held_bytes = sum(p.nbytes for p in self._model.parameters())

    def states(self, capacity: int) -> _GenericStates:
        return _GenericStates()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(
        self,
        segments: Sequence[Segment],
        *,
        keep_at: Sequence[int] = (),
        before_layer: Callable[[int], None] | None = None,
    ) -> Pass:
        assert not keep_at and before_layer is None, "a generic model cannot be stopped on its way"
        wanted = []
        for segment in segments:
            assert segment.adapter is None and segment.hidden is None, "the engine refuses these before"
            ids = torch.tensor([list(segment.ids)], device=self.device)
            output = self._body(input_ids=ids, past_key_values=segment.states.cache, use_cache=True)
            segment.states.length += len(segment.ids)
            wanted.append(output.last_hidden_state[0, len(segment.ids) - segment.n_wanted :])
        return Pass(rows=torch.cat(wanted))

    def features(self, segments: Sequence[Segment], cut: int) -> Tensor:
        raise AssertionError("a generic model has no cut: the engine refuses before")

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, rows: Tensor, adapters: Sequence[Adapter | None] = ()) -> Tensor:
        logits: Tensor = self._head(rows)
        return logits.float()
