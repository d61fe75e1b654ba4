"""One adapter's directory: what it says of itself, whether it was replaced, and copies of its files."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from math import isfinite
from pathlib import Path

from mesh.errors import ConfigError
from mesh.messages.files import AdapterHeld
from node.compute.adapters.card import read_card, read_config
from node.files.file_list import ADAPTER_FILES, FileList
from node.files.index import Identity

__all__ = ["copy_adapter", "described", "identity_of", "link_adapter"]

log = logging.getLogger(__name__)

_WORD = re.compile(r"[A-Za-z0-9._:+-]{1,64}")


def described(path: Path, name: str, version: int, files: FileList) -> AdapterHeld:
    """From the adapter's own files; what they do not tell stays open."""
    blob = files.blob
    method, task, first_layer, metric, weights, own_base = "", "", None, None, "", None
    try:
        method = _word(str(read_config(path).get("peft_type", "")).lower())
        if (card := read_card(path)) is not None:
            method, task, first_layer = _word(card.method), _word(card.task), min(card.first_layer, 2**31)
            weights, own_base = _word(card.digest), _word(card.backbone_sha256) or None
            metric = card.metric if card.metric is not None and isfinite(card.metric) else None
    except ConfigError as error:
        log.warning("adapter %s: %s", name, error)
    return AdapterHeld(
        name=name, version=version, digest=blob.digest.hex(), manifest_bytes=blob.size, bytes=files.n_bytes,
        base=own_base, method=method, task=task, first_layer=first_layer, metric=metric,
        weights=weights, is_own=True,
    )  # fmt: skip


def _word(text: str) -> str:
    """A card may come from anywhere: what is no plain word is not sent to the whole mesh."""
    return text if _WORD.fullmatch(text) else ""


def identity_of(path: Path) -> Identity:
    """What changes when one of its files is replaced."""
    found = []
    for name in ADAPTER_FILES:
        try:
            status = (path / name).stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def link_adapter(source: Path, draft: Path) -> None:
    """The same files in a new directory, on the disk once where the file system can do that.

    Raises:
        OSError: They cannot be read, or written there.
    """
    draft.mkdir(mode=0o700, parents=True)
    for name in ADAPTER_FILES:
        if (source / name).is_file():
            try:
                os.link(source / name, draft / name)
            except OSError:
                shutil.copy2(source / name, draft / name)


def copy_adapter(source: Path, shelf: Path) -> Path:
    """A copy of an adapter's files in a hidden directory of ``shelf``, to be moved into place.

    Raises:
        OSError: They cannot be read, or written there.
    """
    draft = shelf / ".mesh" / "partial" / secrets.token_hex(8)
    draft.mkdir(mode=0o700, parents=True)
    for name in ADAPTER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, draft / name)
    return draft
