"""Methods whose effect PEFT itself computes: the merged weight of each adapted module, minus the frozen one.

Only the adapted modules are built, from their own weights; the rest of the model is never touched. PEFT
sees a configuration made anew from checked numbers, so nothing in a stranger's file chooses what it
imports, reads or allocates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mesh.errors import ConfigError

__all__ = ["by_peft", "vera_factors"]

# A field's type, and the most it may be in units of the backbone's largest matrix side (or its size).
_SIDE = "side"
_SIZE = "size"
_FLAG = "flag"
_REAL = "real"
_SEED = "seed"
_FIELDS: dict[str, dict[str, str]] = {
    "LOHA": {"r": _SIDE, "alpha": _REAL, "rank_pattern": _SIDE, "alpha_pattern": _REAL},
    "LOKR": {
        "r": _SIDE,
        "alpha": _REAL,
        "rank_pattern": _SIDE,
        "alpha_pattern": _REAL,
        "decompose_both": _FLAG,
        "decompose_factor": _SIDE,
    },
    "OFT": {
        "r": _SIDE,
        "oft_block_size": _SIDE,
        "coft": _FLAG,
        "eps": _REAL,
        "block_share": _FLAG,
        "use_cayley_neumann": _FLAG,
        "num_cayley_neumann_terms": _SIDE,
    },
    "BOFT": {"boft_block_size": _SIDE, "boft_block_num": _SIDE, "boft_n_butterfly_factor": _SIDE},
    "HRA": {"r": _SIDE, "apply_GS": _FLAG},
    "FOURIERFT": {
        "n_frequency": _SIZE,
        "scaling": _REAL,
        "random_loc_seed": _SEED,
        "n_frequency_pattern": _SIZE,
    },
    "VERA": {"r": _SIDE, "projection_prng_key": _SEED, "save_projection": _FLAG},
}


def by_peft(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path
) -> dict[str, Tensor]:
    """Module -> D, by PEFT. ``weights``: module -> frozen weight; ``tensors``: as in the adapter's file,
    without the leading ``base_model.model.``.

    Raises:
        ConfigError: PEFT cannot make an adapter of these.
    """
    root = _injected(config, weights, tensors, where)
    differences = {}
    for name, weight in weights.items():
        layer = root.get_submodule(name)
        layer.merge(safe_merge=True)  # raises if a number is not finite
        differences[name] = layer.get_base_layer().weight.data - weight
    return differences


def vera_factors(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (r, d_in) and B (d_out, r) of a VeRA adapter, whose random projections PEFT makes again
    from their seed where the file has not got them."""
    root = _injected(config, weights, tensors, where)
    factors = {}
    for name, weight in weights.items():
        layer = root.get_submodule(name)
        a = layer.vera_A["default"][:, : weight.shape[1]]
        b = layer.vera_B["default"][: weight.shape[0]]
        scale_a = layer.vera_lambda_d["default"].data[:, None]
        scale_b = layer.vera_lambda_b["default"].data[:, None]
        factors[name] = ((a * scale_a).clone(), b * scale_b)
    return factors


def _injected(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path
) -> Any:
    # Seconds to import, and most adapters are plain LoRA and need none of it.
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    root = nn.Module()
    for name, weight in weights.items():
        _put(root, name, weight)
    method = config["peft_type"]
    fields = _checked(config, weights, where)
    try:
        made = PeftConfig.from_peft_type(
            peft_type=method, target_modules=list(weights), inference_mode=True, **fields
        )
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[method](root, made, "default")
        found = set_peft_model_state_dict(_Tuned(tuner, made), dict(tensors))
    except Exception as error:  # whatever PEFT raises about a file that is not its own
        raise ConfigError(f"{where}: peft cannot read this {method} adapter: {error}") from error
    if found.unexpected_keys:
        raise ConfigError(f"{where}: peft knows no place for the tensor {found.unexpected_keys[0]!r}")
    return root


class _Tuned(nn.Module):  # type: ignore[misc]
    """What ``set_peft_model_state_dict`` takes for a PEFT model: modules under ``base_model.model``."""

    def __init__(self, tuner: Any, config: Any) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = {"default": config}


def _put(root: nn.Module, name: str, weight: Tensor) -> None:
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    root.add_module(last, linear)


def _checked(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    most = {
        # VeRA's usual rank is 256, however small the matrices are.
        _SIDE: max(1024, *(max(weight.shape) for weight in weights.values())),
        _SIZE: max(weight.numel() for weight in weights.values()),
        _SEED: 2**63 - 1,
    }
    checked: dict[str, Any] = {}
    for name, kind in _FIELDS[config["peft_type"]].items():
        value = config.get(name)
        if value is None:
            continue
        for one in value.values() if name.endswith("_pattern") and isinstance(value, dict) else [value]:
            is_number = isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)
            if kind == _FLAG:
                is_right = isinstance(one, bool)
            elif kind == _REAL:
                is_right = is_number
            else:
                is_right = is_number and isinstance(one, int) and -1 <= one <= most[kind]
            if not is_right:
                raise ConfigError(f"{where}: {name} is {str(one)[:80]!r}, which no adapter of this model has")
        checked[name] = value
    return checked
