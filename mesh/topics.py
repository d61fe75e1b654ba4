"""The topic table: a topic that is not here does not exist.

From it come the names and filters the bus uses, the broker's access list, and ``docs/protocol.md`` and
``docs/asyncapi.yaml`` (``python -m mesh.topic_docs --write``; a test checks that they are current).

Every node writes only below its own id, so the broker's access list proves who sent a message; the
exceptions are the coordinator's record and the task topics, which carry an epoch instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh import messages as m
from mesh.ids import MeshName
from mesh.transport.identity import CLIENT_COMMON_NAME

__all__ = ["BASE", "CLEARS", "TABLE", "Topic", "access_list", "topic_of"]

BASE = "edgemesh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One row. ``pattern`` is below ``edgemesh/<mesh>/``; ``{node}``, ``{to}``, ``{task}`` are ids."""

    name: str
    pattern: str
    payload: tuple[type, ...]
    encoding: Literal["json", "msgpack"]
    writer: str
    reader: str
    qos: Literal[0, 1]
    retain: bool
    why: str

    def topic(self, mesh: MeshName, **ids: str) -> str:
        return f"{BASE}/{mesh}/{self.pattern.format(**ids)}"

    def filter(self, mesh: MeshName, **ids: str) -> str:
        """Subscription filter: ids left out become ``+``."""
        wild = {"node": "+", "to": "+", "task": "+", **ids}
        return f"{BASE}/{mesh}/{self.pattern.format(**wild)}"


# A table: one row reads better in four lines than in twelve.
# fmt: off
STATE = Topic(
    name="STATE", pattern="node/{node}/state", payload=(m.NodeState,), encoding="json",
    writer="that node; the broker, as its last will", reader="everybody", qos=1, retain=True,
    why="retained, so that a newcomer knows the members at once; incarnation outdates a late will",
)
INFO = Topic(
    name="INFO", pattern="node/{node}/info", payload=(m.NodeInfo,), encoding="json",
    writer="that node", reader="everybody", qos=1, retain=True,
    why="what a node is changes rarely; placement and the terminal view need it at once",
)
METRICS = Topic(
    name="METRICS", pattern="node/{node}/metrics", payload=(m.NodeReport,), encoding="json",
    writer="that node, every second", reader="everybody", qos=0, retain=False,
    why="proof of life on any broker: a lost one is replaced by the next",
)
INBOX = Topic(
    name="INBOX", pattern="node/{node}/to/{to}",
    payload=(
        m.Drain, m.EpochHint, m.Hold, m.Held, m.Recall, m.Inventory, m.Assign, m.Refused, m.AttemptsRunning,
        m.AttemptEnded, m.OutcomeTaken, m.CancelAttempt, m.StaleCommand, m.FeaturesWanted, m.FeaturesReady,
        m.PullAdapter, m.RemoveAdapter, m.ClearShare,
    ),
    encoding="msgpack", writer="the one node", reader="the other", qos=1, retain=False,
    why="the sender's id is in the topic, where the access list can hold it to the truth",
)
COORDINATOR = Topic(
    name="COORDINATOR", pattern="coordinator", payload=(m.LeaseRecord,), encoding="json",
    writer="candidates and the coordinator", reader="everybody", qos=1, retain=True,
    why="one topic is one order for all readers: the first claim of an epoch's term wins",
)
SUBMIT = Topic(
    name="SUBMIT", pattern="task/submit", payload=(m.Submit,), encoding="json",
    writer="clients", reader="every node; the coordinator acts", qos=1, retain=False,
    why="all nodes keep it for a few seconds, so a submission during a failover is not lost",
)
CANCEL = Topic(
    name="CANCEL", pattern="task/{task}/cancel", payload=(m.CancelTask,), encoding="json",
    writer="clients", reader="the coordinator", qos=1, retain=False,
    why="an empty payload is enough: the task is in the topic",
)
EXPLAIN = Topic(
    name="EXPLAIN", pattern="task/{task}/explain", payload=(m.ExplainTask,), encoding="json",
    writer="clients", reader="the coordinator", qos=1, retain=False,
    why="an empty payload is enough: the task is in the topic; the answer comes as 'why'",
)
WHY = Topic(
    name="WHY", pattern="task/{task}/why", payload=(m.TaskExplanation,), encoding="json",
    writer="coordinator", reader="clients that asked", qos=1, retain=False,
    why="the numbers behind each decision; only on request, so that nobody pays for what nobody reads",
)
STATUS = Topic(
    name="STATUS", pattern="task/{task}/status", payload=(m.TaskStatus,), encoding="json",
    writer="coordinator", reader="clients", qos=1, retain=True,
    why="retained for a bounded time, so that a client may look later; 'queued' acknowledges the task",
)
STREAM = Topic(
    name="STREAM", pattern="task/{task}/stream", payload=(m.TaskTokens,), encoding="json",
    writer="the worker", reader="clients", qos=0, retain=False,
    why="tokens in batches of 50-100 ms; a lost piece is made good by the result",
)
PROGRESS = Topic(
    name="PROGRESS", pattern="task/{task}/progress", payload=(m.TaskProgress,), encoding="json",
    writer="the worker", reader="clients", qos=0, retain=False,
    why="how far a tuning task is, a few times a second; the next one replaces a lost one",
)
RESULT = Topic(
    name="RESULT", pattern="task/{task}/result", payload=(m.TaskResult,), encoding="json",
    writer="coordinator", reader="clients", qos=1, retain=True,
    why="complete in one message; retained for a bounded time, for clients that were away",
)
REPLY = Topic(
    name="REPLY", pattern="(reply_to)", payload=(m.TaskReply,), encoding="json",
    writer="coordinator", reader="that client", qos=1, retain=False,
    why="a client that named a topic hears acknowledgement and result there",
)
EVENT = Topic(
    name="EVENT", pattern="event", payload=(m.TaskEvent,), encoding="json",
    writer="coordinator", reader="people", qos=0, retain=False,
    why="what happened, in words",
)

