"""``edgemesh tune``: train an adapter on records of your own, somewhere in the mesh.

Every line of the data is checked before anything is sent. Small data travel with the task; larger ones are
kept in this machine's state directory, and the task goes to a node of this machine. Progress is talk and goes
to stderr; what was trained goes to stdout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.errors import ConfigError, TaskError
from mesh.units import seconds_text
from node.cli.ask import REACH_TO_ASK, as_json_line, harmless, state_code
from node.cli.options import Chosen, as_json, choose, end_with, settings_flags
from node.cli.records import TASKS, RecordsFile, placed, read_records_of

if TYPE_CHECKING:
    from mesh.messages import Submit, TaskResult, TaskStatus

__all__ = ["COMMANDS", "followed"]

F = TypeVar("F", bound=Callable[..., Any])


def _tune_options(function: F) -> F:
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    options: list[Any] = [
        click.option("--data", required=True, type=path, metavar="FILE",
                     help="JSON lines: text and label, prompt and completion, or messages."),
        click.option("--adapter", required=True, metavar="NAME",
                     help="Name of the result: a-z, 0-9 and '-'. One of this name is replaced at the end."),
        click.option("--task", type=click.Choice(TASKS), default=None,
                     help="What to learn [default: as the records say]."),
        click.option("--eval", "eval_path", type=path, default=None, metavar="FILE",
                     help="Records that are never trained on, to say how good the adapter is."),
        click.option("--skip-bad", is_flag=True, help="Leave out lines that cannot be read."),
        click.option("--top-layers", default="auto", show_default=True, metavar="K|auto",
                     help="How many layers at the top to adapt; auto: by a short trial."),
        click.option("--epochs", type=int, default=5, show_default=True, metavar="E",
                     help="Passes over the data; all but the first use cached features."),
        click.option("--method", default="lora", show_default=True, metavar="M",
                     help="A PEFT method such as lora, rslora, dora, ia3, loha, lokr, oft, vera."),
        click.option("--rank", type=int, default=8, show_default=True, metavar="R",
                     help="Size of the low-rank update."),
        click.option("--alpha", type=float, default=None, metavar="A",
                     help="Its scale is A / R [default: 2 R]."),
        click.option("--targets", multiple=True, metavar="NAME",
                     help="Module to adapt, such as q_proj. Repeatable [default: the method's]."),
        click.option("--learning-rate", type=float, default=None, metavar="LR",
                     help="[default: the method's]"),
        click.option("--batch", type=int, default=16, show_default=True, metavar="N", help="Records a step."),
        click.option("--nodes", type=int, default=1, show_default=True, metavar="N",
                     help="Train on N nodes at once, averaged after each epoch; fewer do it in turns."),
        click.option("--seed", "train_seed", type=int, default=0, show_default=True, metavar="N",
                     help="The same seed, data and --nodes give the same adapter, to the bit."),
        click.option("--max-tokens", type=int, default=512, show_default=True, metavar="N",
                     help="A longer record is cut."),
        click.option("--feature-error", type=float, default=0.0, show_default=True, metavar="X",
                     help="Largest relative error of cached features; 0 keeps them exact."),
        click.option("--deadline", type=float, default=None, metavar="SECONDS",
                     help="The adapter is worth nothing after this time."),
        click.option("--value", type=float, default=1.0, show_default=True, metavar="V",
                     help="What it is worth in time; under load the mesh prefers more."),
        click.option("--model", "model_name", default=None, metavar="NAME",
                     help="Only nodes that serve this model."),
        click.option("--id", "task_id", default=None, metavar="ID",
                     help="The same body under the same id is the same task."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@_tune_options
@as_json
@settings_flags(*REACH_TO_ASK)
def tune(is_json: bool, **options: Any) -> None:
    """Train an adapter on the records in FILE and serve it. Ctrl-C stops; the same command goes on.

    With --json progress is one JSON object a line, and so is the result.
    """
    chosen = choose({name: options.pop(name) for name in (*REACH_TO_ASK, "config")})
    request = _request(chosen, options)
    end_with(asyncio.run(_tune(chosen, request, is_json=is_json)))


# ── before anything is sent ─────────────────────────────────────────────────────────────────────────


def _request(chosen: Chosen, options: dict[str, Any]) -> Submit:
    """The submission these options describe; all of it, every record too, is good.

    Raises:
        ConfigError: Something is not; the text says what, of a record with its line.
    """
    from random import SystemRandom

    from mesh.ids import TaskId, new_task_id
    from mesh.messages import Submit, TuneSpec
    from node.compute.tune.records import same_labels

    task, data, evaluation = read_records_of(options)
    same_labels(data.records, evaluation.records if evaluation is not None else data.records)
    try:
        spec = TuneSpec(
            adapter=options["adapter"],
            task=task,
            **placed(chosen, data, evaluation),
            skip_bad=options["skip_bad"],
            method=options["method"],
            top_layers=_top_layers(options["top_layers"]),
            targets=[name for given in options["targets"] for name in given.split(",") if name],
            rank=options["rank"],
            alpha=options["alpha"],
            epochs=options["epochs"],
            learning_rate=options["learning_rate"],
            batch=options["batch"],
            seed=options["train_seed"],
            max_tokens=options["max_tokens"],
            feature_error=options["feature_error"],
            nodes=_nodes(options["nodes"], data),
        )
        request = Submit(
            kind="tune",
            tune=spec,
            id=TaskId(options["task_id"]) if options["task_id"] else new_task_id(SystemRandom()),
            deadline_s=options["deadline"],
            value=options["value"],
            model=options["model_name"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for one in (data, evaluation):
        if one is not None:
            skipped = f", {one.records.n_skipped} lines left out" if one.records.n_skipped else ""
            click.secho(f"{one.path.name}: {len(one.records.items)} records{skipped}", err=True, dim=True)
    return request


def _nodes(given: int, data: RecordsFile) -> int:
    if given > len(data.records.items):
        raise ConfigError(f"{len(data.records.items)} records cannot be split among --nodes {given}")
    return given


def _top_layers(given: str) -> int | None:
    if given == "auto":
        return None
    try:
        return int(given)
    except ValueError:
        raise ConfigError(f"--top-layers must be a number of layers or 'auto', got {given!r}") from None


# ── while it runs ───────────────────────────────────────────────────────────────────────────────────


async def _tune(chosen: Chosen, request: Submit, *, is_json: bool) -> int:
    assert request.tune is not None
    return _end(
        chosen, await followed(chosen, request, request.tune.adapter, is_json=is_json), is_json=is_json
    )


async def followed(chosen: Chosen, request: Submit, name: str, *, is_json: bool) -> TaskStatus | TaskResult:
    """Submit, and show how it is getting on until it has ended. Ctrl-C cancels the task."""
    from mesh.messages import TaskProgress, TaskResult, TaskStatus
    from node.client import TASK_ROWS, cancel_task, connected, submit
    from node.faces.progress import TuneProgress

    assert request.id is not None
    final: TaskStatus | TaskResult | None = None
    async with connected(chosen.settings, chosen.state, TASK_ROWS, task=request.id) as client:
        try:
            with TuneProgress(name) as shown:
                async for news in submit(client, request):
                    match news:
                        case TaskProgress() if is_json:
                            click.echo(as_json_line(news))
                        case TaskProgress():
                            shown.show(news)
                        case TaskStatus():
                            if not is_json and (words := _status_words(news)):
                                shown.note(words)
                            final = news if news.is_final else final
                        case TaskResult():
                            final = news
                        case _:
                            pass
        # Ctrl-C, or the reader of our pipe has enough: the mesh must not go on for nobody.
        except (asyncio.CancelledError, BrokenPipeError):
            click.echo("\nedgemesh: stopping; the same command goes on from here", err=True)
            await cancel_task(client, request.id, timeout_s=5.0)
            raise
    if final is None:
        raise TaskError(
            f"the task {request.id} ended without a word: `edgemesh tasks {request.id}` may know more"
        )
    return final


def _status_words(status: TaskStatus) -> str:
    if status.state == "running":
        again = f" (attempt {status.attempt}, from where the last one was)" if status.attempt > 1 else ""
        return f"{status.node} {'tunes' if status.kind == 'tune' else 'computes'}{again}"
    if status.state == "queued" and status.reason:
        return f"queued: {status.reason}"
    return ""


def _end(chosen: Chosen, final: TaskStatus | TaskResult, *, is_json: bool) -> int:
    from mesh.messages import TaskResult
    from node.faces.tuning import card_words, use_words

    if is_json:
        click.echo(as_json_line(final))
    card = final.output.adapter if isinstance(final, TaskResult) and final.output is not None else None
    if final.state != "done":
        reason = harmless(final.reason or "no reason was given")
        click.echo(f"edgemesh: {final.state}: {reason}", err=True)
    elif card is None or not isinstance(final, TaskResult):
        raise TaskError(f"the task {final.task} is done, but no adapter came back: update {final.node}")
    elif not is_json:
        place = harmless(final.node or "?")
        if final.node in chosen.state.nodes_here(chosen.settings.mesh):
            place = f"{place}: {chosen.state.adapters_dir / card.name}"
        lines = [card_words(card), f"digest  {card.digest}", f"on      {place}", f"use it  {use_words(card)}"]
        click.echo("".join(f"{harmless(line)}\n" for line in lines), nl=False)
        click.secho(f"trained in {seconds_text(final.service_s)}", err=True, dim=True)
    return state_code(final.state)


COMMANDS = (tune,)
