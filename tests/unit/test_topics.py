"""The topic table: complete, unambiguous, and what the documents say."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from mesh import messages as m
from mesh.brokers.access import AccessList, anonymous_lines
from mesh.errors import DecodeError
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId, is_id
from mesh.packets import CLIENT, Packet, node_filters, outgoing, read
from mesh.topic_docs import STATEMENTS, asyncapi, protocol_markdown
from mesh.topics import CLEARS, REPLY, TABLE, access_list, topic_of
from mesh.transport.bus import Heard
from mesh.transport.identity import CLIENT_COMMON_NAME

HOME = MeshName("home")
A, B = NodeId("a"), NodeId("b")
DOCS = Path(__file__).parents[2] / "docs"

NEVER_TRAVEL = {
    m.ChatMessage, m.AttemptId, m.Outcome, m.TaskRecord,  # parts of others
    m.EpochSeen,  # durable only
    m.Unacceptable,  # made here of what came
    m.PeerHello,  # travels on the data plane
    m.TuneSpec, m.Output, m.AdapterCard, m.NodeRates,  # parts of others
    m.CandidateNode, m.TaskDecision, m.KindError, m.FeaturesHeld, m.FeaturesSpec,  # parts of others
}  # fmt: skip


def state(node: NodeId, incarnation: int = 1) -> m.NodeState:
    return m.NodeState(node=node, state="online", incarnation=incarnation, boot=Boot("b1"))


def test_every_message_has_exactly_one_way_to_travel_or_a_reason_not_to() -> None:
    kinds = {kind for name in m.__all__ if isinstance(kind := getattr(m, name), type) and is_dataclass(kind)}
    ways = [kind for row in TABLE for kind in row.payload] + list(CLEARS) + list(NEVER_TRAVEL)
    assert sorted(kind.__name__ for kind in ways) == sorted(kind.__name__ for kind in kinds)


def test_asking_for_the_topic_of_what_never_travels_is_a_programming_mistake() -> None:
    with pytest.raises(KeyError):
        topic_of(m.EpochSeen(epoch=Epoch(1, A)))


def test_topics_follow_the_conventions() -> None:
    """EM-MQTT-01."""
    for row in TABLE:
        if row is REPLY:
            continue
        topic = row.topic(HOME, node="n", to="o", task="t")
        assert re.fullmatch(r"[a-z0-9-]+(/[a-z0-9-]+){2,5}", topic), topic
        assert row.why and row.writer and row.reader


def test_no_topic_belongs_to_two_rows() -> None:
    for row in TABLE:
        if row is not REPLY:
            topic = row.topic(HOME, node="n", to="o", task="t")
            matching = [
                other
                for other in TABLE
                if other is not REPLY
                and re.fullmatch(re.escape(other.filter(HOME)).replace(r"\+", "[^/]+"), topic)
            ]
            assert matching == [row]


def test_clients_are_never_mistaken_for_a_node() -> None:
    assert not is_id(CLIENT)


# ── packets ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("edgemesh/home/node/a/state", b'{"node":"b","state":"left","incarnation":9,"boot":"x"}'),
        ("edgemesh/home/node/a/info", b"{}"),
        ("edgemesh/home/node/a/to/b", b"\xc1"),
        ("edgemesh/home/node/a/to/b", b"\x82\xa4type\xa9EpochSeen\xa1v\x01"),
        ("edgemesh/home/task/t-1/status", b'{"task":"t-2"}'),
        ("edgemesh/home/task/t-1/unknown", b"{}"),
        ("edgemesh/home/nodes/a/state", b"{}"),
        ("edgemesh/other/coordinator", b"{}"),
        ("edgemesh/home/node/-a/state", b"{}"),
        ("edgemesh/home/node/" + "a" * 64 + "/state", b"{}"),
        ("edgemesh/home/task/Ü/cancel", b""),
    ],
)
def test_what_is_no_message_of_this_mesh_is_a_decode_error(topic: str, payload: bytes) -> None:
    """EM-MQTT-04, EM-MQTT-19."""
    with pytest.raises(DecodeError):
        read(Packet(topic=topic, payload=payload, qos=1), mesh=HOME)


def test_a_message_that_does_not_belong_in_an_inbox_is_refused_there() -> None:
    for name, kind in ((name, getattr(m, name)) for name in m.__all__):
        if isinstance(kind, type) and is_dataclass(kind) and "INBOX" not in _row_name(kind):
            forged = b"\x82\xa4type" + bytes([0xA0 | len(name)]) + name.encode() + b"\xa1v\x01"
            with pytest.raises(DecodeError):
                read(Packet(topic="edgemesh/home/node/a/to/b", payload=forged, qos=1), mesh=HOME)


def _row_name(kind: type) -> str:
    return next((row.name for row in TABLE if kind in row.payload), "")


def test_a_cleared_topic_says_once_that_its_node_or_task_is_forgotten() -> None:
    said = {}
    for row in TABLE:
        if row.retain:
            topic = row.topic(HOME, node="a", task="t-1")
            heard = read(Packet(topic=topic, payload=b"", qos=1, retain=True), mesh=HOME)
            said[row.name] = heard and heard.message
    assert {name: message for name, message in said.items() if message} == {
        "STATE": m.NodeForgotten(node=A),
        "STATUS": m.TaskForgotten(task=TaskId("t-1")),
    }


def test_what_a_client_had_retained_is_not_said_again_at_every_connect() -> None:
    """``mosquitto_pub -r`` to a topic that is not for keeping: a broker would repeat it to every newcomer."""
    for topic, payload in (("task/submit", b'{"prompt": "hi"}'), ("task/t-1/cancel", b"x")):
        packet = Packet(topic=f"edgemesh/home/{topic}", payload=payload, qos=1)
        assert read(packet, mesh=HOME) is not None
        assert read(replace(packet, retain=True), mesh=HOME) is None


@pytest.mark.parametrize("payload", [b"", b"x", b'{"task": "t-2"}', b"\xff"])
def test_whoever_asks_why_need_not_say_anything_but_the_task_in_the_topic(payload: bytes) -> None:
    """EM-MQTT-23."""
    packet = Packet(topic="edgemesh/home/task/t-1/explain", payload=payload, qos=1)
    assert read(packet, mesh=HOME) == Heard(m.ExplainTask(task=TaskId("t-1")), CLIENT)


def test_an_answer_and_a_report_come_from_the_coordinator_of_their_epoch() -> None:
    answer = m.TaskExplanation(task=TaskId("t-1"), epoch=Epoch(3, A), state=None)
    report = m.CostReport(epoch=Epoch(3, A), errors=[m.KindError(kind="tune", p50=0.2, n=5)])
    for message in (answer, report):
        (packet,) = outgoing(message, mesh=HOME, me=A)
        assert read(packet, mesh=HOME) == Heard(message, A)


def test_a_forgotten_task_clears_all_that_was_retained_of_it() -> None:
    """EM-MQTT-16."""
    packets = outgoing(m.TaskForgotten(task=TaskId("t-1")), mesh=HOME, me=A)
    assert {packet.topic for packet in packets} == {
        row.topic(HOME, task="t-1") for row in TABLE if row.retain and "{task}" in row.pattern
    }
    assert all(packet.retain and not packet.payload for packet in packets)


def test_a_node_listens_to_all_it_needs_and_to_no_other_inbox() -> None:
    filters = node_filters(HOME, A)
    assert "edgemesh/home/node/+/to/a" in filters
    assert not [one for one in filters if one.endswith("/#") or "/to/+" in one]


def test_a_submission_on_its_way_lives_no_shorter_than_its_deadline() -> None:
    """EM-MQTT-12."""
    (packet,) = outgoing(m.Submit(prompt="hi", deadline_s=2.5), mesh=HOME, me=A)
    assert packet.expiry_s is not None and packet.expiry_s >= 2.5
    assert read(packet, mesh=HOME) == Heard(m.Submit(prompt="hi", deadline_s=2.5), CLIENT)


# ── the access list ─────────────────────────────────────────────────────────────────────────────────


MEMBERS = AccessList(access_list(HOME))
STRANGERS = AccessList(anonymous_lines(access_list(HOME)))


def _rows(rights: AccessList, name: str | None, right: Literal["read", "write"]) -> set[str]:
    """Names of the rows of node ``a`` (and of ``a``'s message to ``b``) on which ``name`` has the right."""
    return {
        row.name
        for row in TABLE
        if row is not REPLY and rights.allows(name, "x", right, row.topic(HOME, node="a", to="b", task="t"))
    }


def test_strangers_ask_and_read_what_is_public() -> None:
    assert _rows(STRANGERS, None, "write") == {"SUBMIT", "CANCEL", "EXPLAIN"}
    assert _rows(STRANGERS, None, "read") == {
        "STATE", "INFO", "METRICS", "COORDINATOR", "STATUS", "STREAM", "PROGRESS", "RESULT",
        "EVENT", "WHY", "COSTS", "RING", "FILES", "CACHE",
    }  # fmt: skip
    assert STRANGERS.allows(None, "x", "read", "edgemesh/home/client/me")
    assert not STRANGERS.allows(None, "x", "write", "edgemesh/home/client/me")
    assert not STRANGERS.allows(None, "x", "read", "edgemesh/other/coordinator")


def test_clients_with_a_certificate_may_do_what_strangers_may_and_no_more() -> None:
    for right in ("read", "write"):
        assert _rows(MEMBERS, CLIENT_COMMON_NAME, right) == _rows(STRANGERS, None, right)
    assert MEMBERS.allows(CLIENT_COMMON_NAME, "x", "read", "edgemesh/home/client/me")
    for topic in ("client/me", f"node/{CLIENT_COMMON_NAME}/state", f"node/{CLIENT_COMMON_NAME}/to/a"):
        assert not MEMBERS.allows(CLIENT_COMMON_NAME, "x", "write", f"edgemesh/home/{topic}")


def test_members_speak_under_their_own_name_only() -> None:
    """EM-MQTT-04."""
    shared = {
        "COORDINATOR", "SUBMIT", "CANCEL", "EXPLAIN", "STATUS", "STREAM", "PROGRESS", "RESULT", "EVENT",
        "WHY", "COSTS", "RING",
    }  # fmt: skip
    own = {"STATE", "INFO", "METRICS", "INBOX", "CATALOGUE", "FILES", "CACHE"}
    assert _rows(MEMBERS, "a", "write") == shared | own
    assert _rows(MEMBERS, "b", "write") == shared
    assert MEMBERS.allows("b", "x", "read", "edgemesh/home/node/a/to/b")
    assert not MEMBERS.allows("b", "x", "read", "edgemesh/home/node/a/to/c")
    assert MEMBERS.allows("b", "x", "write", "edgemesh/home/client/me")
    assert not MEMBERS.allows("b", "x", "write", "anything/else")


# ── the documents ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "made"), [("protocol.md", protocol_markdown), ("asyncapi.yaml", asyncapi)])
def test_the_committed_documents_are_what_the_table_says(name: str, made: object) -> None:
    assert callable(made)
    assert (DOCS / name).read_text(encoding="utf-8") == made(), "run: python -m mesh.topic_docs --write"


def test_the_documents_name_every_topic_message_and_field_a_client_meets() -> None:
    text, api = protocol_markdown(), asyncapi()
    for row in TABLE:
        for kind in row.payload:
            assert f"`{kind.__name__}`" in text and f"\n    {kind.__name__}:" in api
    for field in fields(m.Submit):
        assert re.search(rf"^\| .*`{field.name}`.* \|", text, re.MULTILINE), field.name
    for field in fields(m.TuneSpec):
        assert re.search(rf"^\| .*`{field.name}`.* \|", text, re.MULTILINE), field.name
    for kind in m.TaskKind.__args__:
        assert f"| `{kind}` |" in text
    for status in m.TaskState.__args__:
        assert f"| `{status}` |" in text


def test_every_reference_in_the_asyncapi_file_leads_somewhere() -> None:
    paths: set[str] = set()
    stack: list[str] = []
    for line in asyncapi().splitlines():
        if found := re.match(r'^( *)(?:- *)?"?([\w./{}$-]+)"?:', line):
            depth = len(found[1]) // 2
            stack[depth:] = [found[2]]
            paths.add("#/" + "/".join(stack))
    references = set(re.findall(r'"\$ref": "([^"]+)"', asyncapi()))
    assert references and references <= paths, references - paths


def test_the_examples_in_the_protocol_document_are_accepted() -> None:
    blocks = re.findall(r"```json\n(.*?)```", protocol_markdown(), re.DOTALL)
    assert len(blocks) == len([row for row in TABLE if row.encoding == "json"])
    (submit,) = (block for block in blocks if '"prompt":' in block)
    topic = "edgemesh/home/task/submit"
    heard = read(Packet(topic=topic, payload=submit.encode(), qos=1), mesh=HOME)
    assert heard is not None and isinstance(heard.message, m.Submit)
    for block in blocks:
        assert isinstance(json.loads(block), dict)


def test_shell_examples_submit_what_the_mesh_accepts() -> None:
    commands = re.findall(r"-m '(\{.*?\})'\n", protocol_markdown())
    assert len(commands) >= 3
    for payload in commands:
        packet = Packet(topic="edgemesh/home/task/submit", payload=payload.encode(), qos=1)
        heard = read(packet, mesh=HOME, replies_anywhere=False)
        assert heard is not None and isinstance(heard.message, m.Submit), heard


def test_statements_keep_their_numbers() -> None:
    text = protocol_markdown()
    assert [f"EM-MQTT-{n:02d}" in text for n in range(1, len(STATEMENTS) + 1)] == [True] * len(STATEMENTS)
    assert STATEMENTS[9].startswith("A reply carries the correlation"), "tests cite it as EM-MQTT-10"
