"""The arithmetic of training: steps, their pieces, and what an adapter does on records it never saw.

Everything follows from the seed, the examples and the starting weights. No clock, no global random source
and no hidden state takes part, so a trainer restored at step n goes on as if it had never stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from node.compute.tune.batches import Example, batches, pieces
from node.compute.tune.forward import Layout, TopPass
from node.compute.tune.top_model import Kind

__all__ = ["Evaluation", "Read", "Recipe", "Trainer"]

Read = Callable[[Sequence[Sequence[int]]], Sequence[Tensor]]
"""Feature maps of token lists: (T_i, d) each, entering the cut."""

# Losses that the displayed one is the mean of: an epoch of a small set, half a minute of a large one.
_LOSSES_SHOWN = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights follow their gradients: AdamW, a linear rise, then a linear fall to nothing."""

    learning_rate: float
    epochs: int
    batch: int
    seed: int
    warm_up: float = 0.06
    """Share of all steps over which the learning rate rises."""
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over all targets: labels, or labelled tokens."""

    loss: float
    loss_error: float
    """Standard error of ``loss``."""
    accuracy: float


class Trainer:
    """``model`` is a ``load_top`` wrapped by ``adapt``; ``n_rows`` bounds a piece."""

    def __init__(
        self,
        model: Any,
        cut: int,
        kind: Kind,
        examples: Sequence[Example],
        read: Read,
        recipe: Recipe,
        n_rows: int,
        *,
        is_activated: bool = False,
    ) -> None:
        assert examples
        self.model = model
        self.cut = cut
        self._pass = TopPass(model, cut)
        self._kind = kind
        self._examples = examples
        self._read = read
        self._recipe = recipe
        self._n_rows = n_rows
        self._is_activated = is_activated
        self._parameters = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
        self._optimizer = _adamw(list(self._parameters.values()), recipe)
        self._order: tuple[int, list[list[int]]] | None = None
        self.steps_per_epoch = -(-len(examples) // recipe.batch)
        self.n_steps = self.steps_per_epoch * recipe.epochs
        self.step = 0
        """Optimizer steps done."""
        self.losses: deque[float] = deque(maxlen=_LOSSES_SHOWN)
        """Of the last steps: mean over what was learned in each."""

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.steps_per_epoch

    @property
    def loss(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None

    def learning_rate_at(self, step: int) -> float:
        """Of the step after ``step`` others."""
        rise = max(1, round(self._recipe.warm_up * self.n_steps))
        share = (step + 1) / rise if step < rise else (self.n_steps - step) / max(1, self.n_steps - rise + 1)
        return self._recipe.learning_rate * share

    def take_step(self) -> Generator[None, None, None]:
        """One optimizer step, a yield after each piece but the last."""
        assert self.step < self.n_steps
        numbers = self._batch()
        n_targets = sum(len(self._examples[number].targets) for number in numbers)
        total = 0.0
        for at, piece in enumerate(pieces(self._examples, numbers, self._n_rows)):
            if at:
                yield
            logits, targets = self._logits([self._examples[number] for number in piece])
            loss = F.cross_entropy(logits, targets, reduction="sum") / n_targets
            loss.backward()
            total += float(loss)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate_at(self.step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.step += 1

    def evaluate(self, examples: Sequence[Example]) -> Generator[None, None, Evaluation]:
        """How the adapter does on ``examples``; a yield after each piece."""
        parts: list[Tensor] = []
        right = 0
        for piece in pieces(examples, range(len(examples)), self._n_rows):
            with torch.no_grad():
                logits, targets = self._logits([examples[number] for number in piece])
                parts.append(F.cross_entropy(logits, targets, reduction="none"))
                right += int((logits.argmax(-1) == targets).sum())
            yield
        losses = torch.cat(parts).double()
        n = len(losses)
        error = float(losses.std(correction=0)) / n**0.5
        return Evaluation(float(losses.mean()), error, right / n)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def last_rows(self, examples: Sequence[Example]) -> Tensor:
        """Shapes: (targets of all examples, d), after the final norm, in the order of the examples."""
        x, layout = self._rows(examples)
        return self._pass.rows(x, layout)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            found[f"weight.{name}"] = parameter.detach()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                found[f"{key}.{name}"] = value
        return found

    def restore(self, step: int, losses: Sequence[float], tensors: Mapping[str, Tensor]) -> None:
        """Go on after ``step`` steps with what ``tensors()`` gave then.

        Raises:
            ValueError: The tensors are not those of this model.
        """
        if not 0 <= step <= self.n_steps:
            raise ValueError(f"it is at step {step} of {self.n_steps}")
        weights, moments = {}, {}
        for name, parameter in self._parameters.items():
            kept = tensors.get(f"weight.{name}")
            if kept is None or kept.shape != parameter.shape:
                raise ValueError(f"it has no {name} of shape {tuple(parameter.shape)}")
            state = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            # A parameter that never had a gradient has no moments; one with some has all.
            if state and len(state) != len(_MOMENTS):
                raise ValueError(f"it has only a part of the optimizer's state of {name}")
            weights[name], moments[name] = kept, state
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
                if moments[name]:
                    self._optimizer.state[parameter] = moments[name]
        self.step = step
        self.losses.extend(losses)

    def _batch(self) -> list[int]:
        epoch = self.epoch
        if self._order is None or self._order[0] != epoch:
            recipe = self._recipe
            self._order = epoch, batches(len(self._examples), recipe.batch, recipe.seed, epoch)
        return self._order[1][self.step % self.steps_per_epoch]

    def _rows(self, examples: Sequence[Example]) -> tuple[Tensor, Layout]:
        maps = self._read([example.ids for example in examples])
        active = [example.active_from for example in examples] if self._is_activated else None
        layout = Layout([len(e.ids) for e in examples], [e.wanted for e in examples], active)
        return torch.cat(list(maps)), layout

    def _logits(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Shapes: (targets, labels or vocabulary), (targets,)."""
        x, layout = self._rows(examples)
        logits = self._pass.logits(self._pass.rows(x, layout))
        return logits, torch.tensor([target for example in examples for target in example.targets])


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _adamw(parameters: list[Tensor], recipe: Recipe) -> Any:
    """Fused where PyTorch has it: one pass over the weights in place of ten."""
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    try:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    except RuntimeError:
        return torch.optim.AdamW(parameters, foreach=False, **settings)
