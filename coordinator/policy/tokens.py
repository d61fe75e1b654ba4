"""How many tokens a text has, before a node has counted them.

``n_tokens = each * n_texts + rate * n_bytes``, learned by kind of task: a chat template adds a few dozen
tokens to each prompt, and a token of common words has twice the bytes of one of names or numbers. Least
squares of the relative error, in which old outcomes fade.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from mesh.messages.task import TaskKind

__all__ = ["TokenCounts"]

_BYTES_PER_TOKEN: Final = 4.0
"""English under a vocabulary of 32 k to 150 k: 3.5 to 4.5, as long as nothing was seen."""
_RATE_LEAST: Final = 1 / 32
_RATE_MOST: Final = 1.0
"""Tokenizers fall back to bytes."""
_KEPT: Final = 0.9
"""Of what was learned, at each lesson: half of it after seven."""
_FIRST_WEIGHT: Final = 0.25
"""Of what is believed at first, in lessons; it fades as they do."""
_EACH_DOUBTED: Final = 50.0
"""So many tokens more for each text are at first as hard to believe as an estimate that is all wrong."""
_STAYING_SHARE: Final = 0.02
"""Of that first weight; texts that are alike say nothing of ``each`` against ``rate``."""


@dataclass(slots=True)
class _Line:
    """Sums over lessons of products of ``n_texts / n_tokens``, ``n_bytes / n_tokens`` and 1."""

    texts_texts: float = _FIRST_WEIGHT / _EACH_DOUBTED**2
    texts_bytes: float = 0.0
    bytes_bytes: float = _FIRST_WEIGHT * _BYTES_PER_TOKEN**2
    texts: float = 0.0
    bytes: float = _FIRST_WEIGHT * _BYTES_PER_TOKEN
    each: float = 0.0
    rate: float = 1 / _BYTES_PER_TOKEN

    def take(self, texts: float, n_bytes: float) -> None:
        self.texts_texts = _KEPT * self.texts_texts + texts * texts
        self.texts_bytes = _KEPT * self.texts_bytes + texts * n_bytes
        self.bytes_bytes = _KEPT * self.bytes_bytes + n_bytes * n_bytes
        self.texts = _KEPT * self.texts + texts
        self.bytes = _KEPT * self.bytes + n_bytes
        self._solve()

    def _solve(self) -> None:
        weight = _STAYING_SHARE * _FIRST_WEIGHT
        tt, tb = self.texts_texts + weight / _EACH_DOUBTED**2, self.texts_bytes
        bb = self.bytes_bytes + weight * _BYTES_PER_TOKEN**2
        t, b = self.texts, self.bytes + weight * _BYTES_PER_TOKEN
        each = max(0.0, (t * bb - b * tb) / (tt * bb - tb * tb))
        # Whichever of the two is at a bound, the other is the best beside it.
        self.rate = min(max((b - each * tb) / bb, _RATE_LEAST), _RATE_MOST)
        self.each = max(0.0, (t - self.rate * tb) / tt)


@dataclass(slots=True)
class TokenCounts:
    """Learned by one coordinator while it coordinates."""

    _lines: dict[TaskKind, _Line] = field(default_factory=dict)

    def expected(self, kind: TaskKind, n_bytes: float, n_texts: float = 0.0) -> float:
        """Tokens of ``n_texts`` texts with ``n_bytes`` bytes of UTF-8 in all."""
        line = self._lines.get(kind)
        return n_bytes / _BYTES_PER_TOKEN if line is None else line.each * n_texts + line.rate * n_bytes

    def learn(self, kind: TaskKind, *, n_bytes: int, n_texts: int, n_tokens: float) -> None:
        """A node has counted. A token stands for at most 32 bytes, or it is none of ours."""
        if 0 < n_bytes <= n_tokens / _RATE_LEAST:
            self._lines.setdefault(kind, _Line()).take(n_texts / n_tokens, n_bytes / n_tokens)
