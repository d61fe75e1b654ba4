"""Bytes and messages: what goes in comes out, and what is refused is refused in words."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from mesh.errors import DecodeError
from mesh.ids import Epoch, MeshName, NodeId, TaskId
from mesh.messages import (
    AdapterCard,
    Assign,
    AttemptEnded,
    ChatMessage,
    Drain,
    EpochSeen,
    FeaturesHeld,
    LeaseRecord,
    NodeReport,
    Outcome,
    Output,
    Submit,
    TaskEvent,
    TaskProgress,
    TaskRecord,
    TaskReply,
    TaskResult,
    TaskStatus,
    TaskTokens,
    TuneSpec,
    Unacceptable,
)
from mesh.messages.output import LABEL_BYTES_MAX, LABELS_MAX, NUMBERS_MAX, TEXTS_MAX
from mesh.messages.task import ANSWER_BYTES_MAX, MAX_TOKENS_MAX, PROMPT_BYTES_MAX, STOP_STRINGS_MAX
from mesh.messages.tune import INLINE_DATA_BYTES_MAX
from mesh.wire import (
    FRAME_BYTES_MAX,
    JSON_BYTES_MAX,
    MESH,
    PROTOCOL_MAX,
    Codec,
    correlation_bytes,
    correlation_text,
    decode_json,
    decode_reply,
    encode_json,
    encode_reply,
    read_submit,
    to_plain,
)

HOME = MeshName("home")
A = NodeId("pi-4")
EPOCH = Epoch(3, A)
OUTCOME = Outcome(
    state="done", text="Paris", finish_reason="stop", reason=None, node=A, attempt=1, epoch=EPOCH, ttft_s=0.1
)
STATUS = TaskStatus(
    task=TaskId("t-1"), state="queued", reason=None, node=None, attempt=0, epoch=EPOCH, durable_on=2
)


def read(body: Any = None, **properties: Any) -> Submit | Unacceptable:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_submit(payload, mesh=HOME, **properties)


def reason(body: Any, **properties: Any) -> str:
    refused = read(body, **properties)
    assert isinstance(refused, Unacceptable), refused
    return refused.reason


# ── between nodes ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "message",
    [
        Drain(on=True),
        EpochSeen(epoch=EPOCH),
        EpochSeen(epoch=Epoch(0, NodeId(""))),
        LeaseRecord(kind="claim", epoch=EPOCH, ttl_s=3, beat=0),
        AttemptEnded(task=TaskId("t-1"), attempt=1, epoch=EPOCH, outcome=OUTCOME),
        Assign(
            epoch=EPOCH,
            task=TaskId("t-1"),
            attempt=2,
            submit=Submit(messages=[ChatMessage(role="user", content="naïve 🙂")], stop=["\n"], seed=7),
            budget_s=1.5,
        ),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_comes_back_as_it_went(message: object) -> None:
    assert MESH.decode(MESH.encode(message)) == message
    assert decode_json(encode_json(message), type(message)) == message


def test_an_older_node_ignores_what_a_newer_one_adds() -> None:
    plain = {"type": "Drain", "v": 1, "on": True, "because": {"new": ["field"]}}
    assert MESH.decode(msgpack.packb(plain)) == Drain(on=True)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"type": "Drian", "v": 1, "on": True}, "unknown type of message 'Drian'"),
        ({"v": 1, "on": True}, "unknown type"),
        ({"type": ["Drain"], "v": 1}, "unknown type"),
        ({"type": "TaskReply", "v": 1}, "unknown type"),
        ({"type": "Drain", "v": PROTOCOL_MAX + 1, "on": True}, "protocol version 2"),
        ({"type": "Drain", "v": 0, "on": True}, "protocol version 0"),
        ({"type": "Drain", "v": True, "on": True}, "protocol version True"),
        ({"type": "Drain", "v": 1}, "on is missing"),
        ({"type": "Drain", "v": 1, "on": 1}, "on must be true or false, got an integer"),
        ({"type": "EpochSeen", "v": 1, "epoch": {"term": -1, "node": "a"}}, "epoch: term must be from 0"),
        ([1, 2], "named fields, got a list"),
        ("Drain", "named fields, got a string"),
    ],
)
def test_what_is_no_message_is_refused_in_words(plain: object, said: str) -> None:
    with pytest.raises(DecodeError) as refused:
        MESH.decode(msgpack.packb(plain))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81\xa1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\x81\xa1\xff\x01",
        b"\x81\xa3\xed\xa0\x80\x01",
        b"\x81\x90\x01",
        MESH.encode(Drain(on=True)) + b"\x00",
        MESH.encode(Drain(on=True))[:-1],
        bytes(FRAME_BYTES_MAX + 1),
    ],
    ids=[
        "nothing", "never used", "cut", "deep", "array bomb", "map bomb", "text bomb", "binary bomb",
        "timestamp", "no UTF-8", "surrogate", "list as key", "trailing", "truncated", "oversize",
    ],
)  # fmt: skip
def test_hostile_frames_are_decode_errors(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        MESH.decode(payload)


def test_no_number_is_nan_or_infinite_even_where_no_field_checks_it() -> None:
    report = NodeReport(
        node=A, incarnation=1, ready=True, activity="idle", running=0, cpu_percent=float("nan"),
        memory_free_bytes=1, rss_bytes=1, tokens_per_s=0.0,
    )  # fmt: skip
    with pytest.raises(DecodeError, match="finite"):
        MESH.decode(MESH.encode(report))


def test_the_largest_record_fits_one_frame() -> None:
    submit = Submit(
        messages=[ChatMessage(role="assistant", content="x" * (PROMPT_BYTES_MAX // 1024))] * 1024,
        id=TaskId("t" * 63),
        max_tokens=MAX_TOKENS_MAX,
        stop=["😀" * 256] * STOP_STRINGS_MAX,
        adapter="😀" * 200,
        model="😀" * 200,
        reply_to="x" * 512,
        correlation="x" * 1024,
        seed=2**53 - 1,
    )
    outcome = Outcome(**{**to_plain(OUTCOME), "epoch": EPOCH, "text": "x" * ANSWER_BYTES_MAX})
    record = TaskRecord(
        task=TaskId("t" * 63), submit=submit, digest="d" * 64, budget_s=1e9 / 3, outcome=outcome, epoch=EPOCH
    )
    assert MESH.decode(MESH.encode(record)) == record
    assert len(encode_json(submit)) < JSON_BYTES_MAX


@pytest.mark.parametrize("kind", ["embed", "classify", "tune"])
def test_the_largest_record_of_each_kind_fits_one_frame_and_its_result_one_json_message(kind: str) -> None:
    small = {"id": TaskId("t" * 63), "reply_to": "x" * 512, "correlation": "x" * 1024, "model": "😀" * 200}
    texts = ["x" * (PROMPT_BYTES_MAX // TEXTS_MAX)] * TEXTS_MAX
    label = "x" * (LABEL_BYTES_MAX // 2 // TEXTS_MAX)
    card = AdapterCard(
        name="a" * 63, digest="d" * 64, method="lora", top_layers=4, first_layer=26, bytes=10**9,
        task="classify", labels=["😀" * (LABEL_BYTES_MAX // LABELS_MAX // 4)] * LABELS_MAX, metric=0.1,
    )  # fmt: skip
    held = FeaturesHeld(
        top_layers=4, profile="x" * 512, n_tokens=10**9, n_bytes=10**12, sample_keys=["f" * 64] * 32
    )
    data = "x" * INLINE_DATA_BYTES_MAX
    numbers = [[-1.2345678901234567e-100] * (NUMBERS_MAX // TEXTS_MAX)] * TEXTS_MAX
    submit, output = {
        "embed": (Submit(kind="embed", texts=texts, **small), Output(vectors=numbers)),
        "classify": (
            Submit(kind="classify", texts=texts, adapter="😀" * 200, **small),
            Output(labels=[label] * TEXTS_MAX, classes=[label] * TEXTS_MAX, scores=numbers),
        ),
        "tune": (
            Submit(kind="tune", tune=TuneSpec(adapter="a", data=data, eval_data=data), **small),
            Output(adapter=card, features=held),
        ),
    }[kind]
    outcome = replace(OUTCOME, text="x" * 4096, output=output)
    record = TaskRecord(
        task=TaskId("t" * 63), submit=submit, digest="d" * 64, budget_s=1.5, outcome=outcome, epoch=EPOCH
    )
    frame = MESH.encode(record)
    assert MESH.decode(frame) == record
    assert len(frame) <= submit.n_text_bytes + outcome.n_bytes + 45 * 1024, "as the stores count it"
    result = TaskResult(
        task=TaskId("t"), state="done", text="x" * 4096, finish_reason=None, reason=None, node=A, attempt=1,
        epoch=EPOCH, n_prompt_tokens=1, n_tokens=1, queue_s=0.0, ttft_s=None, service_s=0.2, output=output,
    )  # fmt: skip
    assert decode_json(encode_json(result), TaskResult) == result


@pytest.mark.parametrize(
    "output",
    [
        {"vectors": [[0.5] * (NUMBERS_MAX + 1)]},
        {"labels": ["x"] * (TEXTS_MAX + 1)},
        {"classes": ["x"] * (LABELS_MAX + 1)},
        {"labels": ["x" * (LABEL_BYTES_MAX + 1)]},
    ],
)
def test_an_output_too_large_to_travel_is_none(output: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most"):
        Output(**output)


def test_an_older_worker_s_outcome_and_a_newer_one_s_progress_are_understood() -> None:
    plain = to_plain(OUTCOME)
    del plain["output"]
    ended = {
        "type": "AttemptEnded",
        "v": 1,
        "task": "t-1",
        "attempt": 1,
        "epoch": plain["epoch"],
        "outcome": plain,
    }
    message = MESH.decode(msgpack.packb(ended))
    assert isinstance(message, AttemptEnded) and message.outcome == OUTCOME
    newer = {"task": "t", "attempt": 1, "seq": 2, "phase": "training", "fraction": 0.5, "gpu": {"new": 1}}
    assert decode_json(json.dumps(newer).encode(), TaskProgress).fraction == 0.5


def test_what_is_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="a frame has at most"):
        MESH.encode(TaskEvent(text="x" * FRAME_BYTES_MAX))
    with pytest.raises(ValueError, match="larger than JSON may be"):
        encode_json(TaskEvent(text="x" * JSON_BYTES_MAX))


def test_a_codec_knows_only_its_own_kinds() -> None:
    small = Codec([Drain])
    with pytest.raises(DecodeError, match="unknown type"):
        small.decode(MESH.encode(EpochSeen(epoch=EPOCH)))


# ── submissions ─────────────────────────────────────────────────────────────────────────────────────


def test_the_smallest_submission_is_a_prompt() -> None:
    assert read({"prompt": "hi"}) == Submit(prompt="hi")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give either 'prompt' (a string) or 'messages' (a list), and not both"),
        ({"prompt": "  "}, "prompt is empty: say what the model shall answer"),
        ({"promt": "hi"}, "unknown field 'promt'; did you mean 'prompt'?"),
        ({"prompt": "hi", "deadline": 3}, "unknown field 'deadline'; did you mean 'deadline_s'?"),
        ({"prompt": "hi", "max_tokens": "4"}, "max_tokens must be an integer, got a string"),
        ({"prompt": "hi", "max_tokens": 4.5}, "max_tokens must be an integer, got a number"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens must be from 1 to 32768, got 0"),
        ({"prompt": "hi", "max_tokens": 10**30}, "max_tokens must be from 1 to 32768"),
        ({"prompt": 5}, "prompt must be a string or null, got an integer"),
        ({"prompt": "hi", "value": 0}, "value must be a positive, finite number, got 0"),
        ({"prompt": "hi", "value": -1}, "value must be a positive, finite number, got -1"),
        ({"prompt": "hi", "deadline_s": -3}, "deadline_s must be a positive, finite number, got -3"),
        (
            {"prompt": "hi", "kind": "tuen"},
            "kind must be 'generate' or 'score' or 'classify' or 'embed' or 'tune'",
        ),
        ({"prompt": "hi", "kind": "tune"}, "a tune task takes 'tune', not 'prompt' or 'messages'"),
        ({"kind": "tune"}, "a tune task needs 'tune': what to train"),
        ({"kind": "tune", "tune": {"adaptor": "x"}}, "unknown field 'tune.adaptor'; did you mean 'adapter'?"),
        ({"kind": "tune", "tune": {"adapter": "x"}}, "give the records either in 'data' or by 'data_sha256'"),
        ({"kind": "tune", "tune": {"data": "{}"}}, "tune.adapter is missing"),
        ({"kind": "tune", "tune": {"adapter": "../x", "data": "{}"}}, "adapter must be 1 to 63 of a-z"),
        (
            {"kind": "tune", "tune": {"adapter": "x", "data": "{}", "task": "guess"}},
            "tune.task must be 'classify'",
        ),
        ({"prompt": "hi", "tune": {"adapter": "x", "data": "{}"}}, "'tune' needs kind 'tune'"),
        ({"kind": "classify", "texts": ["hi"]}, "a classify task needs 'adapter'"),
        ({"kind": "classify", "adapter": "x"}, "a classify task needs 'texts' (a list of strings)"),
        ({"prompt": "hi", "texts": ["hi"]}, "a generate task takes no 'texts'"),
        ({"kind": "embed", "texts": ["hi", " "]}, "texts takes 1 to 256 strings that are not empty"),
        ({"kind": "embed", "texts": ["hi"] * 257}, "texts takes 1 to 256 strings"),
        (
            {"kind": "score", "prompt": "x" * 200_000, "texts": ["y" * 100_000]},
            "together must be at most 262144",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role must be 'system' or 'user' or"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "text": "x"}]}, "unknown field 'messages[0].text'"),
        ({"messages": ["hi"]}, "messages[0] must be an object, got a string"),
        ({"prompt": "hi", "stop": "x"}, "stop must be a list, got a string"),
        ({"prompt": "hi", "id": "Not An Id"}, "id must be 1 to 63 of a-z, 0-9 and '-'"),
        ({"prompt": "hi", "v": 2}, "protocol version 2"),
        ({"prompt": "hi", "reply_to": 5}, "reply_to must be a string, got a number"),
        ({"prompt": "hi", "reply_to": "a/#"}, "reply_to must be a plain topic"),
        ({"prompt": "x" * 300_000}, "prompt must be at most 262144 bytes of UTF-8"),
        (["hi"], "not readable: a message is an object with named fields, got a list"),
        (b"hello", "not readable: JSON is malformed"),
        (b'{"prompt":', "not readable: the JSON ends too early"),
        (b'{"prompt": "hi", "value": NaN}', "JSON has no NaN and no Infinity"),
        (b'{"prompt": "hi", "value": 1e999}', "out of range"),
        (b'{"prompt": "\xff"}', "not readable: the text is not UTF-8"),
        (b'{"prompt": "hi"} {}', "trailing"),
        (b"[" * 1_000_000, "not readable: nested too deeply"),
        (b" " * (JSON_BYTES_MAX + 1), "at most 1500000 are read"),
        (b"", "not readable"),
    ],
)
def test_a_bad_submission_is_refused_with_advice(body: object, said: str) -> None:
    assert said in reason(body)


def test_a_refusal_still_finds_its_sender() -> None:
    body = {"id": "t-1", "promt": "hi", "reply_to": "edgemesh/home/client/me", "correlation": "7"}
    assert read(body) == Unacceptable(
        reason="unknown field 'promt'; did you mean 'prompt'?",
        id=TaskId("t-1"),
        reply_to="edgemesh/home/client/me",
        correlation="7",
    )
    refused = read(b"nonsense", response_topic="edgemesh/home/client/me", correlation=b"7")
    assert isinstance(refused, Unacceptable)
    assert (refused.id, refused.reply_to, refused.correlation) == (None, "edgemesh/home/client/me", "7")


def test_a_refusal_repeats_no_more_than_a_line_of_what_was_sent() -> None:
    assert len(reason({"prompt": "hi", "x" * 100_000: 1})) <= 400
    assert len(reason({"prompt": "hi", "kind": "x" * 100_000})) <= 400
    assert len(reason({"prompt": "hi", "id": "x" * 100_000})) <= 400


@pytest.mark.parametrize(
    "topic",
    [
        "edgemesh/home/node/pi-4/state",
        "edgemesh/home/coordinator",
        "edgemesh/home/task/submit",
        "edgemesh/home/client/",
        "edgemesh/other/client/me",
        "edgemesh",
        "edgemesh/",
        "$SYS/broker",
        "a/+/b",
        "a\x00b",
        "",
    ],
)
@pytest.mark.parametrize("by", ["json", "property"])
def test_no_submission_makes_the_coordinator_write_where_it_should_not(topic: str, by: str) -> None:
    """EM-MQTT-11."""
    refused = (
        read({"prompt": "hi", "reply_to": topic})
        if by == "json"
        else read({"prompt": "hi"}, response_topic=topic)
    )
    assert isinstance(refused, Unacceptable)
    assert "reply_to" in refused.reason and refused.reply_to is None


def test_replies_outside_our_tree_only_on_a_broker_that_is_not_ours() -> None:
    """EM-MQTT-11."""
    body = {"prompt": "hi", "reply_to": "my/answers"}
    assert read(body) == Submit(prompt="hi", reply_to="my/answers")
    assert "must be a topic below edgemesh/home/client/" in reason(body, replies_anywhere=False)
    inside = {"prompt": "hi", "reply_to": "edgemesh/home/client/me"}
    assert read(inside, replies_anywhere=False) == Submit(**inside)


def test_mqtt5_properties_stand_in_for_what_the_json_leaves_out() -> None:
    """EM-MQTT-13."""
    assert read({"prompt": "hi"}, response_topic="r", correlation=b"\xff") == Submit(
        prompt="hi", reply_to="r", correlation="hex:ff"
    )
    both = {"prompt": "hi", "reply_to": "mine", "correlation": "7"}
    assert read(both, response_topic="r", correlation=b"x") == Submit(**both)
    nothing = {"prompt": "hi", "reply_to": None, "correlation": None}
    assert read(nothing, response_topic="r") == Submit(prompt="hi", reply_to="r")
    assert "at most 500 bytes" in reason({"prompt": "hi"}, correlation=bytes(501))


@pytest.mark.parametrize(
    ("deadline_s", "expiry_s", "is_then"),
    [(None, 5, 5), (3, 5, 3), (9, 5, 5), (3, None, 3), (None, None, None)],
)
def test_the_earlier_of_deadline_and_expiry_counts(
    deadline_s: float | None, expiry_s: float | None, is_then: float | None
) -> None:
    """EM-MQTT-12."""
    submit = read({"prompt": "hi", "deadline_s": deadline_s}, expiry_s=expiry_s)
    assert isinstance(submit, Submit) and submit.deadline_s == is_then


def test_an_expired_submission_is_refused() -> None:
    assert "expired" in reason({"prompt": "hi"}, expiry_s=0)


@pytest.mark.parametrize(
    "data", [b"", b"7", "grüße".encode(), b"\xff\x00", b"hex:ff", b"hex:zz", b"a\nb", bytes(range(256))]
)
def test_correlation_data_comes_back_byte_for_byte(data: bytes) -> None:
    """EM-MQTT-10."""
    assert correlation_bytes(correlation_text(data)) == data


def test_correlation_from_json_travels_as_it_was_written() -> None:
    assert correlation_bytes("hex:zz") == b"hex:zz"


@pytest.mark.parametrize("kind", ["status", "result"])
def test_a_reply_says_what_it_is_and_whose(kind: str) -> None:
    result = TaskResult(
        task=TaskId("t-1"), state="done", text="hi", finish_reason="stop", reason=None, node=A, attempt=1,
        epoch=EPOCH, n_prompt_tokens=1, n_tokens=1, queue_s=0.0, ttft_s=None, service_s=0.2,
    )  # fmt: skip
    body = STATUS if kind == "status" else result
    payload = encode_reply(TaskReply(reply_to="r", correlation="7", body=body))
    assert decode_reply(payload) == (body, "7")
    assert json.loads(payload)["type"] == type(body).__name__
    with pytest.raises(DecodeError, match="a reply is"):
        decode_reply(encode_json(body))


def test_public_json_is_what_a_person_would_expect() -> None:
    payload = encode_json(TaskTokens(task=TaskId("t-1"), attempt=1, seq=0, text="né", n_tokens=1))
    assert payload.decode() == '{"v":1,"task":"t-1","attempt":1,"seq":0,"text":"né","n_tokens":1}'


def test_every_field_of_a_submission_has_a_sentence_for_a_wrong_type() -> None:
    assert "tune must be an object or null, got a list" in reason({"kind": "tune", "tune": []})
    assert "features must be an object or null, got a list" in reason({"kind": "features", "features": []})
    for field in fields(Submit):
        if field.name in ("tune", "features"):
            continue
        said = reason({"prompt": "hi", field.name: {}})
        assert said.startswith(f"{field.name} must be ") and "got an object" in said, said


def test_every_field_of_what_to_tune_has_a_sentence_for_a_wrong_type() -> None:
    for field in fields(TuneSpec):
        if field.name == "part":  # an object itself, whose first missing field is named
            continue
        said = reason({"kind": "tune", "tune": {"adapter": "x", "data": "{}", field.name: {}}})
        assert said.startswith(f"tune.{field.name} must be ") and "got an object" in said, said
