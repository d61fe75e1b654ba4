"""Which weight format to load: from the memory there is, what each was measured to do here, and the hurry.

Pure but for ``choose_here``, which reads two files: the header of the weights (how many bytes each format
will take) and what ``node.compute.backbone.speed`` measured on this machine. Nothing here imports torch, so
that ``edgemesh models show`` answers at once.

Formats stand in order of exactness. The most exact one that fits is taken, unless a less exact one is
faster by enough to be worth its error: by a quarter of a noticeable wait when nobody hurries, by anything
when a deadline presses. Faster means a typical request, prompt and answer together.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mesh.units import bytes_text
from node.durable import write_durably

__all__ = [
    "AROUND_BYTES",
    "PRECISIONS",
    "SPEEDS",
    "Choice",
    "Row",
    "Speed",
    "choose_here",
    "choose_precision",
    "format_bytes",
    "machine_key",
    "read_speeds",
    "write_speeds",
]

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
"""The most exact first. (bfloat16 before float16: same range as float32, so nothing overflows.)"""

NOTES = {
    "fp32": "exact",
    "bf16": "perplexity as fp32",
    "fp16": "perplexity as fp32",
    "int8": "perplexity within 1 % of fp32",
    "int4": "perplexity within 2 % of fp32 where weights were made for 4 bits, else more",
}
"""Measured on the bundled model: ``python -m tests.benchmarks.precision``."""

AROUND_BYTES = 600_000_000
"""Beside the weights: interpreter, torch and tokenizer 0.4 GB (measured), buffers and states 0.2 GB."""

SPEEDS = "speeds.json"
"""File in a prepared model's directory."""

_WORTH = 1.25  # how much faster a less exact format must be when nobody hurries
_NOTICED_S = 0.5  # and a typical request must take this long: of a tiny model's speeds only noise differs
_TYPICAL_TOKENS = 128  # of a prompt, and of its answer
_GROUP = 32  # as ``formats.GROUP``, which needs torch


@dataclass(frozen=True, slots=True)
class Speed:
    """What one format does on this machine, in tokens/s."""

    decode_tok_s: float
    """One sequence."""
    prefill_tok_s: float

    @property
    def request_s(self) -> float:
        """A typical request, alone."""
        return _TYPICAL_TOKENS / self.prefill_tok_s + _TYPICAL_TOKENS / self.decode_tok_s


@dataclass(frozen=True, slots=True)
class Row:
    """One format, for the table that explains a choice."""

    precision: str
    needs_bytes: int
    """Weights and all around them."""
    fits: bool
    speed: Speed | None
    note: str


@dataclass(frozen=True, slots=True)
class Choice:
    precision: str | None
    """``None``: nothing that may be chosen fits; ``reason`` is then the refusal."""
    reason: str
    table: tuple[Row, ...]


def choose_precision(
    free_bytes: int,
    sizes: Mapping[str, int],
    speeds: Mapping[str, Speed],
    pinned: str | None = None,
    deadline_pressure: float = 0.0,
) -> Choice:
    """Which format to load, and why.

    ``sizes``: bytes of the weights in each format that may be chosen. ``speeds``: of those measured here,
    empty if none was. ``deadline_pressure``: 0 = no hurry, 1 = the deadline will be missed otherwise.
    """
    assert sizes and 0 <= deadline_pressure <= 1
    order = [precision for precision in PRECISIONS if precision in sizes]
    table = tuple(
        Row(
            precision=precision,
            needs_bytes=sizes[precision] + AROUND_BYTES,
            fits=sizes[precision] + AROUND_BYTES <= free_bytes,
            speed=speeds.get(precision),
            note=NOTES[precision],
        )
        for precision in order
    )
    by_name = {row.precision: row for row in table}
    free = f"{bytes_text(free_bytes)} free"
    if pinned is not None:
        row = by_name.get(pinned)
        if row is None:
            return Choice(None, f"{pinned} is not among {', '.join(order)} for this model", table)
        if not row.fits:
            return Choice(
                None, f"{pinned} needs {bytes_text(row.needs_bytes)}, {free}{_instead(table)}", table
            )
        return Choice(pinned, "pinned by the operator", table)
    fitting = [row for row in table if row.fits]
    if not fitting:
        least = min(table, key=lambda row: row.needs_bytes)
        needs = f"even {least.precision} needs {bytes_text(least.needs_bytes)}, {free}"
        return Choice(None, f"{needs}: close other programs or choose a smaller model", table)
    chosen = fitting[0]
    why = "the most exact" if chosen is table[0] else f"the most exact that fits in {free}"
    worth = 1 + (_WORTH - 1) * (1 - deadline_pressure)
    noticed_s = _NOTICED_S * (1 - deadline_pressure)
    for row in fitting[1:]:
        if not (chosen.speed and row.speed) or chosen.speed.request_s < noticed_s:
            continue
        if chosen.speed.request_s > worth * row.speed.request_s:
            times = fitting[0].speed.request_s / row.speed.request_s if fitting[0].speed else 1.0
            hurry = ", and a deadline presses" if deadline_pressure > 0 else ""
            why = f"{times:.1f} times as fast here as {fitting[0].precision}, {row.note}{hurry}"
            chosen = row
    if not speeds:
        why += "; speeds on this machine are not measured yet"
    return Choice(chosen.precision, why, table)


