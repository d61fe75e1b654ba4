"""``docs/cli.md`` from the commands themselves: ``python -m node.cli.reference --write``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from node.cli.main import EXIT_CODES, cli
from node.settings import TABLE

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"

INTRODUCTION = """\
# Command line

Made from the commands by `python -m node.cli.reference --write`; a test checks that it is current.

Data goes to stdout, talk to stderr. Every command that reads has `--json` (one JSON value; with `--watch`,
one per line). Settings come from `~/.config/edgemesh/config.toml`, then `EDGEMESH_*` variables, then flags;
`edgemesh config show --origin` tells what holds and why.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_commands(), *_settings(), "## Exit codes\n", *_exit_codes()])


def _commands() -> Iterator[str]:
    for name, command in _walk("edgemesh", cli):
        yield f"## {name}\n"
        context = click.Context(
            command, info_name=name, terminal_width=100, help_option_names=["-h", "--help"]
        )
        yield f"```\n{command.get_help(context).rstrip()}\n```\n"


def _walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group) or command.invoke_without_command or command is cli:
        yield name, command
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from _walk(f"{name} {child}", command.commands[child])


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield "| TOML key | variable | flag | meaning |\n|---|---|---|---|"
    for row in TABLE:
        flag = f"{row.option} {row.metavar}".strip().replace("|", "\\|")
        yield f"| `{row.name}` | `{row.variable}` | `{flag}` | {row.help.replace('|', chr(92) + '|')} |"
    yield ""


def _exit_codes() -> Iterator[str]:
    yield "| code | meaning |\n|---|---|"
    for line in EXIT_CODES.splitlines()[2:]:
        code, _, meaning = line.strip().partition(" ")
        yield f"| {code} | {meaning.strip()} |"
    yield ""


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        sys.stdout.write(page())
