"""What ``python -m mesh.topic_docs --write`` writes: ``docs/protocol.md`` and ``docs/asyncapi.yaml``.

Both come from the topic table, the message classes and example messages that went through the codec, so
they cannot say anything the program does not. Only the prose between is written by hand, here.
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
from mesh.messages.task import ANSWER_BYTES_MAX, MAX_TOKENS_MAX, PROMPT_BYTES_MAX, STOP_STRINGS_MAX
from mesh.topics import BASE, INBOX, REPLY, TABLE, Topic, access_list
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

_EXAMPLES: dict[type, m.NodeState | Any] = {
    m.NodeState: m.NodeState(node=_NODE, state="online", incarnation=12, boot=Boot("9c41f0aa")),
    m.NodeInfo: m.NodeInfo(
        node=_NODE, incarnation=12, hostname="pi-4", version="0.1.0", protocol_min=1, protocol_max=1,
        addresses=["192.168.1.20"], port=40123, system="Linux aarch64", device="cpu", n_cpus=4,
        memory_bytes=8_000_000_000, model="SmolLM2-135M-Instruct", adapters=[], slots=1, context_tokens=8192,
    ),
    m.NodeReport: m.NodeReport(
        node=_NODE, incarnation=12, ready=True, activity="1 task", running=1, cpu_percent=97.5,
        memory_free_bytes=5_100_000_000, rss_bytes=910_000_000, tokens_per_s=9.8, temperature_c=61.2,
    ),
    m.LeaseRecord: m.LeaseRecord(kind="lease", epoch=_EPOCH, ttl_s=3.0, beat=412),
    m.Submit: m.Submit(prompt="What is the capital of France?", id=_TASK, max_tokens=64, deadline_s=30.0),
    m.CancelTask: m.CancelTask(task=_TASK),
    m.TaskStatus: _STATUS,
    m.TaskTokens: m.TaskTokens(task=_TASK, attempt=1, seq=0, text="The capital of", n_tokens=3),
    m.TaskResult: _RESULT,
    m.TaskReply: m.TaskReply(reply_to="edgemesh/home/client/me", correlation="42", body=_STATUS),
    m.TaskEvent: m.TaskEvent(text="desktop-91b0e4 finished t-5d1c0a9e77f2 in 0.4 s", task=_TASK),
}  # fmt: skip

_NOTES: dict[type, str] = {
    m.NodeState: "`online`, `draining` (finishes its tasks, takes no new ones), `offline` (the will) or `left` (a goodbye).",
    m.TaskStatus: "`node` is where it runs or ran, `attempt` counts its tries from 1, `durable_on` the nodes that have it on"
    " disk, and `budget_s` is the time left to the deadline when this was sent: devices share no clock, so no time of day"
    " ever travels.",
    m.TaskResult: "`finish_reason` is `stop` (the model ended, or a stop string came) or `length` (`max_tokens`). Times are in"
    " seconds: `queue_s` waiting, `service_s` being computed, `ttft_s` of that until the first token.",
    m.TaskReply: "See *Replies* below for how to ask for them.",
}

_STATES = {
    "queued": "Acknowledged: the task is on the disk of two nodes (`durable_on`; of one, where there is one) and"
    " will end.",
    "assigned": "A node has been told to run it.",
    "running": "That node runs it. After a failure of the node the task is queued again, as the next `attempt`.",
    "done": "**Final.** The result holds the whole answer.",
    "failed": "**Final.** It could not be computed; `reason` says why.",
    "rejected": "**Final.** The mesh does not take it; `reason` says what to change.",
    "expired": "**Final.** Its deadline passed first.",
    "cancelled": "**Final.** Somebody asked for its end; the result holds what there was of an answer.",
}

_REASONS = (
    ("`the submission is not readable: …`", "not UTF-8, not JSON, nested too deeply, NaN or Infinity"),
    ("`unknown field 'promt'; did you mean 'prompt'?`", "a misspelt field is refused, never ignored"),
    ("`max_tokens must be an integer, got a string`", "a field of the wrong type"),
    ("`value must be a positive, finite number, got -1.0`", "a field out of its range"),
    (
        "`give either 'prompt' (a string) or 'messages' (a list), and not both`",
        "nothing, or two things, to do",
    ),
    ("`prompt is empty: say what the model shall answer`", "only white space"),
    ("`reply_to must be a topic below edgemesh/home/client/ …`", "see *Replies*"),
    ("`no node serves model '…'; served here: …`", "ask for one of those, or leave `model` out"),
    ("`no node has adapter '…'; known here: …`", "as above"),
    ("`prompt and max_tokens (…) are longer than the context of … tokens`", "shorten one of them"),
    ("`id … is taken by a task with another body; use another id`", "an id stands for one body"),
    ("`the queue is full (… tasks); try again later`", "the mesh is overloaded"),
    ("`its deadline of … s passed …`", "state `expired`"),
    ("`given up after … attempts: …`", "state `failed`: every node that tried was lost or broke"),
)

STATEMENTS: tuple[str, ...] = (
    "Every topic is below `edgemesh/<mesh>/` and in the table above; ids are 1 to 63 of `a-z`, `0-9` and `-`, with"
    " no `-` at an end.",
    "A node publishes its retained topics again on every connect. Nothing exists only in the broker: an empty"
    " broker is full again as soon as the nodes are back.",
    "A node's last will is its `state` with `offline` and the `incarnation` of the session it belongs to. A reader"
    " ignores a state whose incarnation is lower than one it has seen.",
    "A node publishes only below its own `node/<id>/`, except for what its row says the coordinator or a worker"
    " publishes. Where the payload names the node or task, it is the one in the topic, or the message is dropped.",
    "The client id of a node is `<node>-<boot>`, so that two processes with one identity do not take each other's"
    " connection over.",
    "Readers of JSON ignore fields they do not know. A field `v`, where present, is the protocol version; a"
    " message of a version outside the reader's range is dropped.",
    "A submission with an unknown field is rejected, and so is one that cannot be read; the refusal goes to the"
    " task's `status` (under the given `id`, or a new one) and to `reply_to`, as far as they could be read.",
    "`queued` acknowledges: from then on the task ends in exactly one final state, whichever nodes fail.",
    "`id` is an idempotency key: the same body under the same id is the same task, and is answered again. Another"
    " body under a known id is rejected, and the known task does not notice.",
    "A reply carries the correlation data of its submission byte for byte (MQTT 5), and `correlation` in its JSON.",
    "A reply is only ever published below `edgemesh/<mesh>/client/`, or outside `edgemesh/` on a broker that the"
    " mesh does not host.",
    "The earlier of `deadline_s` and the message's remaining expiry interval is the task's deadline, counted from"
    " arrival at the coordinator.",
    "What the JSON says wins over the MQTT 5 properties.",
    "`stream` is QoS 0, with `seq` from 0 in each attempt; a higher `attempt` starts the text over. The result"
    " never needs the stream.",
    "`result` holds the complete answer. It may arrive more than once and is then the same.",
    "`status` and `result` are retained for about two minutes after the end and then cleared with an empty"
    " payload; on an MQTT 5 connection they also expire by themselves.",
    "A cancel's payload does not matter; it may be empty. Cancelling an ended or unknown task changes nothing.",
    "Of two coordinator records the one with the higher `epoch` (`term`, then `node`) counts. Commands of a lower"
    " epoch are refused by their receivers.",
    "A message that cannot be read costs its sender that message, and nobody else anything.",
    "MQTT 3.1.1 is enough for everything; MQTT 5 adds the response topic, correlation data and expiry.",
    "QoS 1 delivers at least once: every receiver takes a repetition for what it is.",
)
"""``EM-MQTT-01`` and so on; tests name the ones they hold up. A number is never used again for another."""


# ── docs/protocol.md ────────────────────────────────────────────────────────────────────────────────

_HEAD = """\
# The MQTT protocol of edgemesh

