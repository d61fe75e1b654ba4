"""What ``python -m mesh.topic_docs --write`` writes: ``docs/protocol.md`` and ``docs/asyncapi.yaml``.

Both come from the topic table, the message classes and example messages that went through the codec, so
they cannot say anything the program does not. Only the prose between is written by hand, in
``mesh.topic_prose``.
"""

# ruff: noqa: E501  (tables and paragraphs of Markdown)

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mesh import messages as m
from mesh.ids import Boot, Epoch, MeshName, NodeId, TaskId
from mesh.messages.cache import CacheTier
from mesh.messages.files import AdapterHeld, AdapterRemoved
from mesh.messages.output import NUMBERS_MAX, TEXTS_MAX
from mesh.messages.task import ANSWER_BYTES_MAX, MAX_TOKENS_MAX, PROMPT_BYTES_MAX, STOP_STRINGS_MAX
from mesh.messages.tune import INLINE_DATA_BYTES_MAX
from mesh.topic_prose import HEAD, REASONS, REPLIES, STATEMENTS, STATES, SUBMIT
from mesh.topics import BASE, REPLY, TABLE, Topic, access_list
from mesh.units import bytes_text
from mesh.wire import (
    FRAME_BYTES_MAX,
    JSON_BYTES_MAX,
    PROTOCOL,
    encode_json,
    encode_reply,
    json_schemas,
    plain_json,
)

__all__ = ["STATEMENTS", "asyncapi", "protocol_markdown", "write"]

_MESH = MeshName("home")
_NODE, _WORKER = NodeId("pi-4-3f9a2c"), NodeId("desktop-91b0e4")
_TASK = TaskId("t-5d1c0a9e77f2")
_EPOCH = Epoch(7, _NODE)

_STATUS = m.TaskStatus(
    task=_TASK, state="queued", reason=None, node=None, attempt=0, epoch=_EPOCH, durable_on=2, budget_s=29.4
)  # fmt: skip
_RESULT = m.TaskResult(
    task=_TASK, state="done", text="The capital of France is Paris.", finish_reason="stop", reason=None,
    node=_WORKER, attempt=1, epoch=_EPOCH, n_prompt_tokens=37, n_tokens=8, queue_s=0.012, ttft_s=0.094,
    service_s=0.41,
)  # fmt: skip

_EXPLANATION = m.TaskExplanation(
    task=_TASK, epoch=_EPOCH, state="running", kind="generate", value=2.0, budget_s=21.5, node=_WORKER, attempt=1,
    decisions=[
        m.TaskDecision(
            verb="start", age_s=1.2, words="desktop-91b0e4: density 1.43/s, 20.1 s of slack", node=_WORKER,
            policy="vdf", score=1.1, density=1.43, laxity_s=20.1, cost_s=1.4, service_s=2.5, n_waiting=3,
            candidates=[
                m.CandidateNode(
                    node=_WORKER, service_s=2.5, why_not=None, parts={"prefill": 0.4, "decode": 2.1}
                ),
                m.CandidateNode(node=_NODE, service_s=9.8, why_not="ends 7.3 s later"),
            ],
            n_candidates=2,
        )
    ],
    n_decisions=1,
)  # fmt: skip

