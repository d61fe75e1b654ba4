"""Passes of one shape, so that the bits of a row do not depend on its neighbours.

A matrix product may add in another order for another number of rows, and then a text's features would
depend on what else was computed at the time: no longer the same with and without a cache. So texts are cut
into pieces at multiples of ``PASS_ROWS`` from their beginning, and every pass has exactly ``PASS_ROWS`` rows:
pieces of several texts, one after another, and rows that are thrown away. Attention goes over each
text alone. That makes rows independent of their neighbours if the kernels treat every row of a product
alike; whether they do is not assumed but tried, on the device at hand (``prove``). Where they do not, a
pass holds one text only, always at its beginning.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from node.compute.backbone.contract import Backbone, Segment

__all__ = ["PASS_ROWS", "Numerics", "Piece", "filled", "numerics_string", "packed", "prove"]

# Rows of one pass: as many as the piece of a prompt that the engine reads between two looks at whether
# somebody waits.
PASS_ROWS = 256
_PROOF_LAYERS = 2  # all layers are alike


@dataclass(frozen=True, slots=True)
class Numerics:
    """How rows are computed on this device."""

    is_packed: bool
    """Several texts in one pass; otherwise one."""
    threads: int | None
    """The only number of threads that may be used; ``None``: the bits are the same for any."""
    text: str
    """As it is part of keys."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start`` to ``stop`` of text number ``text``, all in one pass."""

    text: int
    start: int
    stop: int

    @property
    def n(self) -> int:
        return self.stop - self.start


def packed(lengths: Sequence[int], is_packed: bool = True) -> Iterator[list[Piece]]:
    """The pieces of each pass, for texts of ``lengths`` tokens; pieces of one text come in their order.

    Whole pieces fill a pass by themselves. What is left of each text is placed longest first into the pass
    where it leaves least room (best fit decreasing, at most 22 % above the optimum).
    """
    rest = []
    for text, length in enumerate(lengths):
        whole = length // PASS_ROWS * PASS_ROWS
        for start in range(0, whole, PASS_ROWS):
            yield [Piece(text, start, start + PASS_ROWS)]
        if length > whole:
            rest.append(Piece(text, whole, length))
    if not is_packed:
        yield from ([piece] for piece in rest)
        return
    rest.sort(key=lambda piece: -piece.n)
    passes: list[list[Piece]] = []
    by_room: list[list[int]] = [[] for _ in range(PASS_ROWS + 1)]
    for piece in rest:
        room = next((room for room in range(piece.n, PASS_ROWS + 1) if by_room[room]), None)
        if room is None:
            passes.append([])
            at, room = len(passes) - 1, PASS_ROWS
        else:
            at = by_room[room].pop()
        passes[at].append(piece)
        by_room[room - piece.n].append(at)
    yield from passes


def filled(backbone: Backbone, segments: Sequence[Segment]) -> list[Segment]:
    """``segments`` and rows to throw away, ``PASS_ROWS`` in all."""
    n = PASS_ROWS - sum(len(segment.ids) for segment in segments)
    assert n >= 0, "a pass has room for its pieces"
    return [*segments, Segment(backbone.states(n), [0] * n)] if n else list(segments)


def numerics_string(device: str, precision: str, is_packed: bool = True, threads: int | None = None) -> str:
    """What a node would compute by, without computing: how one that holds no lower layers asks for features.

    Two devices of which one rounds otherwise must have different strings: processor kind, vector unit,
    libraries and shape are in it.
    """
    if device == "cpu":
        kind = f"cpu-{platform.machine().lower()}-{torch.backends.cpu.get_cpu_capability().lower()}"
    elif device == "cuda":
        kind = f"cuda-{torch.cuda.get_device_name().lower().replace(' ', '-')}"
    else:
        kind = device
    torch_version = torch.__version__.split("+")[0]
    shape = f"rows{PASS_ROWS}-{'packed' if is_packed else 'alone'}"
    return "/".join(
        [kind, f"torch-{torch_version}", precision, shape, *([f"threads{threads}"] if threads else [])]
    )


def prove(backbone: Backbone, threads_max: int | None = None) -> Numerics:
    """Try whether a piece has the same bits among other neighbours, at other places, by other threads."""
    before = torch.get_num_threads()
    most = before if threads_max is None else threads_max
    try:
        torch.set_num_threads(most)
        expected = [_rows(backbone, [piece], 0) for piece in _PIECES]
        is_packed = all(
            torch.equal(_rows(backbone, others, at), expected[index]) for index, others, at in _PLACES
        )
        threads = None
        for fewer in range(1, most if backbone.device == "cpu" else 1):
            torch.set_num_threads(fewer)
            if not all(
                torch.equal(_rows(backbone, [piece], 0), rows)
                for piece, rows in zip(_PIECES, expected, strict=True)
            ):
                threads = most
    finally:
        torch.set_num_threads(before)
    return Numerics(
        is_packed, threads, numerics_string(backbone.device, backbone.precision, is_packed, threads)
    )


# Lengths that leave the rows of a piece at odd places, and one that fills a pass; tokens any vocabulary has.
_LENGTHS = (1, 7, 48, 63, 100, PASS_ROWS)
_PIECES = [[1 + (17 * row + 5 * length) % 30 for row in range(length)] for length in _LENGTHS]
# (which piece, what is in the pass, where the piece stands among it)
_PLACES = [
    (1, [_PIECES[0], _PIECES[1], _PIECES[2]], 1),
    (2, [_PIECES[3], _PIECES[4], _PIECES[2], _PIECES[1]], 2),
    (2, [_PIECES[2], _PIECES[4]], 0),
    (4, [_PIECES[1], _PIECES[0], _PIECES[3], _PIECES[4], _PIECES[0]], 3),
    (3, [_PIECES[4], _PIECES[2], _PIECES[3]], 2),
]


def _rows(backbone: Backbone, pieces: Sequence[Sequence[int]], at: int) -> Tensor:
    """The features of ``pieces[at]`` in a pass of all ``pieces``."""
    segments = [Segment(backbone.states(len(ids)), ids) for ids in pieces]
    x = backbone.features(filled(backbone, segments), min(_PROOF_LAYERS, backbone.n_layers))
    start = sum(len(ids) for ids in pieces[:at])
    return x[start : start + len(pieces[at])].clone()
