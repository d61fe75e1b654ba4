"""PEFT's methods by name, confined to the layers from a cut on.

What an adapter does below its cut would change the feature maps it is trained from. So every configuration
here names its layers, and methods that cannot be confined are refused with the reason.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from mesh.errors import ConfigError
from node.compute.tune.head_start import pool_patterns

__all__ = ["METHODS", "Method", "adapt", "check_method"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEAR = (*_ATTENTION, *_MLP)
_NORMS = ("input_layernorm", "post_attention_layernorm")

Build = Callable[["_Wish"], Any]


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is asked of a method. ``where``: the arguments that confine it to its layers."""

    where: dict[str, Any]
    targets: tuple[str, ...]
    rank: int
    alpha: float | None
    seed: int
    invocation: tuple[int, ...] | None
    width: int
    pattern: Callable[[Sequence[str]], str]
    patterns: Callable[[float], tuple[dict[str, int], dict[str, float]]]
    """LoRA's ranks and alphas of single modules, from the alpha of the others."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to adapt."""

    build: Build
    targets: tuple[str, ...]
    """Modules adapted unless others are asked for."""
    learning_rate: float
    allowed: tuple[str, ...] = _LINEAR
    by_pattern: bool = False
    """PEFT's configuration takes no list of layers, so a pattern of names says which."""
    has_rank: bool = True


def _lora(**extra: Any) -> Build:
    def build(wish: _Wish) -> Any:
        alpha = 2 * wish.rank if wish.alpha is None else wish.alpha
        # A classifier starts with a pool in its last layer, which takes more rank on two matrices.
        ranks, alphas = wish.patterns(alpha)
        return peft.LoraConfig(
            r=wish.rank,
            lora_alpha=_whole(alpha),
            lora_dropout=0.0,
            rank_pattern=ranks,
            alpha_pattern={name: _whole(value) for name, value in alphas.items()},
            **extra,
            **wish.where,
        )

    return build


def _alora(wish: _Wish) -> Any:
    assert wish.invocation, "checked where the data are known"
    return _lora(alora_invocation_tokens=list(wish.invocation))(wish)


def _lycoris(config: Any) -> Build:
    def build(wish: _Wish) -> Any:
        alpha = wish.rank if wish.alpha is None else wish.alpha
        return config(r=wish.rank, alpha=_whole(alpha), **wish.where)

    return build


def _ia3(wish: _Wish) -> Any:
    down = [name for name in wish.targets if name == "down_proj"]
    return peft.IA3Config(feedforward_modules=wish.pattern(down) if down else [], **wish.where)


def _oft(wish: _Wish) -> Any:
    return peft.OFTConfig(r=0, oft_block_size=_block(wish), use_cayley_neumann=False, **wish.where)


def _boft(wish: _Wish) -> Any:
    return peft.BOFTConfig(boft_block_size=_block(wish), boft_n_butterfly_factor=1, **wish.where)


def _vera(wish: _Wish) -> Any:
    # Vectors only are trained, so its rank may be far larger: PEFT's own default is 256.
    return peft.VeraConfig(
        r=32 * wish.rank, projection_prng_key=wish.seed % 2**32, save_projection=True, **wish.where
    )


def _fourierft(wish: _Wish) -> Any:
    return peft.FourierFTConfig(
        n_frequency=125 * wish.rank, scaling=150.0, random_loc_seed=wish.seed % 2**32, **wish.where
    )


METHODS: dict[str, Method] = {
    "lora": Method(_lora(), _LINEAR, 2e-3, allowed=(*_LINEAR, "lm_head")),
    "rslora": Method(_lora(use_rslora=True), _LINEAR, 1e-3, allowed=(*_LINEAR, "lm_head")),
    "dora": Method(_lora(use_dora=True), _LINEAR, 2e-3),
    "alora": Method(_alora, _LINEAR, 2e-3),
    "ia3": Method(_ia3, ("k_proj", "v_proj", "down_proj"), 1e-2, by_pattern=True, has_rank=False),
    "loha": Method(_lycoris(peft.LoHaConfig), _LINEAR, 2e-3),
    "lokr": Method(_lycoris(peft.LoKrConfig), _LINEAR, 5e-3),
    "oft": Method(_oft, _LINEAR, 1e-3),
    "boft": Method(_boft, ("q_proj", "v_proj"), 1e-3),
    "hra": Method(
        lambda wish: peft.HRAConfig(r=wish.rank + wish.rank % 2, **wish.where), ("q_proj", "v_proj"), 2e-3
    ),
    "vera": Method(_vera, _LINEAR, 1e-2),
    "fourierft": Method(_fourierft, ("q_proj", "v_proj"), 2e-2),
    "ln_tuning": Method(
        lambda wish: peft.LNTuningConfig(**wish.where),
        _NORMS,
        5e-3,
        allowed=_NORMS,
        by_pattern=True,
        has_rank=False,
    ),
}

