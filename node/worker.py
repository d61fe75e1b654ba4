"""Keeps a compute process alive and translates between its frames and the node's facts.

    StartAttempt, StopAttempt, PauseAttempt, ResumeAttempt ──▶ Run, Stop, Pause, Resume ─▷ child
    child ─▷ Loading, Ready ──▶ activity, EngineReady          Adapters ──▶ AdaptersChanged
             Text, Progress, Ended ──▶ AttemptText, AttemptProgress, AttemptFinished
             Rates ──▶ RatesMeasured

    absent ──start──▶ loading ──Ready──▶ ready ──exit──▶ absent, and again after a pause
                         └──LoadFailed, exit──▶ absent (for good if trying again cannot help)

Every attempt handed in gets exactly one ``AttemptFinished``: if the process ends first, a failure that
says ``retry``, because the task is not to blame. Pauses grow with every quick end and carry jitter, so
that nodes which ran out of memory together do not come back together.

Where deadlines are missed again and again and another weight format would be faster, the process is started
anew between two tasks, to load that one (``--precision`` pins a format).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from coordinator.facts import (
    NODE_STOPS,
    AdaptersChanged,
    AttemptFinished,
    AttemptProgress,
    AttemptText,
    EngineLost,
    EngineReady,
    FeaturesArrived,
    FeaturesNeeded,
    FeaturesProfiled,
    PauseAttempt,
    RatesMeasured,
    ResumeAttempt,
    StartAttempt,
    StopAttempt,
)
from mesh.core import Fact
from mesh.errors import ConfigError, DecodeError
from mesh.ids import TaskId
from mesh.messages import Assign, Outcome, TaskProgress
from node.compute.backbone.precision import choose_here
from node.compute.messages import (
    CODEC,
    LENGTH_BYTES,
    Adapters,
    Ended,
    FeaturesGiven,
    Load,
    LoadFailed,
    Loading,
    NeedFeatures,
    Pause,
    Profiled,
    Progress,
    Rates,
    Ready,
    Resume,
    Run,
    Stop,
    Text,
    frame,
    frame_size,
)
from node.compute.models import resolve
from node.hurry import Hurry
from node.logs import say
from node.settings import Settings
from node.state import StateDir

__all__ = ["ComputeWorker", "load_of", "pause_s"]

log = logging.getLogger(__name__)

# -P: a file that lies in the operator's working directory must not be imported.
COMMAND = (sys.executable, "-P", "-m", "node.compute")

# A life shorter than this after loading counts as a quick end.
_STEADY_S = 60.0
_QUICK_ENDS_MAX = 5
_PAUSE_S_FIRST = 0.5
_PAUSE_S_LONG = 300.0  # after so many quick ends something is wrong that time may mend but haste will not

_EXIT_S = 2.0  # the child leaves at once when its input ends; if not, it hangs and is killed
_RATE_WINDOW_S = 5.0
_LOG_LINE_BYTES = 4096
_PRESSING = 0.25  # of recent deadlines missed: then a few seconds of loading are worth a faster format
_UNBOUNDED = 1 << 62
_LAST_WORDS = 5  # lines of the child's complaint repeated in the reason of its end


@dataclass(frozen=True, slots=True)
class _End:
    reason: str
    is_permanent: bool = False
    was_steady: bool = False


class ComputeWorker:
    """The shell around one compute process, which is told to ``load``.

    ``learn`` takes facts; it must not call back at once. ``serve_link`` serves the node's end of the link
    over which a child reads from the mesh, made anew for each (see ``node.cache.link``). ``prepare`` is
    awaited before each start, and says how far it is as ``Loading`` does.
    """

    def __init__(
        self,
        load: Load,
        *,
        learn: Callable[[Fact], None],
        rng: Random | None = None,
        command: Sequence[str] = COMMAND,
        serve_link: Callable[[socket.socket], Coroutine[Any, Any, None]] | None = None,
        prepare: Callable[[Callable[[str, float | None], None]], Awaitable[None]] | None = None,
    ) -> None:
        self._prepare = prepare
        self._serve_link = serve_link
        self._load = load
        self._learn = learn
        self._rng = rng or Random()
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None
        self._ready: Ready | None = None
        self._running: dict[tuple[TaskId, int], Assign] = {}
        self._started_at: dict[tuple[TaskId, int], float] = {}
        self._hurry = Hurry()
        self._is_changing = False
        self._progress: dict[TaskId, TaskProgress] = {}  # of tuning attempts that run
        self._spoken: deque[tuple[float, int]] = deque()  # (when, tokens) of the last _RATE_WINDOW_S
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()
        self._over.set()
        self.activity = "starting the compute process"
        """What it does, in words for the status screen; ``idle`` or the number of tasks once ready."""

    @property
    def is_ready(self) -> bool:
        return self._ready is not None

    @property
    def weights_sha256(self) -> str:
        """Of what is loaded; empty before it is, and where there are no weights."""
        return self._ready.digest if self._ready else ""

    @property
    def device(self) -> str | None:
        """``cpu``, ``cuda`` or ``mps``; ``None`` before the child has looked."""
        return self._ready.device if self._ready else None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def tokens_per_s(self) -> float:
        """Over the last seconds, all attempts together."""
        now = time.monotonic()
        while self._spoken and self._spoken[0][0] < now - _RATE_WINDOW_S:
            self._spoken.popleft()
        if not self._spoken:
            return 0.0
        return sum(n for _, n in self._spoken) / max(1.0, now - self._spoken[0][0])

    def carry_out(
        self, fact: StartAttempt | StopAttempt | PauseAttempt | ResumeAttempt | FeaturesArrived
    ) -> None:
        """Pass an order on. Without a loaded model an attempt fails at once, to be tried elsewhere."""
        match fact:
            case StartAttempt(assign=assign):
                if self._ready is None:
                    self._finish(assign, _lost(assign, f"no model is loaded: {self.activity}"))
                    return
                self._running[assign.task, assign.attempt] = assign
                self._started_at[assign.task, assign.attempt] = time.monotonic()
                self._say(
                    Run(
                        task=assign.task,
                        attempt=assign.attempt,
                        submit=assign.submit,
                        budget_s=assign.budget_s,
                    )
                )
            case StopAttempt(task=task, attempt=attempt, reason=reason):
                if (task, attempt) in self._running:
                    self._say(Stop(task=task, attempt=attempt, reason=reason))
            case PauseAttempt(task=task, attempt=attempt):
                self._say(Pause(task=task, attempt=attempt))
            case ResumeAttempt(task=task, attempt=attempt):
                self._say(Resume(task=task, attempt=attempt))
            case FeaturesArrived(task=task, attempt=attempt) if (task, attempt) in self._running:
                self._say(
                    FeaturesGiven(
                        task=task,
                        attempt=attempt,
                        round=fact.round,
                        made=fact.made,
                        reason=fact.reason,
                    )
                )
        self._describe()

    async def run(self) -> None:
        """Keep a child alive until cancelled, or until ``stop``."""
        quick_ends = 0
        while not self._stopping.is_set():
            if self._prepare is not None:
                await self._prepare(self._show_loading)
                if self._stopping.is_set():
                    return
            self._over.clear()
            try:
                end = await self._live()
            finally:
                self._lose_all(NODE_STOPS)
                self._over.set()
            if self._stopping.is_set():
                return
            if self._is_changing:
                self._is_changing = False
                continue
            quick_ends = 0 if end.was_steady else quick_ends + 1
            if end.is_permanent:
                self.activity = f"cannot compute: {end.reason}"[:200]
                log.error("compute will not be tried again: %s", end.reason)
                return
            wait_s = pause_s(quick_ends, self._rng)
            self.activity = f"compute ended ({end.reason}); again in {wait_s:.0f} s"[:200]
            log.warning(
                "compute ended %d times in a row: %s; again in %.1f s", quick_ends, end.reason, wait_s
            )
            await asyncio.sleep(wait_s)

    async def stop(self) -> None:
        """End the child; what it ran is handed back before this returns."""
        self._stopping.set()
        self.activity = "stopping"
        self._lose_all(NODE_STOPS)
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(_EXIT_S):
                await self._over.wait()
        except TimeoutError:
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await self._over.wait()

    # ── one life of the child ───────────────────────────────────────────────────────────────────────

    async def _live(self) -> _End:
        self._last_words.clear()
        self.activity = "starting the compute process"
        ours, theirs = self._link_ends()
        link_fd = theirs.fileno() if theirs is not None else None
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LOG_LINE_BYTES * 16,
                env={**os.environ, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"},
                pass_fds=() if link_fd is None else (link_fd,),
            )
        except OSError as error:  # no memory or no process to be had now: the node lives on without
            if ours is not None:
                ours.close()
            unborn = f"it could not be started: {error}"
            self._learn(EngineLost(unborn))
            return _End(unborn)
        finally:
            if theirs is not None:
                theirs.close()  # the child has it
        self._process = process
        ready_at: float | None = None
        failed: LoadFailed | None = None
        listening = [asyncio.create_task(self._log_lines(process), name="worker.log")]
        if ours is not None and self._serve_link is not None:
            listening.append(asyncio.create_task(self._serve_link(ours), name="worker.link"))
        reason: str | None = None
        try:
            self._say(replace(self._load, link_fd=link_fd))
            assert process.stdin is not None and process.stdout is not None
            if self._stopping.is_set():  # while the process was being made
                process.stdin.close()
            while (message := await _next(process.stdout)) is not None:
                if isinstance(message, Ready):
                    ready_at = time.monotonic()
                elif isinstance(message, LoadFailed):
                    failed = message
                self._on(message)
        except DecodeError as error:
            reason = f"it sent what is no message ({error})"
        finally:
            code = await _end(process)
            for task in listening:
                task.cancel()
            self._process = None
        if self._stopping.is_set():
            reason = NODE_STOPS
        reason = failed.reason if failed else reason or _obituary(code, self._last_words)
        self._lose_all(reason)
        self._learn(EngineLost(reason))
        return _End(
            reason,
            is_permanent=failed is not None and failed.is_permanent,
            was_steady=ready_at is not None and time.monotonic() - ready_at > _STEADY_S,
        )

    def _link_ends(self) -> tuple[socket.socket | None, socket.socket | None]:
        """The node's and the child's; none where descriptors cannot be passed on."""
        if self._serve_link is None or os.name != "posix":
            return None, None
        try:
            return socket.socketpair()
        except OSError as error:
            log.warning("no link to the compute process (%s): it will not read from the mesh", error)
            return None, None

    def _on(self, message: object) -> None:
        match message:
            case Loading(text=text, fraction=fraction):
                self._show_loading(text, fraction)
            case Ready():
                self._ready = message
                self._learn(
                    EngineReady(
                        model=message.model,
                        context_tokens=message.context_tokens,
                        slots=message.slots,
                        also_called=message.also_called,
                        precision=message.precision,
                        precision_reason=message.precision_reason,
                        adapters=message.adapters,
                        rates=message.rates,
                        can_pause=message.can_pause,
                        features_profile=message.features_profile,
                        top_layers=message.top_layers,
                    )
                )
            case Adapters(names=names):
                self._learn(AdaptersChanged(tuple(names)))
            case Rates(rates=rates):
                self._learn(RatesMeasured(rates))
            case NeedFeatures():
                self._learn(FeaturesNeeded(message.task, message.attempt, message.round, message.spec))
            case Profiled(profile=profile):
                self._learn(FeaturesProfiled(profile))
            case Text(task=task, attempt=attempt, text=text, n_tokens=n_tokens):
                self._spoken.append((time.monotonic(), n_tokens))
                self._learn(AttemptText(task, attempt, text, n_tokens))
            case Progress(progress=progress):
                self._progress[progress.task] = progress
                self._learn(AttemptProgress(progress))
            case Ended():
                self._progress.pop(message.task, None)
                assign = self._running.pop((message.task, message.attempt), None)
                if assign is not None:
                    started_at = self._started_at.pop((message.task, message.attempt))
                    self._hurry.saw(assign.budget_s, time.monotonic() - started_at)
                    self._finish(assign, _outcome(assign, message))
                    self._change_if_pressed()
        self._describe()

    def _show_loading(self, text: str, fraction: float | None) -> None:
        activity = text if fraction is None else f"{text} ({fraction:.0%})"
        if activity != self.activity:
            self.activity = activity
            say(log, "loading", activity)

    async def _log_lines(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # longer than the stream's limit: no line for people
                continue
            if not line:
                return
            text = line[:_LOG_LINE_BYTES].decode(errors="replace").rstrip()
            if text:
                self._last_words.append(text)
                log.info("compute: %s", text)

    # ── pieces ──────────────────────────────────────────────────────────────────────────────────────

    def _say(self, message: object) -> None:
        """Not awaited: the child's slots bound what is buffered here, and a dead child reads nothing."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._process.stdin.write(frame(message))

    def _change_if_pressed(self) -> None:
        """Between two tasks: have another weight format loaded if deadlines ask for it."""
        pressure = self._hurry.pressure
        is_due = pressure >= _PRESSING and self._load.precision == "auto" and not self._running
        if not is_due or self._ready is None or self._ready.top_layers is not None:
            return
        self._hurry.forget()  # looked at, whatever comes of it
        try:
            source = resolve(self._load.model)
            home = Path(self._load.models_dir) / source.slug
            weights = source.path if source.kind == "directory" and source.path is not None else home
            on_cpu = self._ready.device == "cpu"
            # The child's memory comes back before the next one loads.
            choice = choose_here(weights, home, "auto", _UNBOUNDED, on_cpu=on_cpu, deadline_pressure=pressure)
        except (OSError, ValueError, ConfigError):  # no weights, as echo, or the child's to complain of
            return
        if choice.precision in (None, self._ready.precision):
            return
        log.info("%.0f %% of recent deadlines were missed: changing to %s", 100 * pressure, choice.precision)
        self._load = replace(self._load, deadline_pressure=pressure)
        self._is_changing = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _finish(self, assign: Assign, outcome: Outcome) -> None:
        self._learn(AttemptFinished(assign.task, assign.attempt, outcome))

    def _lose_all(self, reason: str) -> None:
        """Every running attempt fails, to be tried elsewhere; the engine is gone."""
        self._ready = None
        self._progress.clear()
        running, self._running = self._running, {}
        self._started_at.clear()
        for assign in running.values():
            self._finish(assign, _lost(assign, reason))

    def _describe(self) -> None:
        if self._ready is not None:
            n = len(self._running)
            self.activity = "idle" if n == 0 else f"{n} task{'s' if n != 1 else ''}"
            if self._progress:
                furthest = max(self._progress.values(), key=lambda progress: progress.fraction)
                self.activity += f", tuning {furthest.fraction:.0%}"


