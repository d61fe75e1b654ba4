"""What a message looks like on MQTT, and back: topic, payload, QoS, retained, MQTT 5 properties.

Pure functions around the topic table, shared by the real bus and its twin. Reading never raises
anything but ``DecodeError``.

Who is the sender? The node whose id is in the topic (the broker's access list holds it to the truth), the
node of the epoch where a coordinator speaks, and ``CLIENT`` for whoever submits, cancels or streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mesh import wire
from mesh.core import Message
from mesh.errors import DecodeError
from mesh.ids import MeshName, NodeId, TaskId, is_id
from mesh.messages import (
    CancelTask,
    CostReport,
    ExplainTask,
    LeaseRecord,
    NodeForgotten,
    RingRecord,
    Submit,
    TaskExplanation,
    TaskForgotten,
    TaskReply,
    TaskResult,
    TaskStatus,
)
from mesh.topics import (
    BASE,
    CACHE,
    CANCEL,
    CATALOGUE,
    CLEARS,
    COORDINATOR,
    EXPLAIN,
    FILES,
    INBOX,
    INFO,
    METRICS,
    REPLY,
    RING,
    STATE,
    STATUS,
    SUBMIT,
    TABLE,
    Topic,
    topic_of,
)
from mesh.transport.bus import Heard

__all__ = ["CLIENT", "Packet", "client_filters", "node_filters", "outgoing", "read"]

CLIENT = NodeId("")
"""The sender of a message that no node answers for; never the id of a node (``mesh.ids.is_id``)."""

# How long a broker that speaks MQTT 5 keeps what the coordinator did not clear because the whole mesh
# was switched off: an open task's status for a day, an ended task's for as long as clients may ask.
_OPEN_TASK_EXPIRY_S = 24 * 3600
_ENDED_TASK_EXPIRY_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One PUBLISH, with the MQTT 5 properties we use (lost on a 3.1.1 connection)."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: float | None = None

    @property
    def n_bytes(self) -> int:
        return len(self.topic) + len(self.payload)


def node_filters(mesh: MeshName, me: NodeId) -> list[str]:
    """What a node listens to: all about its peers, its own inbox, the coordinator, and what clients ask."""
    return [
        *(
            row.filter(mesh)
            for row in (STATE, INFO, METRICS, CATALOGUE, FILES, COORDINATOR, RING, SUBMIT, CANCEL, EXPLAIN)
        ),
        INBOX.filter(mesh, to=me),
    ]


def client_filters(mesh: MeshName, rows: Iterable[Topic], *, task: TaskId | None = None) -> list[str]:
    """The filters of ``rows``; with ``task``, of that one task."""
    ids: dict[str, str] = {"task": task} if task else {}
    return [row.filter(mesh, **ids) for row in rows]


def outgoing(message: Message, *, mesh: MeshName, me: NodeId, to: NodeId | None = None) -> list[Packet]:
    """The packets that carry ``message``: one, or one for each retained topic that it clears.

    Raises:
        ValueError: It is too large to travel, or holds text that is not UTF-8.
    """
    if rows := CLEARS.get(type(message)):
        ids = {"task": getattr(message, "task", ""), "node": getattr(message, "node", "")}
        return [Packet(topic=row.topic(mesh, **ids), payload=b"", qos=row.qos, retain=True) for row in rows]
    row = topic_of(message)
    payload = wire.MESH.encode(message) if row.encoding == "msgpack" else b""
    if row is INBOX:
        assert to is not None, f"{type(message).__name__} goes to one node's inbox: name it"
        return [Packet(topic=INBOX.topic(mesh, node=me, to=to), payload=payload, qos=row.qos)]
    if row is CATALOGUE:
        topic = row.topic(mesh, node=me)
        return [Packet(topic=topic, payload=payload, qos=row.qos, retain=row.retain)]
    if isinstance(message, TaskReply):
        data = None if message.correlation is None else wire.correlation_bytes(message.correlation)
        payload = wire.encode_reply(message)
        return [Packet(topic=message.reply_to, payload=payload, qos=row.qos, correlation=data)]
    ids = {"task": getattr(message, "task", ""), "node": getattr(message, "node", None) or ""}
    expiry_s: float | None = None
    if isinstance(message, TaskResult | TaskStatus):
        ended = isinstance(message, TaskResult) or message.is_final
        expiry_s = _ENDED_TASK_EXPIRY_S if ended else _OPEN_TASK_EXPIRY_S
    elif isinstance(message, Submit) and message.deadline_s is not None:
        expiry_s = message.deadline_s + 1  # brokers count whole seconds; this must not cut the deadline
    return [
        Packet(
            topic=row.topic(mesh, **ids),
            payload=wire.encode_json(message),
            qos=row.qos,
            retain=row.retain,
            expiry_s=expiry_s,
        )
    ]


def read(packet: Packet, *, mesh: MeshName, replies_anywhere: bool = True) -> Heard | None:
    """The message in a packet that arrived; ``None`` for one that says nothing.

    A cleared topic says that its node or task is forgotten, once: by the first of its topics.

    Raises:
        DecodeError: It is no message of this mesh, or its sender claims to be another node.
    """
    row, ids = _row_of(packet.topic, mesh)
    if packet.retain and not row.retain:
        return None  # a client had the broker keep it: it was acted upon when it was said, once is enough
    if row is SUBMIT:
        submit = wire.read_submit(
            packet.payload,
            mesh=mesh,
            response_topic=packet.response_topic,
            correlation=packet.correlation,
            expiry_s=packet.expiry_s,
            replies_anywhere=replies_anywhere,
        )
        return Heard(submit, CLIENT)
    if row is CANCEL:  # the task is in the topic, whatever the payload says
        return Heard(CancelTask(task=TaskId(ids["task"])), CLIENT)
    if row is EXPLAIN:
        return Heard(ExplainTask(task=TaskId(ids["task"])), CLIENT)
    if row is REPLY:
        return Heard(_read_reply(packet), CLIENT)
    if row.retain and not packet.payload:
        if row is STATE:
            return Heard(NodeForgotten(node=NodeId(ids["node"])), NodeId(ids["node"]))
        return Heard(TaskForgotten(task=TaskId(ids["task"])), CLIENT) if row is STATUS else None
    if row in (INBOX, CATALOGUE):
        said = wire.MESH.decode(packet.payload)
        if type(said) not in row.payload:
            raise DecodeError(f"{type(said).__name__} does not travel by {row.pattern}")
        return Heard(said, NodeId(ids["node"]))
    message: Message = wire.decode_json(packet.payload, row.payload[0])
    for name, id_in_topic in ids.items():
        if (id_inside := getattr(message, name)) != id_in_topic:
            raise DecodeError(f"the topic says {name} {id_in_topic}, the payload {str(id_inside)[:80]!r}")
    if row in (STATE, INFO, METRICS, FILES, CACHE):
        return Heard(message, NodeId(ids["node"]))
    if isinstance(message, LeaseRecord | TaskStatus | TaskResult | TaskExplanation | CostReport | RingRecord):
        return Heard(message, message.epoch.node)
    return Heard(message, CLIENT)


def _read_reply(packet: Packet) -> TaskReply:
    """A reply as the client sees it."""
    body, correlation = wire.decode_reply(packet.payload)
    if correlation is None and packet.correlation is not None:
        correlation = wire.correlation_text(packet.correlation)
    return TaskReply(reply_to=packet.topic, correlation=correlation, body=body)


_PATTERNS = tuple(
    (row, re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[a-z0-9-]+)", re.escape(row.pattern))))
    for row in TABLE
    if row is not REPLY
)


def _row_of(topic: str, mesh: MeshName) -> tuple[Topic, dict[str, str]]:
    """The row a topic belongs to, and the ids in it. Topics outside our tree can only be replies."""
    own = f"{BASE}/{mesh}/"
    if not topic.startswith(f"{BASE}/") or topic.startswith(f"{own}client/"):
        return REPLY, {}
    if topic.startswith(own):
        for row, pattern in _PATTERNS:
            if found := pattern.fullmatch(topic, len(own)):
                ids = found.groupdict()
                if not all(is_id(text) for text in ids.values()):
                    break
                ids.pop("to", None)
                return row, ids
    raise DecodeError("no topic of this mesh")