_REFUSED = {
    "adalora": "it moves rank between layers by a schedule over the whole run, which the steps of a "
    "resumed job would not repeat; choose lora or rslora",
    "adaption_prompt": "it replaces whole attention modules, which the pass over packed rows does not "
    "call; choose lora or ia3",
    "prompt_tuning": "it puts tokens before the text, so every layer changes; choose lora or alora",
    "prefix_tuning": "it puts key/value states before the text in every layer; choose lora or alora",
    "p_tuning": "it puts tokens before the text, so every layer changes; choose lora or alora",
    "trainable_tokens": "it changes the embeddings, below every cut; choose lora",
}
_ALSO_CALLED = {
    "adaptionprompt": "adaption_prompt",
    "prompt": "prompt_tuning",
    "prefix": "prefix_tuning",
    "ptuning": "p_tuning",
    "p-tuning": "p_tuning",
    "prompt-tuning": "prompt_tuning",
    "prefix-tuning": "prefix_tuning",
    "layernorm": "ln_tuning",
}


def check_method(name: str, targets: Sequence[str], task: str) -> Method:
    """The method called ``name``.

    Raises:
        ConfigError: There is none, it cannot be trained from feature maps, or not with these targets or
            for this task.
    """
    known = _ALSO_CALLED.get(name.lower(), name.lower())
    if known in _REFUSED:
        raise ConfigError(f"the method {name!r} cannot be trained from feature maps: {_REFUSED[known]}")
    method = METHODS.get(known)
    if method is None:
        raise ConfigError(f"no method {name!r}; choose one of {', '.join(METHODS)}")
    if wrong := sorted(set(targets) - set(method.allowed)):
        below = " (the embeddings are below every cut)" if "embed_tokens" in wrong else ""
        raise ConfigError(
            f"{known} cannot adapt {', '.join(wrong)}{below}; choose among {', '.join(method.allowed)}"
        )
    if known == "alora" and task != "chat":
        raise ConfigError(
            "alora starts at the tokens that invoke it, which only a chat has (its template's mark of an "
            f"answer); for {task} choose lora"
        )
    if "lm_head" in targets and task == "classify":
        raise ConfigError("a classifier has no lm_head: it trains a head of its own; leave lm_head out")
    return method


def adapt(
    model: nn.Module,
    name: str,
    *,
    layers: range,
    task: str,
    targets: Sequence[str] = (),
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
    invocation: tuple[int, ...] | None = None,
) -> Any:
    """``model`` wrapped by PEFT's method ``name`` in ``layers`` only, started from ``seed``.

    Raises:
        ConfigError: See ``check_method``; or PEFT itself refuses, with its words.
    """
    known = _ALSO_CALLED.get(name.lower(), name.lower())
    method = check_method(name, targets, task)
    chosen = tuple(dict.fromkeys(targets)) or method.targets

    def pattern(names: Sequence[str]) -> str:
        inner = [n for n in names if n != "lm_head"]
        numbers = "|".join(map(str, layers))
        blocks = rf"model\.layers\.({numbers})\.(?:\w+\.)?({'|'.join(map(re.escape, inner))})"
        return blocks if len(inner) == len(names) else rf"(?:{blocks}|lm_head)" if inner else "lm_head"

    # A list of layers is what other programs read best; a pattern, where PEFT has no such list.
    if method.by_pattern or "lm_head" in chosen:
        where: dict[str, Any] = {"target_modules": pattern(chosen)}
    else:
        where = {"target_modules": list(chosen), "layers_to_transform": list(layers)}
    where["task_type"] = "SEQ_CLS" if task == "classify" else "CAUSAL_LM"
    width = int(model.config.hidden_size)

    def patterns(of_others: float) -> tuple[dict[str, int], dict[str, float]]:
        return pool_patterns(model.config, known, task, chosen, rank, of_others)

    wish = _Wish(where, chosen, rank, alpha, seed, invocation, width, pattern, patterns)
    # PEFT starts weights from torch's global source; it is put back, whoever else uses it.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # On what PEFT cannot know here: BOFT's CUDA kernel, which a CPU does not need, and norms of ours.
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, method.build(wish))
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"{known} with rank {rank} does not fit this model: {error}") from error


def _whole(alpha: float) -> Any:
    """``16`` in the file rather than ``16.0``, as PEFT's own examples have it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _block(wish: _Wish) -> int:
    """Side of the rotated blocks: the rank, made a divisor of the width (all inner widths share it)."""
    return next(size for size in range(max(2, wish.rank), 0, -1) if wish.width % size == 0)
