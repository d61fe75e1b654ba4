"""Adapters from node to node: ``edgemesh adapters pull``, ``push`` and ``rm``."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh.errors import ConfigError
from mesh.ids import NodeId, is_id
from mesh.units import bytes_text
from node.cli.options import REACH, Chosen, as_json, choose, settings_flags

if TYPE_CHECKING:
    from mesh.messages.files import AdapterPull

__all__ = ["add_to"]

_CHECK_TIMEOUT_S = 180  # ten seconds of importing; a busy machine takes its time
_SAY_EVERY_S = 2.0


@click.command()
@click.argument("name")
@click.option(
    "--version",
    "version",
    type=int,
    default=None,
    metavar="N",
    help="This version; it is served as NAME-vN beside the newest.",
)
@click.option("--as", "save_as", default=None, metavar="NEW", help="Serve it under another name.")
@as_json
@settings_flags(*REACH)
def pull(name: str, version: int | None, save_as: str | None, is_json: bool, **flags: Any) -> None:
    """Have adapter NAME on this device's node, whatever its size.

    Small adapters come by themselves (`--adapter-replicas`). What is pulled leaves again when
    `--adapter-disk` is full and it has not been used for longest.
    """
    from node.files.asking import mesh_files, pull_adapter

    chosen = choose(flags)
    if save_as is not None and not is_id(save_as):
        raise ConfigError(f"--as must be 1 to 63 of a-z, 0-9 and '-', not at an end; got {save_as!r}")
    node = _node_here(chosen)

    async def work() -> dict[str, Any]:
        files = await mesh_files(chosen.settings, chosen.state)
        held, newest = files.find(name, version), files.newest[name]
        is_old = newest.held is None or newest.held.digest != held.digest
        new_name = save_as or (f"{name}-v{version}"[:63] if is_old else None)
        await pull_adapter(chosen.settings, chosen.state, node, held, new_name, _Lines())
        return {"name": new_name or name, "version": held.version, "bytes": held.bytes, "node": node}

    done = asyncio.run(work())
    if is_json:
        click.echo(json.dumps(done))
    else:
        click.echo(
            f"{done['name']}: version {done['version']} of {name}, {bytes_text(done['bytes'])}, on {node}"
        )


@click.command()
@click.argument("adapter", metavar="DIR_OR_NAME")
@click.option(
    "--name", "new_name", default=None, metavar="NAME", help="What to call it [default: as the directory]."
)
@as_json
@settings_flags(*REACH, "model")
def push(adapter: str, new_name: str | None, is_json: bool, **flags: Any) -> None:
    """Give an adapter to every node that can serve it.

    DIR is a directory that peft's save_pretrained wrote: it is checked against the backbone and becomes an
    adapter of the mesh, or its next version. NAME is one of this device.
    """
    from node.files.asking import spread_adapter
    from node.files.file_list import ADAPTER_FILES, FileList

    chosen = choose(flags)
    node = _node_here(chosen)
    given = Path(adapter).expanduser()
    name = new_name or _name_of(given)
    if not is_id(name):
        raise ConfigError(
            f"an adapter's name is 1 to 63 of a-z, 0-9 and '-', not at an end; got {name!r}: give --name"
        )
    path = chosen.state.adapters_dir / name
    is_directory = given.is_dir() and given.resolve() != path.resolve()
    if is_directory:
        _bring(chosen, given, name)
    elif not path.is_dir():
        raise ConfigError(
            f"{adapter!r} is no directory and no adapter of this device: see `edgemesh adapters list`"
        )
    files = FileList.of(path / file for file in ADAPTER_FILES if (path / file).is_file())
    held, nodes = asyncio.run(
        spread_adapter(chosen.settings, chosen.state, name, files.blob.digest.hex(), _Lines())
    )
    everyone = sorted({*nodes, node})
    if is_json:
        click.echo(
            json.dumps({"name": name, "version": held.version, "bytes": held.bytes, "nodes": everyone})
        )
    else:
        click.echo(f"{name}: version {held.version}, {bytes_text(held.bytes)}, on {', '.join(everyone)}")


@click.command()
@click.argument("name")
@click.option("--here", "is_here", is_flag=True, help="Only from this device; the others keep it.")
@as_json
@settings_flags(*REACH)
def rm(name: str, is_here: bool, is_json: bool, **flags: Any) -> None:
    """Remove adapter NAME from the whole mesh.

    Nodes that are away remove it when they come back within 30 days. A version made after this is another
    one and stays. With --here it is not pulled again before there is a newer version.
    """
    chosen = choose(flags)
    if is_here:
        from node.files.library import Library

        if not is_id(name) or not Library(chosen.state.adapters_dir).remove_here(name):
            raise ConfigError(f"no adapter here is called {name!r}: see `edgemesh adapters list --here`")
        done: dict[str, Any] = {"name": name, "version": None, "left_on": []}
    else:
        from node.files.asking import remove_adapter

        here = chosen.state.nodes_here(chosen.settings.mesh)
        version, left = asyncio.run(remove_adapter(chosen.settings, chosen.state, name, here))
        done = {"name": name, "version": version, "left_on": left}
    if is_json:
        click.echo(json.dumps(done))
        return
    click.echo(f"{name}: removed {'from this device' if is_here else 'from the mesh'}", err=True)
    if done["left_on"]:
        click.echo(f"still on {', '.join(done['left_on'])}, which did not answer yet", err=True)


class _Lines:
    """A line now and then while it takes long."""

    def __init__(self) -> None:
        self._due_at = time.monotonic() + _SAY_EVERY_S

    def __call__(self, node: NodeId, pull: AdapterPull) -> None:
        if time.monotonic() >= self._due_at:
            self._due_at = time.monotonic() + _SAY_EVERY_S
            done, whole = bytes_text(pull.done_bytes), bytes_text(pull.bytes)
            click.secho(f"{node} pulls {pull.name}: {done} of {whole}", err=True, dim=True)


def _node_here(chosen: Chosen) -> NodeId:
    here = chosen.state.nodes_here(chosen.settings.mesh)
    if not here:
        raise ConfigError(
            f"no node of mesh '{chosen.settings.mesh}' runs on this device: start one with `edgemesh join`"
        )
    return here[0]


def _name_of(directory: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", directory.resolve().name.lower()).strip("-")[:63]


def _bring(chosen: Chosen, given: Path, name: str) -> None:
    """Check a directory from elsewhere and put it among this device's adapters.

    Raises:
        ConfigError: It is no adapter for the backbone, or the backbone is not here.
    """
    from node.compute.adapters.card import Card, write_card
    from node.compute.models import DEFAULT_MODEL, read_manifest, resolve
    from node.durable import replace_directory
    from node.files.adapter_directory import copy_adapter

    source = resolve(chosen.settings.model or DEFAULT_MODEL)
    home = chosen.state.models_dir / source.slug
    manifest = read_manifest(home) if source.kind != "echo" else None
    if manifest is None:
        raise ConfigError(
            f"the adapter cannot be checked: {source.display} is not on this device; name the model that its "
            "node serves with --model"
        )
    model = source.path if source.kind == "directory" and source.path is not None else home
    click.secho(f"checking {given} against {source.display}", err=True, dim=True)
    command = [sys.executable, "-P", "-m", "node.compute.adapters.check"]
    command += [str(given.resolve()), str(model), manifest.weights_sha256, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"checking took more than {_CHECK_TIMEOUT_S} s: close other programs and try again"
        ) from None
    if done.returncode:
        raise ConfigError((done.stderr.strip().splitlines() or ["the adapter could not be checked"])[-1])
    card = json.loads(done.stdout)
    try:
        draft = copy_adapter(given, chosen.state.adapters_dir)
        write_card(draft, Card(**{**card, "labels": tuple(card["labels"])}))
        replace_directory(draft, chosen.state.adapters_dir / name)
    except OSError as error:
        raise ConfigError(f"cannot put it into {chosen.state.adapters_dir}: {error.strerror}") from error


def add_to(group: click.Group) -> None:
    """``adapters`` with what moves them."""
    for command in (pull, push, rm):
        group.add_command(command)
