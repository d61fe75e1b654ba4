"""Every message that crosses the network: frozen dataclasses that cannot hold a wrong value.

``node``       who is here and how it is doing
``agreement``  who coordinates
``cache``      who keeps which part of the mesh's memory, and what each node holds
``task``       what clients ask, and what coordinator and workers tell one another about it
``features``   which feature maps are to be made, and that they are there
``explain``    why the coordinator decided as it did, and how well it foresees
``tune``       what a tuning task asks, and its progress
``output``     what tasks give besides text
``files``      which adapters and which backbone a node can give to others

Fields carry units in their names. Times on the wire are lengths (seconds left), never points on a
clock: edge devices share no clock. Checks in ``__post_init__`` are written so that NaN fails them, and
raise ``ValueError`` with a sentence for the sender; ``mesh.wire`` turns it into ``DecodeError``.
"""

from mesh.messages.agreement import EpochHint, EpochSeen, LeaseKind, LeaseRecord
from mesh.messages.cache import (
    CacheReport,
    CatalogueDelta,
    CatalogueVersion,
    CatalogueWhole,
    ClearShare,
    RingRecord,
)
from mesh.messages.explain import (
    CandidateNode,
    CostReport,
    ExplainTask,
    KindError,
    TaskDecision,
    TaskExplanation,
)
from mesh.messages.features import FeaturesReady, FeaturesSpec, FeaturesWanted
from mesh.messages.files import FilesHeld, PullAdapter, RemoveAdapter
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
from mesh.messages.output import AdapterCard, FeaturesHeld, Output
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
    "CacheReport",
    "CancelAttempt",
    "CancelTask",
    "CandidateNode",
    "CatalogueDelta",
    "CatalogueVersion",
    "CatalogueWhole",
    "ChatMessage",
    "ClearShare",
    "CostReport",
    "Drain",
    "EpochHint",
    "EpochSeen",
    "ExplainTask",
    "FeaturesHeld",
    "FeaturesReady",
    "FeaturesSpec",
    "FeaturesWanted",
    "FilesHeld",
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
    "PullAdapter",
    "Recall",
    "Refused",
    "RemoveAdapter",
    "RingRecord",
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