_EXAMPLES: dict[type, m.NodeState | Any] = {
    m.NodeState: m.NodeState(node=_NODE, state="online", incarnation=12, boot=Boot("9c41f0aa")),
    m.NodeInfo: m.NodeInfo(
        node=_NODE, incarnation=12, hostname="pi-4", version="0.1.0", protocol_min=1, protocol_max=1,
        addresses=["192.168.1.20"], port=40123, system="Linux aarch64", device="cpu", n_cpus=4,
        memory_bytes=8_000_000_000, model="SmolLM2-135M-Instruct", adapters=[], slots=1, context_tokens=8192,
        rates=m.NodeRates(
            prefill_tokens_per_s=96.0, decode_tokens_per_s=9.8, row_cost=0.22, features_tokens_per_s=110.0,
            tune_tokens_per_s=180.0, adapter_load_s=0.05,
        ),
    ),
    m.NodeReport: m.NodeReport(
        node=_NODE, incarnation=12, ready=True, activity="1 task", running=1, cpu_percent=97.5,
        memory_free_bytes=5_100_000_000, rss_bytes=910_000_000, tokens_per_s=9.8, temperature_c=61.2,
    ),
    m.LeaseRecord: m.LeaseRecord(kind="lease", epoch=_EPOCH, ttl_s=3.0, beat=412),
    m.Submit: m.Submit(prompt="What is the capital of France?", id=_TASK, max_tokens=64, deadline_s=30.0),
    m.CancelTask: m.CancelTask(task=_TASK),
    m.ExplainTask: m.ExplainTask(task=_TASK),
    m.TaskExplanation: _EXPLANATION,
    m.CostReport: m.CostReport(
        epoch=_EPOCH,
        errors=[m.KindError(kind="generate", p50=0.12, n=64), m.KindError(kind="tune", p50=0.21, n=7)],
    ),
    m.TaskStatus: _STATUS,
    m.TaskTokens: m.TaskTokens(task=_TASK, attempt=1, seq=0, text="The capital of", n_tokens=3),
    m.TaskResult: _RESULT,
    m.TaskReply: m.TaskReply(reply_to="edgemesh/home/client/me", correlation="42", body=_STATUS),
    m.TaskProgress: m.TaskProgress(
        task=TaskId("spam-1"), attempt=1, seq=41, phase="training", fraction=0.55, epoch=2, epochs=5, step=57,
        steps=125, loss=0.41, metric=0.875, eta_s=12.5, cache_hits=960, cache_misses=40,
        text="epoch 3 of 5",
    ),
    m.RingRecord: m.RingRecord(epoch=_EPOCH, change=3, quotas={_WORKER: 8 * 10**9, _NODE: 2 * 10**9}),
    m.CacheReport: m.CacheReport(
        node=_WORKER, incarnation=1, quota_bytes=8 * 10**9, held_bytes=1_204_300_000, blocks=31_200,
        memory=CacheTier(hits=9_400, bytes=361_000_000, saved_s=1_880.0),
        disk=CacheTier(hits=2_100, bytes=80_700_000, saved_s=420.5),
        peers=CacheTier(hits=840, bytes=32_200_000, saved_s=168.2), misses=31_050, given_bytes=1_190_000_000,
    ),
    m.FilesHeld: m.FilesHeld(
        node=_WORKER, incarnation=1, base="5c" * 32,
        adapters=[
            AdapterHeld(
                name="spam", version=3, digest="0d" * 32, manifest_bytes=402, bytes=1_871_302, base="5c" * 32,
                method="lora", task="classify", first_layer=26, metric=0.97, weights="a1" * 32, is_own=True,
            )
        ],
        removed=[AdapterRemoved(name="old-tone", version=2, left_s=2_591_990.0)],
    ),
    m.TaskEvent: m.TaskEvent(text="desktop-91b0e4 finished t-5d1c0a9e77f2 in 0.4 s", task=_TASK),
}  # fmt: skip

_NOTES: dict[type, str] = {
    m.NodeState: "`online`, `draining` (finishes its tasks, takes no new ones), `offline` (the will) or `left` (a goodbye).",
    m.NodeInfo: "`rates` are the node's own measure of itself, for whoever must expect something before the node has worked:"
    " each is as others see it. `row_cost` is the share of a step that each further answer adds; `origin` is `measured`,"
    " `busy` (beside other work: measured again later) or `guessed`; `emulated_slowdown` above 1 says that the node plays"
    " a slower one (`--slowdown`). `cache_bytes` is what it gives to the mesh's memory; `holds` is `top` where the node has"
    " the upper layers of the model only.",
    m.CacheReport: "Counts since the node started. `memory`, `disk` and `peers` are where blocks were found, the nearest"
    " first; `saved_s` is what this node would have computed for them; `misses` were computed.",
    m.FilesHeld: "Of the versions of one name that all nodes say, the highest `version` counts, then the higher `digest`; a"
    " removal counts for all versions up to its own. `digest` names the manifest, which the node's data plane gives as a"
    " blob. `left_s` is how long the node will remember the removal, from when it said so.",
    m.TaskStatus: "`node` is where it runs or ran, `attempt` counts its tries from 1, `durable_on` the nodes that have it on"
    " disk, and `budget_s` is the time left to the deadline when this was sent: devices share no clock, so no time of day"
    " ever travels.",
    m.TaskResult: "`finish_reason` is `stop` (the model ended, or a stop string came) or `length` (`max_tokens`). Times are in"
    " seconds: `queue_s` waiting, `service_s` being computed, `ttft_s` of that until the first token. `output` holds"
    " what a `kind` other than `generate` gives.",
    m.TaskExplanation: "`state` is null if the coordinator does not know the task. Of each decision: `density` is value per"
    " second of node time, `laxity_s` the slack after the expected end, `service_s` the expected time from start to end and"
    " `cost_s` the node time that others lose by it. `why_not` is null for the node that was taken. A task that waits has a"
    " last entry `wait`: what it would be now.",
    m.CostReport: "`p50`: half of the last predictions of that kind were off by at most this share.",
    m.TaskProgress: "`phase` is `reading` (the data), `features` (computing what no earlier job computed), `choosing`"
    " (how many layers), `training` or `saving`; `fraction` is of the whole task.",
    m.TaskReply: "See *Replies* below for how to ask for them.",
}

