"""The compute process: ``python -m node.compute``. Loads one model and runs attempts until told to end.

It is a process of its own so that nothing in it reaches the node: not a forward pass of seconds, not
four seconds of importing torch under the interpreter's lock, not the kernel killing it for memory (see
``docs/adr/0007-compute-in-a-child-process.md``). It speaks ``node.compute.messages`` over its standard
input and output; whatever else prints goes to standard error.

It ends when its input ends, and on Linux the kernel kills it with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from mesh.errors import ConfigError, DecodeError, UnreachableError
from mesh.messages import NodeRates
from mesh.units import bytes_text
from node.compute.backbone.precision import (
    AROUND_BYTES,
    PRECISIONS,
    choose_here,
    read_speeds,
)
from node.compute.echo import EchoEngine
from node.compute.engine import Engine, Event
from node.compute.features.link import MeshLink
from node.compute.lean import leave_out_unused
from node.compute.messages import (
    Adapters,
    Ended,
    FeaturesGiven,
    Load,
    LoadFailed,
    Loading,
    Pause,
    Profiled,
    Rates,
    Ready,
    Resume,
    Run,
    Stop,
    frame,
    read_frame,
)
from node.compute.models import CATALOGUE, Progress, Source, echo_rate, prepare, resolve
from node.compute.outbox import Outbox
from node.compute.pace import Pace
from node.compute.rate_watch import Measure, RateWatch
from node.compute.rates import RatedAs, echo_rates, guessed_rates, read_rates, slowed
from node.profile import memory_free_bytes, physical_cores

__all__ = ["main"]

Say = Callable[[object], None]

# Reading a GGUF holds the weights twice for a moment (measured: 1.55 GB for 0.54 GB of weights).
CONVERT_FACTOR = 2

ADAPTERS_EVERY_S = 2.0  # a listing of a directory; whoever puts an adapter there waits no longer for it

_OOM_SCORE = "800"  # of 1000: when memory runs out, the kernel takes this process and not the node
_NICE = 5  # heartbeats first: the node needs microseconds, and needs them now
_PR_SET_PDEATHSIG = 1


class _NoMemoryError(Exception):
    """The model does not fit now; it may later."""


def main() -> int:
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not write into the frames

    def say(message: object) -> None:
        out.write(frame(message))

    _stand_back()
    # Not bounded here: the node sends at most what its slots and the operator's stops amount to.
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), name="compute.listen", daemon=True).start()
    load = inbox.get()
    if not isinstance(load, Load):
        raise DecodeError(f"the first message must be Load, got {type(load).__name__}")
    pace = Pace(load.slowdown)
    link = MeshLink.of(load.link_fd) if load.link_fd is not None else None
    try:
        loaded = _load(load, say, pace, link)
    except ConfigError as error:
        say(LoadFailed(reason=str(error), is_permanent=True))
        return 1
    except (UnreachableError, _NoMemoryError, OSError) as error:
        say(LoadFailed(reason=str(error), is_permanent=False))
        return 1
    engine = loaded.engine
    adapters = _AdapterWatch(loaded.adapters, say)
    rates = RateWatch(
        loaded.rates,
        lambda better: say(Rates(rates=slowed(better, load.slowdown))),
        home=loaded.home,
        rated_as=loaded.rated_as,
        measure=loaded.measure,
    )
    say(
        Ready(
            model=engine.model,
            context_tokens=engine.context_tokens,
            slots=engine.slots,
            device=engine.device,
            digest=loaded.digest,
            precision=loaded.precision,
            precision_reason=loaded.precision_reason,
            adapters=adapters.names,
            also_called=tuple(name for name in engine.names[1:] if name != engine.model),
            rates=slowed(loaded.rates, load.slowdown),
            can_pause=True,
            features_profile=loaded.features_profile,
            top_layers=loaded.top_layers,
        )
    )
    _serve(engine, adapters, rates, pace, inbox, say)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    engine: Engine
    digest: str
    """Of the weights; of nothing for ``echo``."""
    rates: NodeRates
    """As far as known without measuring now, without any slowdown."""
    precision: str = ""
    precision_reason: str = ""
    adapters: Callable[[], tuple[str, ...]] = tuple
    """Looks at the adapters' directory and names those that can be served."""
    home: Path | None = None
    rated_as: RatedAs | None = None
    measure: Measure | None = None
    """``None``: there is nothing to measure, or it was measured at an earlier start."""
    features_profile: str | None = None
    """As far as known without computing now."""
    top_layers: int | None = None
    """``None``: all layers are loaded."""


