"""What clients ask, and what coordinator, holders and workers tell one another about it.

A task's way through the mesh (``h`` = durable there before the next arrow):

    client ──Submit──▶ coordinator ──Hold──▶ holder h ──Held──▶ coordinator h ──TaskStatus(queued)──▶ client
    coordinator ──Assign──▶ worker ──TaskTokens, TaskProgress──▶ client
    worker h ──AttemptEnded──▶ coordinator h ──TaskResult──▶ client, ──Hold(outcome)──▶ holder h
    coordinator ──OutcomeTaken──▶ worker

``TaskStatus(queued)`` is the acknowledgement. Everything here is repeated until answered, and every
receiver takes a repetition for what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mesh.ids import Epoch, NodeId, TaskId
from mesh.messages.checks import check_count, check_id, check_positive, check_seconds, check_text
from mesh.messages.features import FeaturesSpec
from mesh.messages.output import TEXTS_MAX, Output
from mesh.messages.tune import TuneSpec

__all__ = [
    "Assign",
    "AttemptEnded",
    "AttemptId",
    "AttemptsRunning",
    "CancelAttempt",
    "CancelTask",
    "ChatMessage",
    "Held",
    "Hold",
    "Inventory",
    "Outcome",
    "OutcomeTaken",
    "Recall",
    "Refused",
    "StaleCommand",
    "Submit",
    "TaskEvent",
    "TaskForgotten",
    "TaskKind",
    "TaskRecord",
    "TaskReply",
    "TaskResult",
    "TaskState",
    "TaskStatus",
    "TaskTokens",
    "Unacceptable",
]

TaskState = Literal["queued", "assigned", "running", "done", "failed", "rejected", "expired", "cancelled"]
TERMINAL_STATES = frozenset({"done", "failed", "rejected", "expired", "cancelled"})

PROMPT_BYTES_MAX = 256 * 1024  # 64 k tokens of English: twice the longest context we serve
ANSWER_BYTES_MAX = 192 * 1024  # 32 k tokens of English; with its prompt it still fits one frame (mesh.wire)
STOP_STRINGS_MAX = 16
TaskKind = Literal["generate", "score", "classify", "embed", "tune", "features"]
MAX_TOKENS_MAX = 32_768


# ── what clients say ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """One task; ``kind`` says what is done with which fields.

    ========  ==========================================================================================
    generate  goes on from ``prompt`` or ``messages``
    score     log-probabilities of ``texts`` after ``prompt`` or ``messages``, or of themselves
    classify  the label of each of ``texts`` by the classifier that ``adapter`` names
    embed     a unit vector for each of ``texts``
    tune      trains the adapter that ``tune`` describes
    features  makes the feature maps that a task with this ``tune`` or these ``texts`` is going to read
    ========  ==========================================================================================

    ``id`` is an idempotency key: the same body under the same id is the same task, however often it
    arrives. ``deadline_s`` counts from arrival at the coordinator and applies to completion.
    ``value`` is what an answer in time is worth, in the submitter's own unit.
    """

    prompt: str | None = None
    messages: list[ChatMessage] = field(default_factory=list)
    id: TaskId | None = None
    kind: TaskKind = "generate"
    texts: list[str] = field(default_factory=list)
    tune: TuneSpec | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    deadline_s: float | None = None
    value: float = 1.0
    adapter: str | None = None
    model: str | None = None
    stream: bool = True
    reply_to: str | None = None
    """A topic for acknowledgement and result; MQTT 5 clients set the response topic instead."""
    correlation: str | None = None
    """Comes back with every reply (MQTT 5 correlation data, as text or hexadecimal)."""
    features: FeaturesSpec | None = None
    """features: which; may be left out where ``tune`` says it all."""

    def __post_init__(self) -> None:
        if self.id is not None:
            check_id("id", self.id)
        self._check_kind()
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty: say what the model shall answer")
        if self.messages and not any(message.content.strip() for message in self.messages):
            raise ValueError("messages are empty: at least one needs content")
        check_text("prompt", self.prompt, PROMPT_BYTES_MAX)
        check_text("messages", "".join(message.content for message in self.messages), PROMPT_BYTES_MAX)
        if self.kind == "score" and self.n_text_bytes > PROMPT_BYTES_MAX:
            raise ValueError(f"prompt, messages and texts together must be at most {PROMPT_BYTES_MAX} bytes")
        if len(self.messages) > 1024:
            raise ValueError("at most 1024 messages")
        check_count("max_tokens", self.max_tokens, MAX_TOKENS_MAX, least=1)
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature must be from 0 (greedy) to 10, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None:
            check_count("seed", self.seed)
        if len(self.stop) > STOP_STRINGS_MAX or any(not 0 < len(text) <= 256 for text in self.stop):
            raise ValueError(f"stop takes at most {STOP_STRINGS_MAX} strings of 1 to 256 characters")
        check_positive("deadline_s", self.deadline_s)
        check_positive("value", self.value)
        for name in ("adapter", "model"):
            text = getattr(self, name)
            if text is not None and not 0 < len(text) <= 200:
                raise ValueError(f"{name} must be 1 to 200 characters")
        check_text("correlation", self.correlation, 1024)
        if self.reply_to is not None and not _is_plain_topic(self.reply_to):
            raise ValueError(
                "reply_to must be a plain topic of at most 512 bytes, with no + or #, not starting with $"
            )

    @property
    def n_text_bytes(self) -> int:
        """UTF-8 bytes of all that is to be computed on; what is left of a submission is small."""
        tune = self.tune
        texts = [self.prompt or "", *(message.content for message in self.messages), *self.texts]
        texts += [tune.data or "", tune.eval_data or ""] if tune is not None else []
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    def _check_kind(self) -> None:
        """Each kind has its inputs, and no others: a field that would be ignored is a mistake."""
        has_prompt, has_messages = self.prompt is not None, bool(self.messages)
        if has_prompt and has_messages:
            raise ValueError("give either 'prompt' (a string) or 'messages' (a list), and not both")
        if self.kind == "generate" and not (has_prompt or has_messages):
            raise ValueError("give either 'prompt' (a string) or 'messages' (a list), and not both")
        if self.kind == "features":
            self._check_features(has_prompt or has_messages)
        elif self.features is not None:
            raise ValueError("'features' needs kind 'features'")
        if self.kind in ("classify", "embed", "tune") and (has_prompt or has_messages):
            inputs = "'tune'" if self.kind == "tune" else "'texts'"
            raise ValueError(f"a {self.kind} task takes {inputs}, not 'prompt' or 'messages'")
        wants_texts = self.kind in ("score", "classify", "embed")
        if self.kind != "features" and wants_texts != bool(self.texts):
            raise ValueError(
                f"a {self.kind} task needs 'texts' (a list of strings)"
                if wants_texts
                else f"a {self.kind} task takes no 'texts'"
            )
        if len(self.texts) > TEXTS_MAX or any(not text.strip() for text in self.texts):
            raise ValueError(f"texts takes 1 to {TEXTS_MAX} strings that are not empty")
        check_text("texts", "".join(self.texts), PROMPT_BYTES_MAX)
        if self.kind != "features" and (self.kind == "tune") != (self.tune is not None):
            raise ValueError(
                "a tune task needs 'tune': what to train"
                if self.kind == "tune"
                else "'tune' needs kind 'tune'"
            )
        if self.kind == "classify" and self.adapter is None:
            raise ValueError("a classify task needs 'adapter', a classifier made by a tune task")
        if self.kind == "tune" and self.adapter is not None:
            raise ValueError("a tune task names its adapter in 'tune', not in 'adapter'")

    def _check_features(self, has_words: bool) -> None:
        """Records, or texts and how they are read; no adapter changes feature maps below its first layer."""
        reads = self.features.reads if self.features is not None else "tune"
        if (reads == "tune") != (self.tune is not None) or (self.tune is not None) == bool(self.texts):
            raise ValueError(
                "a features task needs 'tune' (what is going to be trained), or 'texts' and in 'features' "
                "which kind of task reads them"
            )
        if has_words and reads != "score":
            raise ValueError("only texts to score are read after 'prompt' or 'messages'")
        if self.adapter is not None:
            raise ValueError("a features task takes no 'adapter': feature maps are the same for all")


def _is_plain_topic(topic: str) -> bool:
    is_sized = 0 < len(topic.encode("utf-8", "surrogatepass")) <= 512
    return is_sized and topic[0] != "$" and not any(character in topic for character in "+#\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unacceptable:
    """A submission that could not be read; made by the shell so that the core can answer it."""

    reason: str
    id: TaskId | None
    reply_to: str | None
    correlation: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTask:
    """A client wants the task ended; the task's id is in the topic."""

    task: TaskId

    def __post_init__(self) -> None:
        check_id("task", self.task)