# ── docs/protocol.md ────────────────────────────────────────────────────────────────────────────────


def protocol_markdown() -> str:
    """``docs/protocol.md``."""
    tree = "\n".join(_tree_line(row) for row in TABLE if row is not REPLY)
    parts = [
        HEAD.format(tree=tree + "\n" + f"{'client/…':<24}    q1  {_text(REPLY.why)}"),
        "## Topics\n",
        *(_section(row) for row in TABLE),
        REPLIES,
        "## The states of a task\n",
        "```\nqueued ─▶ assigned ─▶ running ─▶ done · failed · cancelled · expired\n"
        "   ▲         │           │\n   └─────────┴───────────┘ the node was lost: the next attempt\n"
        "rejected: never queued\n```\n",
        "| state | meaning |\n|---|---|\n"
        + "".join(f"| `{name}` | {text} |\n" for name, text in STATES.items()),
        "## Reasons\n",
        "`reason` is a sentence for people; programs look at `state`.\n",
        "| reason | when |\n|---|---|\n" + "".join(f"| {reason} | {when} |\n" for reason, when in REASONS),
        "## Bounds\n",
        "| what | at most |\n|---|---|\n" + "".join(f"| {what} | {most} |\n" for what, most in _bounds()),
        "## Statements\n",
        "What clients and brokers may rely upon, numbered; tests name the ones they hold up.\n",
        "".join(f"- **EM-MQTT-{n:02d}** {text}\n" for n, text in enumerate(STATEMENTS, start=1)),
    ]
    return _wrapped("\n".join(parts))


def _tree_line(row: Topic) -> str:
    pattern = re.sub(r"\{(\w+)\}", r"<\1>", row.pattern)
    return f"{pattern:<24}  {'R' if row.retain else ' '} q{row.qos}  {_text(row.why)}"


def _section(row: Topic) -> str:
    title = "A client's own topic" if row is REPLY else "`" + re.sub(r"\{(\w+)\}", r"<\1>", row.pattern) + "`"
    kinds = " · ".join(f"`{kind.__name__}`" for kind in row.payload)
    lines = [
        f"### {title}\n",
        f"{kinds}, {row.encoding}, QoS {row.qos}{', retained' if row.retain else ''}."
        f" Written by {row.writer}; read by {row.reader}. {_sentence(row.why)}\n",
    ]
    if row.encoding == "msgpack":
        lines.append(
            'A msgpack map: `{"type": the message\'s name, "v": '
            + str(PROTOCOL)
            + ", ...its fields}`. The messages are"
            " described in `mesh/messages/`.\n"
        )
        return "\n".join(lines)
    kind = row.payload[0]
    lines.append(f"{_paragraphs(kind)}\n")
    lines.append(f"```json\n{_example(kind)}\n```\n")
    if note := _NOTES.get(kind):
        lines.append(f"{note}\n")
    if kind is m.Submit:
        lines.append(
            SUBMIT.format(
                max_tokens=MAX_TOKENS_MAX,
                stop=f"{STOP_STRINGS_MAX} of 256 characters",
                texts=TEXTS_MAX,
                text_bytes=bytes_text(PROMPT_BYTES_MAX),
                numbers=f"{NUMBERS_MAX:,}",
                data_bytes=bytes_text(INLINE_DATA_BYTES_MAX),
            )
        )
    return "\n".join(lines)


