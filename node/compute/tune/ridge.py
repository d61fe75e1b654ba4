"""Linear classifiers in closed form, judged on texts that took no part in the fit.

Ridge regression is the one learner whose leave-one-out predictions cost nothing: with X = U S V' the fit is
U f U'Y with f = S² / (S² + ridge); a text's weight in its own fit is h = (row sums of U² f) + 1/n for the
mean; without the text it would get (fit - h y) / (1 - h). Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Fit", "Mixture", "indicators", "mix", "ridge"]

# Relative to the mean squared length of the rows: from next to nothing to rows that hardly count.
_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
_LEVERAGE_MAX = 1 - 1e-9
_NEWTON_STEPS = 50
_SURE_MAX = 1e3
"""Largest factor on regressed indicators (which run from 0 to 1): texts told apart without a single error
would ask for infinity."""


@dataclass(frozen=True, slots=True)
class Fit:
    weight: Tensor
    """(k, d): predictions = (x - mean of x) @ weight.T + mean of y, or x @ weight.T without the means."""
    held_out: Tensor
    """(n, k): each text predicted from the others."""
    error: float
    """Mean square of held_out - y."""
    strength: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """Logits as a sum of several classifiers' predictions."""

    factors: tuple[float, ...]
    """None is negative."""
    loss: float
    """Mean cross-entropy of what the texts get from the others."""
    accuracy: float


def indicators(labels: Tensor, n_labels: int) -> Tensor:
    """Shapes: (n,) -> (n, n_labels), one where the label is."""
    return F.one_hot(labels, n_labels).double()


def ridge(x: Tensor, y: Tensor, *, has_mean: bool) -> Fit:
    """The ridge from ``_RIDGES`` whose held-out error is least.

    Shapes: x (n, d), y (n, k). ``has_mean``: means are fitted beside, unpunished.
    """
    n = len(x)
    x, y = x.double(), y.double()
    mean = y.mean(0) if has_mean else torch.zeros_like(y[0])
    u, s, vt = torch.linalg.svd(x - x.mean(0) if has_mean else x, full_matrices=False)
    power = s.square()
    unit = float(power.sum()) / n or 1.0
    seen = u.T @ (y - mean)
    best: tuple[float, float, Tensor] | None = None
    for strength in _RIDGES:
        kept = power / (power + strength * unit)
        own = (u.square() @ kept + (1 / n if has_mean else 0.0)).clamp(max=_LEVERAGE_MAX)[:, None]
        held_out = (mean + u @ (kept[:, None] * seen) - own * y) / (1 - own)
        error = float((held_out - y).square().mean())
        if best is None or error < best[0]:
            best = error, strength, held_out
    assert best is not None
    error, strength, held_out = best
    weight = (vt.T @ ((s / (power + strength * unit))[:, None] * seen)).T
    return Fit(weight, held_out, error, strength)


def mix(predictions: Sequence[Tensor], labels: Tensor) -> Mixture:
    """Factors that minimize the cross-entropy of the summed predictions. Shapes: each (n, labels).

    The loss is convex in the factors, so Newton's method with halved steps finds the minimum; a classifier
    that would enter with a negative factor is left out.
    """
    chosen = list(range(len(predictions)))
    while True:
        factors, loss = _newton(torch.stack([predictions[at] for at in chosen]), labels)
        if min(factors) >= 0 or len(chosen) == 1:
            break
        chosen.remove(chosen[min(range(len(chosen)), key=lambda at: factors[at])])
    placed = {at: max(0.0, factor) for at, factor in zip(chosen, factors, strict=True)}
    whole = tuple(placed.get(at, 0.0) for at in range(len(predictions)))
    total = sum(factor * prediction for factor, prediction in zip(whole, predictions, strict=True))
    assert isinstance(total, Tensor)
    return Mixture(whole, loss, float((total.argmax(1) == labels).double().mean()))


def _newton(z: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Shapes: z (m, n, labels), labels (n,)."""

    def loss_of(factors: Tensor) -> float:
        return float(F.cross_entropy(torch.einsum("m,mnk->nk", factors, z), labels))

    n = z.shape[1]
    factors = torch.ones(len(z), dtype=z.dtype)
    loss = loss_of(factors)
    target = F.one_hot(labels, z.shape[2]).to(z)
    for _ in range(_NEWTON_STEPS):
        p = torch.einsum("m,mnk->nk", factors, z).softmax(1)
        slope = torch.einsum("mnk,nk->m", z, p - target) / n
        expected = torch.einsum("mnk,nk->mn", z, p)
        bend = (torch.einsum("mnk,lnk,nk->ml", z, z, p) - expected @ expected.T) / n
        bend += 1e-9 * torch.eye(len(z), dtype=z.dtype)
        move = torch.linalg.solve(bend, slope)
        size = 1.0
        while size > 1e-4:
            tried = (factors - size * move).clamp(-_SURE_MAX, _SURE_MAX)
            if (new := loss_of(tried)) < loss - 1e-12:
                factors, loss = tried, new
                break
            size /= 2
        else:
            break
    return factors.tolist(), loss