# ── what clients hear ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """Retained for a bounded time. ``queued`` is the acknowledgement: the task is durable."""

    task: TaskId
    state: TaskState
    reason: str | None
    """Why it ended so; of a queued task why no node could start it when it was accepted."""
    node: NodeId | None
    """Where it runs or ran."""
    attempt: int
    epoch: Epoch
    durable_on: int
    """How many nodes hold the task on disk."""
    kind: str = "generate"
    value: float = 1.0
    budget_s: float | None = None
    """Seconds left to the deadline when this was sent."""

    @property
    def is_final(self) -> bool:
        return self.state in TERMINAL_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTokens:
    """A piece of the answer while it is made. QoS 0: pieces may be lost, the result is complete.

    ``seq`` counts from 0 within one attempt; a new ``attempt`` starts the text over.
    """

    task: TaskId
    attempt: int
    seq: int
    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The complete answer, or why there is none. Sent once per terminal state; never needs the stream."""

    task: TaskId
    state: TaskState
    text: str
    finish_reason: str | None
    """``stop`` (end of text or a stop string), ``length`` (max_tokens), else ``None``."""
    reason: str | None
    node: NodeId | None
    attempt: int
    epoch: Epoch
    n_prompt_tokens: int
    n_tokens: int
    queue_s: float
    ttft_s: float | None
    """From the start of the attempt to its first token."""
    service_s: float
    output: Output | None = None
    """What a kind other than ``generate`` gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReply:
    """A status or a result again, for a client that named its own topic."""

    reply_to: str
    correlation: str | None
    body: TaskStatus | TaskResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvent:
    """A line for people: the mesh's event log, bounded and not retained."""

    text: str
    task: TaskId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForgotten:
    """Clears the task's retained topics: nothing about a task stays in the broker for ever."""

    task: TaskId


