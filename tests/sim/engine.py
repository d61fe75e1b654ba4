"""The part of a simulated process around its cores: reports once a second, and an engine that takes time.

Every attempt answers with a text of its own, so that two answers to one task can be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from coordinator.facts import (
    AttemptFinished,
    AttemptProgress,
    AttemptText,
    DrainChanged,
    EngineLost,
    EngineReady,
    PauseAttempt,
    ResumeAttempt,
    StartAttempt,
    StopAttempt,
)
from mesh.core import Fact
from mesh.facts import OwnInfo, OwnReport
from mesh.messages import AdapterCard, Assign, NodeInfo, NodeRates, NodeReport, Outcome, Output, TaskProgress
from tests.sim.world import Life

__all__ = ["MODEL", "EngineShell", "info_of"]

MODEL = "toy"
CONTEXT_TOKENS = 4096
REPORT_EVERY_S = 1.0
# Near enough to the mean time of an attempt: 256 tokens are expected where nothing else is known.
RATES = NodeRates(
    prefill_tokens_per_s=1e4,
    decode_tokens_per_s=256.0,
    row_cost=0.5,
    tune_tokens_per_s=100.0,
    features_tokens_per_s=1e4,
)
ENGINE_AGAIN_S = 1.0


def info_of(node: str, slots: int = 0, cache_bytes: int = 0) -> NodeInfo:
    return NodeInfo(
        node=node,  # type: ignore[arg-type]
        incarnation=0,
        hostname=node,
        version="0",
        protocol_min=1,
        protocol_max=1,
        addresses=[node],
        port=1,
        system="sim",
        device="cpu",
        n_cpus=1,
        memory_bytes=2**30,
        model=MODEL,
        adapters=[],
        slots=slots,
        context_tokens=CONTEXT_TOKENS if slots else None,
        can_pause=bool(slots),
        rates=RATES,
        cache_bytes=cache_bytes,
    )


@dataclass(slots=True)
class _Engine:
    slots: int
    is_ready: bool = False
    is_draining: bool = False
    running: dict[tuple[str, int], Assign] = field(default_factory=dict)
    paused: dict[tuple[str, int], bool] = field(default_factory=dict)
    """Of those that run, the ones that stand still -> whether they would have ended meanwhile."""


class EngineShell:
    """Every life gets an engine; ``service_s`` is the mean time of an attempt."""

    def __init__(self, seed: int | str, *, service_s: float = 1.0, failure_p: float = 0.0) -> None:
        self._rng = Random(f"engine/{seed}")
        self._service_s = service_s
        self._failure_p = failure_p
        self._engines: dict[str, _Engine] = {}  # by boot
        self.slots_max = 3
        self.quotas: Mapping[str, int] = {}
        """What nodes give to the mesh's memory, in bytes: nothing, unless a world says so."""

    def on_start(self, life: Life) -> None:
        self._engines[life.boot] = _Engine(slots=self._rng.randint(1, self.slots_max))
        life.world.queue.after(self._rng.uniform(0.1, 2.0), self._load, life)
        self._report(life)

    def on_end(self, life: Life) -> None:
        self._engines.pop(life.boot, None)

    def lose(self, life: Life) -> None:
        """The compute process dies; a new one is ready a little later."""
        engine = self._engines[life.boot]
        if engine.is_ready:
            engine.is_ready = False
            engine.running.clear()
            engine.paused.clear()
            life.world.note("engine lost", life)
            life.learn(EngineLost("killed"))
            life.world.queue.after(ENGINE_AGAIN_S, self._load, life)

    def on_fact(self, life: Life, fact: Fact) -> None:
        engine = self._engines.get(life.boot)
        if engine is None:
            return
        match fact:
            case StartAttempt() if not engine.is_ready:
                pass  # ordered before the core heard of the loss, which fails it in a moment
            case StartAttempt(assign=assign):
                engine.running[assign.task, assign.attempt] = assign
                n_computing = len(engine.running) - len(engine.paused)
                assert n_computing <= engine.slots, f"{n_computing} at once in {engine.slots} slots"
                service_s = self._rng.expovariate(1.0) * self._service_s
                life.world.queue.after(service_s * 0.5, self._text, life, assign)
                life.world.queue.after(service_s, self._finish, life, assign, "done")
            case StopAttempt(task=task, attempt=attempt):
                stopped = engine.running.get((task, attempt))
                if stopped is not None:
                    life.world.queue.after(
                        self._rng.uniform(0, 0.2), self._finish, life, stopped, "cancelled"
                    )
            case PauseAttempt(task=task, attempt=attempt):
                assert not engine.paused, "one stands still at a time"
                if (task, attempt) in engine.running:
                    engine.paused[task, attempt] = False
                    life.world.note("paused", life)
            case ResumeAttempt(task=task, attempt=attempt):
                if engine.paused.pop((task, attempt), False):
                    self._finish(life, engine.running[task, attempt], "done")
            case DrainChanged(draining=draining):
                engine.is_draining = draining
            case _:
                pass

    def _load(self, life: Life) -> None:
        engine = self._engines.get(life.boot)
        if engine is None or not life.is_alive:
            return
        engine.is_ready = True
        life.learn(EngineReady(MODEL, CONTEXT_TOKENS, engine.slots, can_pause=True))
        life.learn(OwnInfo(info_of(life.name, engine.slots, self.quotas.get(life.name, 0))))

    def _report(self, life: Life) -> None:
        engine = self._engines.get(life.boot)
        if engine is None or not life.is_alive:
            return
        if not life.is_stopped():
            life.learn(OwnReport(_report_of(life.name, engine)))
        life.world.queue.after(REPORT_EVERY_S, self._report, life)

    def _text(self, life: Life, assign: Assign) -> None:
        if not self._is_running(life, assign):
            return
        if assign.submit.kind == "tune":
            at = TaskProgress(task=assign.task, attempt=assign.attempt, seq=0, phase="training", fraction=0.5)
            life.learn(AttemptProgress(at))
        else:
            life.learn(AttemptText(assign.task, assign.attempt, "...", 1))

    def _finish(self, life: Life, assign: Assign, state: Any) -> None:
        if not self._is_running(life, assign):
            return
        engine, key = self._engines[life.boot], (assign.task, assign.attempt)
        if state == "done" and key in engine.paused:
            engine.paused[key] = True
            return
        engine.paused.pop(key, None)
        del engine.running[key]
        outcome = Outcome(
            state=state,
            text=f"{assign.task} by {life.name}/{life.boot} as {assign.attempt}",
            finish_reason="stop" if state == "done" else None,
            reason=None if state == "done" else "stopped",
            node=life.host.node,
            attempt=assign.attempt,
            epoch=assign.epoch,
            n_tokens=1,
            queue_s=assign.queue_s,
            service_s=self._service_s,
            output=_trained(assign, life.boot) if state == "done" and assign.submit.kind == "tune" else None,
        )
        if state == "done" and self._rng.random() < self._failure_p:
            outcome = replace(
                outcome, state="failed", text="", finish_reason=None, reason="out of memory", retry=True
            )
        life.learn(AttemptFinished(assign.task, assign.attempt, outcome))

    def _is_running(self, life: Life, assign: Assign) -> bool:
        engine = self._engines.get(life.boot)
        return (
            life.is_alive
            and engine is not None
            and engine.running.get((assign.task, assign.attempt)) == assign
        )


def _trained(assign: Assign, boot: str) -> Output:
    assert assign.submit.tune is not None
    name, digest = assign.submit.tune.adapter, f"{boot}/{assign.attempt}"
    card = AdapterCard(
        name=name, digest=digest, method="lora", top_layers=1, first_layer=3, bytes=9, task="classify"
    )
    return Output(adapter=card)


def _report_of(node: str, engine: _Engine) -> NodeReport:
    return NodeReport(
        node=node,  # type: ignore[arg-type]
        incarnation=0,
        ready=engine.is_ready and not engine.is_draining,
        activity="idle",
        running=len(engine.running),
        cpu_percent=0.0,
        memory_free_bytes=2**30,
        rss_bytes=2**20,
        tokens_per_s=0.0,
    )
