"""The engine of a node that holds the top layers of its model only: it tunes, scores, classifies and embeds.

                 ┌── known profiles ──▶ reading ──all there──▶ computing ──▶ Ended
    Run ─────────┤                        │
                 │        ┌──missing──────┘
                 │        ▼
                 └──▶ asking ──NeedFeatures──▷ node ─▷ … ─▷ FeaturesGiven ──▶ settling ──▶ reading

*Reading*: feature maps at the cut come from the mesh, in the numerics of the nodes that made them; one
attempt never mixes two. *Asking*: some are nowhere, and a node that holds all layers is asked to make them.
*Settling*: it has, and a moment later the catalogue says so. Whoever waits takes no part in a step: other
attempts go on. Answers are not written here, as each token would have to go through the layers below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch

from mesh.errors import ConfigError
from mesh.messages import FeaturesHeld, FeaturesSpec
from mesh.messages.features import FEATURE_ROUNDS_MAX
from node.compute.adapters.card import read_card
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.contract import Backbone, Segment
from node.compute.backbone.deltas import Adapter
from node.compute.engine import Event, refusal, refused
from node.compute.features.maps import FeatureMaps, MissingFeaturesError, Reading
from node.compute.messages import Ended, FeaturesGiven, NeedFeatures, Pause, Progress, Resume, Run, Stop
from node.compute.serve.fed import FedSequence
from node.compute.serve.texts import Texts
from node.compute.serve.tokens import Tokens
from node.compute.serve.tuning import Job, Tuning
from node.compute.top_backbone import TopBackbone
from node.compute.tune.job import Snapshot

__all__ = ["NEEDS_WHOLE", "TopEngine", "TopParts"]

NEEDS_WHOLE = "needs a node that holds the whole model; this one holds its top {n} layers"

SLOTS = 16
_PIECE_ROWS = 512
# The catalogue tells of new maps about a second after they are on disk.
_LOOK_EVERY_S = 0.25
_SETTLE_S = 8.0
_PROFILES_MAX = 8
"""Tried before anybody is asked: a mesh has a few kinds of devices."""


class TopParts(Protocol):
    """What the engine is made of besides the model itself."""

    def profiles(self) -> Sequence[str]:
        """How nodes of the mesh compute feature maps, as far as known."""

    def claimed(self, keys: Sequence[bytes]) -> bool:
        """Whether each of ``keys`` is here, or some node says that it has it."""

    def maps(self, profile: str, cut: int, codec: str | None, error: float, n_bytes: int) -> FeatureMaps:
        """Feature maps computed elsewhere. Raises: ConfigError."""

    def job(self, run: Run, left_s: float | None, profile: str, codec: str | None) -> Job:
        """A tuning job that reads such maps. Raises: ConfigError."""


@dataclass(slots=True)
class _Attempt:
    run: Run
    started_at: float
    spec: FeaturesSpec
    cut: int
    profile: str
    """In which features are read now; empty: nobody has said any."""
    untried: list[str]
    codec: str | None = None
    round: int = 0
    state: Literal["asking", "settling", "reading", "computing"] = "reading"
    made: FeaturesHeld | None = None
    """What was made for it last."""
    look_at: float = 0.0
    settled_by: float = 0.0
    texts: Texts | None = None
    """``None``: it tunes."""
    adapter: Adapter | None = None
    reading: Reading | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.run.task, self.run.attempt


class TopEngine:
    """See ``node.compute.engine.Engine``. ``top`` has the layers; ``names`` are all names of the model.

    ``tokens`` gives the tokenizer, which a node that only tunes does without between two jobs.
    """

    slots = SLOTS

    def __init__(
        self,
        names: Sequence[str],
        top: TopBackbone,
        tokens: Callable[[], Tokens],
        shelf: Shelf,
        parts: TopParts,
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = names[0]
        self.names = tuple(names)
        self._top = top
        self._tokens = tokens
        self._shelf = shelf
        self._parts = parts
        self._threads = threads
        self._clock = clock
        self._attempts: dict[tuple[str, int], _Attempt] = {}  # bounded by the slots
        self._tuning = Tuning(self._begin_tuning, clock, self._tuning_misses)
        self._seen: list[str] = []  # profiles that were told of, the newest first
        self._fitting: tuple[str, ...] | None = None
        self._was_tuning = False

    @property
    def context_tokens(self) -> int:
        return int(self._top.context_tokens)

    @property
    def device(self) -> str:
        return self._top.device

    @property
    def due_s(self) -> float | None:
        if len(self._tuning) or any(self._is_working(one) for one in self._attempts.values()):
            return 0.0
        looks = [one.look_at for one in self._attempts.values() if one.state == "settling"]
        return max(0.0, min(looks) - self._clock()) if looks else None

    def adapters(self) -> tuple[str, ...]:
        """Those that change nothing below the layers that are here."""
        if self._shelf.refresh() or self._fitting is None:
            names = self._shelf.names()
            self._fitting = tuple(name for name in names if self._first_layer(name) >= self._top.first_layer)
        return self._fitting

    def _first_layer(self, name: str) -> int:
        try:
            card = read_card(self._shelf.directory / name)
            return (card or self._shelf.card(name)).first_layer
        except ConfigError:
            return -1  # damaged: it is named by nobody, and refused with the reason when asked for

    # ── attempts ────────────────────────────────────────────────────────────────────────────────────

    def start(self, run: Run) -> list[Event]:
        submit = run.submit
        refuse = refusal(run, self.names, len(self._attempts) >= self.slots, self.adapters())
        if refuse is not None:
            return [refuse]
        if submit.kind in ("generate", "features"):
            return [self._elsewhere(run, f"a {submit.kind} task {NEEDS_WHOLE.format(n=self._n_held)}")]
        if submit.kind == "tune":
            return self._start_tuning(run)
        adapter: Adapter | None = None
        try:
            adapter = self._shelf.pin(submit.adapter) if submit.adapter is not None else None
            attempt = self._reads(run, adapter)
        except ConfigError as error:  # this node's copy is damaged or finds no room now
            return [self._elsewhere(run, str(error))]
        except ValueError as error:
            self._unpin(adapter)
            return [refused(run, str(error))]
        self._attempts[attempt.key] = attempt
        return self._read(attempt)

    @property
    def _n_held(self) -> int:
        return int(self._top.n_layers - self._top.first_layer)

    def _reads(self, run: Run, adapter: Adapter | None) -> _Attempt:
        """Raises:
        ValueError: The task cannot be done as asked.
        """
        cut = adapter.first_layer if adapter is not None else self._top.first_layer
        assert self._top.first_layer <= cut, "adapters that begin lower are not offered"
        cut = min(cut, self._top.n_layers - 1)  # one that changes the head alone
        texts = Texts(
            run, adapter, self._tokens(), cast(Backbone, self._top), self._clock, make_sequence=FedSequence
        )
        spec = FeaturesSpec(
            top_layers=self._top.n_layers - cut,
            reads=run.submit.kind,  # type: ignore[arg-type]
            completes=adapter is not None and adapter.completes,
            parent=run.task,
        )
        return self._attempt(run, spec, cut, texts=texts, adapter=adapter)

    def _start_tuning(self, run: Run) -> list[Event]:
        tune = run.submit.tune
        assert tune is not None, "the submission has been checked"
        top_layers = tune.top_layers or self._n_held
        if top_layers > self._n_held:
            held = f"this one holds its top {self._n_held} (--top-layers)"
            return [self._elsewhere(run, f"adapting the top {top_layers} layers needs another node: {held}")]
        run = replace(run, submit=replace(run.submit, tune=replace(tune, top_layers=top_layers)))
        spec = FeaturesSpec(top_layers=top_layers, parent=run.task)
        attempt = self._attempt(run, spec, self._top.n_layers - top_layers)
        self._attempts[attempt.key] = attempt
        return self._read(attempt)

    def _attempt(self, run: Run, spec: FeaturesSpec, cut: int, **fields: Any) -> _Attempt:
        known = list(dict.fromkeys([*self._seen, *self._parts.profiles()]))[:_PROFILES_MAX]
        return _Attempt(run, self._clock(), spec, cut, known[0] if known else "", known[1:], **fields)

    def pause(self, pause: Pause) -> None:
        """Only answers stand still for others, and none is written here."""

    def resume(self, resume: Resume) -> None:
        pass

    def stop(self, stop: Stop) -> list[Event]:
        attempt = self._attempts.get((stop.task, stop.attempt))
        if attempt is None:
            return []
        if (events := self._tuning.stop(stop)) == [] and attempt.texts is not None:
            events = attempt.texts.cancel(stop.reason)
        elif not events:
            events = [self._end(attempt, "cancelled", stop.reason)]
        self._forget(attempt)
        return events

    def _elsewhere(self, run: Run, reason: str) -> Ended:
        """This node cannot; another one may."""
        return Ended(task=run.task, attempt=run.attempt, state="failed", reason=reason)

    def _end(
        self, attempt: _Attempt, state: Literal["failed", "cancelled", "rejected"], reason: str
    ) -> Ended:
        run = attempt.run
        service_s = self._clock() - attempt.started_at
        return Ended(
            task=run.task, attempt=run.attempt, state=state, reason=reason[:2000], service_s=service_s
        )

    def _forget(self, attempt: _Attempt) -> None:
        self._attempts.pop(attempt.key, None)
        if attempt.reading is not None:
            attempt.reading.close()
        if attempt.texts is not None:
            for sequence in attempt.texts.sequences:
                sequence.close(None)
        self._unpin(attempt.adapter)

    def _unpin(self, adapter: Adapter | None) -> None:
        if adapter is not None:
            self._shelf.unpin(adapter)

    # ── feature maps ────────────────────────────────────────────────────────────────────────────────

    def _read(self, attempt: _Attempt) -> list[Event]:
        """Begin to read in the attempt's profile, or ask where none is known."""
        if not attempt.profile:
            return self._ask(attempt)
        attempt.state = "reading"
        if attempt.texts is None:
            run, spent_s = attempt.run, self._clock() - attempt.started_at
            left_s = None if run.budget_s is None else max(0.0, run.budget_s - spent_s)
            return self._tuning.start(replace(run, budget_s=left_s))
        ids = [sequence.ids for sequence in attempt.texts.sequences]
        n_bytes = 4 * self._top.width * sum(map(len, ids))
        try:
            maps = self._parts.maps(attempt.profile, attempt.cut, attempt.codec, 0.0, n_bytes)
        except ConfigError as error:
            self._forget(attempt)
            return [self._end(attempt, "failed", str(error))]
        attempt.reading = maps.reading(ids)
        return []

    def _missed(self, attempt: _Attempt, text: str) -> list[Event]:
        """Features are missing in this profile: the next one, or somebody makes them."""
        attempt.reading = None
        if attempt.untried:
            attempt.profile, attempt.codec = attempt.untried.pop(0), None
            return self._read(attempt)
        if attempt.made is not None:
            attempt.round += 1
        if attempt.round >= FEATURE_ROUNDS_MAX:
            self._forget(attempt)
            return [self._end(attempt, "failed", f"{text} (asked for {attempt.round} times)")]
        return self._ask(attempt)

    def _ask(self, attempt: _Attempt) -> list[Event]:
        run, attempt.state = attempt.run, "asking"
        need = NeedFeatures(task=run.task, attempt=run.attempt, round=attempt.round, spec=attempt.spec)
        if attempt.texts is not None:
            return [need]
        waits = Snapshot(phase="features", text="waits for feature maps that another node makes")
        return [Progress(progress=waits.message(run.task, run.attempt, attempt.round)), need]

    def give(self, given: FeaturesGiven) -> list[Event]:
        attempt = self._attempts.get((given.task, given.attempt))
        if attempt is None or attempt.state != "asking" or attempt.round != given.round:
            return []
        if given.made is None:
            self._forget(attempt)
            why = given.reason or "no reason was given"
            return [self._end(attempt, "failed", f"its feature maps are not in the mesh: {why}")]
        attempt.made, attempt.profile, attempt.codec = given.made, given.made.profile, given.made.codec
        self._seen = [attempt.profile, *(p for p in self._seen if p != attempt.profile)][:_PROFILES_MAX]
        attempt.state = "settling"
        attempt.look_at, attempt.settled_by = self._clock(), self._clock() + _SETTLE_S
        return []

    def _settle(self, attempt: _Attempt) -> list[Event]:
        assert attempt.made is not None
        keys = [bytes.fromhex(key) for key in attempt.made.sample_keys]
        if self._clock() < attempt.settled_by and not self._parts.claimed(keys):
            attempt.look_at = self._clock() + _LOOK_EVERY_S
            return []
        return self._read(attempt)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[Event]:
        now = self._clock()
        for attempt in self._attempts.values():
            if attempt.state == "settling" and attempt.look_at <= now:
                return self._settle(attempt)
        working = [attempt for attempt in self._attempts.values() if self._is_working(attempt)]
        if len(self._tuning) and not (working and self._was_tuning):
            self._was_tuning = True
            return self._tune()
        self._was_tuning = False
        if not working:
            return []
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        # Whose rows are there goes through first: another attempt may need the layers in another format.
        attempt = min(working, key=lambda one: one.state != "computing")
        self._attempts[attempt.key] = self._attempts.pop(attempt.key)  # next time the others come first
        return self._fetch(attempt) if attempt.state == "reading" else self._compute(attempt)

    @staticmethod
    def _is_working(attempt: _Attempt) -> bool:
        return attempt.texts is not None and attempt.state in ("reading", "computing")

    def _fetch(self, attempt: _Attempt) -> list[Event]:
        assert attempt.reading is not None and attempt.texts is not None
        try:
            if not attempt.reading.step():
                return []
            rows = attempt.reading.take()
            self._top.use(attempt.profile.partition(" ")[0])
        except MissingFeaturesError as error:
            return self._missed(attempt, str(error))
        except ConfigError as error:
            self._forget(attempt)
            return [self._end(attempt, "failed", str(error))]
        for sequence, its in zip(attempt.texts.sequences, rows, strict=True):
            assert isinstance(sequence, FedSequence)
            sequence.feed(its, attempt.cut)
        attempt.reading, attempt.state = None, "computing"
        return []

    def _compute(self, attempt: _Attempt) -> list[Event]:
        """One pass of the attempt's texts through the layers that are here."""
        texts, n_left = attempt.texts, _PIECE_ROWS
        assert texts is not None
        self._top.use(attempt.profile.partition(" ")[0])
        picked: list[tuple[Any, Segment]] = []
        for sequence in texts.sequences:
            if n_left <= 0:
                break
            if not sequence.is_open:
                sequence.open(self._top, None)
            segment, n = sequence.segment(n_left, self._top.n_layers)
            n_left -= n
            picked.append((sequence, segment))
        rows = self._top.forward([segment for _, segment in picked]).rows
        events: list[Event] = []
        start = 0
        for sequence, segment in picked:
            its = rows[start : start + segment.n_wanted]
            start += segment.n_wanted
            events += texts.take(sequence, its)
            if not sequence.n_left:
                sequence.close(None)
        if any(isinstance(event, Ended) for event in events):
            self._forget(attempt)
        return events

    # ── tuning ──────────────────────────────────────────────────────────────────────────────────────

    def _begin_tuning(self, run: Run, left_s: float | None) -> Job:
        attempt = self._attempts[run.task, run.attempt]
        return self._parts.job(run, left_s, attempt.profile, attempt.codec)

    def _tuning_misses(self, run: Run, since: float, text: str) -> list[Event]:
        return self._missed(self._attempts[run.task, run.attempt], text)

    def _tune(self) -> list[Event]:
        events = self._tuning.step()
        for event in events:
            if isinstance(event, Ended):
                if (attempt := self._attempts.get((event.task, event.attempt))) is not None:
                    self._forget(attempt)
                if event.output is not None:
                    self.adapters()  # served from now on
        return events
