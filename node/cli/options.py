"""Flags made from the settings table, and what they give a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from mesh.errors import ConfigError
from node.settings import ROWS, Loaded, Settings, read_settings
from node.state import StateDir

__all__ = ["REACH", "Chosen", "as_json", "choose", "end_with", "settings_flags"]

F = TypeVar("F", bound=Callable[..., Any])

REACH = ("mesh", "code", "broker", "seeds", "interfaces", "state_dir")
"""The settings a command needs that talks to a mesh without being a node."""


def settings_flags(*names: str) -> Callable[[F], F]:
    """Add ``--config`` and the flags of these settings; the values arrive as keyword arguments."""

    def add(function: F) -> F:
        config = click.option("--config", type=click.Path(path_type=Path), help="Configuration file.")
        function = config(function)
        for row in reversed([ROWS[name] for name in names]):
            attributes: dict[str, Any] = {"help": row.help, "default": None}
            if not row.metavar:
                attributes |= {"is_flag": True, "flag_value": row.flag_sets}
            else:
                attributes |= {"metavar": row.metavar, "multiple": row.is_many}
                if "|" in row.metavar and row.metavar.islower():
                    attributes |= {"type": click.Choice(row.metavar.split("|"))}
            function = click.option(row.option, row.name, **attributes)(function)
        return function

    return add


@dataclass(frozen=True, slots=True)
class Chosen:
    """What holds for this command: settings with the mesh settled, and where state is."""

    settings: Settings
    state: StateDir
    loaded: Loaded


def choose(flags: dict[str, Any]) -> Chosen:
    """Settings from file, environment and these flags.

    The mesh is the one that was named, else the one of the join code, else the only one known here, else
    ``home``.

    Raises:
        ConfigError: A setting is wrong, or code and mesh name disagree.
    """
    config = flags.pop("config", None)
    if flags.get("code") == "-":  # arguments can be seen by every user of the machine, with ps
        is_asked = sys.stdin.isatty()
        flags["code"] = (
            click.prompt("Join code", hide_input=True, err=True) if is_asked else sys.stdin.readline()
        )
    loaded = read_settings(flags, config=config)
    settings, state = loaded.settings, StateDir(loaded.settings.state_dir)
    is_named = loaded.origin["mesh"] != "default"
    if settings.code is not None:
        from mesh.transport.identity import MeshKey

        key = MeshKey.from_code(settings.code)
        if is_named and key.name != settings.mesh:
            raise ConfigError(
                f"the join code is of mesh '{key.name}', not '{settings.mesh}': correct one of them"
            )
        settings = replace(settings, mesh=key.name)
    elif not is_named:
        settings = replace(settings, mesh=state.default_mesh())
    return Chosen(settings, state, loaded)


def end_with(code: int) -> NoReturn:
    """End the command with this exit code."""
    click.get_current_context().exit(code)


def as_json(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "is_json", is_flag=True, help="Print JSON for scripts.")(function)
