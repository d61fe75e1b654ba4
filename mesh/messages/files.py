"""What files a node has to give: versions of adapters, and the backbone it serves.

The files themselves travel by the data plane as blobs: who knows the digest of a manifest can fetch the
manifest, and from it the files. A name stands for its newest version, see ``mesh.agreement.versions``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.ids import NodeId
from mesh.messages.checks import check_count, check_id, check_seconds, check_text
from mesh.messages.tune import check_adapter_name

__all__ = [
    "MANIFEST_BYTES_MAX",
    "VERSION_MAX",
    "AdapterHeld",
    "AdapterPull",
    "AdapterRemoved",
    "FilesHeld",
    "ModelHeld",
    "PullAdapter",
    "RemoveAdapter",
]

MANIFEST_BYTES_MAX = 64 * 1024
"""Of what lists the files: 64 names and digests are 12 KiB."""
VERSION_MAX = 2**48
ADAPTERS_HELD_MAX = 512  # with digests 150 KiB of JSON, retained once a node
REMOVED_MAX = 512
PULLS_MAX = 16
MODEL_NAMES_MAX = 8
_TEXT_BYTES_MAX = 200
_DIGITS = frozenset("0123456789abcdef")


def _check_digest(name: str, value: str) -> None:
    if len(value) != 64 or not _DIGITS.issuperset(value):
        raise ValueError(f"{name} must be 64 hexadecimal digits, got {value[:80]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterHeld:
    """One version of an adapter that a node has on its disk: a part of ``FilesHeld``."""

    name: str
    version: int
    digest: str
    """Digest of its manifest: two nodes with one digest have the same files."""
    manifest_bytes: int
    bytes: int
    """All files together."""
    base: str | None = None
    """SHA-256 of the backbone's weights that it is for; ``None``: nobody said."""
    method: str = ""
    task: str = ""
    first_layer: int | None = None
    metric: float | None = None
    weights: str = ""
    """The adapter's own digest, as its card and listings show it; empty without a card."""
    is_own: bool = False
    """Made or brought here; not pulled from another node."""

    def __post_init__(self) -> None:
        check_adapter_name("name", self.name)
        check_count("version", self.version, VERSION_MAX, least=1)
        _check_digest("digest", self.digest)
        check_count("manifest_bytes", self.manifest_bytes, MANIFEST_BYTES_MAX, least=1)
        check_count("bytes", self.bytes)
        for name in ("base", "method", "task", "weights"):
            check_text(name, getattr(self, name), _TEXT_BYTES_MAX)
        if self.first_layer is not None:
            check_count("first_layer", self.first_layer)
        if self.metric is not None and not abs(self.metric) < float("inf"):
            raise ValueError(f"metric must be a finite number, got {self.metric}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRemoved:
    """Versions up to this one are gone for good, also where a node was away: a part of ``FilesHeld``."""

    name: str
    version: int
    left_s: float
    """How long the node that says so will remember it, from when it said so."""

    def __post_init__(self) -> None:
        check_adapter_name("name", self.name)
        check_count("version", self.version, VERSION_MAX, least=1)
        check_seconds("left_s", self.left_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPull:
    """How a pull that somebody asked for is getting on: a part of ``FilesHeld``."""

    name: str
    digest: str
    done_bytes: int
    bytes: int
    trouble: str | None = None
    """Why it ended without success."""

    def __post_init__(self) -> None:
        check_adapter_name("name", self.name)
        _check_digest("digest", self.digest)
        check_count("done_bytes", self.done_bytes)
        check_count("bytes", self.bytes)
        check_text("trouble", self.trouble, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeld:
    """The backbone whose files a node can give: a part of ``FilesHeld``."""

    name: str
    digest: str
    """Digest of the manifest of its files."""
    manifest_bytes: int
    bytes: int
    weights_sha256: str
    source: str = ""
    """What it was made from, such as ``hub:org/name``; empty for a file of that machine."""
    also_called: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_text("name", self.name, 256)
        check_text("source", self.source, 512)
        _check_digest("digest", self.digest)
        _check_digest("weights_sha256", self.weights_sha256)
        check_count("manifest_bytes", self.manifest_bytes, MANIFEST_BYTES_MAX, least=1)
        check_count("bytes", self.bytes)
        if len(self.also_called) > MODEL_NAMES_MAX:
            raise ValueError("too many names of one model")
        for name in self.also_called:
            check_text("also_called", name, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesHeld:
    """Retained: the adapters and the backbone that a node can give to others.

    Of several versions of one adapter the newest counts; ``removed`` says which are gone for good. Every
    node repeats the removals it knows, so that one that was away hears of them.
    """

    node: NodeId
    incarnation: int
    adapters: list[AdapterHeld] = field(default_factory=list)
    removed: list[AdapterRemoved] = field(default_factory=list)
    model: ModelHeld | None = None
    base: str | None = None
    """SHA-256 of the weights that the node serves, once they are loaded."""
    pulls: list[AdapterPull] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_id("node", self.node)
        check_count("incarnation", self.incarnation)
        check_text("base", self.base, _TEXT_BYTES_MAX)
        if len(self.adapters) > ADAPTERS_HELD_MAX or len(self.removed) > REMOVED_MAX:
            raise ValueError("too many adapters or removals in one node's files")
        if len(self.pulls) > PULLS_MAX:
            raise ValueError("too many pulls in one node's files")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullAdapter:
    """Asks a node to have this version of an adapter, whatever its settings say about copies."""

    name: str
    digest: str
    save_as: str | None = None
    """As another adapter of this name; for versions that are not the newest."""

    def __post_init__(self) -> None:
        check_adapter_name("name", self.name)
        _check_digest("digest", self.digest)
        if self.save_as is not None:
            check_adapter_name("save_as", self.save_as)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveAdapter:
    """Asks a node to remove the adapter's versions up to this one from the whole mesh."""

    name: str
    version: int

    def __post_init__(self) -> None:
        check_adapter_name("name", self.name)
        check_count("version", self.version, VERSION_MAX, least=1)
