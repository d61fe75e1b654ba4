"""Every message that crosses the network: frozen dataclasses that cannot hold a wrong value.

``node``       who is here and how it is doing
``agreement``  who coordinates
``task``       what clients ask, and what coordinator and workers tell one another about it
``explain``    why the coordinator decided as it did, and how well it foresees
``tune``       what a tuning task asks, and its progress
``output``     what tasks give besides text

Fields carry units in their names. Times on the wire are lengths (seconds left), never points on a
clock: edge devices share no clock. Checks in ``__post_init__`` are written so that NaN fails them, and
raise ``ValueError`` with a sentence for the sender; ``mesh.wire`` turns it into ``DecodeError``.
"""

from mesh.messages.agreement import EpochHint, EpochSeen, LeaseKind, LeaseRecord
from mesh.messages.explain import (
    CandidateNode,
    CostReport,
    ExplainTask,
    KindError,
    TaskDecision,
    TaskExplanation,
)
from mesh.messages.node import (
    Drain,
    NodeForgotten,
    NodeInfo,
    NodeRates,
    NodeReport,
    NodeStanding,
    NodeState,
    PeerHello,
)
from mesh.messages.output import AdapterCard, Output
from mesh.messages.task import (
    Assign,
    AttemptEnded,
    AttemptId,
    AttemptsRunning,
    CancelAttempt,
    CancelTask,
    ChatMessage,
    Held,
    Hold,
    Inventory,
    Outcome,
    OutcomeTaken,
    Recall,
    Refused,
    StaleCommand,
    Submit,
    TaskEvent,
    TaskForgotten,
    TaskKind,
    TaskRecord,
    TaskReply,
    TaskResult,
    TaskState,
    TaskStatus,
    TaskTokens,
    Unacceptable,
)
from mesh.messages.tune import TaskProgress, TuneSpec, TuneTask

__all__ = [
    "AdapterCard",
    "Assign",
    "AttemptEnded",
    "AttemptId",
    "AttemptsRunning",
    "CancelAttempt",
    "CancelTask",
    "CandidateNode",
    "ChatMessage",
    "CostReport",
    "Drain",
    "EpochHint",
    "EpochSeen",
    "ExplainTask",
    "Held",
    "Hold",
    "Inventory",
    "KindError",
    "LeaseKind",
    "LeaseRecord",
    "NodeForgotten",
    "NodeInfo",
    "NodeRates",
    "NodeReport",
    "NodeStanding",
    "NodeState",
    "Outcome",
    "OutcomeTaken",
    "Output",
    "PeerHello",
    "Recall",
    "Refused",
    "StaleCommand",
    "Submit",
    "TaskDecision",
    "TaskEvent",
    "TaskExplanation",
    "TaskForgotten",
    "TaskKind",
    "TaskProgress",
    "TaskRecord",
    "TaskReply",
    "TaskResult",
    "TaskState",
    "TaskStatus",
    "TaskTokens",
    "TuneSpec",
    "TuneTask",
    "Unacceptable",
]
