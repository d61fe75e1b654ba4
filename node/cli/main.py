"""The ``edgemesh`` command: its families, its exit codes, and the one place where errors become words."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

import click

from mesh.errors import ConfigError, EdgemeshError, TaskError, UnreachableError, WrongKeyError
from node import __version__
from node.cli import (
    adapters,
    ask,
    cache,
    cleanup,
    configure,
    features,
    invite,
    look,
    node_life,
    show,
    sim,
    texts,
    tune,
)

__all__ = ["cli", "exit_code", "main"]

EXIT_CODES = """\
\b
Exit codes:
  0    done
  1    the task failed, or edgemesh itself did
  2    a flag, a setting or an input is wrong
  3    wrong join code: that mesh has another key
  4    nobody answered: no broker, no node, no coordinator
  5    the mesh rejected the task
  6    the task expired or was cancelled
  130  interrupted (Ctrl-C)
"""

SECTIONS = (
    ("A node on this device", ("join", "drain", "leave", "cleanup")),
    ("Ask the mesh", ("run", "submit", "classify", "score", "embed", "tasks", "cancel")),
    ("Teach it", ("tune", "features", "adapters")),
    ("Look at it", ("status", "nodes", "task", "cache", "models")),
    ("Plan it", ("sim",)),
    ("Invite others", ("token", "mqtt")),
    ("This program", ("config", "completion", "demo", "version")),
)


def exit_code(error: EdgemeshError) -> int:
    """The stable exit code of a failure."""
    match error:
        case WrongKeyError():
            return 3
        case ConfigError():
            return 2
        case UnreachableError():
            return 4
        case TaskError():
            return 1
        case _:
            return 1


class _Mesh(click.Group):
    """A group that speaks our errors and lists its commands by what people want to do."""

    def invoke(self, ctx: click.Context) -> Any:
        # Commands say themselves what matters; `join` sets up its own log. Lines of the libraries below
        # would fall into the middle of an answer.
        logging.basicConfig(level=logging.ERROR, format="edgemesh: %(message)s")
        try:
            return super().invoke(ctx)
        except EdgemeshError as error:
            click.echo(f"edgemesh: {error}", err=True)
            ctx.exit(exit_code(error))
        except KeyboardInterrupt:
            click.echo("edgemesh: interrupted", err=True)
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS:
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            with formatter.section(title):
                formatter.write_dl([(name, command.get_short_help_str(85)) for name, command in commands])


@click.group(
    cls=_Mesh,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__, "-V", "--version", prog_name="edgemesh")
def cli() -> None:
    """One mesh from the devices you already have: it answers prompts with a language model.

    \b
    On the first device:   edgemesh join        (prints a join code once)
    On every other one:    edgemesh join --code CODE
    From any of them:      edgemesh run "What is a mesh?"
    Teach it something:    edgemesh tune --data FILE.jsonl --adapter NAME

    Settings come from ~/.config/edgemesh/config.toml, then EDGEMESH_* variables, then flags;
    `edgemesh config show` tells what holds. Data goes to stdout, talk to stderr.
    """


FAMILIES = (
    *(node_life, ask, texts, tune, features, adapters, look, cache),
    *(sim, invite, configure, cleanup, show),
)
for family in FAMILIES:
    for command in family.COMMANDS:
        cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Never raises for an operator's mistake."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without a letter shows "?" and not a traceback
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.umask(os.umask(0o077) | 0o077)  # keys, prompts and answers: whatever we create is this user's alone
    try:
        cli.main(args=list(argv) if argv is not None else None, prog_name="edgemesh")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
