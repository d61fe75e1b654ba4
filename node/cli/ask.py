"""Ask the mesh: ``run``, ``submit``, ``cancel``.

The answer goes to stdout as it is made; who answers and how fast goes to stderr.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.errors import ConfigError, TaskError
from node.cli.options import REACH, Chosen, as_json, choose, end_with, settings_flags

if TYPE_CHECKING:
    from mesh.messages import Submit, TaskResult, TaskStatus

__all__ = ["COMMANDS", "REACH_TO_ASK", "as_json_line", "given_text", "harmless", "state_code"]

F = TypeVar("F", bound=Callable[..., Any])

# ``--seed`` is the sampling seed here; a peer to ask comes from EDGEMESH_SEEDS or the configuration file.
REACH_TO_ASK = tuple(name for name in REACH if name != "seeds")

# 0 to 4 are common to all commands, see node.cli.main.
STATE_CODES = {"done": 0, "failed": 1, "rejected": 5, "expired": 6, "cancelled": 6}


def state_code(state: str) -> int:
    """The exit code of a task's end."""
    return STATE_CODES[state]


def _task_options(function: F) -> F:
    options: list[Any] = [
        click.argument("prompt"),
        click.option("--max-tokens", type=int, default=256, show_default=True, metavar="N",
                     help="Longest answer."),
        click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T",
                     help="0 takes the likeliest token each time."),
        click.option("--top-p", type=float, default=1.0, show_default=True, metavar="P",
                     help="Sample among the likeliest tokens that sum up to P."),
        click.option("--seed", "sample_seed", type=int, default=None, metavar="N",
                     help="Makes sampling repeatable (--temperature above 0)."),
        click.option("--stop", multiple=True, metavar="TEXT",
                     help="End the answer before TEXT. Repeatable."),
        click.option("--deadline", type=float, default=None, metavar="SECONDS",
                     help="The whole answer is worth nothing after this time."),
        click.option("--value", type=float, default=1.0, show_default=True, metavar="V",
                     help="What an answer in time is worth; under load the mesh prefers more."),
        click.option("--adapter", default=None, metavar="NAME", help="Answer with this adapter."),
        click.option("--model", "model_name", default=None, metavar="NAME",
                     help="Only nodes that serve this model."),
        click.option("--id", "task_id", default=None, metavar="ID",
                     help="The same body under the same id is the same task."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _request(options: dict[str, Any], *, stream: bool) -> Submit:
    """The submission these options describe; all of it is checked before anything is sent.

    Raises:
        ConfigError: One of them is wrong; the text says which and why.
    """
    from random import SystemRandom

    from mesh.ids import TaskId, new_task_id
    from mesh.messages import Submit

    try:
        return Submit(
            prompt=given_text(options["prompt"]),
            id=TaskId(options["task_id"]) if options["task_id"] else new_task_id(SystemRandom()),
            max_tokens=options["max_tokens"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            seed=options["sample_seed"],
            stop=list(options["stop"]),
            deadline_s=options["deadline"],
            value=options["value"],
            adapter=options["adapter"],
            model=options["model_name"],
            stream=stream,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def given_text(prompt: str) -> str:
    """The prompt, or what stdin holds; in a locale that is not UTF-8 still the bytes that were given.

    Raises:
        ConfigError: They are no text.
    """
    given = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt) if _is_torn(prompt) else None
    try:
        return prompt if given is None else given.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 text (byte {error.start})") from error


def _is_torn(text: str) -> bool:
    """Whether Python kept bytes of the command line that this locale has no letters for."""
    return any("\udc80" <= letter <= "\udcff" for letter in text)


@click.command()
@_task_options
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@as_json
@settings_flags(*REACH_TO_ASK)
def run(no_stream: bool, is_json: bool, **options: Any) -> None:
    """Answer PROMPT, token by token ('-' reads it from stdin). Ctrl-C cancels the task."""
    chosen, options = _split(options)
    request = _request(options, stream=not (no_stream or is_json))
    end_with(asyncio.run(_run(chosen, request, is_json=is_json)))


@click.command()
@_task_options
@click.option("--wait", is_flag=True, help="Wait for the end and print the answer.")
@as_json
@settings_flags(*REACH_TO_ASK)
def submit(wait: bool, is_json: bool, **options: Any) -> None:
    """Submit PROMPT; print the task's id once the mesh has it safe."""
    chosen, options = _split(options)
    request = _request(options, stream=True)  # whoever watches the mesh sees it grow
    end_with(asyncio.run(_submit(chosen, request, wait=wait, is_json=is_json)))


@click.command()
@click.argument("task")
@as_json
@settings_flags(*REACH)
def cancel(task: str, is_json: bool, **flags: Any) -> None:
    """End TASK; what it has said so far is its result."""
    end_with(asyncio.run(_cancel(choose(flags), task, is_json=is_json)))


def _split(options: dict[str, Any]) -> tuple[Chosen, dict[str, Any]]:
    """The settings among a command's options, and the rest."""
    flags = {name: options.pop(name) for name in (*REACH_TO_ASK, "config")}
    return choose(flags), options


async def _run(chosen: Chosen, request: Submit, *, is_json: bool) -> int:
    from mesh.messages import TaskResult, TaskStatus, TaskTokens
    from node.client import TASK_ROWS, cancel_task, connected, submit
    from node.faces.answer import Answer

    assert request.id is not None
    answer = Answer()
    final: TaskStatus | TaskResult | None = None
    async with connected(chosen.settings, chosen.state, TASK_ROWS, task=request.id) as client:
        try:
            async for progress in submit(client, request):
                match progress:
                    case TaskTokens():
                        _put(answer.feed(progress))
                    case TaskStatus():
                        _tell(progress)
                        final = progress if progress.is_final else final
                    case TaskResult():
                        final = progress
        # Ctrl-C, or the reader of our pipe has enough: the mesh must not go on for nobody.
        except (asyncio.CancelledError, BrokenPipeError):
            click.echo("\nedgemesh: cancelling the task", err=True)
            await cancel_task(client, request.id, timeout_s=2.0)
            raise
    if final is None:
        raise TaskError(
            f"the task {request.id} ended without a word: `edgemesh tasks {request.id}` may know more"
        )
    if isinstance(final, TaskResult) and not is_json:
        rest = answer.finish(final)
        _put(rest if rest.endswith("\n") else f"{rest}\n")
    return _end(final, is_json=is_json)


async def _submit(chosen: Chosen, request: Submit, *, wait: bool, is_json: bool) -> int:
    from mesh.messages import TaskResult, TaskStatus
    from node.client import TASK_ROWS, connected, submit

    final: TaskStatus | TaskResult | None = None
    async with connected(chosen.settings, chosen.state, TASK_ROWS, task=request.id) as client:
        async for progress in submit(client, request):
            if isinstance(progress, TaskStatus):
                if not wait and not progress.is_final:
                    click.echo(_json(progress) if is_json else progress.task)
                    return 0
                final = progress if progress.is_final else final
            elif isinstance(progress, TaskResult):
                final = progress
    if final is None:
        raise TaskError(
            f"the task {request.id} ended without a word: `edgemesh tasks {request.id}` may know more"
        )
    if wait and isinstance(final, TaskResult) and not is_json:
        _put(f"{final.text}\n")
    elif not wait and not is_json and state_code(final.state) == 0:
        click.echo(request.id)  # the same task was done before
    return _end(final, is_json=is_json)


async def _cancel(chosen: Chosen, task: str, *, is_json: bool) -> int:
    from mesh.ids import TaskId, is_id
    from node.client import TASK_ROWS, cancel_task, connected

    if not is_id(task):
        raise ConfigError(f"{task!r} cannot be a task's id: `edgemesh tasks` lists them")
    async with connected(chosen.settings, chosen.state, TASK_ROWS, task=TaskId(task)) as client:
        final = await cancel_task(client, TaskId(task))
    if final is None:
        raise ConfigError(f"the mesh knows no task {task}: `edgemesh tasks` lists those it knows")
    if is_json:
        click.echo(_json(final))
    else:
        click.echo(f"{task}: {final.state}", err=True)
    return 0


# ── words ───────────────────────────────────────────────────────────────────────────────────────────


def _put(text: str) -> None:
    if text:
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)  # a file gets every byte
        sys.stdout.flush()


def harmless(text: str) -> str:
    """Without what would steer a terminal: models say what they are told to, and reasons quote clients."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _tell(status: TaskStatus) -> None:
    """One line of talk per change that people care about."""
    if status.node is not None and status.state == "running":
        again = f" (attempt {status.attempt})" if status.attempt > 1 else ""
        click.secho(harmless(f"{status.node} answers{again}"), err=True, dim=True)
    elif status.state == "queued" and status.reason:
        click.secho(harmless(f"queued: {status.reason}"), err=True, dim=True)


def _end(final: TaskStatus | TaskResult, *, is_json: bool) -> int:
    """The last words and the exit code."""
    from mesh.messages import TaskResult

    if is_json:
        click.echo(_json(final))
    if final.state == "done" and isinstance(final, TaskResult):
        click.secho(_figures(final), err=True, dim=True)
    elif final.state != "done":
        reason = harmless(final.reason or "no reason was given")
        click.echo(f"edgemesh: {final.state}: {reason}", err=True)
    return state_code(final.state)


def _figures(result: TaskResult) -> str:
    from mesh.units import seconds_text

    decode_s = result.service_s - (result.ttft_s or 0.0)
    rate = (result.n_tokens - 1) / decode_s if result.n_tokens > 1 and decode_s > 0 else 0.0
    parts = [f"{result.n_tokens} tokens", f"{rate:.1f} tok/s"]
    if result.ttft_s is not None:
        parts.append(f"first after {seconds_text(result.queue_s + result.ttft_s)}")
    return harmless(f"{' · '.join(parts)} · on {result.node or '?'}")


def _json(message: Any) -> str:
    from mesh.wire import plain_json, to_plain

    return plain_json(to_plain(message))


def as_json_line(message: Any) -> str:
    """A message among others of other kinds, so that ``type`` must tell which it is."""
    from mesh.wire import plain_json, to_plain

    return plain_json({"type": type(message).__name__, **to_plain(message)})


COMMANDS = (run, submit, cancel)
