"""From the names of a file's tensors to modules of the backbone, and what cannot be served by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from node.compute.adapters.facts import BackboneFacts, Module
from node.compute.adapters.tensors import StoredTensor

__all__ = ["DENSE", "LOW_RANK", "METHODS", "check_config", "modules_of", "pattern_value"]

LOW_RANK = ("LORA", "ADALORA", "IA3", "LN_TUNING")
"""Read by us: their tensors are the numbers a pass needs, up to a factor."""
DENSE = ("VERA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "FOURIERFT")
"""Computed by PEFT itself, from the weights of the modules they adapt."""
METHODS = (*LOW_RANK, *DENSE)

_WHY_NOT = {
    "PROMPT_TUNING": "it puts trained vectors before the prompt, so no state of the prompt is shared",
    "MULTITASK_PROMPT_TUNING": "it puts trained vectors before the prompt, so no state is shared",
    "P_TUNING": "it puts trained vectors before the prompt, so no state of the prompt is shared",
    "PREFIX_TUNING": "it puts trained keys and values into every layer, so no state is shared",
    "CPT": "it puts trained vectors before the prompt, so no state of the prompt is shared",
    "ADAPTION_PROMPT": "it adds a second attention to the layers, which our pass has not",
    "POLY": "it mixes several LoRAs by task, which a request cannot name",
    "XLORA": "it chooses among several LoRAs by a pass of its own",
    "TRAINABLE_TOKENS": "it changes embeddings, and with them every layer's states",
}
"""Why some methods are not served; others are simply not built."""

_REFUSED_FIELDS = {
    "trainable_token_indices": "it trains embeddings, and with them every layer's states",
    "target_parameters": "it adapts bare parameters, which the Llama family has not",
    "layer_replication": "it makes a model of more layers than the backbone has",
    "use_qalora": "it pools its inputs (QALoRA)",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "arrow_config": "it chooses among several LoRAs (Arrow)",
    "kasa_config": "it changes the frozen weights (KaSA)",
    "monteclora_config": "it samples its weights (MonteCLoRA)",
    "velora_config": "it compresses its inputs (VeLoRA)",
    "megatron_config": "it is for Megatron's parallel layers",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?"
    r"(?P<module>layers\.(?P<layer>\d{1,6})\.(?P<kind>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
    r"|input_layernorm|post_attention_layernorm)|lm_head|score|norm|embed_tokens)\.(?P<rest>.+)"
)
_SHARED = re.compile(r"base_model\.(?P<rest>vera_[AB])")

# Patterns of ranks are regular expressions from a stranger, matched against names of about 60 characters.
_PATTERN_CHARS_MAX = 200
_PATTERN_REPEATS_MAX = 3
_PATTERNS_MAX = 4096


def check_config(config: Mapping[str, Any], where: Path) -> str:
    """The method, if this configuration can be served.

    Raises:
        ConfigError: Which part of it cannot, and why.
    """
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(name.lower() for name in METHODS)
        why = _WHY_NOT.get(str(method), "it is not one of those our pass knows")
        raise ConfigError(f"{where}: {str(method)[:40]} adapters are not served: {why}; served are {known}")
    if config.get("task_type") not in _TASKS:
        raise ConfigError(
            f"{where}: task_type {str(config['task_type'])[:40]!r} is not served; CAUSAL_LM and SEQ_CLS are"
        )
    for name, why in _REFUSED_FIELDS.items():
        if config.get(name):
            raise ConfigError(f"{where}: {name} is not served: {why}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{where}: init_lora_weights={start!r} trained on changed frozen weights; save it as a plain "
            "LoRA: model.save_pretrained(dir, path_initial_model_for_weight_conversion=...)"
        )
    for name in ("rank_pattern", "alpha_pattern", "n_frequency_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or len(patterns) > _PATTERNS_MAX:
            raise ConfigError(f"{where}: {name} must be at most {_PATTERNS_MAX} patterns of module names")
        if method != "ADALORA":
            for pattern in patterns:
                _check_pattern(pattern, where, name)
    return method


def modules_of(
    stored: Mapping[str, StoredTensor], facts: BackboneFacts, where: Path
) -> dict[Module, dict[str, str]]:
    """Module -> what of it is stored, such as ``lora_A.weight`` -> name of the tensor.

    What all modules share (VeRA's projections) is under ``Module(-1, "")``, a saved classification head
    under the kind ``score``.

    Raises:
        ConfigError: A tensor is for no module of this backbone.
    """
    found: dict[Module, dict[str, str]] = {}
    for name in stored:
        if shared := _SHARED.fullmatch(name):
            found.setdefault(Module(-1, ""), {})[shared["rest"]] = name
            continue
        match = _KEY.fullmatch(name)
        if match is None:
            raise ConfigError(f"{where}: the tensor {name[:120]!r} is for no module our pass knows")
        if match["module"] == "embed_tokens":
            raise ConfigError(
                f"{where}: it has trained embeddings ({name}), which change every layer's states; "
                "train it without embed_tokens in target_modules and modules_to_save"
            )
        layer = int(match["layer"]) if match["layer"] else facts.n_layers
        if match["layer"] and layer >= facts.n_layers:
            raise ConfigError(
                f"{where}: made for another backbone: it adapts layer {layer}, this backbone has "
                f"{facts.n_layers} layers of width {facts.width}"
            )
        rest = match["rest"].removeprefix("base_layer.").removeprefix("modules_to_save.")
        module = Module(layer, match["kind"] or match["module"])
        if rest in found.setdefault(module, {}):
            raise ConfigError(f"{where}: two tensors are {rest} of {facts.name_of(module)}")
        found[module][rest] = name
    if not found:
        raise ConfigError(f"{where}: it holds no weights")
    return found


def pattern_value(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """As PEFT looks up ``alpha_pattern`` and its kind: the first pattern that ends a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def _check_pattern(pattern: Any, where: Path, field: str) -> None:
    """Refuse what could match for hours: a repeated group, or many repeats."""
    is_plain = isinstance(pattern, str) and len(pattern) <= _PATTERN_CHARS_MAX
    n_repeats = len(re.findall(r"[*+?{]", pattern)) if is_plain else 0
    if not is_plain or n_repeats > _PATTERN_REPEATS_MAX or re.search(r"\)[*+?{]", pattern):
        raise ConfigError(
            f"{where}: {field} has a pattern too complicated to be trusted: {str(pattern)[:80]!r}"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {field}: {pattern!r} is no regular expression ({error})") from error