def _example(kind: type) -> str:
    message = _EXAMPLES[kind]
    payload = encode_reply(message) if isinstance(message, m.TaskReply) else encode_json(message)
    plain = json.loads(payload)
    if kind is m.Submit:  # as a person would write it
        default = json.loads(encode_json(m.Submit(prompt="x")))
        plain = {name: value for name, value in plain.items() if name == "prompt" or value != default[name]}
    text = plain_json(plain)
    if len(text) > 100:
        text = plain_json(plain, indent=2)
    return text


def _bounds() -> list[tuple[str, str]]:
    return [
        ("one JSON message", f"{JSON_BYTES_MAX:,} bytes (Mosquitto 2.1 disconnects above 2,000,000)"),
        ("one msgpack message between nodes", bytes_text(FRAME_BYTES_MAX)),
        ("prompt, or all messages together", f"{bytes_text(PROMPT_BYTES_MAX)} of UTF-8"),
        ("answer", f"{MAX_TOKENS_MAX:,} tokens, {bytes_text(ANSWER_BYTES_MAX)}"),
        ("tuning data in a submission", f"{bytes_text(INLINE_DATA_BYTES_MAX)}, and as much to evaluate on"),
        ("texts of one task", f"{TEXTS_MAX}, {bytes_text(PROMPT_BYTES_MAX)} together"),
        ("scores and vectors of one result", f"{NUMBERS_MAX:,} numbers"),
        ("messages in one conversation", "1024"),
        ("stop strings", f"{STOP_STRINGS_MAX} of 256 characters"),
        ("id", "63 characters of `a-z`, `0-9`, `-`"),
        ("reply topic", "512 bytes"),
        ("correlation", "1024 bytes; as MQTT 5 correlation data 500"),
    ]


def _paragraphs(kind: type) -> str:
    """The class's docstring as Markdown."""
    lines = [line.strip() for line in (kind.__doc__ or "").strip().splitlines()]
    return _text("\n".join(lines))


def _text(restructured: str) -> str:
    return restructured.replace("``", "`")


def _sentence(text: str) -> str:
    return _text(text[:1].upper() + text[1:]) + "."


def _wrapped(markdown: str) -> str:
    """No trailing blanks, one blank line at most, one newline at the end."""
    text = "\n".join(line.rstrip() for line in markdown.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


# ── docs/asyncapi.yaml ──────────────────────────────────────────────────────────────────────────────


def asyncapi() -> str:
    """``docs/asyncapi.yaml``: AsyncAPI 3.0 (https://www.asyncapi.com/docs/reference/specification/v3.0.0).

    Written from the mesh's side: ``receive`` is what the mesh hears, ``send`` what it says.
    """
    document: dict[str, Any] = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "edgemesh",
            "version": f"{PROTOCOL}.0.0",
            "description": "The MQTT topics by which an edgemesh is asked, answers and works. See protocol.md.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "loopback": {
                "host": "localhost:1883",
                "protocol": "mqtt",
                "protocolVersion": "3.1.1",
                "description": "For clients on a node's own machine; see edgemesh mqtt for the port.",
            },
            "mesh": {
                "host": "{host}:8883",
                "protocol": "secure-mqtt",
                "protocolVersion": "3.1.1",
                "description": "Members, by certificate. MQTT 5 is used where the broker speaks it.",
                "variables": {"host": {"description": "Any node that hosts the broker now."}},
                "security": [{"$ref": "#/components/securitySchemes/certificate"}],
            },
        },
        "channels": {row.name.lower(): _channel(row) for row in TABLE},
        "operations": {_operation_id(row): _operation(row) for row in TABLE},
        "components": {
            "securitySchemes": {"certificate": {"type": "X509"}},
            "messages": {kind.__name__: _message(kind, row) for row in TABLE for kind in row.payload},
            "schemas": _schemas(),
        },
    }
    head = "# Written by `python -m mesh.topic_docs --write` from mesh/topics.py and mesh/messages. Do not edit.\n"
    return head + _yaml(document)


_PARAMETERS = {
    "mesh": "The mesh's name.",
    "node": "Id of the node that writes.",
    "to": "Id of the node that reads.",
    "task": "Id of the task.",
}


def _channel(row: Topic) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": None if row is REPLY else f"{BASE}/{{mesh}}/{row.pattern}",
        "description": _sentence(row.why),
        "messages": {
            kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in row.payload
        },
    }
    if row is not REPLY:
        names = ["mesh", *re.findall(r"\{(\w+)\}", row.pattern)]
        channel["parameters"] = {name: {"description": _PARAMETERS[name]} for name in names}
    return channel


