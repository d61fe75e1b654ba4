"""Look at the mesh: ``status``, ``nodes``, ``tasks``, ``task show``; and ``models`` on this device."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.errors import ConfigError
from mesh.units import bytes_text
from node.cli.options import REACH, Chosen, as_json, choose, settings_flags

if TYPE_CHECKING:
    from mesh.messages import TaskExplanation
    from node.faces.view import View

__all__ = ["COMMANDS"]

_MEASURE_TIMEOUT_S = 180  # two seconds of measuring, ten of importing; a busy machine takes its time

F = TypeVar("F", bound=Callable[..., Any])


def _looking(function: F) -> F:
    function = settings_flags(*REACH)(function)
    function = click.option(
        "--watch", is_flag=True, help="Go on until Ctrl-C; with --json one line a second."
    )(function)
    return as_json(function)


@click.command()
@_looking
def status(is_json: bool, watch: bool, **flags: Any) -> None:
    """Show nodes, coordinator, broker, tasks and events."""
    from node.faces.console import status_out

    _look(choose(flags), is_json, watch, lambda view: asdict(view), status_out)


@click.command()
@_looking
def nodes(is_json: bool, watch: bool, **flags: Any) -> None:
    """List the nodes and how they are doing."""
    from node.faces.console import nodes_out

    _look(
        choose(flags), is_json, watch,
        lambda view: [asdict(row) for row in view.nodes],
        lambda view: nodes_out(view.nodes),
    )  # fmt: skip


@click.command()
@click.argument("task", required=False)
@_looking
def tasks(task: str | None, is_json: bool, watch: bool, **flags: Any) -> None:
    """List the tasks the mesh still knows, or one TASK."""
    from node.faces.console import tasks_out

    def chosen_rows(view: View) -> list[Any]:
        return [row for row in view.tasks if task in (None, row.task)]

    _look(
        choose(flags), is_json, watch,
        lambda view: [asdict(row) for row in chosen_rows(view)],
        lambda view: tasks_out(chosen_rows(view)),
    )  # fmt: skip


@click.group()
def task() -> None:
    """One task: why it runs where it does."""


@task.command("show")
@click.argument("task")
@as_json
@settings_flags(*REACH)
def task_show(task: str, is_json: bool, **flags: Any) -> None:
    """Tell each decision about TASK with the numbers behind it.

    Value density, slack, the nodes it might have gone to and why it did not; of a task that waits also what
    it would be now. The coordinator keeps the newest decisions of the newest tasks in memory; those of an
    earlier coordinator are gone with it.
    """
    from node.faces.console import explanation_out

    chosen = choose(flags)
    told = asyncio.run(_explain(chosen, task))
    if is_json:
        click.echo(json.dumps(_rounded(asdict(told) | {"epoch": str(told.epoch)})))
    else:
        explanation_out(told)


async def _explain(chosen: Chosen, name: str) -> TaskExplanation:
    from mesh.ids import TaskId, is_id
    from node.client import EXPLAIN_ROWS, connected, explain_task

    if not is_id(name):
        raise ConfigError(f"{name!r} is no id of a task: `edgemesh tasks` lists those there are")
    async with connected(chosen.settings, chosen.state, EXPLAIN_ROWS, task=TaskId(name)) as client:
        return await explain_task(client, TaskId(name))


def _look(
    chosen: Chosen, is_json: bool, is_watch: bool, plain: Callable[[View], Any], show: Callable[[View], None]
) -> None:
    """Once or again and again, for a script or for people."""

    def put(view: View) -> None:
        if is_json:
            click.echo(json.dumps(_rounded(plain(view))))
        else:
            show(view)

    from node.client import snapshot, watch

    if not is_watch:
        put(asyncio.run(snapshot(chosen.settings, chosen.state)))
    elif is_json or not sys.stdout.isatty():
        asyncio.run(_each(watch(chosen.settings, chosen.state), put))
    else:
        asyncio.run(_screen(watch(chosen.settings, chosen.state, every_s=0.25)))


async def _each(views: AsyncGenerator[View, None], put: Callable[[View], None]) -> None:
    async with aclosing(views):  # the reader of a pipe may leave at any line
        async for view in views:
            put(view)


async def _screen(views: AsyncGenerator[View, None]) -> None:
    from node.faces.tui import screen

    newest = [await anext(views)]
    shown = asyncio.create_task(screen(lambda: newest[0]), name="look.screen")
    try:
        async for view in views:
            newest[0] = view
            if shown.done():
                break
    finally:
        shown.cancel()
        await asyncio.gather(shown, return_exceptions=True)


def _rounded(plain: Any) -> Any:
    """Milliseconds are as exact as any of these figures is."""
    match plain:
        case float():
            return round(plain, 3)
        case dict():
            return {key: _rounded(value) for key, value in plain.items()}
        case list() | tuple():
            return [_rounded(value) for value in plain]
        case _:
            return plain


@click.group(invoke_without_command=True)
@as_json
@settings_flags("state_dir")
@click.pass_context
def models(context: click.Context, /, is_json: bool, **flags: Any) -> None:
    """List the models this device can serve, and which are here already."""
    if context.invoked_subcommand is not None:
        return
    from node.compute.models import list_models
    from node.faces.console import table_out

    rows = list_models(choose(flags).state.models_dir)
    if is_json:
        click.echo(json.dumps([asdict(row) for row in rows]))
        return
    sizes = [bytes_text(row.size_bytes) if row.size_bytes is not None else "–" for row in rows]
    table = [(row.name, row.state, size, row.display) for row, size in zip(rows, sizes, strict=True)]
    table_out(("name", "state", "size", "what it is"), table)


@models.command("show")
@click.argument("name", required=False)
@click.option("--measure", is_flag=True, help="Measure each format's speed on this machine now (seconds).")
@as_json
@settings_flags("state_dir", "precision")
def models_show(name: str | None, measure: bool, is_json: bool, **flags: Any) -> None:
    """Show the weight formats of model NAME, and which one this device would load and why."""
    from node.compute.backbone.precision import choose_here, read_speeds
    from node.compute.models import DEFAULT_MODEL, read_manifest, resolve
    from node.faces.console import table_out
    from node.profile import memory_free_bytes

    chosen = choose(flags)
    source = resolve(name or DEFAULT_MODEL)
    home = chosen.state.models_dir / source.slug
    if source.kind == "echo":
        raise ConfigError("echo has no weights: name a model, as in `edgemesh models show smollm2-135m`")
    if read_manifest(home) is None:
        raise ConfigError(
            f"{source.display} is not on this machine yet: "
            f"`edgemesh up --model {name or source.name}` fetches it"
        )
    directory = source.path if source.kind == "directory" and source.path is not None else home
    if measure:
        _measure_speeds(directory, home)
    speeds = read_speeds(home)
    choice = choose_here(directory, home, chosen.settings.precision, memory_free_bytes())
    if is_json:
        click.echo(json.dumps({"model": source.name, **asdict(choice)}))
        return
    table_out(
        ("", "format", "needs", "tokens/s", "prompt tokens/s", "quality"),
        [
            (
                "→" if row.precision == choice.precision else "",
                row.precision,
                bytes_text(row.needs_bytes) + ("" if row.fits else " (does not fit)"),
                f"{row.speed.decode_tok_s:.0f}" if row.speed else "–",
                f"{row.speed.prefill_tok_s:.0f}" if row.speed else "–",
                row.note,
            )
            for row in choice.table
        ],
    )
    click.echo(f"{choice.precision or 'nothing'}: {choice.reason}")
    if not speeds:
        click.echo("`edgemesh models show --measure` measures the formats on this machine", err=True)


def _measure_speeds(directory: Path, home: Path) -> None:
    """In a process of its own: commands do without torch, and it takes gigabytes for a moment.

    Raises:
        ConfigError: It did not end well; with its last line.
    """
    command = [sys.executable, "-P", "-m", "node.compute.backbone.speed", str(directory), str(home)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_MEASURE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"measuring took more than {_MEASURE_TIMEOUT_S} s: close other programs and try again"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"the formats could not be measured: {last}")


COMMANDS = (status, nodes, tasks, task, models)