# ── what is durable ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a task, or one attempt of it, ended. The first one settled is the task's for ever."""

    state: TaskState
    text: str
    finish_reason: str | None
    reason: str | None
    node: NodeId | None
    attempt: int
    epoch: Epoch
    """The epoch whose coordinator assigned the attempt, or settled the task without one."""
    n_prompt_tokens: int = 0
    n_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float | None = None
    service_s: float = 0.0
    retry: bool = False
    """A failure of this node rather than of the task: try elsewhere (never set in a settled outcome)."""
    output: Output | None = None
    """What a kind other than ``generate`` gives; ``text`` says it for people."""

    def __post_init__(self) -> None:
        if self.state not in TERMINAL_STATES:
            raise ValueError(f"an outcome is final, {self.state!r} is not")

    @property
    def n_bytes(self) -> int:
        """About what it takes on disk; what is left of an outcome is small."""
        return len(self.text.encode("utf-8", "surrogatepass")) + (self.output.n_bytes if self.output else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord:
    """What a coordinator and a holder keep on disk about a task: enough to carry it on elsewhere."""

    task: TaskId
    submit: Submit
    digest: str
    """Of the body, to tell a repetition from another task under the same id."""
    budget_s: float | None
    """Seconds left to the deadline when this was written; a restart counts on from here."""
    outcome: Outcome | None
    epoch: Epoch
    """Of the coordinator that last wrote the record."""
    age_s: float = 0.0
    """Seconds since the task was accepted, when this was written; a restart counts on from here."""
    settled_s: float = 0.0
    """Seconds since the outcome was settled, when this was written; 0 while open."""

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_seconds("budget_s", self.budget_s)
        check_seconds("age_s", self.age_s)
        check_seconds("settled_s", self.settled_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptId:
    task: TaskId
    attempt: int
    epoch: Epoch

    def __post_init__(self) -> None:
        check_id("task", self.task)
        check_count("attempt", self.attempt, 1000, least=1)


# ── between coordinator, holders and workers (msgpack) ──────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Keep this record on disk, replacing an older one, and say so."""

    epoch: Epoch
    record: TaskRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The record is on this node's disk. ``settled`` tells which version of it."""

    epoch: Epoch
    task: TaskId
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """A new coordinator asks a node for every record it holds and every attempt it runs."""

    epoch: Epoch
    round: int = 0
    """Comes back in the answer: parts of two answers do not make a whole one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Part of the answer to ``Recall``; ``is_last`` closes it. Split by size, see ``mesh.wire``."""

    epoch: Epoch
    records: list[TaskRecord]
    running: list[AttemptId]
    ended: list[AttemptEnded]
    is_last: bool
    round: int = 0
    """Of the ``Recall`` this answers."""
    part: int = 0
    """Counts from 0, so that a lost part is noticed and the node is asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Run one attempt. ``budget_s`` is what is left of the deadline, ``None`` without one."""

    epoch: Epoch
    task: TaskId
    attempt: int
    submit: Submit
    budget_s: float | None
    queue_s: float = 0.0
    """How long the task waited before this; the worker puts it into the outcome, which is then complete
    whoever settles it."""
    pauses: TaskId | None = None
    """May start though all slots are taken: the attempt of this task, which runs on the same node, stands
    still between two tokens until a slot is free. Only for a node whose info says ``can_pause``."""

    def __post_init__(self) -> None:
        check_id("task", self.task)
        if self.pauses is not None:
            check_id("pauses", self.pauses)
        check_count("attempt", self.attempt, 1000, least=1)
        check_seconds("budget_s", self.budget_s)
        check_seconds("queue_s", self.queue_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The worker does not take the attempt (full, draining, model missing): place it elsewhere."""

    attempt: AttemptId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptsRunning:
    """What this worker runs now; sent at every start and about once a second."""

    attempts: list[AttemptId]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """The attempt's outcome, durable on the worker; repeated until ``OutcomeTaken``."""

    task: TaskId
    attempt: int
    epoch: Epoch
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeTaken:
    """The coordinator has the task's end on two disks: the worker may forget the attempt."""

    epoch: Epoch
    task: TaskId
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAttempt:
    """Stop between two tokens; what was made so far is the outcome's text."""

    epoch: Epoch
    task: TaskId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StaleCommand:
    """To a sender whose command carried an epoch that is over: you are not the coordinator any more."""

    seen: Epoch
