"""Every decoder meets hostile bytes: ``DecodeError`` and nothing else, in bounded memory.

The examples are drawn by Hypothesis; what it once found stays in ``tests/unit/test_wire.py`` by name.
"""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import fields
from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import DecodeError
from mesh.ids import Epoch, MeshName, NodeId, TaskId
from mesh.messages import (
    AdapterCard,
    Assign,
    AttemptEnded,
    AttemptId,
    CatalogueDelta,
    CatalogueWhole,
    ChatMessage,
    FeaturesHeld,
    Inventory,
    LeaseRecord,
    NodeState,
    Outcome,
    Output,
    RingRecord,
    Submit,
    TaskProgress,
    TaskRecord,
    TaskStatus,
    TuneSpec,
    Unacceptable,
)
from mesh.packets import Packet, read
from mesh.topics import TABLE
from mesh.transport.bus import Heard
from mesh.wire import (
    FRAME_BYTES_MAX,
    JSON_BYTES_MAX,
    MESH,
    correlation_bytes,
    correlation_text,
    decode_json,
    decode_reply,
    encode_json,
    read_submit,
)

HOME = MeshName("home")
A = NodeId("pi-4")
T = TaskId("t-1")

# Enough to find what is likely within a few seconds; raise it to hunt.
EXAMPLES = settings(max_examples=100, deadline=None)