class _AdapterWatch:
    """Tells the node when the adapters have changed: somebody put one there, or tuning ended."""

    def __init__(self, look: Callable[[], tuple[str, ...]], say: Say) -> None:
        self._look = look
        self._say = say
        self.names = look()
        self._due_at = time.monotonic() + ADAPTERS_EVERY_S

    @property
    def due_s(self) -> float:
        return max(0.0, self._due_at - time.monotonic())

    def look(self) -> None:
        self._due_at = time.monotonic() + ADAPTERS_EVERY_S
        if (names := self._look()) != self.names:
            self.names = names
            self._say(Adapters(names=list(names)))


def _serve(
    engine: Engine, adapters: _AdapterWatch, rates: RateWatch, pace: Pace, inbox: SimpleQueue[Any], say: Say
) -> None:
    outbox = Outbox(say)
    held: list[Event] = []  # of a step that is not over yet on the device we play
    while True:
        is_idle = engine.due_s is None and not held
        work_s = pace.rest_s or (0.0 if held else engine.due_s)
        at = (work_s, outbox.due_s, adapters.due_s, rates.due_s if is_idle else None)
        events: list[Event] = []
        for message in _waiting(inbox, min(due for due in at if due is not None)):
            match message:
                case Run():
                    events += engine.start(message)
                case Stop():  # what the attempt had said before comes before its end
                    events, held = [*events, *held, *engine.stop(message)], []
                case Pause():
                    engine.pause(message)
                case Resume():
                    engine.resume(message)
                case FeaturesGiven():
                    events += engine.give(message)
        if not pace.rest_s:
            events, held = [*events, *held], []
            if engine.due_s == 0:
                with pace.working():
                    held = engine.step()
                if not pace.rest_s:
                    events, held = [*events, *held], []
        if engine.due_s is not None or held:
            rates.interrupt()
        elif rates.due_s == 0:
            rates.step()
        for event in events:
            if isinstance(event, Ended) and event.output is not None and event.output.adapter is not None:
                adapters.look()  # before anybody hears that it is there and asks for it
            outbox.take(event)
        outbox.flush()
        if adapters.due_s == 0:
            adapters.look()


def _waiting(inbox: SimpleQueue[Any], wait_s: float | None) -> list[Any]:
    """All messages there are, after waiting at most ``wait_s`` for the first (``None``: for ever)."""
    messages = []
    with contextlib.suppress(Empty):
        if wait_s != 0:
            messages.append(inbox.get(timeout=wait_s))
        while True:
            messages.append(inbox.get_nowait())
    return messages


def _listen(inbox: SimpleQueue[Any]) -> None:
    while (message := read_frame(sys.stdin.buffer)) is not None:
        inbox.put(message)
    # The node is gone or wants us gone. Nothing here needs saving, and the main thread may be deep in
    # a matrix product or an import: leave without asking it.
    os._exit(0)


def _load(load: Load, say: Say, pace: Pace, link: MeshLink | None) -> _Loaded:
    """The engine, and what the node says of it.

    Raises:
        ConfigError, UnreachableError, _NoMemoryError, OSError: With a sentence for the operator.
    """
    source = resolve(load.model)
    if source.kind == "echo":
        echo = EchoEngine(load.model, pace.clock, load.slowdown)
        return _Loaded(engine=echo, digest="", rates=echo_rates(echo_rate(load.model)))

    def progress(text: str, fraction: float | None) -> None:
        say(Loading(text=text, fraction=fraction))

    directory, manifest = prepare(source, Path(load.models_dir), _convert, progress)
    home = Path(load.models_dir) / source.slug
    why_top = _why_top(load, directory, home)  # what cannot fit is refused before seconds of importing
    progress(f"loading {source.display}", 0.0)

    leave_out_unused()
    import torch
    from transformers import AutoConfig

    from node.compute.assembly import FeatureMemory, measurement, model_engine
    from node.compute.backbone.llama import LlamaBackbone
    from node.compute.backbone.load import best_device, load_backbone
    from node.compute.backbone.speed import measured_speeds
    from node.compute.features.proof import Proof

    threads = load.threads or physical_cores()
    torch.set_num_threads(threads)
    progress(f"loading {source.display}", 0.4)
    device = best_device()
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if why_top is not None:
        if load.hold == "auto" and not LlamaBackbone.can_run(config):
            raise _NoMemoryError(why_top)
        return _load_top(
            load, source, directory, manifest.weights_sha256, device, threads, pace, link, why_top
        )
    formats = PRECISIONS if LlamaBackbone.can_run(config) else ("fp32", "bf16", "fp16")
    if load.precision == "auto" and formats == PRECISIONS and not read_speeds(home):
        progress("measuring weight formats on this device, once", None)
        measured_speeds(directory, home)
    precision, reason = _choose(load, directory, home, on_cpu=device == "cpu", formats=formats)
    backbone = load_backbone(directory, device, precision)
    progress(f"loading {source.display}", 0.9)
    names = tuple(dict.fromkeys((source.name, source.display)))  # a path is nobody's business
    digest = manifest.weights_sha256
    rated_as = RatedAs(digest=digest, precision=backbone.precision, device=device, threads=threads)
    kept = read_rates(home, rated_as)
    can_tune = LlamaBackbone.can_run(config)
    speed = read_speeds(home).get(precision)
    rates = kept or guessed_rates(backbone.weight_bytes, backbone.n_layers, can_tune, speed)
    proof = Proof(
        backbone,
        threads,
        home=home,
        rated_as=rated_as,
        on_proven=lambda profile: say(Profiled(profile=profile)),
    )
    memory = FeatureMemory(load, backbone, threads, link=link, rates=rates, proof=proof)
    engine = model_engine(load, names, directory, digest, backbone, threads, pace.clock, memory=memory)
    return _Loaded(
        engine=engine,
        digest=digest,
        precision=backbone.precision,
        precision_reason=reason,
        adapters=engine.adapters,
        rates=rates,
        home=home,
        rated_as=rated_as,
        measure=None if kept else measurement(directory, digest, backbone, threads),
        features_profile=proof.profile,
    )


