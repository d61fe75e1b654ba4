"""What could go from this device: ``edgemesh cleanup``."""

from __future__ import annotations

import json
from typing import Any

import click

from mesh.errors import ConfigError
from mesh.units import bytes_text
from node.cli.ask import harmless
from node.cli.options import as_json, choose, end_with, settings_flags

__all__ = ["COMMANDS"]

_DAY_S = 24 * 3600.0


@click.command()
@click.option("--yes", "is_meant", is_flag=True, help="Remove what is listed; without it nothing changes.")
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="N",
    help="Leave what was used in the last N days.",
)
@click.option(
    "--keep",
    "kept",
    multiple=True,
    metavar="KIND",
    help="Leave everything of this kind, such as model. Repeatable.",
)
@as_json
@settings_flags("state_dir", "model")
def cleanup(is_meant: bool, days: float, kept: tuple[str, ...], is_json: bool, **flags: Any) -> None:
    """List what this device could do without, and remove it with --yes.

    Data sets and checkpoints of tuning jobs nobody went on with, adapters pulled from others and not used,
    older versions, feature maps of nodes that no longer run, unfinished downloads, and models other than
    --model. All of it can be had or computed again; adapters made here are never touched.
    """
    from node.compute.models import DEFAULT_MODEL, resolve
    from node.files.leftovers import find_leftovers, remove_leftover

    chosen = choose(flags)
    stays = resolve(chosen.settings.model or DEFAULT_MODEL).slug
    try:
        found = find_leftovers(chosen.state, model=stays, unused_s=days * _DAY_S)
    except OSError as error:
        raise ConfigError(
            f"cannot read {chosen.state.path} ({error.strerror}): choose another --state-dir"
        ) from error
    found = [one for one in found if one.kind not in kept]
    troubles: dict[str, str] = {}
    for one in found if is_meant else ():
        try:
            remove_leftover(chosen.state, one)
        except OSError as error:
            troubles[str(one.path)] = error.strerror or str(error)
    if is_json:
        rows = [
            {"kind": one.kind, "name": one.name, "bytes": one.n_bytes, "why": one.why, "path": str(one.path),
             "removed": is_meant and str(one.path) not in troubles}
            for one in found
        ]  # fmt: skip
        click.echo(json.dumps(rows))
    else:
        _show([(one.kind, one.name, bytes_text(one.n_bytes), one.why) for one in found])
        freed = sum(one.n_bytes for one in found if str(one.path) not in troubles)
        if is_meant:
            click.echo(f"{bytes_text(freed)} freed", err=True)
        elif found:
            click.echo(f"{bytes_text(freed)} could go; nothing was removed: add --yes to do it", err=True)
        else:
            click.echo("edgemesh: nothing to clean up", err=True)
    for path, trouble in troubles.items():
        click.echo(f"edgemesh: {path} could not be removed: {trouble}", err=True)
    end_with(1 if troubles else 0)


def _show(rows: list[tuple[str, str, str, str]]) -> None:
    if not rows:
        return
    from node.faces.console import table_out

    table_out(("what", "name", "size", "why"), [[harmless(cell) for cell in row] for row in rows])


COMMANDS = (cleanup,)
