"""Published traces of requests, read line by line. Each bad line is named, with what it should be.

``azure``     CSV, ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Azure/AzurePublicDataset, 2023 and 2024)
``mooncake``  JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` (kvcache-ai/Mooncake)

Only times and lengths are read. Mooncake's ``hash_ids`` say which prompts begin alike; virtual nodes have
no prefix cache, so they are left aside.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from mesh.errors import ConfigError

__all__ = ["READERS", "Request", "TraceError", "read_azure", "read_mooncake"]

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_AZURE_EXAMPLE = "2023-11-16 18:15:46.680590,374,44"
_MOONCAKE_EXAMPLE = '{"timestamp": 1500, "input_length": 374, "output_length": 44}'
_TOKENS_MAX = 10_000_000
_QUOTED_MAX = 80


class TraceError(ConfigError):
    """A line of a trace is not what its format says.

    Attributes:
        line: Counted from 1; 0 = the file as a whole.
    """

    code = "trace"

    def __init__(self, name: str, line: int, found: str, expected: str) -> None:
        where = f"{name}, line {line}" if line else name
        super().__init__(f"{where}: expected {expected}, found {found}")
        self.line = line


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a trace: somebody asked something."""

    at_s: float
    """Since the first request."""
    n_prompt_tokens: int
    n_tokens: int
    """Of the answer, at least 1."""


def read_azure(lines: Iterable[str], name: str) -> list[Request]:
    """Requests in order of time, the first at 0.

    Args:
        lines: With or without line ends.
        name: Of the file, for errors.

    Raises:
        TraceError: A line is not what it should be, or there is no request at all.
    """
    rows = enumerate(csv.reader(lines), 1)
    titles = next((row for _, row in rows), None)
    if titles is None:
        raise TraceError(name, 0, "an empty file", f"a line {','.join(_AZURE)} and requests below it")
    titles = [title.strip().removeprefix("\ufeff") for title in titles]
    if missing := [title for title in _AZURE if title not in titles]:
        raise TraceError(
            name,
            1,
            _quoted(",".join(titles)),
            f"the titles {','.join(_AZURE)} ({', '.join(missing)} missing)",
        )
    at, prompt, answer = (titles.index(title) for title in _AZURE)
    requests: list[tuple[datetime, int, int]] = []
    try:
        for line, row in rows:
            if not any(row):
                continue
            try:
                when = datetime.fromisoformat(row[at].strip()).replace(tzinfo=None)
                requests.append((when, _tokens(row[prompt]), _tokens(row[answer])))
            except (ValueError, IndexError):
                expected = f"{','.join(titles)} such as {_AZURE_EXAMPLE}"
                raise TraceError(name, line, _quoted(",".join(row)), expected) from None
    except csv.Error as error:
        raise TraceError(name, 0, str(error), "a CSV file") from None
    if not requests:
        raise TraceError(name, 0, "titles only", f"requests such as {_AZURE_EXAMPLE}")
    start = min(when for when, _, _ in requests)
    return _ordered([((when - start).total_seconds(), prompt, answer) for when, prompt, answer in requests])


def read_mooncake(lines: Iterable[str], name: str) -> list[Request]:
    """Requests in order of time, the first at 0.

    Args:
        lines: With or without line ends.
        name: Of the file, for errors.

    Raises:
        TraceError: A line is not what it should be, or there is no request at all.
    """
    requests: list[tuple[float, int, int]] = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
            at_ms = _count(found["timestamp"])
            requests.append((at_ms / 1000, _tokens(found["input_length"]), _tokens(found["output_length"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            expected = f"a JSON object such as {_MOONCAKE_EXAMPLE}"
            raise TraceError(name, line, _quoted(text.strip()), expected) from None
    if not requests:
        raise TraceError(name, 0, "an empty file", f"lines such as {_MOONCAKE_EXAMPLE}")
    start_s = min(at_s for at_s, _, _ in requests)
    return _ordered([(at_s - start_s, prompt, answer) for at_s, prompt, answer in requests])


READERS: Mapping[str, Callable[[Iterable[str], str], list[Request]]] = MappingProxyType(
    {"azure": read_azure, "mooncake": read_mooncake}
)


def _ordered(requests: Iterable[tuple[float, int, int]]) -> list[Request]:
    """By time; requests of one instant stay in the file's order."""
    return [
        Request(at_s, n_prompt_tokens, max(1, n_tokens))
        for at_s, n_prompt_tokens, n_tokens in sorted(requests, key=lambda request: request[0])
    ]


def _tokens(given: object) -> int:
    """A count of tokens; a request that generated nothing still took a step.

    Raises:
        ValueError: It is none.
    """
    n_tokens = _count(int(given) if isinstance(given, str) else given)
    if n_tokens > _TOKENS_MAX:
        raise ValueError(f"{n_tokens} tokens")
    return int(n_tokens)


def _count(given: object) -> float:
    """A number from 0; what JSON calls true or NaN is none.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 <= given < float("inf"):
        raise ValueError(f"{given!r} is no count")
    return given


def _quoted(text: str) -> str:
    short = text if len(text) <= _QUOTED_MAX else text[:_QUOTED_MAX] + "…"
    return repr(short)
