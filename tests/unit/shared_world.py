"""Two nodes' engines and what lies between them: parts of prefixes, given as a test says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from node.compute.features.link import Asked
from node.compute.features.store import Entry
from node.compute.model_engine import ModelEngine
from node.compute.serve.prefix_keys import PrefixKeys
from node.compute.serve.prefixes import Prefixes
from node.compute.serve.shared_prefixes import SharedPrefixes
from tests.serving_world import World

__all__ = ["Mesh", "engine_of", "keys_of", "prompt"]

GROUP_BYTES_MAX = 32 * 1024  # two layers of the tiny model: groups of 1, 2 and 2


def prompt(world: World, seed: int, n: int) -> str:
    rng = random.Random(seed)
    return world.tokens.text([rng.randrange(10, 201) for _ in range(n)])


def keys_of(world: World, **more: str) -> PrefixKeys:
    digests = {"backbone_digest": "weights", "tokenizer_digest": "letters", **more}
    return PrefixKeys(world.backbone, group_bytes_max=GROUP_BYTES_MAX, **digests)


def engine_of(world: World, mesh: Mesh, **more: str) -> ModelEngine:
    """An engine that reads from ``mesh`` and publishes to it."""

    def share(prefixes: Prefixes) -> SharedPrefixes:
        keys = keys_of(world, **more)
        return SharedPrefixes(prefixes, keys, [("mesh", mesh)], mesh, lambda: mesh.now)  # type: ignore[arg-type]

    engine = world.engine(share=share)
    engine._expect_cuts(2, 4)  # as if ``middle`` and ``top`` had been asked for before
    return engine


class Mesh:
    """What has been published; gives ``per_wait`` parts whenever somebody waits or looks, ``until`` so many.

    ``lost``: parts that are claimed and do not come. ``damage`` changes payloads on their way.
    """

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.per_wait, self.until = 1 << 30, 1 << 30
        self.expected_s: float | None = 0.0
        self.lost: set[bytes] = set()
        self.damage: Callable[[bytes, bytes], bytes] = lambda key, payload: payload
        self.now = 0.0
        self.wanted: list[list[bytes]] = []
        self.open: list[_Coming] = []

    def put(self, entries: Mapping[bytes, Entry]) -> bool:
        self.entries.update(entries)
        return True

    def ask(self, keys: Sequence[bytes], n_bytes: int, within_s: float = 0.5) -> _Asking:
        return _Asking([key in self.entries for key in keys], self.expected_s)

    def want(self, keys: Sequence[bytes], within_s: float) -> _Coming:
        self.wanted.append(list(keys))
        self.open.append(_Coming(self, list(keys)))
        return self.open[-1]

    def served(self, key: bytes) -> memoryview | None:
        if key in self.lost or key not in self.entries:
            return None
        return memoryview(self.damage(key, bytes(self.entries[key].encoded.payload)))


class _Asking:
    def __init__(self, there: list[bool], expected_s: float | None) -> None:
        self.answer = (there, Asked(request=1, expected_s=expected_s))

    def wait(self, timeout_s: float) -> bool:
        return True


class _Coming:
    def __init__(self, mesh: Mesh, keys: list[bytes]) -> None:
        self.mesh, self.keys = mesh, keys
        self._n_come = 0
        self.n_waits = 0

    @property
    def n_settled(self) -> int:
        return self._n_come

    def wait(self, n_keys: int, timeout_s: float) -> bool:
        self.n_waits += 1
        self._n_come = min(self._n_come + self.mesh.per_wait, self.mesh.until, len(self.keys))
        return self._n_come >= n_keys

    def take(self, keys: Iterable[bytes]) -> dict[bytes, memoryview]:
        found = {key: self.mesh.served(key) for key in keys}
        return {key: payload for key, payload in found.items() if payload is not None}

    def close(self) -> None:
        if self in self.mesh.open:
            self.mesh.open.remove(self)