def _operation_id(row: Topic) -> str:
    return ("hear" if row.writer == "clients" else "say") + row.name.capitalize()


def _operation(row: Topic) -> dict[str, Any]:
    channel = f"#/channels/{row.name.lower()}"
    operation: dict[str, Any] = {
        "action": "receive" if row.writer == "clients" else "send",
        "channel": {"$ref": channel},
        "summary": f"Written by {row.writer}; read by {row.reader}.",
        "messages": [{"$ref": f"{channel}/messages/{kind.__name__}"} for kind in row.payload],
        "bindings": {"mqtt": {"qos": row.qos, "retain": row.retain, "bindingVersion": "0.2.0"}},
    }
    if row.payload == (m.Submit,):
        operation["reply"] = {
            "address": {
                "description": "Or the MQTT 5 response topic.",
                "location": "$message.payload#/reply_to",
            },
            "channel": {"$ref": "#/channels/reply"},
        }
    return operation


def _message(kind: type, row: Topic) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": kind.__name__,
        "summary": _paragraphs(kind).split("\n\n")[0].replace("\n", " "),
        "contentType": "application/json" if row.encoding == "json" else "application/msgpack",
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
    }
    if kind is m.Submit:
        message["correlationId"] = {
            "description": "Or the MQTT 5 correlation data.",
            "location": "$message.payload#/correlation",
        }
    if kind in _EXAMPLES:
        message["examples"] = [{"payload": json.loads(_example(kind))}]
    return message


def _schemas() -> dict[str, Any]:
    kinds = [kind for row in TABLE for kind in row.payload if kind is not m.TaskReply]
    schemas = json_schemas(kinds)
    # What a client misspells is refused, what a newer node adds is ignored.
    for strict in (m.Submit, m.ChatMessage, m.TuneSpec):
        schemas[strict.__name__]["additionalProperties"] = False
    for row in TABLE:
        for kind in row.payload:
            if kind is m.TaskReply:
                continue
            version = {"type": "integer", "const": PROTOCOL, "description": "Protocol version."}
            schemas[kind.__name__]["properties"]["v"] = version
            if row.encoding == "msgpack":
                schemas[kind.__name__]["properties"]["type"] = {"const": kind.__name__}
    schemas["TaskReply"] = {
        "description": _paragraphs(m.TaskReply),
        "oneOf": [
            {
                "allOf": [
                    {"$ref": f"#/components/schemas/{body.__name__}"},
                    {
                        "type": "object",
                        "required": ["type", "correlation"],
                        "properties": {
                            "type": {"const": body.__name__},
                            "correlation": {"type": ["string", "null"]},
                        },
                    },
                ]
            }
            for body in (m.TaskStatus, m.TaskResult)
        ],
    }
    return dict(sorted(schemas.items()))


def _yaml(value: Any, indent: int = 0) -> str:
    """Plain data as YAML in block style; scalars in JSON's spelling, which is YAML's too."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        return "".join(f"{pad}{_yaml_key(key)}:{_yaml_after(item, indent)}" for key, item in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{pad}-{_yaml_after(item, indent)}" for item in value)
    raise AssertionError(f"a document is not {value!r}")


def _yaml_after(item: Any, indent: int) -> str:
    if isinstance(item, dict | list) and item:
        return "\n" + _yaml(item, indent + 1)
    return f" {json.dumps(item, ensure_ascii=False)}\n"


def _yaml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", key) else json.dumps(key)


def write(docs: Path) -> list[Path]:
    """Write both files into ``docs``; which ones."""
    files = {docs / "protocol.md": protocol_markdown(), docs / "asyncapi.yaml": asyncapi()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mesh.topic_docs", description="What the topic table says."
    )
    parser.add_argument("--write", action="store_true", help="write docs/protocol.md and docs/asyncapi.yaml")
    parser.add_argument("--access-list", metavar="MESH", help="print a Mosquitto access list for this mesh")
    arguments = parser.parse_args()
    if arguments.access_list:
        print(access_list(MeshName(arguments.access_list)), end="")
    if arguments.write:
        for path in write(Path(__file__).parents[1] / "docs"):
            print(f"wrote docs/{path.name}")


if __name__ == "__main__":
    _main()