def choose_here(
    directory: Path,
    home: Path,
    wanted: str,
    free_bytes: int,
    *,
    formats: Collection[str] = PRECISIONS,
    on_cpu: bool = True,
    deadline_pressure: float = 0.0,
) -> Choice:
    """``choose_precision`` from the files: sizes of the weights, and speeds measured here.

    ``wanted``: a format, or ``auto``. ``directory`` holds the weights, ``home`` what was measured.
    """
    sizes = {name: size for name, size in format_bytes(directory, on_cpu).items() if name in formats}
    pinned = None if wanted == "auto" else wanted
    return choose_precision(free_bytes, sizes, read_speeds(home), pinned, deadline_pressure)


def _instead(table: tuple[Row, ...]) -> str:
    fitting = [row for row in table if row.fits]
    if not fitting:
        return ": close other programs or choose a smaller model"
    return (
        f": {fitting[0].precision} would fit ({bytes_text(fitting[0].needs_bytes)}), or close other programs"
    )


def format_bytes(directory: Path, on_cpu: bool = True) -> dict[str, int]:
    """Bytes of the weights in ``directory`` in each format, from the headers of its safetensors files.

    As the engine holds them: matrices in the format, the head in 8 bits for ``int4``, norms and biases in
    the computing type. On a CPU the embedding is read from the file, row by row.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes.update({name: entry["shape"] for name, entry in header.items() if name != "__metadata__"})
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    table = shapes.pop("model.embed_tokens.weight", None)
    if table is not None and (config.get("tie_word_embeddings", True) or "lm_head.weight" not in shapes):
        shapes["lm_head.weight"] = table
    sizes = dict.fromkeys(PRECISIONS, 0)
    for name, shape in shapes.items():
        for precision in PRECISIONS:
            sizes[precision] += _tensor_bytes(precision, name, shape)
    if table is not None and not on_cpu:
        for precision in PRECISIONS:
            sizes[precision] += table[0] * table[1] * _float_bytes(precision)
    return sizes


def _tensor_bytes(precision: str, name: str, shape: list[int]) -> int:
    if len(shape) != 2 or precision in ("fp32", "bf16", "fp16"):
        n = 1
        for size in shape:
            n *= size
        return n * _float_bytes(precision)
    d_out, d_in = shape
    if precision == "int4" and d_in % _GROUP == 0 and not name.startswith("lm_head"):
        return d_out * d_in // 2 + 4 * d_out * d_in // _GROUP
    return d_out * d_in + 8 * d_out


def _float_bytes(precision: str) -> int:
    return 2 if precision in ("bf16", "fp16") else 4


def machine_key() -> str:
    """What a measured speed is true for: this processor with this many cores, this PyTorch."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores, torch {importlib.metadata.version('torch')}"


def read_speeds(home: Path) -> dict[str, Speed]:
    """What was measured on this machine for the model prepared in ``home``; empty if nothing was."""
    try:
        stored = json.loads((home / SPEEDS).read_text(encoding="utf-8"))
        if stored["machine"] != machine_key():
            return {}
        return {name: Speed(**speed) for name, speed in stored["speeds"].items() if name in PRECISIONS}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_speeds(home: Path, speeds: Mapping[str, Speed]) -> None:
    """Kept beside the model: whole or not at all."""
    stored = {"machine": machine_key(), "speeds": {name: asdict(speed) for name, speed in speeds.items()}}
    write_durably(home / SPEEDS, (json.dumps(stored, indent=2) + "\n").encode())
