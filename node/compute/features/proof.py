"""Which numerics were proven for a model on this machine, kept beside it: the next start knows them at once.

Proving takes a second or two of computing (``node.compute.features.shape.prove``), so it is done by the first
who needs feature maps. What was found holds for the same weights, precision, device, number of threads,
machine and libraries; all of that is in the file, and another finding is proven anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from node.compute.backbone.contract import Backbone
from node.compute.features.shape import Numerics, numerics_string, prove
from node.compute.rates import RatedAs
from node.durable import write_durably

__all__ = ["Proof"]

log = logging.getLogger(__name__)

_FILE = "numerics.json"
_KEPT_MAX = 16


class Proof:
    """``home``: a prepared model's directory, ``None`` = nothing is kept. ``on_proven`` is told the profile
    when it had to be proven.
    """

    def __init__(
        self,
        backbone: Backbone,
        threads: int,
        *,
        home: Path | None = None,
        rated_as: RatedAs | None = None,
        on_proven: Callable[[str], None] = lambda profile: None,
    ) -> None:
        self._backbone = backbone
        self._threads = threads
        self._path = home / _FILE if home is not None and rated_as is not None else None
        self._key = rated_as.key if rated_as is not None else ""
        self._on_proven = on_proven
        self._numerics = self._kept()

    @property
    def profile(self) -> str | None:
        """How features are computed, as ``NodeInfo.features_profile`` says it; ``None``: not known yet."""
        return None if self._numerics is None else f"{self._backbone.precision} {self._numerics.text}"

    def numerics(self) -> Numerics:
        """Proven now if need be."""
        if self._numerics is None:
            self._numerics = prove(self._backbone, self._threads)
            self._keep(self._numerics)
            self._on_proven(self.profile or "")
        return self._numerics

    def _kept(self) -> Numerics | None:
        try:
            found = Numerics(**self._stored()[self._key])
            threads = found.threads
            if type(found.is_packed) is not bool or not (threads is None or type(threads) is int):
                return None
            expected = numerics_string(
                self._backbone.device, self._backbone.precision, found.is_packed, threads
            )
        except (KeyError, TypeError):
            return None
        # Libraries may have changed since: their version is in the text.
        return found if found.text == expected else None

    def _keep(self, numerics: Numerics) -> None:
        if self._path is None:
            return
        stored = self._stored()
        stored.pop(self._key, None)
        stored[self._key] = asdict(numerics)
        newest = dict(list(stored.items())[-_KEPT_MAX:])
        try:
            write_durably(self._path, (json.dumps(newest, indent=2) + "\n").encode())
        except OSError as error:
            log.warning("numerics could not be kept in %s: %s", self._path, error)

    def _stored(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}
