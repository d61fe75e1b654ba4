"""The frozen model: weights, key/value states, and one forward pass for any mix of sequences.

Two implementations of ``Backbone``:

``LlamaBackbone``    our own pass for the Llama family (Llama, Mistral, Qwen2): pre-norm blocks with rotary
                     positions, grouped queries and a gated MLP. No generic machinery between two matrix
                     products: decoding one token reads every weight once, so on a CPU the memory bus is the
                     limit, and whatever else happens per layer is loss.
``GenericBackbone``  any other causal model ``transformers`` can load, one sequence at a time.

Rows of several sequences share one pass (``Segment``: a sequence and its new tokens), which is how a
prompt's piece and the next tokens of other answers go through the weights together. Grouping changes the
order of additions and so the last bits of a logit, never the meaning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from node.compute.linear import Linear

__all__ = [
    "Backbone",
    "GenericBackbone",
    "KeyValues",
    "LlamaBackbone",
    "Segment",
    "best_device",
    "load_backbone",
]

# The longest context served: key/value states of one sequence of SmolLM2 take 46 kB per token, so 8,192
# tokens are 377 MB. A model that could take more is held to this until states can leave the memory.
CONTEXT_TOKENS_MAX = 8192


@dataclass(frozen=True, slots=True)
class Segment:
    """``ids`` go on from where ``states`` end; the pass leaves them there, that many tokens longer."""

    states: Any
    """What the sequence has left in the model; opaque outside its backbone."""
    ids: Sequence[int]


class Backbone(Protocol):
    """What the engine needs of a model."""

    context_tokens: int
    device: str
    weight_bytes: int
    """What one decoding step reads."""

    def states(self, capacity: int) -> Any:
        """Room for ``capacity`` tokens of one sequence."""

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Shapes: result (len(segments), vocabulary), float32 logits after each segment's last token."""


def best_device() -> str:
    """``cuda``, ``mps`` or ``cpu``, whichever is there, in this order."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_backbone(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """The weights in ``directory``, by our own pass where it fits the architecture."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if LlamaBackbone.can_run(config):
        return LlamaBackbone(directory, config, device, dtype)
    return GenericBackbone(directory, device, dtype)


class KeyValues:
    """Attention states of one sequence: preallocated, filled from the front.

    Shapes:
        keys, values: (layers, kv_heads, capacity, head_dim)
        cos, sin:     (capacity, 1, head_dim)  rotary factors of each position

    ``torch.empty`` commits no memory before it is written, so room for ``max_tokens`` that never come
    costs nothing on a CPU.
    """

    __slots__ = ("cos", "keys", "length", "sin", "values")

    def __init__(self, shape: tuple[int, int, int, int], cos: Tensor, sin: Tensor, like: Tensor) -> None:
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.cos, self.sin = cos, sin
        self.length = 0

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])


@dataclass(frozen=True, slots=True)
class _Layer:
    """One block. ``qkv`` and ``gate_up`` are stacked, so that a block is four matrix products."""

    attention_norm: Tensor  # (d,)
    qkv: Linear  # d -> (heads + 2 * kv_heads) * head_dim
    out: Linear  # heads * head_dim -> d
    mlp_norm: Tensor  # (d,)
    gate_up: Linear  # d -> 2 * d_mlp
    down: Linear  # d_mlp -> d