epochs = st.builds(
    Epoch, st.integers(1, 2**53 - 1), st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).map(NodeId)
)
texts = st.text(max_size=200).filter(lambda text: text.strip() != "")
# What survives UTF-8: a lone surrogate is no text.
plain_texts = texts.filter(lambda text: text.isascii() or text.encode("utf-8", "ignore").decode() == text)
names = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True)
numbers = st.floats(-1e9, 1e9)
specs = st.builds(
    TuneSpec,
    adapter=names,
    task=st.sampled_from(["classify", "chat", "complete"]),
    data=plain_texts,
    eval_data=st.none() | plain_texts,
    holders=st.lists(names.map(NodeId), max_size=3),
    skip_bad=st.booleans(),
    method=names,
    top_layers=st.none() | st.integers(1, 1024),
    targets=st.lists(names, max_size=3),
    rank=st.integers(1, 1024),
    learning_rate=st.none() | st.floats(1e-9, 1),
    feature_error=st.floats(0, 1, exclude_max=True),
)
outputs = st.one_of(
    st.builds(Output, labels=st.lists(plain_texts, max_size=3), classes=st.lists(plain_texts, max_size=3)),
    st.builds(Output, scores=st.lists(st.lists(numbers, max_size=3), max_size=3)),
    st.builds(Output, vectors=st.lists(st.lists(numbers, max_size=3), max_size=3)),
    st.builds(
        Output,
        adapter=st.builds(
            AdapterCard,
            name=names,
            digest=names,
            method=names,
            top_layers=st.integers(1, 99),
            first_layer=st.integers(0, 99),
            bytes=st.integers(0, 2**53 - 1),
            task=names,
            labels=st.lists(plain_texts, max_size=3),
            metric=st.none() | numbers,
        ),
        features=st.none()
        | st.builds(
            FeaturesHeld,
            top_layers=st.integers(1, 99),
            profile=names,
            n_tokens=st.integers(0, 2**53 - 1),
            n_bytes=st.integers(0, 2**53 - 1),
            sample_keys=st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=32),
            n_found=st.integers(0, 2**53 - 1),
            fetch_s=st.floats(0, 1e9),
        ),
    ),
)
submits = st.one_of(
    st.builds(Submit, kind=st.just("tune"), tune=specs),
    st.builds(
        Submit, kind=st.just("classify"), adapter=names, texts=st.lists(plain_texts, min_size=1, max_size=3)
    ),
    st.builds(
        Submit, kind=st.just("score"), prompt=plain_texts, texts=st.lists(plain_texts, min_size=1, max_size=3)
    ),
    st.builds(
        Submit,
        prompt=plain_texts,
        max_tokens=st.integers(1, 32_768),
        temperature=st.floats(0, 10),
        seed=st.none() | st.integers(0, 2**53 - 1),
        deadline_s=st.none() | st.floats(1e-3, 1e9),
        value=st.floats(1e-9, 1e9),
    ),
    st.builds(Submit, messages=st.lists(st.builds(ChatMessage, content=plain_texts), min_size=1, max_size=4)),
)
outcomes = st.builds(
    Outcome,
    state=st.sampled_from(["done", "failed", "rejected", "expired", "cancelled"]),
    text=plain_texts,
    finish_reason=st.none() | st.sampled_from(["stop", "length"]),
    reason=st.none() | plain_texts,
    node=st.just(A),
    attempt=st.integers(1, 1000),
    epoch=epochs,
    n_tokens=st.integers(0, 32_768),
    queue_s=st.floats(0, 1e6),
    ttft_s=st.none() | st.floats(0, 1e6),
    service_s=st.floats(0, 1e6),
    output=st.none() | outputs,
)
records = st.builds(
    TaskRecord,
    task=st.just(T),
    submit=submits,
    digest=st.just("d"),
    budget_s=st.none() | st.floats(0, 1e9),
    outcome=st.none() | outcomes,
    epoch=epochs,
    age_s=st.floats(0, 1e9),
    settled_s=st.floats(0, 1e9),
)
messages = st.one_of(
    records,
    st.builds(
        TaskProgress,
        task=st.just(T),
        attempt=st.integers(1, 1000),
        seq=st.integers(0, 2**53 - 1),
        phase=st.sampled_from(["reading", "features", "choosing", "training", "saving"]),
        fraction=st.floats(0, 1),
        loss=st.none() | numbers,
        eta_s=st.none() | st.floats(0, 1e9),
        text=plain_texts,
    ),
    st.builds(
        Assign,
        epoch=epochs,
        task=st.just(T),
        attempt=st.integers(1, 1000),
        submit=submits,
        budget_s=st.none(),
        queue_s=st.floats(0, 1e9),
    ),
    st.builds(
        Inventory,
        epoch=epochs,
        records=st.lists(records, max_size=3),
        running=st.lists(
            st.builds(AttemptId, task=st.just(T), attempt=st.integers(1, 1000), epoch=epochs), max_size=3
        ),
        ended=st.lists(
            st.builds(
                AttemptEnded, task=st.just(T), attempt=st.integers(1, 1000), epoch=epochs, outcome=outcomes
            ),
            max_size=2,
        ),
        is_last=st.booleans(),
        round=st.integers(0, 9),
        part=st.integers(0, 9),
    ),
    st.builds(
        LeaseRecord,
        kind=st.sampled_from(["claim", "lease", "resigned"]),
        epoch=epochs,
        ttl_s=st.floats(0.1, 100),
        beat=st.integers(0, 2**53 - 1),
    ),
    st.builds(
        NodeState,
        node=st.just(A),
        state=st.sampled_from(["online", "draining", "offline", "left"]),
        incarnation=st.integers(0, 2**53 - 1),
        boot=st.just("b1"),
    ),
    st.builds(
        RingRecord,
        epoch=epochs,
        change=st.integers(0, 2**53 - 1),
        quotas=st.dictionaries(names.map(NodeId), st.integers(1, 2**53 - 1), max_size=4),
    ),
    st.builds(
        CatalogueWhole,
        life=st.integers(0, 2**48),
        version=st.integers(0, 2**53 - 1),
        salt=st.integers(0, 2**32 - 1),
        n_keys=st.integers(0, 409),
        bits=st.binary(min_size=512, max_size=512),
    ),
    st.builds(
        CatalogueDelta,
        life=st.integers(0, 2**48),
        version=st.integers(1, 2**53 - 1),
        n_keys=st.integers(0, 409),
        flips=st.binary(max_size=20).map(lambda bits: 3 * bits),
    ),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


def refuses_or_understands(payload: bytes) -> object | None:
    """The message in ``payload``, or ``None``; anything but ``DecodeError`` fails the test."""
    try:
        return MESH.decode(payload)
    except DecodeError as error:
        assert str(error), "every refusal says something"
        return None


def read_everywhere(payload: bytes, **properties: Any) -> None:
    """As a packet on every topic there is."""
    for row in TABLE:
        topic = "x/y" if row.name == "REPLY" else row.topic(HOME, node=A, to=A, task=T)
        packet = Packet(topic=topic, payload=payload, qos=1, **properties)
        try:
            heard = read(packet, mesh=HOME)
        except DecodeError as error:
            assert str(error)
            continue
        assert heard is None or isinstance(heard, Heard)


@EXAMPLES
@given(messages)
def test_what_is_encoded_is_decoded_the_same(message: object) -> None:
    assert MESH.decode(MESH.encode(message)) == message
    assert decode_json(encode_json(message), type(message)) == message


@EXAMPLES
@given(st.binary(max_size=2000))
def test_random_bytes(payload: bytes) -> None:
    assert refuses_or_understands(payload) is None
    read_everywhere(payload)


@EXAMPLES
@given(messages, st.integers(0), st.lists(st.tuples(st.integers(0), st.integers(0, 7)), max_size=8))
def test_flipped_bits_and_cut_ends(message: object, cut: int, flips: list[tuple[int, int]]) -> None:
    for payload in (MESH.encode(message), encode_json(message)):
        broken = bytearray(payload)
        for at, bit in flips:
            broken[at % len(broken)] ^= 1 << bit
        refuses_or_understands(bytes(broken))
        read_everywhere(bytes(broken))
        refuses_or_understands(bytes(broken[: cut % len(broken)]))
        read_everywhere(bytes(broken[: cut % len(broken)]))


@EXAMPLES
@given(plain)
def test_any_plain_data_that_is_no_message(value: object) -> None:
    assert refuses_or_understands(msgpack.packb(value, unicode_errors="surrogatepass")) is None


@EXAMPLES
@given(messages, st.data())
def test_a_field_of_the_wrong_type_or_nan(message: Any, data: st.DataObject) -> None:
    plain_message = msgpack.unpackb(MESH.encode(message))
    name = data.draw(st.sampled_from([field.name for field in fields(message)]))
    plain_message[name] = data.draw(plain | st.sampled_from([math.nan, math.inf, -math.inf, -1, 2**64 - 1]))
    got = refuses_or_understands(msgpack.packb(plain_message, unicode_errors="surrogatepass"))
    if got is not None:  # by chance a value the field may have: then it is a message like any other
        assert MESH.decode(MESH.encode(got)) == got
        assert not _holds_nan(msgpack.unpackb(MESH.encode(got)))


def _holds_nan(value: Any) -> bool:
    match value:
        case float(number):
            return not math.isfinite(number)
        case dict(items):
            return any(map(_holds_nan, items.values()))
        case list(items):
            return any(map(_holds_nan, items))
    return False


@EXAMPLES
@given(
    st.dictionaries(st.sampled_from([field.name for field in fields(Submit)]) | st.text(), plain, max_size=5),
    st.none() | st.text(max_size=30),
    st.none() | st.binary(max_size=600),
    st.none() | st.integers(0, 2**32 - 1),
)
def test_a_submission_is_read_or_refused_never_more(
    body: dict[str, Any], response_topic: str | None, correlation: bytes | None, expiry_s: int | None
) -> None:
    payload = json.dumps(body, default=repr).encode("utf-8", "surrogatepass")
    read_one = read_submit(
        payload, mesh=HOME, response_topic=response_topic, correlation=correlation, expiry_s=expiry_s
    )
    assert isinstance(read_one, Submit | Unacceptable)
    if isinstance(read_one, Unacceptable):
        assert read_one.reason and len(read_one.reason) <= 400
    MESH.encode(read_one)
    read_everywhere(payload, response_topic=response_topic, correlation=correlation, expiry_s=expiry_s)


@EXAMPLES
@given(st.binary(max_size=500))
def test_correlation_data_survives_the_way_through_the_mesh(data: bytes) -> None:
    assert correlation_bytes(correlation_text(data)) == data


@pytest.mark.parametrize("depth", [100, 1000, 10_000, 500_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x", b"[", b'{"x":'])
def test_nesting_of_any_depth(opening: bytes, depth: int) -> None:
    payload = (opening * depth)[:FRAME_BYTES_MAX]
    assert refuses_or_understands(payload) is None
    read_everywhere(payload)
    with pytest.raises(DecodeError):
        decode_reply(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd" + (FRAME_BYTES_MAX - 5).to_bytes(4, "big") + b"\x80" * (FRAME_BYTES_MAX - 5),
        b"\xdc\xff\xff" + (b"\x97" + b"\x80" * 7) * (FRAME_BYTES_MAX // 8 - 1),
        b"\xdd\xff\xff\xff\xff" * 100,
        b"\xc6\xff\xff\xff\xff" + bytes(100),
        b"[" + b"{}," * (JSON_BYTES_MAX // 3 - 1) + b"0]",
        b'{"x":"' + b"\\u0000" * (JSON_BYTES_MAX // 6 - 10) + b'"}',
        bytes(FRAME_BYTES_MAX + 1),
        bytes(JSON_BYTES_MAX + 1),
    ],
    ids=["maps", "lists of maps", "huge lists", "huge binary", "JSON objects", "JSON text", "frame", "JSON"],
)
def test_hostile_sizes_stay_within_memory(payload: bytes) -> None:
    tracemalloc.start()
    try:
        refuses_or_understands(payload)
        assert isinstance(read_submit(payload, mesh=HOME), Unacceptable)
        with pytest.raises(DecodeError):
            decode_json(payload, TaskStatus)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 1024 * 1024, "64 bytes for each byte of a frame is the worst msgpack can do"


def test_every_single_bit_flip_of_one_real_status_is_harmless() -> None:
    status = TaskStatus(
        task=T, state="queued", reason=None, node=A, attempt=1, epoch=Epoch(3, A), durable_on=2, budget_s=1.5
    )
    for payload in (MESH.encode(status), encode_json(status)):
        for bit in range(len(payload) * 8):
            broken = bytearray(payload)
            broken[bit // 8] ^= 1 << bit % 8
            refuses_or_understands(bytes(broken))
            packet = Packet(topic=f"edgemesh/home/task/{T}/status", payload=bytes(broken), qos=1)
            try:
                heard = read(packet, mesh=HOME)
            except DecodeError:
                continue
            assert heard is not None and heard.message.task == T


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_start_like_msgpack_maps(seed: int) -> None:
    rng = Random(seed)
    for _ in range(100):
        head = b"\x85\xa4type\xa6Assign\xa1v\x01"
        refuses_or_understands(head + rng.randbytes(rng.randrange(200)))
