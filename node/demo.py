"""``edgemesh demo``: three real nodes on this machine, real answers, and a pulled plug.

Nothing here is staged: the nodes are ``edgemesh join`` processes that find each other by mDNS on loopback,
and the answers come through the same client as ``edgemesh run``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from mesh.errors import TaskError
from mesh.ids import MeshName, NodeId, new_task_id
from mesh.messages import Submit, TaskProgress, TaskResult, TaskStatus, TaskTokens, TuneSpec
from mesh.units import seconds_text
from node.client import TASK_ROWS, connected, submit
from node.faces.tuning import bar, card_words, progress_words
from node.local_mesh import Event, LocalMesh, NodeProcess
from node.settings import Settings
from node.state import StateDir

__all__ = ["run_demo"]

MESH = MeshName("demo")
N_NODES = 3
PREPARE_TIMEOUT_S = 900.0  # the first run fetches 90 MB and converts them; later ones take seconds

QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "Name three large rivers in Europe.",
    "Write one sentence about the sea.",
)
# What one might say to a house, and what it is about: enough to learn from in seconds.
LESSONS = {
    "light": (
        "It is too dark in here, I cannot read.",
        "Turn on the lamp beside the sofa.",
        "Dim the lamps, we are watching a film.",
        "Switch off every lamp upstairs.",
        "Make the hall brighter.",
    ),
    "heating": (
        "I am freezing, warm up the room.",
        "Set the radiator to twenty degrees.",
        "It is too hot in here, turn the radiator down.",
        "Keep the bathroom warm until nine.",
        "The bedroom is cold at night.",
    ),
    "music": (
        "Play some jazz in the kitchen.",
        "Skip this song, please.",
        "Turn the volume down, the song is too loud.",
        "Put on my favourite album.",
        "Stop the radio.",
    ),
}
EXAM = ("My fingers are cold.", "I want to hear a song.", "Why is it so dark on the stairs?")
ADAPTER = "demo-house"

LONG_QUESTION = "Tell me a short story about a lighthouse keeper and a storm."


@dataclass(frozen=True, slots=True)
class _Answer:
    node: NodeId | None
    attempt: int
    n_tokens: int


class _Paper:
    """Where the demo writes: a line each for the narrator, the answers as they come."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._started_at = time.monotonic()

    def _styled(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text

    def title(self, text: str) -> None:
        print(f"\n{self._styled('1;36', text)}", flush=True)

    def line(self, text: str) -> None:
        stamp = f"{time.monotonic() - self._started_at:6.1f} s"
        print(f"{self._styled('2', stamp)}  {text}", flush=True)

    def question(self, text: str) -> None:
        print(f"\n          {self._styled('1', '› ' + text)}\n          ", end="", flush=True)

    def piece(self, text: str) -> None:
        print(text.replace("\n", "\n          "), end="", flush=True)

    def aside(self, text: str) -> None:
        print(self._styled("2", text), end="", flush=True)

    def end(self, text: str, *, goes_on: bool = False) -> None:
        more = "\n          " if goes_on else "\n"
        print(f"\n          {self._styled('2', text)}", end=more, flush=True)


def run_demo(state_dir: Path, model: str, *, keep: bool = False) -> int:
    """Run the whole demo; 0 if everything it shows really happened.

    Args:
        state_dir: Its own state directory; the converted model in it is kept for the next time.
        model: As ``edgemesh join --model`` takes it.
        keep: Leave the nodes running at the end, until Ctrl-C.

    Raises:
        UnreachableError: A node did not come up, or nobody answered; the text holds its last lines.
        TaskError: A question was not answered.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(state_dir / "meshes" / MESH, ignore_errors=True)  # a new mesh each time, from nothing
    return asyncio.run(_run(state_dir, model, keep))


async def _run(state_dir: Path, model: str, keep: bool) -> int:
    paper = _Paper()
    settings = Settings(state_dir=state_dir, mesh=MESH, interfaces=("lo",))
    async with LocalMesh(state_dir, MESH, flags=("--model", model)) as mesh:
        paper.title("1  Three nodes, started on this machine, find each other")
        await _start(mesh, paper)
        paper.title("2  Each loads the model in a process of its own; they are members already")
        await _load(mesh, paper)
        paper.title("3  Questions, answered by whoever is free")
        for question in QUESTIONS:
            await _ask(settings, paper, question, n_tokens=60)
        paper.title(f"4  The mesh learns: {sum(map(len, LESSONS.values()))} sentences about a house")
        await _teach(settings, paper)
        paper.title("5  The plug is pulled: the coordinator dies in the middle of an answer")
        await _pull_the_plug(mesh, settings, paper)
        if keep:
            paper.title(f"The mesh stays up. Try:  EDGEMESH_STATE_DIR={state_dir} EDGEMESH_MESH={MESH} "
                        "EDGEMESH_INTERFACES=lo edgemesh status      (Ctrl-C ends it)")  # fmt: skip
            await asyncio.Event().wait()
        paper.title("6  Everybody leaves")
        codes = await asyncio.gather(*(node.stop() for node in mesh.running))
        paper.line(f"{len(codes)} nodes said goodbye (exit codes {', '.join(map(str, codes))})")
        if any(codes):
            raise TaskError("a node did not leave cleanly")
    paper.title("Your own mesh: `edgemesh join` here, `edgemesh join --code …` on the next device")
    return 0


async def _start(mesh: LocalMesh, paper: _Paper) -> None:
    nodes = await mesh.start_many(N_NODES)
    for node in nodes:
        joined = await node.wait_for("joined")
        notes = [f"joined {seconds_text(joined['joined_s'])} after its start"]
        if any(event["event"] == "broker_hosted" for event in node.events):
            hosted = await node.wait_for("broker_hosted")
            notes.append(f"hosts the broker ({hosted['kind']})")
        if joined["coordinator"] == node.id:
            notes.append("coordinates")
        paper.line(f"{node.id}  {', '.join(notes)}")


async def _load(mesh: LocalMesh, paper: _Paper) -> None:
    async def ready(node: NodeProcess) -> None:
        event = await node.wait_for("engine_ready", PREPARE_TIMEOUT_S)
        paper.line(f"{node.id}  {event['text']}")

    async def talk() -> None:
        """Fetching and converting takes half a minute the first time: pass on what the nodes say."""
        said: set[str] = set()
        while True:
            for node in mesh.nodes:
                for event in list(node.events):
                    if event["event"] == "loading" and event["text"] not in said:
                        said.add(event["text"])
                        paper.line(f"{node.id}  {event['text']}")
            await asyncio.sleep(0.5)

    talking = asyncio.create_task(talk())
    try:
        await asyncio.gather(*(ready(node) for node in mesh.running))
    finally:
        talking.cancel()


async def _ask(
    settings: Settings, paper: _Paper, question: str, n_tokens: int, on_token: asyncio.Event | None = None
) -> _Answer:
    """One question through the client, streamed; ``on_token`` is set when the answer has begun."""
    request = Submit(prompt=question, max_tokens=n_tokens, id=new_task_id(SystemRandom()))
    paper.question(question)
    attempt = 0
    began_at: float | None = None
    async with connected(settings, StateDir(settings.state_dir), TASK_ROWS, task=request.id) as client:
        async for news in submit(client, request):
            match news:
                case TaskTokens():
                    if attempt and news.attempt != attempt:
                        paper.end(f"attempt {news.attempt} starts over on another node:", goes_on=True)
                    attempt = news.attempt
                    began_at = began_at or time.monotonic()
                    paper.piece(news.text)
                    if on_token is not None:
                        on_token.set()
                case TaskResult(state="done"):
                    if not attempt:
                        paper.piece(news.text)
                    speed = news.n_tokens / news.service_s if news.service_s else 0.0
                    first = f", first token after {seconds_text(news.ttft_s)}" if news.ttft_s else ""
                    paper.end(f"{news.node}: {news.n_tokens} tokens, {speed:.1f} tokens/s{first}")
                    return _Answer(news.node, news.attempt, news.n_tokens)
                case TaskResult():
                    raise TaskError(f"the question ended as {news.state}: {news.reason}")
                case TaskStatus(state="running", node=node):
                    paper.aside(f"{node} answers: ")
                case TaskStatus():
                    pass
    raise TaskError("the question was not answered")


async def _teach(settings: Settings, paper: _Paper) -> None:
    """Train a small classifier on top of the model, then ask it about sentences it has not seen."""
    shutil.rmtree(StateDir(settings.state_dir).adapters_dir / ADAPTER, ignore_errors=True)
    lines = [{"text": text, "label": label} for label, texts in LESSONS.items() for text in texts]
    spec = TuneSpec(
        adapter=ADAPTER,
        task="classify",
        data="\n".join(map(json.dumps, lines)),
        top_layers=2,
        epochs=5,
        batch=5,
    )
    result = await _end_of(settings, paper, Submit(kind="tune", tune=spec, id=new_task_id(SystemRandom())))
    assert result.output is not None and result.output.adapter is not None, (
        "a done tuning task has its adapter"
    )
    paper.line(f"{result.node}  {card_words(result.output.adapter)}, after {seconds_text(result.service_s)}")
    request = Submit(kind="classify", texts=list(EXAM), adapter=ADAPTER, id=new_task_id(SystemRandom()))
    output = (await _end_of(settings, paper, request)).output
    assert output is not None, "a done classify task has its output"
    for text, label, scores in zip(EXAM, output.labels, output.scores, strict=True):
        paper.line(f"“{text}”  is about  {label}  ({max(scores):.0%} sure)")


async def _end_of(settings: Settings, paper: _Paper, request: Submit) -> TaskResult:
    """The result of a task, which is done; what a tuning task says on its way is passed on now and then."""
    said = ""
    async with connected(settings, StateDir(settings.state_dir), TASK_ROWS, task=request.id) as client:
        async for news in submit(client, request):
            match news:
                case TaskProgress(fraction=fraction):
                    words = f"{news.phase} {news.epoch}"
                    if words != said:
                        said = words
                        paper.line(f"{bar(fraction, 12)} {fraction:4.0%}  {progress_words(news)}")
                case TaskResult(state="done"):
                    return news
                case TaskResult() | TaskStatus(state="rejected"):
                    raise TaskError(f"the {request.kind} task ended as {news.state}: {news.reason}")
                case _:
                    pass
    raise TaskError(f"the {request.kind} task was not answered")


async def _pull_the_plug(mesh: LocalMesh, settings: Settings, paper: _Paper) -> None:
    names = {node.id: node for node in mesh.running}
    coordinator = names[await _coordinator(mesh)]
    marks = {node: len(node.events) for node in mesh.running if node is not coordinator}
    began = asyncio.Event()
    asking = asyncio.create_task(_ask(settings, paper, LONG_QUESTION, 120, began))
    await asyncio.wait({asking, asyncio.create_task(began.wait())}, return_when=asyncio.FIRST_COMPLETED)
    killed_at = time.monotonic()
    await coordinator.kill()
    paper.end(f"kill -9 {coordinator.pid}   ({coordinator.id} is gone)", goes_on=True)
    answer = await asking
    successor, elected = await _first_elected(marks)
    paper.line(
        f"{successor} coordinates {seconds_text(elected['monotonic_s'] - killed_at)} after the kill "
        f"(epoch {elected['epoch']}); the answer came from {answer.node}, attempt {answer.attempt}"
    )


async def _coordinator(mesh: LocalMesh) -> NodeId:
    """The last one any node has named."""
    last: tuple[float, str] = (0.0, "")
    for node in mesh.running:
        for event in node.events:
            if event["event"] == "elected":
                last = max(last, (event["monotonic_s"], str(node.id)))
    return NodeId(last[1])


async def _first_elected(marks: dict[NodeProcess, int]) -> tuple[NodeId, Event]:
    """Which survivor took over, and the event that says so (one machine: its clock is ours)."""
    waiting = {
        asyncio.create_task(node.wait_for("elected", 20.0, after=mark)): node for node, mark in marks.items()
    }
    done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    winner = done.pop()
    return waiting[winner].id, winner.result()
