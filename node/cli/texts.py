"""Many short texts at once: ``classify``, ``score``, ``embed``.

Texts are arguments, or one a line of stdin with ``-``. They travel in tasks of a bounded number of texts, and
come back in their order.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.errors import ConfigError, TaskError
from node.cli.ask import REACH_TO_ASK, given_text, harmless, state_code
from node.cli.options import Chosen, as_json, choose, end_with, settings_flags

if TYPE_CHECKING:
    from mesh.messages import Output, Submit, TaskResult, TaskStatus

__all__ = ["COMMANDS"]

F = TypeVar("F", bound=Callable[..., Any])

# Texts of one task: together small enough to travel, and their results too (``mesh.messages.output``):
# 8 vectors of 4,096 numbers, 40 texts of 1,000 tokens.
BATCH = {"classify": 128, "score": 32, "embed": 8}
BATCH_BYTES = 64 * 1024

SHOWN_CHARACTERS = 60  # of a text in a table


def _text_options(function: F) -> F:
    options: list[Any] = [
        click.argument("texts", nargs=-1, required=True, metavar="TEXT..."),
        click.option("--deadline", type=float, default=None, metavar="SECONDS",
                     help="An answer is worth nothing after this time."),
        click.option("--value", type=float, default=1.0, show_default=True, metavar="V",
                     help="What an answer in time is worth; under load the mesh prefers more."),
        click.option("--model", "model_name", default=None, metavar="NAME",
                     help="Only nodes that serve this model."),
    ]  # fmt: skip
    function = settings_flags(*REACH_TO_ASK)(as_json(function))
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.option(
    "--adapter",
    required=True,
    metavar="NAME",
    help="A classifier; `edgemesh tune` makes one, `edgemesh adapters list` shows them.",
)
@_text_options
def classify(is_json: bool, **options: Any) -> None:
    """Say which label each TEXT gets. '-' reads one text a line from stdin."""

    def rows(texts: Sequence[str], output: Output) -> Iterator[dict[str, Any]]:
        for text, label, scores in zip(texts, output.labels, output.scores, strict=True):
            yield {"text": text, "label": label, "scores": dict(zip(output.classes, scores, strict=True))}

    _do("classify", options, is_json, rows, ("label", "probability", "text"), lambda row: (
        row["label"], f"{row['scores'][row['label']]:.3f}", _short(row["text"])
    ))  # fmt: skip


@click.command()
@click.option("--prompt", default=None, metavar="TEXT", help="What comes before each text; not scored.")
@click.option("--adapter", default=None, metavar="NAME", help="Score with this adapter.")
@_text_options
def score(is_json: bool, **options: Any) -> None:
    """Say how likely the model finds each TEXT. '-' reads one text a line from stdin.

    In nats: the sum of the log-probabilities of its tokens. Perplexity is their mean, as a number of choices.
    """

    def rows(texts: Sequence[str], output: Output) -> Iterator[dict[str, Any]]:
        for text, scores in zip(texts, output.scores, strict=True):
            mean = sum(scores) / len(scores) if scores else 0.0
            yield {
                "text": text,
                "logprob": math.fsum(scores),
                "perplexity": math.exp(-mean),
                "token_logprobs": scores,
            }

    titles = ("log-probability", "tokens", "perplexity", "text")
    _do("score", options, is_json, rows, titles, lambda row: (
        f"{row['logprob']:.3f}", str(len(row["token_logprobs"])), f"{row['perplexity']:.4g}",
        _short(row["text"]),
    ))  # fmt: skip


@click.command()
@click.option("--adapter", default=None, metavar="NAME", help="Embed with this adapter.")
@_text_options
def embed(is_json: bool, **options: Any) -> None:
    """Give a unit vector for each TEXT. '-' reads one text a line from stdin; --json prints all numbers."""

    def rows(texts: Sequence[str], output: Output) -> Iterator[dict[str, Any]]:
        for text, vector in zip(texts, output.vectors, strict=True):
            yield {"text": text, "vector": vector}

    _do("embed", options, is_json, rows, ("dimensions", "vector", "text"), lambda row: (
        str(len(row["vector"])), " ".join(f"{x:+.3f}" for x in row["vector"][:4]) + " …", _short(row["text"])
    ))  # fmt: skip


def _do(
    kind: str,
    options: dict[str, Any],
    is_json: bool,
    rows: Callable[[Sequence[str], Output], Iterator[dict[str, Any]]],
    titles: Sequence[str],
    cells: Callable[[dict[str, Any]], Sequence[str]],
) -> None:
    """Everything is checked before anything is sent; every result is printed, or none."""
    chosen = choose({name: options.pop(name) for name in (*REACH_TO_ASK, "config")})
    requests = [_request(kind, batch, options) for batch in _batches(kind, _texts(options["texts"]))]
    results = asyncio.run(_answered(chosen, requests))
    last = results[-1]
    if last.state != "done" or len(results) < len(requests):
        reason = harmless(last.reason or "no reason was given")
        click.echo(f"edgemesh: {last.state}: {reason}", err=True)
        end_with(state_code(last.state))
    table: list[dict[str, Any]] = []
    for request, result in zip(requests, results, strict=True):
        output = getattr(result, "output", None)
        if output is None:
            raise TaskError(f"the task {request.id} came back without its {kind} output: update its node")
        try:
            table += rows(request.texts, output)
        except (ValueError, KeyError) as error:
            raise TaskError(
                f"the task {request.id} came back with another number of texts ({error})"
            ) from error
    if is_json:
        click.echo(json.dumps(table))
        return
    from node.faces.console import table_out

    table_out(titles, [[harmless(cell) for cell in cells(row)] for row in table])


def _texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, with ``-`` replaced by the lines of stdin that are not empty."""
    texts: list[str] = []
    for argument in arguments:
        given = given_text(argument)
        texts += [line for line in given.splitlines() if line.strip()] if argument == "-" else [given]
    if not texts:
        raise ConfigError("stdin held no text: give one a line")
    return texts


