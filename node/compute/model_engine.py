"""Answers, scores, classes, vectors and adapters from a real model: all that runs shares every pass.

One step is one forward pass. In it every running answer gets its next token, and prompts and texts that
are still being read get a piece further (Sarathi's chunked prefill, arXiv 2308.16369): a long prompt delays
the others' tokens by a bounded time instead of by its length, and a cancellation is seen between two steps.
Rows of different adapters, and rows that only join at an adapter's first layer, go through the same pass.
Tuning takes chunks of a few tenths of a second between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch

from mesh.errors import ConfigError
from node.compute.adapters.card import read_card
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.contract import Backbone, Segment
from node.compute.backbone.deltas import Adapter
from node.compute.backbone.llama import LlamaBackbone
from node.compute.engine import Event, refusal, refused
from node.compute.messages import Ended, FeaturesGiven, Pause, Resume, Run, Stop
from node.compute.serve.answers import Answer
from node.compute.serve.lines import LongWork
from node.compute.serve.prefixes import PREFIX_BYTES, Prefixes, kept_rows
from node.compute.serve.sequences import Sequence
from node.compute.serve.shared_prefixes import LateError, SharedPrefixes
from node.compute.serve.texts import Texts
from node.compute.serve.tokens import Tokens
from node.compute.serve.tuning import Begin, MakeJob
from node.compute.threads import ThreadChoice

__all__ = ["PROMPT_PIECE_TOKENS", "ModelEngine", "Tokens"]

# One step reads the weights once for all rows in it; 16 answers come four to ten times as fast as one alone,
# and beyond that each answer gets noticeably slower.
SLOTS = 16

# What all open sequences together may hold, in contexts: states of four full contexts of SmolLM2 are 1.5 GB.
_CONTEXTS_OPEN = 4

# About 0.2 s of work on two cores for a model of 135 M weights.
PROMPT_PIECE_TOKENS = 256

# What a pass takes beside its rows, in rows: makes long and short pieces comparable (within a third).
_ROWS_OF_A_STEP = 16

# With answers being asked for all the time, tuning that stands back, or meets somebody who waits for a first
# token, still gets a chunk of a quarter second this often.
_TUNING_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class _Pick:
    """Part of a pass."""

    attempt: Answer | Texts
    sequence: Sequence
    segment: Segment


class ModelEngine:
    """See ``node.compute.engine.Engine``. ``names`` are all names this model answers to, its own first.

    ``shelf``: the adapters, ``None`` for a model that is served without (``why_plain`` says why).
    ``make_job``: starts a tuning task, ``None`` where none can run; ``make_features`` one that only makes
    feature maps. ``prefix_bytes``: memory for what was
    read and may come again; 0 = none. ``share``: makes what fetches prefixes from other nodes and publishes
    ours; ``None``: neither is done.
    """

    slots = SLOTS

    def __init__(
        self,
        names: Several[str],
        backbone: Backbone,
        tokens: Tokens,
        threads_max: int = 1,
        clock: Callable[[], float] = time.monotonic,
        *,
        shelf: Shelf | None = None,
        make_job: MakeJob | None = None,
        make_features: Begin | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        why_plain: str = "",
        share: Callable[[Prefixes], SharedPrefixes] | None = None,
    ) -> None:
        self.model = names[0]
        self.names = tuple(names)
        self._backbone = backbone
        self._tokens = tokens
        most = threads_max if backbone.device == "cpu" else 1
        # A row of a prompt and a token of an answer do not become slow in the same way beside a neighbour.
        self._writing_threads, self._reading_threads = ThreadChoice(most), ThreadChoice(most)
        self._clock = clock
        self._shelf = shelf
        self._why_plain = why_plain or f"{self.model!r} is served without adapters here; ask another node"
        self._long = LongWork(make_job, make_features, clock)
        self._tuned_at = float("-inf")
        self._chunk_s = 0.0  # what the last chunk of tuning took
        self._attempts: dict[tuple[str, int], Answer | Texts] = {}
        # Out of sight: no part in a step, no slot. The worker core pauses one at a time, which bounds memory.
        self._paused: dict[tuple[str, int], Answer] = {}
        self.prefixes: Prefixes | None = None
        self.shared: SharedPrefixes | None = None
        if isinstance(backbone, LlamaBackbone):
            self.prefixes = Prefixes(backbone, prefix_bytes)
            self.shared = share(self.prefixes) if share is not None else None
            self._expect_cuts()

    @property
    def context_tokens(self) -> int:
        return self._backbone.context_tokens

    @property
    def device(self) -> str:
        return self._backbone.device

    @property
    def due_s(self) -> float | None:
        return 0.0 if self._n_running or (self.shared is not None and self.shared.has_work) else None

    @property
    def _n_running(self) -> int:
        return len(self._attempts) + len(self._long)

    def adapters(self) -> tuple[str, ...]:
        """Look at the shelf again, and name what is there."""
        if self._shelf is None:
            return ()
        if self._shelf.refresh():
            self._expect_cuts()
        return tuple(self._shelf.names())

    # ── attempts ────────────────────────────────────────────────────────────────────────────────────

    def start(self, run: Run) -> list[Event]:
        submit = run.submit
        if self._shelf is None and submit.adapter is not None:
            return [refused(run, f"no adapter {submit.adapter!r}: {self._why_plain}")]
        names = self._shelf.names() if self._shelf is not None else []
        if submit.adapter is not None and submit.adapter not in names:
            names = list(self.adapters())  # it may have come a moment ago
        refuse = refusal(run, self.names, self._n_running >= self.slots, names)
        if refuse is not None:
            return [refuse]
        if submit.kind in ("tune", "features"):
            if not self._long.takes(submit.kind):
                return [refused(run, f"nothing can be tuned here: {self._why_plain}")]
            return self._long.start(run)
        adapter: Adapter | None = None
        if submit.adapter is not None:
            assert self._shelf is not None
            try:
                adapter = self._shelf.pin(submit.adapter)
            except ConfigError as error:
                # This node's copy is damaged or finds no room now; another node may do it.
                return [Ended(task=run.task, attempt=run.attempt, state="failed", reason=str(error))]
            self._expect_cuts(adapter.first_layer)
        try:
            attempt = self._attempt(run, adapter)
        except ValueError as error:
            self._unpin(adapter)
            return [refused(run, str(error))]
        self._attempts[run.task, run.attempt] = attempt
        return []

    def _attempt(self, run: Run, adapter: Adapter | None) -> Answer | Texts:
        """Raises:
        ValueError: The task cannot be done as asked.
        """
        submit = run.submit
        if submit.kind != "generate":
            return Texts(run, adapter, self._tokens, self._backbone, self._clock)
        ids = self._tokens.encode(submit, completes=adapter is not None and adapter.completes)
        if len(ids) + submit.max_tokens > self.context_tokens:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_tokens is {submit.max_tokens}; "
                f"together the model takes at most {self.context_tokens}"
            )
        return Answer(run, ids, adapter, self._tokens, self._clock)

    def pause(self, pause: Pause) -> None:
        """What it has written and its states stay where they are; it goes on with its next token."""
        key = (pause.task, pause.attempt)
        attempt = self._attempts.get(key)
        if not isinstance(attempt, Answer):
            return
        for sequence in attempt.sequences:
            # Others that begin alike wait for who is reading. It reads again later, from what was kept.
            if sequence.is_open and sequence.is_reading:
                self._close(sequence)
        self._paused[key] = attempt
        del self._attempts[key]

    def resume(self, resume: Resume) -> None:
        key = (resume.task, resume.attempt)
        if key in self._paused:
            self._attempts[key] = self._paused.pop(key)

    def stop(self, stop: Stop) -> list[Event]:
        self.resume(Resume(task=stop.task, attempt=stop.attempt))
        attempt = self._attempts.get((stop.task, stop.attempt))
        if attempt is not None:
            return self._ended(attempt, attempt.cancel(stop.reason))
        return self._long.stop(stop)

    def give(self, given: FeaturesGiven) -> list[Event]:
        return []  # it makes what it needs

    def _ended(self, attempt: Answer | Texts, events: list[Event]) -> list[Event]:
        for sequence in attempt.sequences:
            if sequence.is_open:
                self._close(sequence)
            if self.shared is not None:
                self.shared.forget(sequence)
        del self._attempts[attempt.run.task, attempt.run.attempt]
        self._unpin(attempt.adapter)
        return events

    def _unpin(self, adapter: Adapter | None) -> None:
        if adapter is not None and self._shelf is not None:
            self._shelf.unpin(adapter)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[Event]:
        if self._long.is_due(is_alone=not self._attempts) and self._is_tunings_turn():
            return self._tune()
        if self.shared is not None:
            self._share(self.shared)
        picks = list(self._picks())
        if not picks:
            return self._idle()
        segments = [pick.segment for pick in picks]
        is_writing = all(len(segment.ids) == 1 for segment in segments)
        choice = self._writing_threads if is_writing else self._reading_threads
        if self.device == "cpu" and torch.get_num_threads() != choice.threads:
            torch.set_num_threads(choice.threads)
        before, used_before = time.perf_counter(), time.process_time()
        readings = [pick.sequence.reading for pick in picks]
        cuts = self.prefixes.keep_at(r for r in readings if r is not None) if self.prefixes else ()
        gate = self.shared.gate(pick.sequence for pick in picks) if self.shared is not None else None
        try:
            found = (
                self._backbone.forward(segments, keep_at=cuts)
                if gate is None
                else self._backbone.forward(segments, keep_at=cuts, before_layer=gate)
            )
        except LateError:
            for pick in picks:
                if pick.sequence.reading is not None and not pick.sequence.reading.is_whole:
                    self._close(pick.sequence)  # it opens again, and reads what has not come
            return []
        n_rows = sum(len(segment.ids) for segment in segments)
        # Not by the engine's clock, which goes slower on a node that plays a slower one.
        took_s = time.perf_counter() - before
        could_s = took_s * choice.threads
        share = (time.process_time() - used_before) / could_s if could_s > 0 else 1.0
        if gate is None:
            choice.saw(took_s / (1 if is_writing else n_rows + _ROWS_OF_A_STEP), share)
            if self.shared is not None and n_rows >= PROMPT_PIECE_TOKENS // 2:
                self.shared.saw_pass(n_rows, took_s)
        if self.prefixes is not None and cuts:
            enters, sizes = [s.enters for s in segments], [len(s.ids) for s in segments]
            for at, pick in enumerate(picks):
                kept = kept_rows(found.kept, enters, sizes, at)
                pick.sequence.keep(self.prefixes, pick.segment, kept)
        return self._take(picks, found.rows)

    def _take(self, picks: Several[_Pick], rows: torch.Tensor) -> list[Event]:
        """Give the rows of a pass to whom they belong."""
        ends, end = [], 0
        for pick in picks:
            end += pick.segment.n_wanted
            ends.append(end)
        events: list[Event] = []
        answers = [
            (pick, ends[at] - 1)
            for at, pick in enumerate(picks)
            if isinstance(pick.attempt, Answer) and pick.segment.n_wanted
        ]
        if answers:
            places = [row for _, row in answers]
            mine = rows if places == list(range(len(rows))) else rows[places]
            logits = self._backbone.logits(mine, [pick.segment.adapter for pick, _ in answers])
            for (pick, _), its in zip(answers, logits, strict=True):
                assert isinstance(pick.attempt, Answer)
                if self.shared is not None and pick.sequence.n_given == len(pick.sequence.ids):
                    self.shared.read(pick.sequence, pick.sequence.shared_ids)
                events += self._said(pick, pick.attempt.take(its))
        for at, pick in enumerate(picks):
            if isinstance(pick.attempt, Texts):
                said = pick.attempt.take(pick.sequence, rows[ends[at] - pick.segment.n_wanted : ends[at]])
                if not pick.sequence.n_left:
                    self._close(pick.sequence)
                events += self._said(pick, said)
        return events

    def _said(self, pick: _Pick, events: list[Event]) -> list[Event]:
        is_over = bool(events) and isinstance(events[-1], Ended)
        return self._ended(pick.attempt, events) if is_over else events

    def _picks(self) -> Iterator[_Pick]:
        """The next token of every answer being written, and pieces of what is being read, in turns."""
        n_layers, n_left = self._backbone.n_layers, PROMPT_PIECE_TOKENS
        reading = []
        for key, attempt in self._attempts.items():
            first = attempt.sequences[0]
            if isinstance(attempt, Answer) and not first.is_reading:
                yield _Pick(attempt, first, first.segment(1, n_layers)[0])
            else:
                reading.append(key)
        for key in reading:
            if n_left <= 0:
                return
            attempt = self._attempts[key] = self._attempts.pop(key)  # next time the others come first
            for sequence in attempt.sequences:
                if n_left <= 0:
                    return
                if not sequence.is_open and not self._open(sequence):
                    break
                if self.shared is not None and not self.shared.may_go_on(sequence, is_alone=self._is_alone):
                    break
                segment, n_rows = sequence.segment(n_left, n_layers)
                n_left -= n_rows
                yield _Pick(attempt, sequence, segment)

    def _open(self, sequence: Sequence) -> bool:
        taken = sum(
            other.capacity
            for attempt in self._attempts.values()
            for other in attempt.sequences
            if other.is_open
        )
        if taken and taken + sequence.capacity > _CONTEXTS_OPEN * self.context_tokens:
            return False  # when somebody has ended
        if self.shared is None:
            return sequence.open(self._backbone, self.prefixes)
        look = self.shared.look(sequence, is_alone=self._is_alone)
        if look.waits or not sequence.open(self._backbone, self.prefixes, look.early):
            return False
        self.shared.opened(sequence)
        return True

    # ── prefixes of other nodes ─────────────────────────────────────────────────────────────────────

    @property
    def _is_alone(self) -> bool:
        """Nobody waits while a pass waits for states."""
        return self._n_running == 1 and all(len(a.sequences) == 1 for a in self._attempts.values())

    def _share(self, shared: SharedPrefixes) -> None:
        shared.step(is_busy=bool(self._attempts))
        for attempt in self._attempts.values():
            for sequence in attempt.sequences:
                if sequence.reading is not None and sequence.reading.is_broken:
                    self._close(sequence)  # it opens again, and reads what has not come

    def _idle(self) -> list[Event]:
        """Whoever is here waits for something to come."""
        if self._long.is_due(is_alone=True):
            return self._tune()
        if self.shared is not None and self._attempts:
            self.shared.wait()
        return []

    def _close(self, sequence: Sequence) -> None:
        if self.shared is not None:
            self.shared.read(sequence, sequence.shared_ids)
        sequence.close(self.prefixes)

    # ── tuning and adapters ─────────────────────────────────────────────────────────────────────────

    def _is_tunings_turn(self) -> bool:
        """Whoever waits for a first token comes before, and everybody before tuning that has time; otherwise
        decoding and tuning take as much time as each other."""
        if not self._attempts:
            return True
        waited_s = self._clock() - self._tuned_at
        is_read = any(sequence.is_reading for a in self._attempts.values() for sequence in a.sequences[:1])
        return waited_s >= (_TUNING_EVERY_S if is_read or self._long.stands_back else self._chunk_s)

    def _tune(self) -> list[Event]:
        began_at = self._clock()
        events = self._long.step()
        self._tuned_at = self._clock()
        self._chunk_s = self._tuned_at - began_at
        if any(isinstance(event, Ended) and event.output is not None for event in events):
            self.adapters()  # served from now on
        return events

    def _expect_cuts(self, *more: int) -> None:
        """Tell the prefixes at which layers adapters begin."""
        if self.prefixes is None or self._shelf is None:
            return
        cuts = {*more, *self.prefixes.cuts}
        if more and cuts == set(self.prefixes.cuts):
            return
        for name in self._shelf.names():
            try:
                card = read_card(self._shelf.directory / name)
            except ConfigError:
                continue  # it is refused, with the reason, when it is asked for
            if card is not None:
                cuts.add(card.first_layer)
        if self.shared is not None:
            cuts |= self.shared.levels(cuts)
        self.prefixes.expect(cuts)
