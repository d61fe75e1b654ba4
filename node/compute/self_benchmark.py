"""How fast this node does each kind of work: about two seconds of measuring, in pieces that others can cut.

What is measured is the work itself where that is possible: passes of the loaded model, an adapter read from
a file. Tuning is measured on layers of the model's shapes with random weights, because its own parts take
seconds to import. Every piece is one pass of a size that takes about a quarter of a second here, so a small
board takes as long as a server and says less exactly what it does.

Nothing of it is left behind: no weights, no prefix, no file.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mesh.messages import NodeRates
from mesh.messages.node import RATE_MAX, RATED_TOP_LAYERS
from node.compute.adapters.facts import BackboneFacts, Place
from node.compute.adapters.files import load_adapter
from node.compute.backbone.contract import Backbone, Segment
from node.compute.rates import TUNE_PASSES
from node.compute.tune.frozen import FrozenNorm, frozen_linear
from node.profile import memory_free_bytes

__all__ = ["SelfBenchmark"]

log = logging.getLogger(__name__)

_PIECE_S = 0.25
_BUDGET_S = 3.0  # from then on once is enough: a large model on a small board
_ROWS = 8  # answers in a batch step: half of the slots, where the cost of a row is what it is at sixteen
_STEPS = 5
_PASSES = 2
_TRIAL_TOKENS = 16
_PASS_TOKENS_MAX = 256  # as the engine reads a prompt
_RECORD_TOKENS = 32  # a short record of tuning data
_RANK = 8  # of adapters, unless another is asked for

Piece = Generator[None, None, float]
"""A yield after each timed pass; seconds of the typical one at the end."""


class SelfBenchmark:
    """``facts``: of a model that adapters fit, ``None`` for one that is served without. ``threads``: as many
    as the engine has. ``clock`` in seconds."""

    def __init__(
        self,
        backbone: Backbone,
        threads: int,
        facts: BackboneFacts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backbone = backbone
        self._threads = threads
        self._facts = facts
        self._clock = clock
        self._spent_s = 0.0

    def run(self) -> Generator[None, None, NodeRates]:
        """A yield between two pieces; the rates at the end, without any slowdown."""
        alone_s = yield from self._steps(1)
        together_s = yield from self._steps(_ROWS)
        row_s, n_tokens = yield from self._prefill(alone_s)
        features_s = tune_s = None
        adapter_load_s = 0.0
        if self._facts is not None:
            adapter_load_s = yield from self._adapter_load(self._facts)
            features_s = yield from self._features(n_tokens)
            tune_s = yield from self._tune(self._facts, row_s)
        return NodeRates(
            prefill_tokens_per_s=_per_s(row_s),
            decode_tokens_per_s=_per_s(alone_s),
            row_cost=min(max(0.0, (together_s / alone_s - 1) / (_ROWS - 1)), 100.0),
            features_tokens_per_s=None if features_s is None else _per_s(features_s),
            tune_tokens_per_s=None if tune_s is None else _per_s(tune_s),
            adapter_load_s=adapter_load_s,
        )

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────

    def _steps(self, n_rows: int) -> Piece:
        """One token of each of ``n_rows`` answers, with the head."""
        sequences = [self._backbone.states(1 + _STEPS) for _ in range(n_rows)]

        def step() -> None:
            self._forward([Segment(states, _ids(1)) for states in sequences])

        # The first one makes room and wakes threads.
        return (yield from self._typical(step, 1 + _STEPS, median, n_warm=1))

    def _typical(
        self,
        work: Callable[[], object],
        n_times: int,
        of: Callable[[Sequence[float]], float] = min,
        n_warm: int = 0,
    ) -> Piece:
        """Fewer times where the whole has taken long enough already."""
        taken: list[float] = []
        while len(taken) < n_times and not (taken and self._spent_s > _BUDGET_S):
            taken.append(self._timed(work))
            yield
        return of(taken[n_warm:] or taken)

    def _prefill(self, alone_s: float) -> Generator[None, None, tuple[float, int]]:
        """Seconds a token of a prompt, and of how many tokens the pass was that said so."""

        def read(n: int) -> Callable[[], None]:
            return lambda: self._forward([Segment(self._backbone.states(n), _ids(n))])

        # A row of a prompt never costs more than a step: so many are a piece at most.
        n_trial = min(max(2, int(_PIECE_S / alone_s)), _TRIAL_TOKENS)
        row_s = (yield from self._typical(read(n_trial), 1)) / n_trial
        n = min(max(n_trial, int(_PIECE_S / row_s)), _PASS_TOKENS_MAX, self._backbone.context_tokens)
        return (yield from self._typical(read(n), _PASSES)) / n, n

    def _features(self, n_tokens: int) -> Piece:
        """Seconds a token through the layers below the top ones; next to nothing where there are none."""
        cut = max(0, self._backbone.n_layers - RATED_TOP_LAYERS)

        def read() -> None:
            segments = [Segment(self._backbone.states(n_tokens), _ids(n_tokens))]
            float(self._backbone.features(segments, cut)[-1, 0])

        return (yield from self._typical(read, _PASSES)) / n_tokens

    def _forward(self, segments: list[Segment]) -> None:
        found = self._backbone.forward(segments)
        float(self._backbone.logits(found.rows)[0, 0])  # a GPU has finished when a number is there

    # ── teaching ────────────────────────────────────────────────────────────────────────────────────

    def _tune(self, facts: BackboneFacts, row_s: float) -> Piece:
        """Seconds a token through ``RATED_TOP_LAYERS`` layers and back, in float32 on the processor."""
        if 3 * 4 * sum(place.d_out * place.d_in for place in _blocks(facts).values()) > memory_free_bytes():
            return row_s * TUNE_PASSES * min(1.0, RATED_TOP_LAYERS / self._backbone.n_layers)
        layers = _TunedLayers(facts)
        yield
        took_s = yield from self._typical(lambda: layers.train(1), 1)
        n = min(max(1, int(_PIECE_S / took_s)), _PASS_TOKENS_MAX // _RECORD_TOKENS)
        return (yield from self._typical(lambda: layers.train(n), _PASSES)) / (n * _RECORD_TOKENS)

    def _adapter_load(self, facts: BackboneFacts) -> Piece:
        """A LoRA of every matrix in the top layers, from a file the system has just written."""
        device = self._backbone.device
        with tempfile.TemporaryDirectory(prefix="edgemesh-") as directory:
            path = Path(directory)
            _write_adapter(path, facts)
            yield
            return (yield from self._typical(lambda: load_adapter(path, facts, device=device), _PASSES))

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds, with the engine's threads; the number of threads is as it was afterwards."""
        before = torch.get_num_threads()
        if before != self._threads:
            torch.set_num_threads(self._threads)
        start_s = self._clock()
        work()
        took_s = self._clock() - start_s
        self._spent_s += took_s
        if before != self._threads:
            torch.set_num_threads(before)
        return max(took_s, 1e-9)


