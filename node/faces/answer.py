"""The text a person sees while an answer is made: pieces may be lost, and an attempt may start over.

``feed`` and ``finish`` return what to print next. Together they always print the whole answer; what was
already on the screen is printed again only if a new attempt said something else.
"""

from __future__ import annotations

from mesh.messages import TaskResult, TaskTokens

__all__ = ["Answer"]


class Answer:
    """One task's streamed text."""

    def __init__(self) -> None:
        self._shown = ""
        self._text = ""
        self._attempt = 0
        self._seq_next = 0

    def feed(self, tokens: TaskTokens) -> str:
        """What to print for this piece; nothing for a repeated, late or out-of-order one."""
        if tokens.attempt > self._attempt:
            self._attempt, self._seq_next, self._text = tokens.attempt, 0, ""
        if tokens.attempt < self._attempt or tokens.seq != self._seq_next:
            return ""  # after a gap nothing more fits: the result fills in
        self._seq_next += 1
        self._text += tokens.text
        return self._catch_up(is_whole=False)

    def finish(self, result: TaskResult) -> str:
        """What is still missing."""
        self._text = result.text
        return self._catch_up(is_whole=True)

    def _catch_up(self, *, is_whole: bool) -> str:
        if self._text.startswith(self._shown):
            rest = self._text[len(self._shown) :]
        elif self._shown.startswith(self._text) and not is_whole:
            return ""  # another attempt says the same again, and has not come as far yet
        else:
            rest = f"\n{self._text}" if self._shown else self._text
        self._shown = self._text
        return rest