def load_of(model: str, settings: Settings, state: StateDir, maps_dir: Path | None = None) -> Load:
    """What a node with these settings tells its compute process. ``maps_dir``: of this node's packs."""
    return Load(
        model=model,
        models_dir=str(state.models_dir),
        adapters_dir=str(state.adapters_dir),
        datasets_dir=str(state.datasets_dir),
        features_dir=str(state.features_dir),
        maps_dir=str(maps_dir) if maps_dir is not None else "",
        precision=settings.precision,
        threads=settings.threads,
        adapter_bytes=settings.adapter_memory,
        feature_memory_bytes=settings.feature_memory,
        feature_disk_bytes=settings.feature_disk,
        slowdown=settings.slowdown,
        hold=settings.hold,
        top_layers=settings.top_layers,
    )


def pause_s(quick_ends: int, rng: Random) -> float:
    """Seconds to wait after so many quick ends in a row: doubling, then long, the upper half by chance."""
    longest_s = _PAUSE_S_LONG if quick_ends >= _QUICK_ENDS_MAX else _PAUSE_S_FIRST * 2**quick_ends
    return longest_s * rng.uniform(0.5, 1.0)


async def _next(stream: asyncio.StreamReader) -> object | None:
    """The child's next message; ``None`` when it has closed its output.

    Raises:
        DecodeError: These bytes are no frame.
    """
    try:
        size = frame_size(await stream.readexactly(LENGTH_BYTES))
        return CODEC.decode(await stream.readexactly(size))  # type: ignore[no-any-return]
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None


async def _end(process: asyncio.subprocess.Process) -> int:
    """Close the child's input, which it obeys; kill it if it does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_EXIT_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise


def _obituary(code: int, last_words: Sequence[str]) -> str:
    if code == -signal.SIGKILL:
        return "the system killed it (most likely out of memory)"
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    words = f": {last_words[-1]}" if last_words else ""
    return f"exit code {code}{words}"[:300]


def _lost(assign: Assign, reason: str) -> Outcome:
    return Outcome(
        state="failed",
        text="",
        finish_reason=None,
        reason=reason,
        node=None,
        attempt=assign.attempt,
        epoch=assign.epoch,
        retry=True,
    )


def _outcome(assign: Assign, ended: Ended) -> Outcome:
    """``node`` is the worker core's to fill in."""
    return Outcome(
        state=ended.state,
        text=ended.text,
        finish_reason=ended.finish_reason,
        reason=ended.reason,
        node=None,
        attempt=assign.attempt,
        epoch=assign.epoch,
        n_prompt_tokens=ended.n_prompt_tokens,
        n_tokens=ended.n_tokens,
        ttft_s=ended.ttft_s,
        service_s=ended.service_s,
        output=ended.output,
        retry=ended.state == "failed",
    )
