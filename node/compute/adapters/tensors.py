"""What a safetensors file says it holds, read and checked before any of it is loaded.

    8 bytes: length of the header │ header: JSON, name -> dtype, shape, place │ the tensors' bytes

The header of a hostile file may promise anything. Here it is bounded, and every promise is held against
the size of the file: a tensor lies inside it, no two overlap, and its shape and type need exactly its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError

__all__ = ["StoredTensor", "bytes_of", "read_header"]

# A name and its entry take about 150 bytes, and an adapter of a 126-layer model on all linear modules has
# 1,800 tensors: 16 MB is sixty times that, and safetensors itself stops at 100 MB.
HEADER_BYTES_MAX = 16_000_000
TENSORS_MAX = 65_536
NAME_BYTES_MAX = 512
DIMENSIONS_MAX = 4

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor is in its file."""

    dtype: str
    """As safetensors writes it, such as ``F32``."""
    shape: tuple[int, ...]
    start: int
    stop: int
    """Bytes of the file, ``stop`` excluded."""

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by name, in the order of their names; nothing is loaded.

    Raises:
        ConfigError: The file is missing, damaged or promises what it does not hold.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or not 2 <= length <= min(HEADER_BYTES_MAX, file_bytes - 8):
                raise _damaged(path, f"its header would take {length:,} of {file_bytes:,} bytes")
            text = file.read(length)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(found, dict):
        raise _damaged(path, "its header is not a JSON object")
    found.pop("__metadata__", None)
    if len(found) > TENSORS_MAX:
        raise _damaged(path, f"it lists {len(found):,} tensors, more than {TENSORS_MAX:,}")
    first = 8 + length
    tensors = {name: _stored(path, name, found[name], first, file_bytes) for name in sorted(found)}
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start < end:
            raise _damaged(path, f"tensor {name[:80]!r} overlaps another")
        end = tensor.stop
    return tensors


def bytes_of(
    path: Path, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, StoredTensor, Iterator[bytes]]]:
    """Name, place and bytes (in pieces) of each tensor, in the order of their names."""
    with path.open("rb") as file:

        def pieces(tensor: StoredTensor) -> Iterator[bytes]:
            file.seek(tensor.start)
            left = tensor.n_bytes
            while left:
                piece = file.read(min(left, 1 << 20))
                if not piece:
                    raise _damaged(path, "it became shorter while it was read")
                left -= len(piece)
                yield piece

        for name in sorted(tensors):
            yield name, tensors[name], pieces(tensors[name])


def _stored(path: Path, name: str, entry: Any, first: int, file_bytes: int) -> StoredTensor:
    if len(name.encode(errors="replace")) > NAME_BYTES_MAX:
        raise _damaged(path, f"a tensor's name is longer than {NAME_BYTES_MAX} bytes")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise _damaged(path, f"tensor {name!r} has no dtype, shape and data_offsets")
    if dtype not in _ITEM_BYTES:
        raise _damaged(path, f"tensor {name!r} is of type {dtype[:20]!r}; known: {', '.join(_ITEM_BYTES)}")
    if len(shape) > DIMENSIONS_MAX or any(type(n) is not int or not 0 <= n <= file_bytes for n in shape):
        raise _damaged(path, f"tensor {name!r} has the shape {str(shape)[:80]}")
    if not 0 <= start <= stop <= file_bytes - first:
        raise _damaged(path, f"tensor {name!r} lies outside the file")
    if prod(shape) * _ITEM_BYTES[dtype] != stop - start:
        raise _damaged(
            path, f"tensor {name!r}: {dtype} of shape {shape} does not take {stop - start:,} bytes"
        )
    return StoredTensor(dtype, tuple(shape), first + start, first + stop)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is damaged: {why}; copy the adapter again from where it was made")
