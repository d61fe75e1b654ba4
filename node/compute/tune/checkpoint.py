"""What a tuning job needs to go on after a ``kill -9``, to the bit.

    <directory>/<spec digest>/0.safetensors     two generations, written in turn: whatever happens while one
                              1.safetensors     is written, the other is whole

One file holds the adapter, the optimizer's moments, and as JSON in its header where the job was. A digest
over all of it is checked on reading; a file that fails is as good as none. Order and starting values follow
from the seed, so no random state has to be kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from node.durable import write_durably

__all__ = ["Checkpoints", "Saved"]

_log = logging.getLogger(__name__)

# Jobs that were begun and never came back: a few of them are somebody's, more are rubbish.
_JOBS_MAX = 16
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Saved:
    """``serial`` counts the saves of a job; ``place`` is whatever the job needs, as JSON allows."""

    serial: int
    place: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one job, in ``directory``/``spec_digest``."""

    def __init__(self, directory: Path, spec_digest: str) -> None:
        self._root = directory
        self._directory = directory / spec_digest
        self._serial = 0

    def latest(self) -> Saved | None:
        """The newest whole one; ``None``: start from the beginning. Damage is logged and passed over."""
        found = [saved for at in (0, 1) if (saved := self._read(self._path(at))) is not None]
        if not found:
            return None
        newest = max(found, key=lambda saved: saved.serial)
        self._serial = newest.serial
        return newest

    def save(self, place: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Durable on return.

        Raises:
            OSError: The disk is full or gone; the checkpoint before this one is still there.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._serial += 1
        owned = {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}
        state = json.dumps(
            {"version": _VERSION, "serial": self._serial, "place": dict(place)}, sort_keys=True
        )
        header = {"state": state, "digest": _digest(state, owned)}
        write_durably(self._path(self._serial % 2), save(owned, metadata=header))

    def remove(self) -> None:
        """The job is done; and of jobs that never ended, only the newest stay."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self.prune()

    def prune(self) -> None:
        """Keep no more than ``_JOBS_MAX`` jobs; the longest untouched go first."""
        with suppress(OSError):
            others = [path for path in self._root.iterdir() if path.is_dir() and path != self._directory]
            others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for path in others[_JOBS_MAX - 1 :]:
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, at: int) -> Path:
        return self._directory / f"{at}.safetensors"

    def _read(self, path: Path) -> Saved | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                # Copies: nothing may keep a file mapped that is about to be replaced.
                tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
            state = json.loads(header["state"])
            if header["digest"] != _digest(header["state"], tensors):
                raise ValueError("its digest is another")
            if state["version"] != _VERSION:
                raise ValueError(f"it has version {state['version']}")
            return Saved(int(state["serial"]), dict(state["place"]), tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _log.warning("the checkpoint %s cannot be used (%s); an older one or none is", path, error)
            return None


def _digest(state: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(state.encode(), digest_size=32)
    for name, tensor in tensors.items():
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        digest.update(head)
        digest.update(memoryview(tensor.cpu().numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()
