"""The sentences of ``docs/protocol.md`` that are written by hand; ``mesh.topic_docs`` puts them between what
the topic table and the message classes say.
"""

# ruff: noqa: E501  (tables and paragraphs of Markdown)

from __future__ import annotations

__all__ = ["HEAD", "REASONS", "REPLIES", "STATEMENTS", "STATES", "SUBMIT"]

HEAD = """\
# The MQTT protocol of edgemesh

<!-- Written by `python -m mesh.topic_docs --write` from mesh/topics.py and mesh/messages. Do not edit. -->

Everything a mesh says goes over one MQTT broker, and everything a person or a program may want from it can be
had with plain `mosquitto_pub` and `mosquitto_sub`. This page is for them. Between nodes the same broker carries
msgpack on the inbox and catalogue topics, which no client needs.

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

R = retained, q = quality of service. Payloads are JSON (UTF-8), except in inboxes and catalogues.
"""

SUBMIT = """\
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
| `kind` | string | `generate` | `generate`, `score`, `classify`, `embed`, `tune` or `features`, see *Kinds of tasks* |
| `texts` | list of strings | – | inputs of `score`, `classify`, `embed`: 1 to {texts}, {text_bytes} together |
| `tune` | object | – | what to train, for `tune` and `features` |
| `features` | object | – | how texts will be read, for `features` without `tune`: `top_layers`, `reads` (a kind) |
| `stream` | boolean | true | whether to publish tokens and progress while they are made |
| `reply_to` | string | none | a topic for acknowledgement and result, see *Replies* |
| `correlation` | string | none | comes back with every reply |

An unknown field is refused by name, so a misspelling never changes what you asked for.

#### Kinds of tasks

| `kind` | it takes | the result's `output` has |
|---|---|---|
| `generate` | `prompt` or `messages` | nothing: the answer is `text` |
| `score` | `texts`, and perhaps `prompt` or `messages` before each of them | `scores`: the log-probability of each token of each text |
| `classify` | `texts` and `adapter`, a classifier | `labels`, one a text; `classes` and their probabilities in `scores` |
| `embed` | `texts` | `vectors`: a unit vector for each text |
| `tune` | `tune` | `adapter`: name, digest, method, layers, size and metric of what was trained |
| `features` | `tune`, or `texts` and `features` | `features`: how many tokens' feature maps the mesh now has for it, and in which numerics |

`output` has no more than {numbers} numbers.

#### Tuning

```sh
mosquitto_pub -p 1883 -q 1 -t edgemesh/home/task/submit \\
  -m '{{"id": "spam-1", "kind": "tune", "tune": {{"adapter": "spam", "task": "classify", "data": "{{\\"text\\": \\"Win a prize\\", \\"label\\": \\"spam\\"}}\\n{{\\"text\\": \\"See you at six\\", \\"label\\": \\"ham\\"}}"}}}}'

# how far it is
mosquitto_sub -p 1883 -t edgemesh/home/task/spam-1/progress

# and use it
mosquitto_pub -p 1883 -q 1 -t edgemesh/home/task/submit \\
  -m '{{"kind": "classify", "adapter": "spam", "texts": ["You have won"]}}'
```

`data` holds records, one JSON object a line: `{{"text", "label"}}` to `classify`, `{{"prompt", "completion"}}` to
`complete`, `{{"messages": [{{"role", "content"}}, …]}}` to `chat`. A line that cannot be read ends the job before any
work, with its number in `reason`, unless `skip_bad` is true. The same task on the same data gives the same
adapter, to the bit, also after an interruption.

| field | type | default | meaning |
|---|---|---|---|
| `adapter` | string | – | its name: 1 to 63 of `a-z`, `0-9`, `-` |
| `task` | string | `classify` | `classify`, `chat` or `complete` |
| `data` | string | – | the records, up to {data_bytes} |
| `data_sha256`, `holders` | string, list of nodes | – | instead of `data`: the digest of a file that these nodes keep (`edgemesh tune` does it) |
| `eval_data`, `eval_sha256` | string | – | records never trained on: how the adapter does on them is its `metric` |
| `skip_bad` | boolean | false | leave out lines that cannot be read |
| `method` | string | `lora` | a PEFT method; a wrong one is told all there are |
| `top_layers` | integer | chosen | how many layers at the top are adapted |
| `targets` | list of strings | the method's | modules to adapt, such as `q_proj` |
| `rank`, `alpha` | integer, number | 8, twice the rank | size and scale of the low-rank update |
| `epochs`, `batch` | integer | 5, 16 | passes over the data, records a step |
| `learning_rate` | number | the method's | |
| `seed` | integer | 0 | of order and initial weights |
| `max_tokens` | integer | 512 | a longer record is cut |
| `feature_error` | number | 0 | largest relative error accepted in a cached feature map; 0 keeps them exact |
| `nodes` | integer | 1 | trained in so many parts at once, averaged after each epoch; another number is another adapter |
| `part` | – | – | the coordinator's own: leave it out |
"""

REPLIES = """\
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


STATES = {
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

REASONS = (
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
    (
        "`no node has adapter '…': those there are: …`",
        "name one of those, or train it (`kind` `tune`); also the reason of a task that waits for it",
    ),
    ("`line 7: …`", "a tuning task's data: what is wrong, by line; `skip_bad` leaves such lines out"),
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
    "`progress` is QoS 0, with `seq` from 0 in each attempt; of one attempt the highest `seq` counts, of two the"
    " higher `attempt`. An interrupted tuning task goes on where its last attempt saved its state.",
    "`explain` is answered with `why`, also for an unknown task; its payload does not matter. A question that comes"
    " while nobody coordinates is not answered: ask again. Nothing is decided otherwise for having been asked.",
)
"""``EM-MQTT-01`` and so on; tests name the ones they hold up. A number is never used again for another."""