def _batches(kind: str, texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_bytes = 0
    for text in texts:
        size = len(text.encode("utf-8", "surrogatepass"))
        if batch and (len(batch) >= BATCH[kind] or n_bytes + size > BATCH_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(text)
        n_bytes += size
    yield batch


def _request(kind: str, texts: list[str], options: dict[str, Any]) -> Submit:
    from random import SystemRandom

    from mesh.ids import new_task_id
    from mesh.messages import Submit

    try:
        return Submit(
            kind=kind,  # type: ignore[arg-type]
            texts=texts,
            prompt=options.get("prompt"),
            id=new_task_id(SystemRandom()),
            deadline_s=options["deadline"],
            value=options["value"],
            adapter=options["adapter"],
            model=options["model_name"],
            stream=False,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


async def _answered(chosen: Chosen, requests: Sequence[Submit]) -> list[TaskResult | TaskStatus]:
    """The end of each, one after the other; the first that is not ``done`` is the last."""
    ends: list[TaskResult | TaskStatus] = []
    for request in requests:
        ends.append(await _ended(chosen, request))
        if ends[-1].state != "done":
            break
    return ends


async def _ended(chosen: Chosen, request: Submit) -> TaskResult | TaskStatus:
    from mesh.messages import TaskResult, TaskStatus
    from node.client import TASK_ROWS, cancel_task, connected, submit

    assert request.id is not None
    final: TaskResult | TaskStatus | None = None
    async with connected(chosen.settings, chosen.state, TASK_ROWS, task=request.id) as client:
        try:
            async for news in submit(client, request):
                if isinstance(news, TaskResult) or (isinstance(news, TaskStatus) and news.is_final):
                    final = news
                elif isinstance(news, TaskStatus) and news.state == "queued" and news.reason:
                    click.secho(f"queued: {harmless(news.reason)}", err=True, dim=True)
        except asyncio.CancelledError:  # Ctrl-C: the mesh must not go on for nobody
            await cancel_task(client, request.id, timeout_s=2.0)
            raise
    if final is None:
        raise TaskError(
            f"the task {request.id} ended without a word: `edgemesh tasks {request.id}` may know more"
        )
    return final


def _short(text: str) -> str:
    line = " ".join(text.split())
    is_long = len(line) > SHOWN_CHARACTERS and sys.stdout.isatty()
    return f"{line[: SHOWN_CHARACTERS - 1]}…" if is_long else line


COMMANDS = (classify, score, embed)