COSTS = Topic(
    name="COSTS", pattern="costs", payload=(m.CostReport,), encoding="json",
    writer="coordinator", reader="people", qos=1, retain=True,
    why="how far off predictions were lately; at most every 5 s and only if that has changed",
)

RING = Topic(
    name="RING", pattern="ring", payload=(m.RingRecord,), encoding="json",
    writer="coordinator", reader="every node", qos=1, retain=True,
    why="retained, so that a newcomer knows at once where blocks belong; written when members come or go",
)
CATALOGUE = Topic(
    name="CATALOGUE", pattern="node/{node}/catalogue",
    payload=(m.CatalogueDelta, m.CatalogueWhole, m.CatalogueVersion),
    encoding="msgpack", writer="that node", reader="every node", qos=1, retain=True,
    why="retained: by the last one a reader sees what it has missed, and fetches the whole from that node",
)

FILES = Topic(
    name="FILES", pattern="node/{node}/files", payload=(m.FilesHeld,), encoding="json",
    writer="that node", reader="every node; people", qos=1, retain=True,
    why="retained, so that who was away hears of new adapters and of removed ones; only when they change",
)
CACHE = Topic(
    name="CACHE", pattern="node/{node}/cache", payload=(m.CacheReport,), encoding="json",
    writer="that node, every few seconds if it has changed", reader="people", qos=0, retain=True,
    why="retained: what a node at rest holds is known at once to who asks",
)

TABLE: tuple[Topic, ...] = (
    STATE, INFO, METRICS, INBOX, COORDINATOR, SUBMIT, CANCEL, EXPLAIN, WHY, STATUS, STREAM, PROGRESS, RESULT,
    REPLY, EVENT, COSTS, RING, CATALOGUE, FILES, CACHE,
)
# fmt: on

CLEARS: dict[type, tuple[Topic, ...]] = {
    m.TaskForgotten: (STATUS, RESULT),
    m.NodeForgotten: (STATE, INFO, CATALOGUE, FILES, CACHE),
}
"""Messages that travel as empty retained payloads: they remove what the rows kept."""

_TOPIC_OF: dict[type, Topic] = {kind: row for row in TABLE for kind in row.payload}


def topic_of(message: object) -> Topic:
    """The one row whose payload this message is.

    Raises:
        KeyError: The message never travels (a programming mistake, not a remote one).
    """
    return _TOPIC_OF[type(message)]


def access_list(mesh: MeshName) -> str:
    """Who may do what on the mesh's own broker, in Mosquitto's format.

    Clients without a certificate (the plain listener on loopback) submit, cancel, and read what is public:
    JSON, but not what others submitted. Clients with a certificate (``edgemesh mqtt``) may do the same, from
    anywhere. Members, whose name is in their certificate (``%u``), speak only below their own id, and hear
    all but other members' inboxes.
    """
    asked = [row for row in TABLE if row.writer == "clients"]
    public = [row for row in TABLE if row.encoding == "json" and row not in (*asked, REPLY)]
    shared = [row for row in TABLE if not row.pattern.startswith("node/") and row is not REPLY]
    everywhere = f"{BASE}/{mesh}"
    for_clients = [
        *(f"topic write {row.filter(mesh)}" for row in asked),
        *(f"topic read {row.filter(mesh)}" for row in public),
        f"topic read {everywhere}/client/#",
    ]
    lines = [
        "# Made from the topic table by mesh.topics. Clients without a certificate (a listener for them gets",
        "# these lines alone: Mosquitto applies a pattern without %u to clients without a name, too):",
        *for_clients,
        "# Clients with a certificate, who all have this name. No pattern below is theirs: Mosquitto applies",
        "# none to a name with a '+' in it, as that could be a wildcard:",
        f"user {CLIENT_COMMON_NAME}",
        *for_clients,
        "# Members of the mesh, by the name in their certificate:",
        f"pattern write {everywhere}/node/%u/#",
        *(f"pattern read {row.filter(mesh)}" for row in (STATE, INFO, METRICS, CATALOGUE, FILES, CACHE)),
        f"pattern read {INBOX.filter(mesh, to='%u')}",
        *(f"pattern readwrite {row.filter(mesh)}" for row in shared),
        f"pattern readwrite {everywhere}/client/#",
    ]
    return "".join(f"{line}\n" for line in lines)
