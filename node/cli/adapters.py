"""The adapters of the mesh and of this device: ``edgemesh adapters list`` and ``show``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh.errors import ConfigError, EdgemeshError
from mesh.units import bytes_text
from node.cli import adapter_moves
from node.cli.ask import harmless
from node.cli.options import REACH, Chosen, as_json, choose, settings_flags

if TYPE_CHECKING:
    from mesh.messages.files import AdapterHeld

__all__ = ["COMMANDS"]

_NODES_SHOWN = 3


@click.group()
def adapters() -> None:
    """See, spread and remove adapters; `edgemesh tune` makes them."""


@adapters.command("list")
@click.option("--here", "is_here", is_flag=True, help="Only those on this device; needs no mesh.")
@as_json
@settings_flags(*REACH)
def list_adapters(is_here: bool, is_json: bool, **flags: Any) -> None:
    """List the adapters of the mesh: what they are, how large, how good, and which nodes have them.

    A directory that peft wrote, put into the state directory's `adapters`, is one as well; nodes notice it
    within two seconds and give it to the others. Where no mesh answers, those on this device are listed.
    """
    chosen = choose(flags)
    directory = chosen.state.adapters_dir
    rows = {row["name"]: row for row in (_row(path) for path in _directories(directory))}
    if not is_here:
        try:
            rows = _with_mesh(chosen, rows)
        except EdgemeshError as error:
            click.secho(f"edgemesh: only this device is listed: {error}", err=True, dim=True)
    listed = [rows[name] for name in sorted(rows)]
    if is_json:
        click.echo(json.dumps(listed))
        return
    if not listed:
        click.echo(f"edgemesh: no adapters in {directory}: `edgemesh tune` makes one", err=True)
        return
    from node.faces.console import table_out

    titles = ("name", "task", "method", "layers", "size", "metric", "digest", "version", "on")
    n_columns = len(titles) if any(row["nodes"] for row in listed) else len(titles) - 2
    table_out(titles[:n_columns], [[harmless(cell) for cell in _cells(row)[:n_columns]] for row in listed])


@adapters.command("show")
@click.argument("name")
@as_json
@settings_flags(*REACH)
def show_adapter(name: str, is_json: bool, **flags: Any) -> None:
    """Show adapter NAME: how it was made, its files, its versions and who has them."""
    told = asyncio.run(_told(choose(flags), name))
    if is_json:
        click.echo(json.dumps(told))
        return
    from node.faces.console import table_out

    rows = [
        (key.replace("_", " "), _words(key, told[key])) for key in told if key not in ("files", "versions")
    ]
    table_out(("", ""), [[harmless(cell) for cell in row] for row in rows if row[1]])
    click.echo()
    table_out(("file", "size", "BLAKE3-256"), [
        (harmless(file["name"]), bytes_text(file["bytes"]), file["digest"][:12]) for file in told["files"]
    ])  # fmt: skip
    click.echo()
    table_out(("version", "size", "digest", "on"), [
        (str(one["version"]), bytes_text(one["bytes"]), one["digest"][:12], ", ".join(one["nodes"]) or "–")
        for one in told["versions"]
    ])  # fmt: skip


async def _told(chosen: Chosen, name: str) -> dict[str, Any]:
    from node.files.asking import adapter_details, mesh_files

    files = await mesh_files(chosen.settings, chosen.state)
    held = files.find(name)
    listed, card = await adapter_details(chosen.settings, chosen.state, files, held)
    told: dict[str, Any] = {
        "name": name, "version": held.version, "task": held.task or None, "method": held.method or None,
        "first_layer": held.first_layer, "top_layers": None, "labels": [], "metric": held.metric,
        "bytes": held.bytes, "backbone_sha256": held.base, "weights_digest": held.weights or None,
        "spec_digest": None, "nodes": files.holders(held.digest),
    }  # fmt: skip
    if card is not None:
        told |= {
            key: value for key, value in _card(card).items() if key in told and key not in ("name", "bytes")
        }
    told["files"] = [
        {"name": file.name, "bytes": file.size, "digest": file.digest.hex()}
        for file in (listed.files if listed is not None else ())
    ]
    told["versions"] = [
        {"version": one.version, "bytes": one.bytes, "digest": one.digest, "nodes": files.holders(one.digest)}
        for one in files.all_versions(name)
    ]
    return told


def _card(content: bytes) -> dict[str, Any]:
    try:
        card = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def _words(key: str, value: Any) -> str:
    match value:
        case None | "" | []:
            return ""
        case list():
            return ", ".join(str(one) for one in value[:20])
        case int() if key == "bytes":
            return bytes_text(value)
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def _with_mesh(chosen: Chosen, here: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of this device and of all others, each with its version and the nodes that have it."""
    from node.files.asking import mesh_files

    files = asyncio.run(mesh_files(chosen.settings, chosen.state))
    rows = {name: dict(row) for name, row in here.items()}
    for name, newest in files.newest.items():
        if newest.held is not None and (nodes := files.holders(newest.held.digest)):
            row = rows.setdefault(name, _row_of(newest.held))
            row |= {"version": newest.held.version, "nodes": nodes}
    return rows


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


def _row_of(held: AdapterHeld) -> dict[str, Any]:
    """What another node says of it."""
    return {
        "name": held.name, "task": held.task or None, "method": held.method or "?", "top_layers": None,
        "first_layer": held.first_layer, "labels": [], "bytes": held.bytes, "metric": held.metric,
        "digest": held.weights or None, "trouble": None, "here": False, "version": held.version, "nodes": [],
    }  # fmt: skip


def _row(directory: Path) -> dict[str, Any]:
    """What the adapter's own files say; ``trouble`` says what is wrong with them."""
    from node.compute.adapters.card import WEIGHTS_FILE, read_card, read_config

    row: dict[str, Any] = {
        "name": directory.name, "task": None, "method": None, "top_layers": None, "first_layer": None,
        "labels": [], "bytes": None, "metric": None, "digest": None, "trouble": None,
        "here": True, "version": None, "nodes": [],
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


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["trouble"]:
        return [row["name"], "–", "–", "–", "–", "–", row["trouble"], "–", "–"]
    nodes = row["nodes"]
    more = f" +{len(nodes) - _NODES_SHOWN}" if len(nodes) > _NODES_SHOWN else ""
    layers = f"top {row['top_layers']}" if row["top_layers"] is not None else None
    if layers is None and row["first_layer"] is not None:
        layers = f"from {row['first_layer']}"
    return [
        row["name"],
        row["task"] or "–",
        row["method"],
        layers or "–",
        bytes_text(row["bytes"]),
        f"{row['metric']:.3g}" if row["metric"] is not None else "–",
        (row["digest"] or "–")[:12],
        str(row["version"] or "–"),
        ", ".join(nodes[:_NODES_SHOWN]) + more or "–",
    ]


adapter_moves.add_to(adapters)

COMMANDS = (adapters,)
