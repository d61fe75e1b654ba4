"""Adapters on this device: ``edgemesh adapters``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mesh.errors import ConfigError
from mesh.units import bytes_text
from node.cli.options import as_json, choose, settings_flags

__all__ = ["COMMANDS"]


@click.group()
def adapters() -> None:
    """See the adapters on this device; `edgemesh tune` makes them."""


@adapters.command("list")
@as_json
@settings_flags("state_dir")
def list_adapters(is_json: bool, **flags: Any) -> None:
    """List the adapters on this device: what they are, how large, how good.

    A directory that peft wrote, put into the state directory's `adapters`, is one as well; nodes notice it
    within two seconds.
    """
    directory = choose(flags).state.adapters_dir
    rows = [_row(path) for path in _directories(directory)]
    if is_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo(f"edgemesh: no adapters in {directory}: `edgemesh tune` makes one", err=True)
        return
    from node.faces.console import table_out

    titles = ("name", "task", "method", "layers", "size", "metric", "digest")
    table_out(titles, [_cells(row) for row in rows])


def _directories(directory: Path) -> list[Path]:
    try:
        found = [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"cannot read {directory} ({error.strerror}): choose another --state-dir"
        ) from error
    return sorted(found)


def _row(directory: Path) -> dict[str, Any]:
    """What the adapter's own files say; ``trouble`` says what is wrong with them."""
    from node.compute.adapters.card import WEIGHTS_FILE, read_card, read_config

    row: dict[str, Any] = {
        "name": directory.name, "task": None, "method": None, "top_layers": None, "first_layer": None,
        "labels": [], "bytes": None, "metric": None, "digest": None, "trouble": None,
    }  # fmt: skip
    try:
        config = read_config(directory)
        row["method"] = str(config.get("peft_type", "?")).lower()
        row["bytes"] = (directory / WEIGHTS_FILE).stat().st_size
        if (card := read_card(directory)) is not None:
            row |= {
                "task": card.task, "method": card.method, "top_layers": card.top_layers,
                "first_layer": card.first_layer, "labels": list(card.labels), "metric": card.metric,
                "digest": card.digest,
            }  # fmt: skip
    except ConfigError as error:
        row["trouble"] = str(error)
    except OSError as error:
        row["trouble"] = f"{WEIGHTS_FILE}: {error.strerror}"
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    if row["trouble"]:
        return [row["name"], "–", "–", "–", "–", "–", row["trouble"]]
    return [
        row["name"],
        row["task"] or "–",
        row["method"],
        f"top {row['top_layers']}" if row["top_layers"] is not None else "–",
        bytes_text(row["bytes"]),
        f"{row['metric']:.3g}" if row["metric"] is not None else "–",
        (row["digest"] or "–")[:12],
    ]


COMMANDS = (adapters,)