class _TunedLayers:
    """The matrices of one layer, passed as often as there are layers: a layer of any real model is larger
    than a cache, so the second pass is no faster than another layer's."""

    def __init__(self, facts: BackboneFacts) -> None:
        blocks = _blocks(facts)
        self._width = facts.width
        self._linears = {
            kind: frozen_linear(_random(place.d_out, place.d_in) * 0.02) for kind, place in blocks.items()
        }
        self._lora = {
            kind: (
                (_random(_RANK, place.d_in) * 0.02).requires_grad_(),
                torch.zeros(place.d_out, _RANK).requires_grad_(),
            )
            for kind, place in blocks.items()
        }
        self._norm = FrozenNorm(torch.ones(facts.width), 1e-5)
        self._head_dim = _head_dim(facts)

    def train(self, n_records: int) -> None:
        """Forward and backward. ``n_records`` of ``_RECORD_TOKENS`` tokens."""
        x = _random(n_records, _RECORD_TOKENS, self._width)
        for _ in range(RATED_TOP_LAYERS):
            x = self._layer(x)
        x.square().mean().backward()
        for a, b in self._lora.values():
            a.grad = b.grad = None

    def _layer(self, x: Tensor) -> Tensor:
        normed = self._norm(x)
        q, k, v = (self._linear(f"self_attn.{name}_proj", normed) for name in "qkv")
        heads = [y.unflatten(-1, (-1, self._head_dim)).transpose(1, 2) for y in (q, k, v)]
        attended = F.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True
        )
        x = x + self._linear("self_attn.o_proj", attended.transpose(1, 2).flatten(2))
        normed = self._norm(x)
        gate, up = self._linear("mlp.gate_proj", normed), self._linear("mlp.up_proj", normed)
        return x + self._linear("mlp.down_proj", F.silu(gate) * up)

    def _linear(self, kind: str, x: Tensor) -> Tensor:
        a, b = self._lora[kind]
        return self._linears[kind](x) + F.linear(F.linear(x, a), b)


def _blocks(facts: BackboneFacts) -> dict[str, Place]:
    """The matrices of one layer."""
    return {kind: place for kind, place in facts.places.items() if kind.startswith(("self_attn.", "mlp."))}


def _head_dim(facts: BackboneFacts) -> int:
    config = json.loads((facts.directory / "config.json").read_text(encoding="utf-8"))
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_adapter(path: Path, facts: BackboneFacts) -> None:
    """As ``peft`` writes it."""
    blocks = _blocks(facts)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": sorted({kind.rpartition(".")[2] for kind in blocks}),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for layer in range(max(0, facts.n_layers - RATED_TOP_LAYERS), facts.n_layers):
        for kind, place in blocks.items():
            stem = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{stem}.lora_A.weight"] = _random(_RANK, place.d_in)
            tensors[f"{stem}.lora_B.weight"] = _random(place.d_out, _RANK)
    save_file(tensors, path / "adapter_model.safetensors")


def _random(*shape: int) -> Tensor:
    """Without touching the process's own random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _ids(n: int) -> list[int]:
    """Some tokens every vocabulary has."""
    return [1 + at % 50 for at in range(n)]


def _per_s(seconds: float) -> float:
    return min(1 / max(seconds, 1 / RATE_MAX), RATE_MAX)