class LlamaBackbone:
    """The Llama family, computed in ``dtype`` with logits in float32."""

    # Rotary kinds whose frequencies do not depend on how long the sequence has become.
    _ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

    def __init__(self, directory: Path, config: Any, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.context_tokens = min(config.max_position_embeddings, CONTEXT_TOKENS_MAX)
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._d_mlp: int = config.intermediate_size
        self._eps: float = config.rms_norm_eps
        self._frequencies, self._rope_scale = _rope(config)

        with _Weights(directory, device, dtype) as weights:
            self._layers = [_layer(weights, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
            self._final_norm = weights["model.norm.weight"].clone()
            tied = config.tie_word_embeddings or "lm_head.weight" not in weights
            self._head = Linear(weights["model.embed_tokens.weight" if tied else "lm_head.weight"])
        # Opened again on purpose: only the rows of tokens that occur are ever read from the file, while
        # the pages of the weights above go when their mapping is closed.
        with _Weights(directory, device, dtype) as weights:
            self._embedding = weights["model.embed_tokens.weight"]  # (vocabulary, d)
        self.weight_bytes = self._head.nbytes + sum(
            linear.nbytes
            for layer in self._layers
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )

    @classmethod
    def can_run(cls, config: Any) -> bool:
        """Whether ``config`` asks for nothing this pass does not do; if in doubt, no."""
        rope = getattr(config, "rope_parameters", None) or {}
        sliding = getattr(config, "sliding_window", None) is not None and getattr(
            config, "use_sliding_window", True
        )
        return (
            config.model_type in ("llama", "mistral", "qwen2")
            and config.hidden_act == "silu"
            and not sliding
            and rope.get("rope_type", "default") in cls._ROPE_TYPES
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and getattr(config, "quantization_config", None) is None
        )

    def states(self, capacity: int) -> KeyValues:
        angles = (
            torch.arange(capacity, dtype=torch.float32)[:, None] * self._frequencies
        )  # (capacity, head_dim/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (capacity, 1, head_dim)
        like = self._embedding
        sin = angles.sin() * self._rope_scale
        # rotate_half negates the upper half of what it moves; the sign is kept in the table instead.
        sin[..., : self._head_dim // 2].neg_()
        return KeyValues(
            (len(self._layers), self._kv_heads, capacity, self._head_dim),
            (angles.cos() * self._rope_scale).to(like),
            sin.to(like),
            like,
        )

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        parts = [(s.states, len(s.ids)) for s in segments]
        for states, n in parts:
            assert n and states.length + n <= states.capacity, "the engine asks for room before it starts"
        ids = torch.tensor([i for s in segments for i in s.ids], device=self.device)
        cos = torch.cat([kv.cos[kv.length : kv.length + n] for kv, n in parts])  # (rows, 1, head_dim)
        sin = torch.cat([kv.sin[kv.length : kv.length + n] for kv, n in parts])
        masks = [_causal_mask(kv.length, n, self._embedding) for kv, n in parts]

        x = self._embedding[ids]  # (rows, d)
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, x, cos, sin, parts, masks)
            x = x + layer.out(attended)
            hidden = F.rms_norm(x, layer.mlp_norm.shape, layer.mlp_norm, self._eps)
            gate, up = layer.gate_up(hidden).split(self._d_mlp, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        for kv, n in parts:
            kv.length += n
        if len(ids) > len(parts):
            ends = torch.tensor([n for _, n in parts], device=self.device).cumsum(0) - 1
            x = x[ends]
        x = F.rms_norm(x, self._final_norm.shape, self._final_norm, self._eps)
        return self._head(x).float()

    def _attention(
        self,
        index: int,
        layer: _Layer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        parts: list[tuple[KeyValues, int]],
        masks: list[Tensor | None],
    ) -> Tensor:
        """Shapes: x (rows, d) -> (rows, heads * head_dim). Appends the rows' keys and values."""
        heads, kv_heads, head_dim = self._heads, self._kv_heads, self._head_dim
        normed = F.rms_norm(x, layer.attention_norm.shape, layer.attention_norm, self._eps)
        qkv = layer.qkv(normed).view(len(x), heads + 2 * kv_heads, head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        qk = qk * cos + qk.roll(head_dim // 2, dims=-1) * sin
        q, k = qk[:, :heads], qk[:, heads:]

        results = []
        start = 0
        for (kv, n), mask in zip(parts, masks, strict=True):
            rows, past, end = slice(start, start + n), kv.length, kv.length + n
            kv.keys[index, :, past:end] = k[rows].transpose(0, 1)
            kv.values[index, :, past:end] = v[rows].transpose(0, 1)
            keys, values = kv.keys[index : index + 1, :, :end], kv.values[index : index + 1, :, :end]
            if n == 1:
                # One new token sees everything: the queries that share a key head stand in for positions,
                # so grouped attention needs no copy of the keys.
                query = q[rows].view(1, kv_heads, heads // kv_heads, head_dim)
                attended = F.scaled_dot_product_attention(query, keys, values)
            else:
                query = q[rows].transpose(0, 1)[None]  # (1, heads, n, head_dim)
                attended = F.scaled_dot_product_attention(
                    query,
                    keys.repeat_interleave(heads // kv_heads, dim=1),
                    values.repeat_interleave(heads // kv_heads, dim=1),
                    attn_mask=mask,
                    is_causal=mask is None,
                ).transpose(1, 2)
            results.append(attended.reshape(n, heads * head_dim))
            start += n
        return results[0] if len(results) == 1 else torch.cat(results)


class _GenericStates:
    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.length = 0


class GenericBackbone:
    """Whatever ``transformers`` can load; correct, and slower than our own pass."""

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self._model.to(device).eval()
        longest = getattr(self._model.config, "max_position_embeddings", None) or CONTEXT_TOKENS_MAX
        self.context_tokens = min(longest, CONTEXT_TOKENS_MAX)
        self.weight_bytes = sum(p.nbytes for p in self._model.parameters())

    def states(self, capacity: int) -> _GenericStates:
        return _GenericStates()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        rows = []
        for segment in segments:
            ids = torch.tensor([list(segment.ids)], device=self.device)
            output = self._model(
                input_ids=ids, past_key_values=segment.states.cache, use_cache=True, logits_to_keep=1
            )
            segment.states.length += len(segment.ids)
            rows.append(output.logits[0, -1].float())
        return torch.stack(rows)


def _rope(config: Any) -> tuple[Tensor, float]:
    """Rotary frequencies (head_dim / 2,) and the factor on sine and cosine, as the config says."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
        return frequencies.float(), float(scale)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def _causal_mask(past: int, n: int, like: Tensor) -> Tensor | None:
    """(n, past + n) for ``n`` new rows after ``past`` others; ``None`` where a kernel needs none."""
    if n == 1 or past == 0:
        return None
    return torch.ones(n, past + n, dtype=torch.bool, device=like.device).tril_(past)


class _Weights:
    """The tensors in a directory's safetensors files by name, read (mapped) one at a time."""

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        index = directory / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        for file in files:
            opened = self._stack.enter_context(safe_open(directory / file, framework="pt", device=device))
            self._file_of.update(dict.fromkeys(opened.keys(), opened))

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._file_of.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor.to(self._dtype)


def _layer(weights: _Weights, prefix: str) -> _Layer:
    def linear(block: str, *names: str) -> Linear:
        """Several matrices of one input as one: their rows, one after another."""
        stems = [f"{prefix}{block}.{name}" for name in names]
        matrix = torch.cat([weights[stem + ".weight"] for stem in stems])
        biases = [weights[stem + ".bias"] for stem in stems if stem + ".bias" in weights]
        assert len(biases) in (0, len(stems)), f"{prefix}{block}: only some of {names} have a bias"
        return Linear(matrix, torch.cat(biases) if biases else None)

    return _Layer(
        # Clones, so that no small tensor keeps the whole file mapped.
        attention_norm=weights[prefix + "input_layernorm.weight"].clone(),
        qkv=linear("self_attn", "q_proj", "k_proj", "v_proj"),
        out=linear("self_attn", "o_proj"),
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"].clone(),
        gate_up=linear("mlp", "gate_proj", "up_proj"),
        down=linear("mlp", "down_proj"),
    )
