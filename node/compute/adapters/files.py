"""A directory as ``peft`` writes it -> an ``Adapter`` the pass applies.

safetensors and JSON only. Sizes and shapes are checked against the header before anything is loaded, and
every refusal names the module, the method or the field. What an adapter does not change it does not keep:
zero differences below the real cut, as some exporters write them, do not make its cut lower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mesh.errors import ConfigError
from node.compute.adapters.by_peft import by_peft, vera_factors
from node.compute.adapters.card import WEIGHTS_FILE, digest_of, read_card, read_config
from node.compute.adapters.facts import BackboneFacts, Module
from node.compute.adapters.keys import DENSE, check_config, modules_of, pattern_value
from node.compute.adapters.tensors import StoredTensor, read_header
from node.compute.backbone.deltas import Adapter, ClassHead, Delta, Dense, Norm, Slot, Up
from node.compute.backbone.weights import Weights

__all__ = ["load_adapter"]

# A class head of 65,536 labels is larger than any task we know; its rows are small beside a vocabulary.
_LABELS_MAX = 65_536


def load_adapter(
    directory: Path, facts: BackboneFacts, *, bytes_max: int | None = None, device: str = "cpu"
) -> Adapter:
    """The adapter in ``directory``, called by the directory's name.

    Raises:
        ConfigError: It is no adapter, a damaged one, one for another backbone, larger than ``bytes_max``
            or of a kind that is not served; the text says which.
    """
    path = directory / WEIGHTS_FILE
    if not path.exists() and (old := directory / "adapter_model.bin").exists():
        raise ConfigError(
            f"{old} is a pickle, which could run code: load it where you trust it and save it again with "
            "peft's save_pretrained(..., safe_serialization=True)"
        )
    config = read_config(directory)
    method = check_config(config, directory)
    stored = read_header(path)
    modules = modules_of(stored, facts, directory)
    card = read_card(directory)
    digest = digest_of(directory)
    if card is not None and card.digest != digest:
        raise ConfigError(
            f"{directory}: edgemesh.json is the card of other weights: remove it, or copy both again"
        )
    if card is not None and facts.sha256 and card.backbone_sha256 not in ("", facts.sha256):
        raise ConfigError(
            f"{directory}: made for another backbone: its weights' SHA-256 is {card.backbone_sha256[:12]}…, "
            f"this one's is {facts.sha256[:12]}…"
        )
    reading = _Reading(directory, config, method, facts, stored, modules)
    needed = reading.n_bytes()
    if bytes_max is not None and needed > bytes_max:
        raise ConfigError(
            f"{directory}: the adapter takes {needed / 1e6:,.1f} MB in memory, and all adapters together may "
            f"take {bytes_max / 1e6:,.1f} MB: raise the budget for adapters, or adapt fewer layers"
        )
    reading.read()
    deltas, norms = reading.deltas(device), {at: t.to(device) for at, t in reading.norms.items()}
    head = _class_head(reading, card.labels if card is not None else (), device)
    held = [t for delta in deltas.values() for t in delta.tensors()] + list(norms.values())
    return Adapter(
        name=directory.name,
        first_layer=min([layer for layer, _ in (*deltas, *norms)], default=facts.n_layers),
        n_bytes=sum(t.nbytes for t in held) + (head.weight.nbytes if head else 0),
        deltas=deltas,
        norms=norms,
        digest=digest,
        n_layers=facts.n_layers,
        head=head,
        invocation=_invocation(config, facts, directory),
        completes=card is not None and card.task == "complete",
    )


@dataclass(slots=True)
class _Parts:
    """What one adapter changes in one stacked matrix, while it is gathered."""

    a: list[Tensor] = field(default_factory=list)
    ups: list[Up] = field(default_factory=list)
    dense: list[Dense] = field(default_factory=list)
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None
    bias: Tensor | None = None

    def delta(self, device: str) -> Delta:
        def on(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.contiguous().to(device)

        return Delta(
            on(torch.cat(self.a)) if self.a else None,
            tuple(Up(up.start, up.b.contiguous().to(device)) for up in self.ups),
            tuple(Dense(dense.start, dense.weight.contiguous().to(device)) for dense in self.dense),
            on(self.out_scale),
            on(self.in_scale),
            on(self.bias),
        )


class _Reading:
    """One directory on its way to an adapter."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        method: str,
        facts: BackboneFacts,
        stored: Mapping[str, StoredTensor],
        modules: Mapping[Module, Mapping[str, str]],
    ) -> None:
        self.directory, self.config, self.method, self.facts = directory, config, method, facts
        self.stored, self.modules = stored, modules
        self.norms: dict[tuple[int, Norm], Tensor] = {}
        self.head: Tensor | None = None
        self._parts: defaultdict[tuple[int, Slot], _Parts] = defaultdict(_Parts)
        self._take: Callable[[str], Tensor]
        self._frozen: Callable[[str], Tensor]

    def n_bytes(self) -> int:
        """What it will take in memory at most, from shapes alone."""
        total = 0
        for module, names in self.modules.items():
            place = self.facts.places.get(module.kind)
            is_dense = "weight" in names or (self.method in DENSE and self.method != "VERA")
            if place is not None and is_dense:
                total += 4 * place.d_out * place.d_in
            elif place is not None and self.method == "VERA":
                total += 4 * self._vera_rank() * (place.d_out + place.d_in)
            else:
                total += sum(4 * _numel(self.stored[name]) for name in names.values())
            if place is not None and self.config.get("use_dora"):
                total += 4 * self.facts.slot_rows[place.slot]
        return total

    def read(self) -> None:
        with (
            safe_open(self.directory / WEIGHTS_FILE, framework="pt") as file,
            Weights(self.facts.directory, "cpu", torch.float32) as weights,
        ):

            def take(name: str) -> Tensor:
                tensor: Tensor = file.get_tensor(name).float()
                if not bool(torch.isfinite(tensor).all()):
                    raise self._wrong(name, "holds numbers that are not finite")
                return tensor

            def frozen(name: str) -> Tensor:
                tied = name == "lm_head.weight" and name not in weights
                return weights["model.embed_tokens.weight" if tied else name]

            self._take, self._frozen = take, frozen
            if self.method in DENSE:
                self._by_peft()
            for module, names in self.modules.items():
                if module.kind == "score":
                    self.head = self._score(names)
                elif module.kind in self.facts.NORMS:
                    self._norm(module, names)
                elif module.kind:
                    self._linear(module, names)

    def deltas(self, device: str) -> dict[tuple[int, Slot], Delta]:
        return {
            at: parts.delta(device) for at, parts in sorted(self._parts.items(), key=lambda item: item[0])
        }

    # ── modules ─────────────────────────────────────────────────────────────────────────────────────

    def _norm(self, module: Module, names: Mapping[str, str]) -> None:
        for rest, name in names.items():
            if rest not in ("weight", "ln_tuning_layers.weight"):
                raise self._wrong(name, "is nothing a norm has")
            weight = self._shaped(name, (self.facts.width,))
            if not torch.equal(weight, self._frozen(self.facts.name_of(module) + ".weight")):
                self.norms[module.layer, self.facts.NORMS[module.kind]] = weight

    def _score(self, names: Mapping[str, str]) -> Tensor:
        if set(names) != {"weight"}:
            extra = next(name for rest, name in names.items() if rest != "weight")
            raise self._wrong(extra, "is nothing a saved classification head has")
        shape = self.stored[names["weight"]].shape
        if len(shape) != 2 or not 1 <= shape[0] <= _LABELS_MAX or shape[1] != self.facts.width:
            raise self._misfit(names["weight"], f"(labels, {self.facts.width})")
        return self._take(names["weight"])

    def _linear(self, module: Module, names: Mapping[str, str]) -> None:
        place = self.facts.places[module.kind]
        frozen = self.facts.name_of(module)
        left = dict(names)
        rows = slice(place.start, place.start + place.d_out)
        parts = self._parts[module.layer, place.slot]
        bias = torch.zeros(place.d_out)
        scale: Tensor | None = None
        if self.method in ("LORA", "ADALORA") and "lora_A" in {rest.split(".")[0] for rest in left}:
            scale = self._low_rank(module, left, parts, bias)
        elif self.method == "IA3" and "ia3_l" in left:
            scale = self._ia3(module, left.pop("ia3_l"), parts)
        elif self.method in DENSE:
            left = {rest: name for rest, name in left.items() if rest in ("weight", "bias")}
        if (name := left.pop("weight", None)) is not None:
            change = self._shaped(name, (place.d_out, place.d_in)) - self._frozen(frozen + ".weight")
            if change.any():
                parts.dense.append(Dense(place.start, change))
        if scale is not None and not bool((scale == 1).all()):
            self._scale(parts, place.slot, rows, scale)
        if left.get("bias") or (scale is not None and self._has_bias(module)):
            bias += self._bias_change(module, left.pop("bias", None), scale)
        if bias.any():
            if parts.bias is None:
                parts.bias = torch.zeros(self.facts.slot_rows[place.slot])
            parts.bias[rows] = bias
        if left:
            raise self._wrong(next(iter(left.values())), f"is nothing {self.method} has")
        if not (parts.ups or parts.dense) and parts.out_scale is parts.in_scale is parts.bias is None:
            del self._parts[module.layer, place.slot]

    def _low_rank(self, module: Module, left: dict[str, str], parts: _Parts, bias: Tensor) -> Tensor | None:
        """A and B into ``parts``, B's bias into ``bias``; gives DoRA's scale of the result."""
        place = self.facts.places[module.kind]
        frozen = self.facts.name_of(module)
        names = {
            rest.removesuffix(".weight"): left.pop(rest)
            for rest in list(left)
            if rest != "weight"
            and rest.removesuffix(".weight") in ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector")
        }
        if not {"lora_A", "lora_B"} <= set(names):
            raise self._wrong(next(iter(names.values())), "is one half of a pair; the other is missing")
        shape = self.stored[names["lora_A"]].shape
        r = shape[0] if shape else 0
        a = self._shaped(names["lora_A"], (r, place.d_in))
        b = self._shaped(names["lora_B"], (place.d_out, r))
        factor = self._factor(frozen, r)
        if self.method == "ADALORA":
            if "lora_E" not in names:
                raise self._wrong(names["lora_A"], "has no singular values (lora_E) beside it")
            a = a * self._shaped(names["lora_E"], (r, 1))
        b = b * factor
        scale = None
        if (magnitude := names.get("lora_magnitude_vector")) is not None:
            merged = self._frozen(frozen + ".weight") + b @ a
            scale = self._shaped(magnitude, (place.d_out,)) / torch.linalg.norm(merged, dim=1)
        if (name := left.pop("lora_B.bias", None)) is not None:
            change = self._shaped(name, (place.d_out,)) * factor
            bias += change if scale is None else change * scale
        if r and b.any() and a.any():
            parts.a.append(a)
            parts.ups.append(Up(place.start, b))
        return scale

    def _factor(self, frozen: str, r: int) -> float:
        """alpha / r in the method's own way."""
        config = self.config
        alpha = pattern_value(config.get("alpha_pattern"), frozen, config.get("lora_alpha", 8))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ConfigError(
                f"{self.directory}: lora_alpha of {frozen} is {str(alpha)[:40]!r}, not a number"
            )
        if self.method == "ADALORA":
            # PEFT divides by the rank it started from, whatever was pruned since.
            start = config.get("init_r", 12)
            if type(start) is not int or start < 1:
                raise ConfigError(f"{self.directory}: init_r is {str(start)[:40]!r}, not a rank")
            return (alpha if alpha > 0 else start) / (start + 1e-5)
        if not r:
            return 0.0
        return alpha / sqrt(r) if config.get("use_rslora") else alpha / r

    def _ia3(self, module: Module, name: str, parts: _Parts) -> Tensor | None:
        """Gives the scale of the result, or puts the scale of the input into ``parts``."""
        place = self.facts.places[module.kind]
        if self.stored[name].shape == (place.d_out, 1):
            return self._shaped(name, (place.d_out, 1)).flatten()
        scale = self._shaped(name, (1, place.d_in)).flatten()
        if bool((scale == 1).all()):
            return None
        if place.d_out == self.facts.slot_rows[place.slot]:
            parts.in_scale = scale
        else:  # The other modules of the stacked matrix see the input as it is.
            weight = self._frozen(self.facts.name_of(module) + ".weight")
            parts.dense.append(Dense(place.start, weight * (scale - 1)))
        return None

    def _scale(self, parts: _Parts, slot: Slot, rows: slice, scale: Tensor) -> None:
        if parts.out_scale is None:
            parts.out_scale = torch.ones(self.facts.slot_rows[slot])
        parts.out_scale[rows] = scale

    def _bias_change(self, module: Module, name: str | None, scale: Tensor | None) -> Tensor:
        """So that DoRA scales the product alone, as PEFT has it, and IA3 the bias with it."""
        place = self.facts.places[module.kind]
        own = self.facts.name_of(module) + ".bias"
        frozen = self._frozen(own) if self._has_bias(module) else torch.zeros(place.d_out)
        wanted = frozen if name is None else self._shaped(name, (place.d_out,))
        if scale is None:
            return wanted - frozen
        return (wanted * scale if self.method == "IA3" else wanted) - frozen * scale

    def _has_bias(self, module: Module) -> bool:
        try:
            self._frozen(self.facts.name_of(module) + ".bias")
        except KeyError:
            return False
        return True

    # ── what PEFT computes ──────────────────────────────────────────────────────────────────────────

    def _by_peft(self) -> None:
        adapted: dict[str, Module] = {}
        tensors: dict[str, Tensor] = {}
        for module, names in self.modules.items():
            if module.kind and module.kind not in self.facts.places:
                continue
            own = {rest: name for rest, name in names.items() if rest not in ("weight", "bias")}
            if own and module.kind:
                adapted[self.facts.name_of(module)] = module
            for rest, name in own.items():
                if _numel(self.stored[name]) > self._numel_max():
                    raise self._wrong(name, f"of shape {self.stored[name].shape} is larger than any weight")
                stem = f"base_model.model.{self.facts.name_of(module)}" if module.kind else "base_model"
                tensors[f"{stem}.{rest}"] = self._take(name)
        if not adapted:
            raise ConfigError(f"{self.directory}: it adapts no module")
        weights = {name: self._frozen(name + ".weight") for name in adapted}
        if self.method == "VERA":
            for name, (a, b) in vera_factors(self.config, weights, tensors, self.directory).items():
                place = self.facts.places[adapted[name].kind]
                if b.any():
                    parts = self._parts[adapted[name].layer, place.slot]
                    parts.a.append(a)
                    parts.ups.append(Up(place.start, b))
            return
        for name, change in by_peft(self.config, weights, tensors, self.directory).items():
            place = self.facts.places[adapted[name].kind]
            if change.any():
                self._parts[adapted[name].layer, place.slot].dense.append(Dense(place.start, change))

    def _vera_rank(self) -> int:
        rank = self.config.get("r", 256)
        if type(rank) is not int or not 1 <= rank <= self._numel_max():
            raise ConfigError(f"{self.directory}: r is {str(rank)[:40]!r}, not a rank")
        return rank

    def _numel_max(self) -> int:
        return max(place.d_out * place.d_in for place in self.facts.places.values())

    # ── tensors ─────────────────────────────────────────────────────────────────────────────────────

    def _shaped(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.stored[name].shape != shape:
            raise self._misfit(name, str(shape))
        return self._take(name)

    def _misfit(self, name: str, wanted: str) -> ConfigError:
        return ConfigError(
            f"{self.directory}: made for another backbone: {name} has the shape {self.stored[name].shape}, "
            f"this backbone (width {self.facts.width}, {self.facts.n_layers} layers) needs {wanted}"
        )

    def _wrong(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.directory}: the tensor {name!r} {why}")


def _class_head(reading: _Reading, labels: tuple[str, ...], device: str) -> ClassHead | None:
    directory = reading.directory
    if reading.head is None:
        if reading.config.get("task_type") == "SEQ_CLS":
            raise ConfigError(
                f"{directory}: it is for classification and has no saved head; train it with "
                "modules_to_save=['score']"
            )
        return None
    n = len(reading.head)
    if labels and len(labels) != n:
        raise ConfigError(f"{directory}: edgemesh.json names {len(labels)} labels, its head has {n}")
    return ClassHead(reading.head.contiguous().to(device), labels or tuple(str(at) for at in range(n)))


def _invocation(config: Mapping[str, Any], facts: BackboneFacts, directory: Path) -> tuple[int, ...] | None:
    tokens = config.get("alora_invocation_tokens")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < facts.vocabulary for t in tokens):
        raise ConfigError(
            f"{directory}: alora_invocation_tokens must be ids of this model's {facts.vocabulary} tokens"
        )
    if not tokens:
        raise ConfigError(f"{directory}: alora_invocation_tokens is empty: the adapter would never apply")
    return tuple(tokens)


def _numel(tensor: StoredTensor) -> int:
    n = 1
    for size in tensor.shape:
        n *= size
    return n