<!-- Written by `python -m mesh.topic_docs --write` from mesh/topics.py and mesh/messages. Do not edit. -->

Everything a mesh says goes over one MQTT broker, and everything a person or a program may want from it can be
had with plain `mosquitto_pub` and `mosquitto_sub`. This page is for them. Between nodes the same broker carries
msgpack on the inbox topics, which no client needs.

In the examples the mesh is called `home` and the client is on the machine of a node whose broker listens for
clients on `127.0.0.1:1883` without encryption (`edgemesh mqtt` prints the right host, port and, from anywhere else
on the network, the certificate options to add).

## In one minute

```sh
# in one terminal: everything that happens to tasks
mosquitto_sub -p 1883 -v -t 'edgemesh/home/task/+/status' -t 'edgemesh/home/task/+/result'

# in another: ask
mosquitto_pub -p 1883 -q 1 -t edgemesh/home/task/submit \\
  -m '{{"id": "my-first", "prompt": "What is the capital of France?", "max_tokens": 64}}'

# and while it is being written
mosquitto_sub -p 1883 -t edgemesh/home/task/my-first/stream
```

## The tree

```
edgemesh/<mesh>/
{tree}
```

R = retained, q = quality of service. Payloads are JSON (UTF-8), except in the inboxes.
"""

_SUBMIT = """\
#### Fields of a submission

