"""From logits to text: choosing a token, and turning tokens into text that never breaks a character.

``Sampler``     greedy, or temperature and nucleus (top-p) sampling with a generator of its own
``TextStream``  tokens in, pieces of valid text out; holds back what may become a stop string
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Sampler", "TextStream"]

# The longest UTF-8 character has 4 bytes, so at most 4 byte-level tokens can still be incomplete; after
# that a replacement character is the model's own doing and goes out.
_TOKENS_PER_CHARACTER_MAX = 4


class Sampler:
    """Chooses the next token of one sequence. Same seed, same logits: same choice, whatever else runs."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def choose(self, logits: Tensor) -> int:
        """Shapes: logits (vocabulary,) float32."""
        if self._temperature == 0:
            return int(logits.argmax())
        # On the CPU, where the generator lives: one seed must mean one text on every device.
        weights = torch.softmax(logits.to("cpu", torch.float32) / self._temperature, dim=-1)
        if self._top_p < 1:
            ordered, tokens = weights.sort(descending=True)
            # The nucleus is the shortest front of the order that holds top_p; its first token always stays
            # (Holtzman et al., "The curious case of neural text degeneration", 2020).
            ordered[ordered.cumsum(0) - ordered >= self._top_p] = 0
            return int(tokens[torch.multinomial(ordered, 1, generator=self._random)])
        return int(torch.multinomial(weights, 1, generator=self._random))


class TextStream:
    """The text of one answer as its tokens arrive.

    ``pieces`` concatenated are the answer. A stop string ends it: nothing of the stop string, and
    nothing after it, is ever given out, not even the beginning of one that may still be completed.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Text of ids[:_read] is out of the decoder; decoding starts a little earlier, at _prefix, because
        # some tokenizers write a token differently at the start of a text.
        self._prefix = 0
        self._read = 0
        self._held = ""
        self.stopped = False
        self.text = ""
        """Everything given out so far."""

    def add(self, token: int) -> str:
        """The next piece, often empty; look at ``stopped`` afterwards."""
        self._ids.append(token)
        return self._give(self._decoded(is_last=False), is_last=False)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return "" if self.stopped else self._give(self._decoded(is_last=True), is_last=True)

    def _decoded(self, is_last: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        is_whole = not after.endswith("\ufffd")
        if not (is_whole or is_last or len(self._ids) - self._read >= _TOKENS_PER_CHARACTER_MAX):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _give(self, new: str, is_last: bool) -> str:
        pending = self._held + new
        found = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = pending[: min(found)], ""
        else:
            keep = 0 if is_last else _beginning_of_stop(pending, self._stop)
            piece, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += piece
        return piece


def _beginning_of_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
