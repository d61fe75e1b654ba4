"""This program: ``config``, ``completion``, ``demo``, ``version``."""

from __future__ import annotations

import json
import platform
from typing import Any

import click

from node import __version__
from node.cli.options import as_json, choose, end_with, settings_flags
from node.settings import TABLE, Setting, broker_text, read_settings

__all__ = ["COMMANDS"]


@click.group()
def config() -> None:
    """Show the settings that hold, and where they come from."""


@config.command("show")
@click.option("--origin", is_flag=True, help="Also say where each value comes from.")
@as_json
@settings_flags(*(row.name for row in TABLE))
def show(origin: bool, is_json: bool, **flags: Any) -> None:
    """Print every setting; secrets are hidden."""
    loaded = read_settings({k: v for k, v in flags.items() if k != "config"}, config=flags["config"])
    rows = [
        (row.name, _shown(row, getattr(loaded.settings, row.name)), loaded.origin[row.name]) for row in TABLE
    ]
    if is_json:
        plain = {
            name: {"value": value, "origin": whence} if origin else value for name, value, whence in rows
        }
        click.echo(json.dumps(plain))
        return
    for name, value, whence in rows:
        click.echo(
            f"{name} = {json.dumps(value, ensure_ascii=False)}" + (f"    # {whence}" if origin else "")
        )


def _shown(row: Setting, value: Any) -> Any:
    """As JSON can hold it, without what must not be seen."""
    if value is None or isinstance(value, bool | int):
        return value
    if row.name == "broker":
        return broker_text(value)
    if row.is_secret:
        return "(hidden)"
    return [str(part) for part in value] if isinstance(value, tuple) else str(value)


@config.command("path")
@settings_flags("state_dir")
def path(**flags: Any) -> None:
    """Print where the configuration file and the state directory are."""
    from node.state import default_config_file

    loaded = read_settings({"state_dir": flags["state_dir"]}, config=flags["config"])
    click.echo(f"config     {flags['config'] or default_config_file()}")
    click.echo(f"state_dir  {loaded.settings.state_dir}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL.

    \b
    bash:  edgemesh completion bash > ~/.local/share/bash-completion/completions/edgemesh
    zsh:   edgemesh completion zsh  > ~/.zfunc/_edgemesh
    fish:  edgemesh completion fish > ~/.config/fish/completions/edgemesh.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, f"click knows bash, zsh and fish, not {shell}"
    click.echo(kind(ctx.find_root().command, {}, "edgemesh", "_EDGEMESH_COMPLETE").source())


@click.command()
@as_json
def version(is_json: bool) -> None:
    """Print this program's version."""
    if is_json:
        record = {"version": __version__, "python": platform.python_version(), "system": platform.platform()}
        click.echo(json.dumps(record))
    else:
        click.echo(f"edgemesh {__version__}")


@click.command()
@click.option("--keep", is_flag=True, help="Keep the demo mesh's state for another look.")
@settings_flags("model", "state_dir")
def demo(keep: bool, **flags: Any) -> None:
    """Three real nodes on this device: they find each other, answer, and lose one."""
    from node.compute.models import DEFAULT_MODEL, resolve
    from node.demo import run_demo

    settings = choose(flags).settings
    model = settings.model or DEFAULT_MODEL
    resolve(model)
    end_with(run_demo(settings.state_dir, model, keep=keep))


COMMANDS = (config, completion, demo, version)
