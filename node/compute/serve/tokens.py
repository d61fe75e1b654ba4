"""The model's tokenizer: what is asked as tokens, tokens as text, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, GenerationConfig

from mesh.messages import Submit

__all__ = ["Tokens"]


class Tokens:
    """The model's tokenizer, chat template and end tokens.

    A ``prompt`` is one user message to a model that has a chat template, because that is what a question is;
    to a model without one, and to an adapter that learned completions, it is text to go on from. Texts to
    score, classify or embed are taken as they are.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        self.ends: frozenset[int] = _end_tokens(directory, self._tokenizer)

    def encode(self, submit: Submit, *, completes: bool = False) -> list[int]:
        """The prompt as the model shall see it; ``completes``: by an adapter that goes on from plain prompts.

        Raises:
            ValueError: The chat template does not take these messages; the text says why.
        """
        if submit.prompt is not None and (completes or not self._tokenizer.chat_template):
            return self.plain(submit.prompt)
        messages = [{"role": message.role, "content": message.content} for message in submit.messages]
        if submit.prompt is not None:
            messages = [{"role": "user", "content": submit.prompt}]
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: send 'prompt' instead of 'messages'")
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return list(encoded["input_ids"])

    def plain(self, text: str) -> list[int]:
        """A text of its own, with whatever the tokenizer puts around one (as tuning sees it)."""
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def continuation(self, text: str) -> list[int]:
        """A text that goes on from something."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def beginning(self) -> list[int]:
        """The token before a text that nothing comes before: what begins a text, else what ends one."""
        tokenizer = self._tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first] if first is not None else sorted(self.ends)[:1] or [0]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation config's, and the tokenizer's own."""
    ends: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (directory / "generation_config.json").exists():
        configured = GenerationConfig.from_pretrained(directory).eos_token_id
        ends.update(
            configured if isinstance(configured, list) else [] if configured is None else [configured]
        )
    return frozenset(ends)
