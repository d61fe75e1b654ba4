"""Every failure edgemesh raises on purpose; the branch says who must act.

    EdgemeshError
    ├── ConfigError            the operator: change a flag, a file or the environment (exit code 2)
    │   └── WrongKeyError      this join code belongs to another mesh (exit code 3)
    ├── UnreachableError       the operator or time: nobody answered (exit code 4)
    ├── PeerError              nobody: drop the message, keep serving
    │   └── DecodeError        the bytes are not a message we accept
    └── TaskError              the ledger settles the task with this reason

Refusals are values (see ``coordinator.admission``), impossibilities are ``assert``s with a sentence.
``code`` is the stable name that travels on the wire and is printed by the command line.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DecodeError",
    "EdgemeshError",
    "PeerError",
    "TaskError",
    "UnreachableError",
    "WrongKeyError",
]


class EdgemeshError(Exception):
    """Base of the tree. The text tells the reader what to do next."""

    code = "internal"


class ConfigError(EdgemeshError):
    """A flag, a file or an environment variable is wrong; the operator must change it."""

    code = "config"


class WrongKeyError(ConfigError):
    """The peer belongs to a mesh with another key."""

    code = "wrong_key"


class UnreachableError(EdgemeshError):
    """Nobody answered: no broker, no peer, no coordinator."""

    code = "unreachable"


class PeerError(EdgemeshError):
    """One peer misbehaved: drop what it said and keep serving."""

    code = "peer"


class DecodeError(PeerError):
    """Bytes that are not a message we accept: malformed, oversized, or of the wrong shape."""

    code = "decode"


class TaskError(EdgemeshError):
    """The work itself failed; the ledger settles the task as failed with this reason."""

    code = "task"