def _why_top(load: Load, directory: Path, home: Path) -> str | None:
    """Why only the top layers are to be loaded; ``None``: all are.

    Raises:
        _NoMemoryError: All shall be loaded, and there is no room for them.
        ConfigError: See ``_choose``.
    """
    if load.hold == "top":
        return "the operator asked for it (--hold top)"
    try:
        _choose(load, directory, home)
    except _NoMemoryError as error:
        if load.hold == "all" or load.precision != "auto":
            raise
        return str(error)
    return None


def _load_top(
    load: Load,
    source: Source,
    directory: Path,
    digest: str,
    device: str,
    threads: int,
    pace: Pace,
    link: MeshLink | None,
    why: str,
) -> _Loaded:
    """Raises: ConfigError, _NoMemoryError."""
    from node.compute.top_assembly import top_engine, top_rates
    from node.compute.tune.top_model import read_config, top_bytes

    config = read_config(directory)
    layers = min(load.top_layers, config.num_hidden_layers)
    needed_bytes = top_bytes(config, layers, "classify") + AROUND_BYTES
    _check_memory(f"loading the top {layers} layers of {source.display}", needed_bytes)
    names = tuple(dict.fromkeys((source.name, source.display)))
    engine = top_engine(load, names, directory, digest, device, threads, pace.clock, link=link)
    return _Loaded(
        engine=engine,
        digest=digest,
        precision_reason=f"the top {layers} of {config.num_hidden_layers} layers only: {why}",
        adapters=engine.adapters,
        rates=top_rates(config, layers),
        top_layers=layers,
    )


def _choose(
    load: Load, directory: Path, home: Path, *, on_cpu: bool = True, formats: Sequence[str] = PRECISIONS
) -> tuple[str, str]:
    """The format of the weights, and why.

    Raises:
        _NoMemoryError: None that may be chosen fits into memory now; the text has the numbers.
        ConfigError: The operator's format is not there for this model.
    """
    if load.precision not in ("auto", *formats):
        raise ConfigError(
            f"no {load.precision} weights for this kind of model: choose one of {', '.join(formats)}"
        )
    choice = choose_here(
        directory,
        home,
        load.precision,
        memory_free_bytes(),
        formats=formats,
        on_cpu=on_cpu,
        deadline_pressure=load.deadline_pressure,
    )
    if choice.precision is None:
        raise _NoMemoryError(f"loading {directory.name}: {choice.reason}")
    return choice.precision, choice.reason


def _convert(source: Source, gguf: Path | None, into: Path, progress: Progress) -> None:
    if source.name in CATALOGUE:
        weight_bytes = CATALOGUE[source.name].weight_bytes
        _check_memory(f"converting {source.display}", CONVERT_FACTOR * weight_bytes + AROUND_BYTES)
    progress(f"converting {source.display}", 0.0)
    from node.compute.convert import convert

    convert(source, gguf, into, progress)


def _check_memory(what: str, needed_bytes: int) -> None:
    free_bytes = memory_free_bytes()
    if needed_bytes > free_bytes:
        raise _NoMemoryError(
            f"{what} needs {bytes_text(needed_bytes)}, {bytes_text(free_bytes)} free: close other programs, "
            "choose a smaller model, or run this node with --no-compute"
        )


def _stand_back() -> None:
    """Give way to the node in every respect, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to handle; it ends our input
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # /proc may be read-only in a container
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
