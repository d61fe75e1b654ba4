"""Our own pass for the Llama family (Llama, Mistral, Qwen2): pre-norm blocks with rotary positions,
grouped queries and a gated MLP.

No generic machinery between two matrix products: decoding one token reads every weight once, so on a CPU
the memory bus is the limit, and whatever else happens per layer is loss. Rows of several sequences share
one pass, which is how a prompt's piece, the next tokens of other answers and rows that enter at a cut go
through the weights together. Grouping changes the order of additions and so the last bits of a logit,
never the meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from node.compute.backbone.attention import Place, attend
from node.compute.backbone.contract import KeyValues, Pass, Segment
from node.compute.backbone.deltas import NOTHING, Adapter, AdapterRows, Norm, Slot
from node.compute.backbone.embedding import Embedding
from node.compute.backbone.linear import Linear, compute_dtype, make_linear, numerics
from node.compute.backbone.step import Slabs, Step, block_script
from node.compute.backbone.weights import Weights

__all__ = ["CONTEXT_TOKENS_MAX", "LlamaBackbone"]

# The longest context served: key/value states of one sequence of SmolLM2 take 46 kB per token, so 8,192
# tokens are 377 MB. A model that could take more is held to this until states can leave the memory.
CONTEXT_TOKENS_MAX = 8192

_ROTARY_TOKENS = 512  # rotary factors made at the start; more as sequences ask for more


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
    """The Llama family with its weights in ``precision``, and logits in float32.

    ``numerics`` names what the last bits of a row depend on beside weights and tokens; ``held_bytes`` is
    what the weights take in memory. ``first_layer``: only the layers from there on are loaded, and the head
    once somebody asks for it; every segment then brings its rows, and enters there or above.
    """

    # Rotary kinds whose frequencies do not depend on how long the sequence has become.
    _ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})

    def __init__(
        self, directory: Path, config: Any, device: str, precision: str, *, first_layer: int = 0
    ) -> None:
        self.device = device
        self.first_layer = first_layer
        self.context_tokens = min(config.max_position_embeddings, CONTEXT_TOKENS_MAX)
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._d_mlp: int = config.intermediate_size
        self._eps: float = config.rms_norm_eps
        self._frequencies, self._rope_scale = _rope(config)
        self.n_layers: int = config.num_hidden_layers
        self.width: int = config.hidden_size
        self.precision = precision
        self.numerics = numerics(precision, device)
        dtype = compute_dtype(precision)

        self._directory = directory
        self._is_tied: bool = config.tie_word_embeddings
        self._own_head: Linear | None = None
        with Weights(directory, device, dtype) as weights:
            held = range(first_layer, self.n_layers)
            self._layers = {i: _layer(weights, f"model.layers.{i}.", precision) for i in held}
            self._final_norm = weights["model.norm.weight"].clone()
        if not first_layer:
            self._own_head = self._load_head()
        self.embedding = Embedding(
            directory, "model.embed_tokens.weight", device, dtype, is_used=not first_layer
        )
        has_slabs = device == "cpu" and not first_layer
        self._slabs = Slabs(self.n_layers, self._kv_heads, self._head_dim, dtype) if has_slabs else None
        self._scripts = {
            index: block_script((layer.qkv, layer.out, layer.gate_up, layer.down), dtype)
            for index, layer in self._layers.items()
        }
        self._cos, self._sin = self._rotary(_ROTARY_TOKENS)
        head_bytes = self._own_head.nbytes if self._own_head is not None else 0
        self.weight_bytes = head_bytes + sum(
            linear.nbytes
            for layer in self._layers.values()
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        )
        norms = [
            self._final_norm,
            *(n for layer in self._layers.values() for n in (layer.attention_norm, layer.mlp_norm)),
        ]
        self.held_bytes = self.weight_bytes + self.embedding.nbytes + sum(norm.nbytes for norm in norms)

    def _load_head(self) -> Linear:
        with Weights(self._directory, self.device, compute_dtype(self.precision)) as weights:
            tied = self._is_tied or "lm_head.weight" not in weights
            # 4 bits cost the head 10 % of perplexity and the layers nothing: it has 8 then.
            return make_linear(
                weights["model.embed_tokens.weight" if tied else "lm_head.weight"],
                None,
                "int8" if self.precision == "int4" else self.precision,
            )

    @property
    def _head(self) -> Linear:
        """Loaded by who needs it where only the top of the model is: a class head does without."""
        if self._own_head is None:
            self._own_head = self._load_head()
        return self._own_head

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

    def states(self, capacity: int, shared: Sequence[Place | None] = ()) -> KeyValues:
        """Room for ``capacity`` tokens; ``shared``: of each layer the first positions, computed before."""
        if len(self._cos) < capacity:
            self._cos, self._sin = self._rotary(min(2 * capacity, max(capacity, self.context_tokens)))
        cos, sin = self._cos[:capacity], self._sin[:capacity]
        is_alone = all(place is None for place in shared)
        seat = self._slabs.seat(capacity) if is_alone and self._slabs is not None else None
        if seat is not None:
            lying = seat.states[:, :capacity].permute(2, 0, 3, 1, 4)  # (2, layers, kv_heads, capacity, d)
            return KeyValues([*lying[0]], [*lying[1]], cos, sin, shared, seat)
        like = self.embedding.like
        starts = [0 if place is None else place[0].shape[1] for place in shared] or [0] * self.n_layers
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for start, layers in groupby(starts):  # one piece of memory for all layers that begin alike
            shape = (len(list(layers)), self._kv_heads, capacity - start, self._head_dim)
            keys += torch.empty(shape, dtype=like.dtype, device=like.device)
            values += torch.empty(shape, dtype=like.dtype, device=like.device)
        return KeyValues(keys, values, cos, sin, shared)

    def _rotary(self, n: int) -> tuple[Tensor, Tensor]:
        """Shapes: two of (n, 1, head_dim)."""
        angles = torch.arange(n, dtype=torch.float32)[:, None] * self._frequencies  # (n, head_dim/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        sin = angles.sin() * self._rope_scale
        # rotate_half negates the upper half of what it moves; the sign is kept in the table instead.
        sin[..., : self._head_dim // 2].neg_()
        return (angles.cos() * self._rope_scale).to(self.embedding.like), sin.to(self.embedding.like)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forward(
        self,
        segments: Sequence[Segment],
        *,
        keep_at: Sequence[int] = (),
        before_layer: Callable[[int], None] | None = None,
    ) -> Pass:
        keep = frozenset(keep_at)
        kept: dict[int, Tensor] = {}
        rows = _Rows(self, segments)
        for index in range(self.n_layers):
            rows.enter(index)
            if index in keep:
                kept[index] = rows.x[: rows.n_began]
            if rows.parts:
                if before_layer is not None:
                    before_layer(index)
                self._block(index, rows, prune=index == self.n_layers - 1 and self.n_layers not in keep)
        if self.n_layers in keep:
            kept[self.n_layers] = rows.x
        rows.end()
        return Pass(rows=self._final(rows), kept=kept)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def features(self, segments: Sequence[Segment], cut: int) -> Tensor:
        assert not self.first_layer, "feature maps are made by the layers that are not here"
        rows = _Rows(self, segments)
        if not cut:
            rows.enter(0)  # with no layer below, features are what the embedding gives
        for index in range(cut):
            rows.enter(index)
            self._block(index, rows)
        rows.end()
        return rows.x

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, rows: Tensor, adapters: Sequence[Adapter | None] = ()) -> Tensor:
        at_head = (self.n_layers, "head")
        own = [a if a is not None and at_head in a.deltas else None for a in adapters]
        deltas = AdapterRows.of([(adapter, 1) for adapter in own])
        head = self._head
        logits = head(rows) if deltas is None else deltas.linear(self.n_layers, "head", head, rows)
        return logits.float()

    # ── one block ───────────────────────────────────────────────────────────────────────────────────

    def _block(self, index: int, rows: _Rows, *, prune: bool = False) -> None:
        """``rows.x`` through one layer, appending the rows' keys and values to their states.

        ``prune``: nothing comes after this layer, so rows that nobody wants leave their states and go.
        """
        layer, deltas, x = self._layers[index], rows.deltas, rows.x
        eps = self._eps
        script = self._scripts[index]
        adapted = NOTHING if deltas is None else deltas.for_script(index, x.dtype)
        if rows.step is not None and adapted is not None and script is not None:
            block, weights, biases = script
            norms = [layer.attention_norm, layer.mlp_norm]
            place = (rows.cos, rows.sin, index, self._heads, self._kv_heads)
            rows.x = block(x, norms, eps, weights, biases, *place, *adapted, *rows.step.arguments)
            return

        def linear(slot: Slot, base: Linear, y: Tensor) -> Tensor:
            return base(y) if deltas is None else deltas.linear(index, slot, base, y)

        def norm(which: Norm, weight: Tensor, y: Tensor) -> Tensor:
            if deltas is None:
                return F.rms_norm(y, weight.shape, weight, eps)
            return deltas.norm(index, which, weight, y, eps)

        qkv = linear("qkv", layer.qkv, norm("attention", layer.attention_norm, x))
        if prune and rows.prune():
            x, deltas = rows.x, rows.deltas
        attended = self._attention(index, qkv, rows)
        if not len(x):
            return
        x = x + linear("out", layer.out, attended)
        normed = norm("mlp", layer.mlp_norm, x)
        gate, up = linear("gate_up", layer.gate_up, normed).split(self._d_mlp, dim=-1)
        rows.x = x + linear("down", layer.down, F.silu(gate).mul_(up))

    def _attention(self, index: int, qkv: Tensor, rows: _Rows) -> Tensor:
        """Shapes: qkv (rows, (heads + 2 * kv_heads) * head_dim) -> (rows, heads * head_dim)."""
        heads, kv_heads, head_dim = self._heads, self._kv_heads, self._head_dim
        if rows.step is not None:
            return rows.step.attend(qkv, rows.cos, rows.sin, index, heads, kv_heads)
        qkv = qkv.view(-1, heads + 2 * kv_heads, head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        qk = qk * rows.cos + qk.roll(head_dim // 2, dims=-1) * rows.sin
        q, k = qk[:, :heads], qk[:, heads:]

        results: dict[int, Tensor] = {}
        start = 0
        for at, (kv, n) in zip(rows.order, rows.parts, strict=True):
            past, end = kv.length, start + n
            kv.append(index, past, k[start:end].transpose(0, 1), v[start:end].transpose(0, 1))
            n_asking = rows.n_wanted(at) if rows.is_pruned else n
            if n_asking:
                results[at] = _attended(q[end - n_asking : end], kv.seen(index, past + n))
            start = end
        in_order = [results[at] for at in (sorted(results) if rows.is_pruned else rows.order)]
        return _joined(in_order) if in_order else qkv.new_empty(0, heads * head_dim)

    def _final(self, rows: _Rows) -> Tensor:
        """The wanted rows after the final norm."""
        x = rows.x[rows.wanted()] if rows.wants_some and not rows.is_pruned else rows.x
        weight, deltas = self._final_norm, rows.wanted_deltas
        if deltas is None or not len(x):
            return F.rms_norm(x, weight.shape, weight, self._eps)
        return deltas.norm(self.n_layers, "final", weight, x, self._eps)


class _Rows:
    """The rows of one pass: those on their way, and those that enter at a later layer.

    ``parts`` are (states, number of rows) of the segments on their way, in the order of their rows; rows
    that enter later come behind those already there, so the segments are put in the order of entrance.
    """

    def __init__(self, backbone: LlamaBackbone, segments: Sequence[Segment]) -> None:
        for segment in segments:
            states, n = segment.states, len(segment.ids)
            assert n and states.length + n <= states.capacity, "the engine asks for room before it starts"
            assert (segment.hidden is None) == (segment.enters == 0), "who enters late brings its rows"
            assert segment.adapter is None or segment.enters <= segment.adapter.first_layer, (
                "above its first layer an adapter's rows are nobody else's"
            )
        self._backbone = backbone
        self._segments = segments
        self._order = sorted(range(len(segments)), key=lambda at: segments[at].enters)  # stable
        self._n_in = 0
        self.parts: list[tuple[KeyValues, int]] = []
        self.is_pruned = False
        """Only wanted rows are left, in the order of the segments."""
        self.deltas: AdapterRows | None = None
        self.step: Step | None = None
        """Where the states are, if every segment is one token and all came in at once."""
        self.n_began = 0
        self.x = backbone.embedding.like

    def enter(self, layer: int) -> None:
        """Take in the segments whose first layer this is."""
        due = []
        while self._n_in < len(self._order) and self._segments[self._order[self._n_in]].enters == layer:
            due.append(self._segments[self._order[self._n_in]])
            self._n_in += 1
        self.n_began = sum(n for _, n in self.parts) if layer else 0
        if not due:
            return
        like = self._backbone.embedding.like
        new = []
        for segment in due:
            if segment.hidden is None:
                new.append(self._backbone.embedding(segment.ids))
            else:
                new.append(segment.hidden.to(like))
        kept = [self.x] if self.parts else []
        self.x = torch.cat([*kept, *new]) if len(kept) + len(new) > 1 else new[0]
        if not layer:
            self.n_began = len(self.x)
        for segment in due:
            states, n = segment.states, len(segment.ids)
            self.parts.append((states, n))
        self.cos = _joined([kv.cos[kv.length : kv.length + n] for kv, n in self.parts])  # (rows, 1, head_dim)
        self.sin = _joined([kv.sin[kv.length : kv.length + n] for kv, n in self.parts])
        entered = [self._segments[at] for at in self._order[: self._n_in]]
        self.step = None
        if len(self.parts) == len(self._segments) == len(self.x) and not self.wants_some:
            self.step = Step.of([kv.seat for kv, _ in self.parts], [kv.length for kv, _ in self.parts])
        self.deltas = AdapterRows.of([(segment.adapter, len(segment.ids)) for segment in entered])

    def end(self) -> None:
        """The rows are through: their states are that much longer."""
        assert self._n_in == len(self._order), "a segment enters above the last layer"
        for states, n in self.parts:
            states.length += n

    @property
    def order(self) -> list[int]:
        """The segments on their way, in the order of their rows."""
        return self._order[: self._n_in]

    def n_wanted(self, at: int) -> int:
        return self._segments[at].n_wanted

    def prune(self) -> bool:
        """Go on with the wanted rows alone; ``False`` if that changes nothing."""
        if not self.wants_some:
            return False
        self.x = self.x[self.wanted()]
        self.deltas = AdapterRows.of([(segment.adapter, segment.n_wanted) for segment in self._segments])
        self.is_pruned = True
        return True

    @property
    def wanted_deltas(self) -> AdapterRows | None:
        """Whose the wanted rows are; ``None`` if no adapter has a final norm of its own."""
        if not any(s.adapter and (s.adapter.n_layers, "final") in s.adapter.norms for s in self._segments):
            return None
        return AdapterRows.of([(segment.adapter, segment.n_wanted) for segment in self._segments])

    @property
    def wants_some(self) -> bool:
        """Whether only some rows are wanted, or in another order than they have."""
        is_sorted = self._order == sorted(self._order)
        return not is_sorted or any(len(s.ids) != s.n_wanted for s in self._segments)

    def wanted(self) -> Tensor:
        """Where the wanted rows are, in the order of the segments."""
        ends: dict[int, int] = {}
        end = 0
        for at in self._order:
            end += len(self._segments[at].ids)
            ends[at] = end
        places = [
            row
            for at, segment in enumerate(self._segments)
            for row in range(ends[at] - segment.n_wanted, ends[at])
        ]
        return torch.tensor(places, device=self.x.device, dtype=torch.long)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _rope(config: Any) -> tuple[Tensor, float]:
    """Rotary frequencies (head_dim / 2,) and the factor on sine and cosine, as the config says."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
        return frequencies.float(), float(scale)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def _attended(query: Tensor, places: Sequence[Place]) -> Tensor:
    """Shapes: query (n, heads, head_dim), of the last n positions in ``places`` -> (n, heads * head_dim)."""
    n, (keys, values) = len(query), places[-1]
    if n == 1:
        return attend(query, places[:-1], (keys, values))
    before = keys.shape[1] - n
    assert before >= 0, "what is new is the sequence's own"
    past = (keys[:, :before], values[:, :before])
    return attend(query, [*places[:-1], past], (keys[:, before:], values[:, before:]))


def _layer(weights: Weights, prefix: str, precision: str) -> _Layer:
    def linear(block: str, *names: str) -> Linear:
        """Several matrices of one input as one: their rows, one after another."""
        stems = [f"{prefix}{block}.{name}" for name in names]
        matrix = torch.cat([weights[stem + ".weight"] for stem in stems])
        biases = [weights[stem + ".bias"] for stem in stems if stem + ".bias" in weights]
        assert len(biases) in (0, len(stems)), f"{prefix}{block}: only some of {names} have a bias"
        return make_linear(matrix, torch.cat(biases) if biases else None, precision)

    return _Layer(
        # Clones, so that no small tensor keeps the whole file mapped.
        attention_norm=weights[prefix + "input_layernorm.weight"].clone(),
        qkv=linear("self_attn", "q_proj", "k_proj", "v_proj"),
        out=linear("self_attn", "o_proj"),
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"].clone(),
        gate_up=linear("mlp", "gate_proj", "up_proj"),
        down=linear("mlp", "down_proj"),
    )
