"""The access list in Mosquitto's own format, so that one text serves every broker.

    topic [read|write|readwrite|deny] FILTER     before any ``user`` line: for clients without a name
    user NAME                                    the ``topic`` lines below are for that name only
    pattern [read|write|readwrite|deny] FILTER   for every name that has no + or # in it; %u is the name,
                                                 %c the client id

What counts is checked per message, at publish and at delivery; a subscription is always granted and then
delivers what the list allows. That is what Mosquitto 2.0 does, and it lets ``#`` mean "all I may see".
Denials win over grants. No line, no right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mesh.errors import ConfigError

__all__ = ["AccessList", "Right", "anonymous_lines", "matches"]

Right = Literal["read", "write"]
_RIGHTS: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "write": frozenset({"write"}),
    "readwrite": frozenset({"read", "write"}),
    "deny": frozenset(),
}


@dataclass(frozen=True, slots=True)
class _Line:
    filter: str
    rights: frozenset[str]
    """Empty for a denial."""

    def says(self, right: Right, topic: str, filter_: str) -> bool:
        return (right in self.rights or not self.rights) and matches(filter_, topic)


class AccessList:
    """Answers who may read or write which topic."""

    def __init__(self, text: str) -> None:
        """Raises: ConfigError: a line is not in the format above."""
        self._anonymous: list[_Line] = []
        self._patterns: list[_Line] = []
        self._users: dict[str, list[_Line]] = {}
        section = self._anonymous
        for number, raw in enumerate(text.splitlines(), start=1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            word, _, rest = line.partition(" ")
            if word == "user" and rest.strip():
                section = self._users.setdefault(rest.strip(), [])
            elif word == "topic" and rest.strip():
                section.append(_line(rest))
            elif word == "pattern" and rest.strip():
                self._patterns.append(_line(rest))
            else:
                raise ConfigError(f"access list line {number}: {line!r} is neither topic, pattern nor user")

    def allows(self, name: str | None, client: str, right: Right, topic: str) -> bool:
        """Whether the client called ``name`` (``None``: anonymous) may ``right`` the ``topic``."""
        own = self._anonymous if name is None else self._users.get(name, [])
        # "/" in a client id would reach into other levels; Mosquitto allows it only where %c is not used.
        verdicts = [line for line in own if line.says(right, topic, line.filter)]
        # A name with a wildcard in it would turn its pattern into everybody's.
        is_wild = any(letter in text for text in (name or "", client) for letter in "+#")
        for line in self._patterns if not is_wild else []:
            if (name is None and "%u" in line.filter) or ("/" in client and "%c" in line.filter):
                continue
            if line.says(right, topic, line.filter.replace("%c", client).replace("%u", name or "")):
                verdicts.append(line)
        return bool(verdicts) and all(line.rights for line in verdicts)


def anonymous_lines(text: str) -> str:
    """Only the ``topic`` lines before the first ``user``: what a listener for strangers may offer.

    Mosquitto applies a ``pattern`` without %u to clients without a name, too; a grant meant for all nodes
    must not become one for whoever can reach the plain port.
    """
    kept = []
    for line in text.splitlines():
        if line.strip().startswith("user "):
            break
        if line.strip().startswith("topic "):
            kept.append(line.strip())
    return "".join(f"{line}\n" for line in kept)


# 4096 pairs of ~100 bytes each: 0.5 MB at most. A mesh of 16 nodes has some 40 filters and 100 topics.
@lru_cache(maxsize=4096)
def matches(filter_: str, topic: str) -> bool:
    """Whether an MQTT filter selects a topic (MQTT 3.1.1, 4.7); no leading wildcard selects ``$``-topics."""
    if topic.startswith("$") and filter_[:1] in ("+", "#"):
        return False
    levels, parts = filter_.split("/"), topic.split("/")
    if levels[-1] == "#":
        levels.pop()
        if len(parts) < len(levels):
            return False
        parts = parts[: len(levels)]  # "a/#" selects "a" as well
    return len(levels) == len(parts) and all(
        level in ("+", part) for level, part in zip(levels, parts, strict=True)
    )


def _line(rest: str) -> _Line:
    word, _, filter_ = rest.strip().partition(" ")
    if word in _RIGHTS and filter_.strip():
        return _Line(filter_.strip(), _RIGHTS[word])
    return _Line(rest.strip(), _RIGHTS["readwrite"])
