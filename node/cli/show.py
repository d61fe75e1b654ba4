"""``demo``: see it work before setting anything up."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["COMMANDS"]


@click.command()
@click.option("--model", default=None, metavar="NAME|PATH", help="As for join [default: the catalogue's].")
@click.option("--state-dir", type=click.Path(path_type=Path), default=None, metavar="DIR",
              help="The demo's own state [default: a folder beside this user's state].")  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the three nodes running until Ctrl-C.")
@click.pass_context
def demo(ctx: click.Context, model: str | None, state_dir: Path | None, keep: bool) -> None:
    """Three nodes on this machine find each other and answer real questions."""
    from node.compute.models import DEFAULT_MODEL
    from node.demo import run_demo
    from node.state import default_state_dir

    where = (state_dir or default_state_dir() / "demo").absolute()
    ctx.exit(run_demo(where, model or DEFAULT_MODEL, keep=keep))


COMMANDS = (demo,)
