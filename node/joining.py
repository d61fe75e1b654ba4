"""Which key a joining process uses: given, saved, or new. Never two meshes of one name by accident.

--code given      it is the key; if only strangers of that name are in sight, it is the wrong one
key saved here    use it
neither, --new    create a mesh
neither           create a mesh, unless one of this name is in sight: then ask for its code
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mesh.errors import ConfigError, WrongKeyError
from mesh.transport.identity import SECRET_BYTES, MeshKey
from node.settings import Settings
from node.state import StateDir

if TYPE_CHECKING:
    from mesh.transport.discovery import Sighting

__all__ = ["SCAN_S", "JoinKey", "known_key", "needs_scan", "resolve_key", "settle_key"]

SCAN_S = 1.0
"""How long a first join looks around. An mDNS answer takes 20 to 120 ms (RFC 6762 section 6)."""


@dataclass(frozen=True, slots=True)
class JoinKey:
    key: MeshKey
    origin: Literal["given", "saved", "created"]


def known_key(settings: Settings, state: StateDir) -> MeshKey:
    """The key of a process that is no node: given by ``--code``, or saved here. Nothing is created.

    Raises:
        ConfigError: There is none.
    """
    if settings.code is not None:
        return MeshKey.from_code(settings.code)
    key = state.mesh_key(settings.mesh)
    if key is None:
        known = ", ".join(state.meshes())
        hint = f"known here: {known}" if known else "`edgemesh join` creates or joins one"
        raise ConfigError(f"no key of a mesh '{settings.mesh}' in {state.path}; {hint}")
    return key


def needs_scan(settings: Settings, state: StateDir) -> bool:
    """Whether ``resolve_key`` depends on who is in sight: only the first join of a machine does."""
    saved = state.mesh_key(settings.mesh)
    if settings.code is not None:
        return saved is None or saved != MeshKey.from_code(settings.code)
    return saved is None and not settings.new


def resolve_key(settings: Settings, state: StateDir, sightings: Sequence[Sighting]) -> JoinKey:
    """The key of this process's mesh; saved, so that the next process of this user finds it.

    Raises:
        ConfigError: A mesh of this name is in sight and its code was not given; or this machine is in
            another mesh of this name already.
        WrongKeyError: The code is of another mesh of the same name than the one in sight.
    """
    mesh = settings.mesh
    saved = state.mesh_key(mesh)
    seen = sorted({sighting.advert.fingerprint for sighting in sightings if sighting.advert.mesh == mesh})
    if settings.code is not None:
        key = MeshKey.from_code(settings.code)
        if saved is not None and saved != key:
            raise ConfigError(
                f"this machine is in another mesh '{mesh}' already (fingerprint {saved.fingerprint}): "
                f"use another --state-dir, or remove {state.path / 'meshes' / mesh} to leave it for good"
            )
        if seen and key.fingerprint not in seen:
            raise WrongKeyError(
                f"the join code is of another mesh: fingerprint {key.fingerprint}, but the '{mesh}' in sight "
                f"has {' and '.join(seen)}; run `edgemesh token` on a device that is in, and copy its code"
            )
        if saved is None:
            state.save_key(key)
        return JoinKey(key, "given")
    if saved is not None:
        return JoinKey(saved, "saved")
    if seen and not settings.new:
        raise ConfigError(
            f"a mesh named '{mesh}' (fingerprint {' and '.join(seen)}) is already on this network: run "
            "`edgemesh token` on a device that is in and join with --code CODE; or create another with --new"
        )
    key = MeshKey.create(mesh, secrets.token_bytes(SECRET_BYTES))
    state.save_key(key)
    return JoinKey(key, "created")


async def settle_key(settings: Settings, state: StateDir) -> JoinKey:
    """``resolve_key`` with a look around where it matters.

    Raises:
        ConfigError: As ``resolve_key``.
        WrongKeyError: As ``resolve_key``.
    """
    sightings: list[Sighting] = []
    if needs_scan(settings, state):
        from mesh.transport.discovery import scan

        sightings = await scan(settings.mesh, SCAN_S, settings.interfaces)
    return resolve_key(settings, state, sightings)