Either `prompt` or `messages` is needed; everything else has a default.

| field | type | default | meaning |
|---|---|---|---|
| `prompt` | string | – | what the model shall go on from, put into its chat template as one user message |
| `messages` | list of `{{"role", "content"}}` | – | a conversation; roles `system`, `user`, `assistant` |
| `id` | string | made up | the task's name in all topics, and the idempotency key: send again freely |
| `max_tokens` | integer | 256 | at most {max_tokens} |
| `temperature` | number | 0 | 0 is greedy; at most 10 |
| `top_p` | number | 1 | above 0, at most 1 |
| `seed` | integer | – | the same seed draws the same answer on the same node |
| `stop` | list of strings | `[]` | end before any of these; at most {stop} |
| `deadline_s` | number | none | seconds from arrival until the *answer*; later it is worth nothing |
| `value` | number | 1 | what an answer in time is worth, in your own unit |
| `model`, `adapter` | string | any, none | by name; what there is stands in the nodes' `info` |
| `kind` | string | `generate` | what to do; there is one kind so far |
| `stream` | boolean | true | whether to publish tokens while they are made |
| `reply_to` | string | none | a topic for acknowledgement and result, see *Replies* |
| `correlation` | string | none | comes back with every reply |

An unknown field is refused by name, so a misspelling never changes what you asked for.
"""

_REPLIES = """\
## Replies: request and response

Every task can be followed by its id. A program that would rather hear about its own requests on a topic of its
own has two ways, which mean the same.

**MQTT 5** (`mosquitto_rr`, paho, aiomqtt, …): set the *response topic* and, if wanted, *correlation data*; both come
back as properties. The message's *expiry interval* is a deadline, too.

```sh
mosquitto_rr -p 1883 -V 5 -q 1 -t edgemesh/home/task/submit -e edgemesh/home/client/me \\
  -m '{"prompt": "What is the capital of France?", "stream": false}'
```

`mosquitto_rr` ends with the first reply, which is the acknowledgement; a program goes on listening for the result.

**MQTT 3.1.1**: name the topic in the JSON.

```sh
mosquitto_sub -p 1883 -t edgemesh/home/client/me &
mosquitto_pub -p 1883 -q 1 -t edgemesh/home/task/submit \\
  -m '{"prompt": "What is the capital of France?", "reply_to": "edgemesh/home/client/me", "correlation": "42"}'
```

A reply is the JSON of a `TaskStatus` or of a `TaskResult`, with its kind as `type` and with your `correlation`. There
are at least two: the acknowledgement (`queued`, or `rejected` with the reason) and the result.

The topic must be below `edgemesh/<mesh>/client/`: a submission must not be able to make the coordinator write where
only nodes may. With a broker of your own (`--broker`) it may be any topic outside `edgemesh/` as well. Correlation data
of up to 500 bytes comes back byte for byte; as JSON text it is itself, or `hex:…` where it is no printable text.
"""


def protocol_markdown() -> str:
    """``docs/protocol.md``."""
    tree = "\n".join(_tree_line(row) for row in TABLE if row is not REPLY)
    parts = [
        _HEAD.format(tree=tree + "\n" + f"{'client/…':<24}    q1  {_text(REPLY.why)}"),
        "## Topics\n",
        *(_section(row) for row in TABLE),
        _REPLIES,
        "## The states of a task\n",
        "```\nqueued ─▶ assigned ─▶ running ─▶ done · failed · cancelled · expired\n"
        "   ▲         │           │\n   └─────────┴───────────┘ the node was lost: the next attempt\n"
        "rejected: never queued\n```\n",
        "| state | meaning |\n|---|---|\n"
        + "".join(f"| `{name}` | {text} |\n" for name, text in _STATES.items()),
        "## Reasons\n",
        "`reason` is a sentence for people; programs look at `state`.\n",
        "| reason | when |\n|---|---|\n" + "".join(f"| {reason} | {when} |\n" for reason, when in _REASONS),
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
    if row is INBOX:
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
        lines.append(_SUBMIT.format(max_tokens=MAX_TOKENS_MAX, stop=f"{STOP_STRINGS_MAX} of 256 characters"))
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
    for strict in (m.Submit, m.ChatMessage):
        schemas[strict.__name__]["additionalProperties"] = False
    for row in TABLE:
        for kind in row.payload:
            if kind is m.TaskReply:
                continue
            version = {"type": "integer", "const": PROTOCOL, "description": "Protocol version."}
            schemas[kind.__name__]["properties"]["v"] = version
            if row is INBOX:
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
