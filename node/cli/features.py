"""``edgemesh features``: make feature maps ahead of need, somewhere in the mesh.

Whoever tunes on the same records later finds them, on whatever node it is: also on one that holds only the
top of its model, while all others sleep.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh.errors import ConfigError, TaskError
from mesh.units import bytes_text, seconds_text
from node.cli.ask import REACH_TO_ASK, as_json_line, harmless, state_code
from node.cli.options import Chosen, as_json, choose, end_with, settings_flags
from node.cli.records import TASKS, placed, read_records_of
from node.cli.tune import followed

if TYPE_CHECKING:
    from mesh.messages import Submit, TaskResult, TaskStatus

__all__ = ["COMMANDS"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--data", required=True, type=_FILE, metavar="FILE", help="Records that are going to be tuned on."
)
@click.option(
    "--top-layers",
    type=int,
    default=4,
    show_default=True,
    metavar="K",
    help="How many layers at the top are going to be adapted.",
)
@click.option(
    "--task",
    type=click.Choice(TASKS),
    default=None,
    help="What is going to be learned [default: as the records say].",
)
@click.option(
    "--eval", "eval_path", type=_FILE, default=None, metavar="FILE", help="More of them, to evaluate by."
)
@click.option("--skip-bad", is_flag=True, help="Leave out lines that cannot be read.")
@click.option(
    "--max-tokens",
    type=int,
    default=512,
    show_default=True,
    metavar="N",
    help="A longer record is cut; the same number as when tuning.",
)
@click.option(
    "--feature-error",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="Largest relative error; 0 keeps them exact. The same number as when tuning.",
)
@click.option("--deadline", type=float, default=None, metavar="SECONDS", help="Stop after this time.")
@click.option(
    "--value",
    type=float,
    default=0.1,
    show_default=True,
    metavar="V",
    help="What it is worth; under load the mesh prefers more.",
)
@click.option("--model", "model_name", default=None, metavar="NAME", help="Only nodes that serve this model.")
@as_json
@settings_flags(*REACH_TO_ASK)
def features(is_json: bool, **options: Any) -> None:
    """Make the feature maps of the records in FILE, for tuning later on any node. Ctrl-C stops.

    With --json progress is one JSON object a line, and so is the result.
    """
    chosen = choose({name: options.pop(name) for name in (*REACH_TO_ASK, "config")})
    request = _request(chosen, options)
    end_with(asyncio.run(_features(chosen, request, is_json=is_json)))


def _request(chosen: Chosen, options: dict[str, Any]) -> Submit:
    """Raises:
    ConfigError: A record or an option is wrong; the text says which.
    """
    from random import SystemRandom

    from mesh.ids import new_task_id
    from mesh.messages import FeaturesSpec, Submit, TuneSpec

    task, data, evaluation = read_records_of(options)
    try:
        spec = TuneSpec(
            adapter="none",  # the maps are the same for all
            task=task,
            **placed(chosen, data, evaluation),
            skip_bad=options["skip_bad"],
            top_layers=options["top_layers"],
            max_tokens=options["max_tokens"],
            feature_error=options["feature_error"],
        )
        return Submit(
            kind="features",
            tune=spec,
            features=FeaturesSpec(top_layers=options["top_layers"]),
            id=new_task_id(SystemRandom()),
            deadline_s=options["deadline"],
            value=options["value"],
            model=options["model_name"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


async def _features(chosen: Chosen, request: Submit, *, is_json: bool) -> int:
    final = await followed(chosen, request, "feature maps", is_json=is_json)
    if is_json:
        click.echo(as_json_line(final))
    if final.state != "done":
        click.echo(f"edgemesh: {final.state}: {harmless(final.reason or 'no reason was given')}", err=True)
    elif not is_json:
        click.echo(harmless(_words(final)))
    return state_code(final.state)


def _words(final: TaskStatus | TaskResult) -> str:
    from mesh.messages import TaskResult

    held = final.output.features if isinstance(final, TaskResult) and final.output is not None else None
    if held is None or not isinstance(final, TaskResult):
        raise TaskError(f"the task {final.task} is done, but nothing came back: update {final.node}")
    new = f"{held.n_computed} of them computed in {seconds_text(final.service_s)}"
    there = "all were there already" if not held.n_computed else new
    return (
        f"{held.n_tokens} tokens below the top {held.top_layers} layers, {bytes_text(held.n_bytes)}, "
        f"on {final.node}: {there}"
    )


COMMANDS = (features,)
