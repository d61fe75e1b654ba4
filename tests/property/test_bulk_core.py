"""The pure core of bulk transfer: any cut, any order, any holder that fails; and bytes from strangers."""

from __future__ import annotations

import contextlib
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.cache.ring import RingEpoch
from mesh.digests import digest_of
from mesh.errors import DecodeError
from mesh.ids import Epoch, NodeId
from mesh.transport.bulk.answers import HEAD_BYTES_MAX, Answer, AnswerReader
from mesh.transport.bulk.blobs import BLOCK_BYTES_MAX, KEYS_MAX, Block, PutVerdict, parse_view
from mesh.transport.bulk.frames import (
    COUNT_BYTES,
    OFFER_BYTES,
    ROW_BYTES,
    BlockStatus,
    Offer,
    Row,
    decode_count,
    decode_keys,
    decode_offers,
    decode_rows,
    decode_verdicts,
    encode_keys,
    encode_offers,
    encode_rows,
)
from mesh.transport.bulk.ranges import STRIKES_MAX, Fault, Flight, Gathering, Spans
from mesh.transport.bulk.waits import WaitConfig, Waits, p95

HOLDERS = [NodeId(name) for name in ("ann", "bob", "cid")]
SPAN = st.tuples(st.integers(0, 60), st.integers(0, 60))


# ── sets of positions ───────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.booleans(), SPAN), max_size=30), SPAN)
def test_spans_are_a_set_of_positions(
    steps: list[tuple[bool, tuple[int, int]]], where: tuple[int, int]
) -> None:
    spans, obvious = Spans(), set[int]()
    for adds, (start, stop) in steps:
        if adds:
            spans.add(start, stop)
            obvious |= set(range(start, stop))
        elif start < stop:
            spans.remove(start, stop)
            obvious -= set(range(start, stop))
        listed = list(spans)
        assert {at for a, b in listed for at in range(a, b)} == obvious
        assert len(spans) == len(obvious)
        assert all(b < c for (_, b), (c, _) in pairwise(listed)), "sorted, none touch"
    gaps = spans.gaps(*where)
    assert {at for a, b in gaps for at in range(a, b)} == set(range(*where)) - obvious


# ── gathering ───────────────────────────────────────────────────────────────────────────────────────


class _Fetch:
    """Plays a whole fetch against a blob, with the moves hypothesis chooses. ``written`` is the sink."""

    def __init__(self, size: int, range_bytes: int) -> None:
        self.blob = random.Random(size).randbytes(size)
        self.gathering = Gathering(size, HOLDERS, range_bytes)
        self.written: list[int | None] = [None] * size
        self.flights: list[Flight] = []
        self.n_asked = 0
        self.now = 0.0

    def begin(self, holder: NodeId, patience_s: float = 5.0) -> bool:
        flight = self.gathering.begin(holder, self.now, patience_s)
        if flight is None:
            return False
        assert 0 <= flight.start < flight.stop <= len(self.blob)
        self.flights.append(flight)
        self.n_asked += flight.n_left
        return True

    def end(self, flight: Flight, n_bytes: int, fault: Fault | None) -> None:
        for start, stop in self.gathering.news(flight, n_bytes):
            for at in range(start, stop):
                assert self.written[at] is None, "no byte is written twice"
                self.written[at] = self.blob[at]
        self.gathering.arrived(flight, n_bytes)
        self.flights.remove(flight)
        self.gathering.ended(flight, fault)

    def check(self) -> None:
        n_had = sum(byte is not None for byte in self.written)
        assert self.gathering.n_had == n_had
        assert self.gathering.is_complete == (n_had == len(self.blob))


@settings(deadline=None)
@given(st.data(), st.integers(0, 200), st.integers(1, 40))
def test_whatever_breaks_a_blob_is_whole_as_long_as_one_holder_is_good(
    data: st.DataObject, size: int, range_bytes: int
) -> None:
    """Any cut, any order of ranges: after the trouble, one honest holder completes it."""
    fetch = _Fetch(size, range_bytes)
    for _ in range(data.draw(st.integers(0, 30))):
        fetch.now += data.draw(st.floats(0, 10))
        if fetch.flights and data.draw(st.booleans()):
            flight = data.draw(st.sampled_from(fetch.flights))
            n_bytes = data.draw(st.integers(0, flight.n_left))
            faults = [Fault.CUT, Fault.SLOW] if flight.holder == HOLDERS[0] else list(Fault)
            whole = [None] if n_bytes == flight.n_left else []
            fault = data.draw(st.sampled_from([*faults, *whole]))
            if flight.holder == HOLDERS[0] and n_bytes < flight.n_left:
                n_bytes, fault = flight.n_left, None  # the good one
            fetch.end(flight, n_bytes, fault)
        else:
            fetch.begin(data.draw(st.sampled_from(HOLDERS)))
        fetch.check()
    for flight in list(fetch.flights):
        if flight.holder != HOLDERS[0]:
            fetch.end(flight, 0, Fault.LIED)
    for _ in range(2 * size + 2):
        if not fetch.flights and not fetch.begin(HOLDERS[0]):
            break
        fetch.end(fetch.flights[0], fetch.flights[0].n_left, None)
    assert fetch.gathering.is_complete and bytes(byte or 0 for byte in fetch.written) == fetch.blob


@given(st.integers(1, 200), st.integers(4, 50), st.randoms(use_true_random=False))
def test_without_trouble_every_byte_is_asked_for_once(
    size: int, range_bytes: int, rng: random.Random
) -> None:
    fetch = _Fetch(size, range_bytes)
    while not fetch.gathering.is_complete:
        if not fetch.begin(rng.choice(HOLDERS)):  # nobody is late: nothing is doubled
            flight = rng.choice(fetch.flights)
            fetch.end(flight, flight.n_left, None)
    assert fetch.n_asked == size


@given(st.integers(2, 300), st.lists(st.floats(0.01, 0.99), max_size=20))
def test_a_cut_range_goes_on_where_it_broke(size: int, cuts: list[float]) -> None:
    fetch = _Fetch(size, size)
    for cut in cuts:
        if fetch.begin(HOLDERS[0]):
            flight = fetch.flights[0]
            fetch.end(flight, max(1, int(cut * flight.n_left)), Fault.CUT)
    while fetch.begin(HOLDERS[0]):
        fetch.end(fetch.flights[0], fetch.flights[0].n_left, None)
    fetch.check()
    assert fetch.gathering.is_complete


def test_a_late_range_is_asked_of_another_once_and_the_first_to_bring_it_wins() -> None:
    fetch = _Fetch(100, 100)
    ann, bob, cid = HOLDERS
    assert fetch.begin(ann)
    fetch.now = 4.9
    assert not fetch.begin(bob), "not late yet"
    fetch.now = 5.0
    assert not fetch.begin(ann), "not from the one who is late"
    assert fetch.begin(bob)
    assert not fetch.begin(cid), "twice, not three times"
    late, double = fetch.flights
    fetch.end(double, 100, None)
    assert fetch.gathering.is_complete
    fetch.end(late, 100, None)  # nothing is written again
    assert {node: list(spans) for node, spans in fetch.gathering.sources.items()} == {bob: [(0, 100)]}


def test_a_failed_double_leaves_the_range_with_the_first() -> None:
    fetch = _Fetch(100, 100)
    ann, bob, cid = HOLDERS
    assert fetch.begin(ann)
    fetch.now = 10
    assert fetch.begin(bob)
    first, double = fetch.flights
    fetch.end(double, 30, Fault.CUT)
    fetch.end(first, 50, Fault.CUT)
    assert fetch.begin(cid)
    assert (fetch.flights[0].start, fetch.flights[0].stop) == (50, 100)


def test_who_lied_is_out_and_who_fails_is_out_after_three_strikes() -> None:
    fetch = _Fetch(100, 10)
    ann, bob, cid = HOLDERS
    fetch.begin(ann)
    fetch.end(fetch.flights[0], 0, Fault.LIED)
    assert not fetch.gathering.may_ask(ann) and not fetch.begin(ann)
    for strike in range(STRIKES_MAX):
        assert fetch.gathering.may_ask(bob), strike
        fetch.begin(bob)
        fetch.end(fetch.flights[0], 0, Fault.CUT)
    assert not fetch.gathering.may_ask(bob)
    for _ in range(STRIKES_MAX - 1):  # slow with some bytes counts as well; a whole range wipes the slate
        fetch.begin(cid)
        fetch.end(fetch.flights[0], 2, Fault.SLOW)
    fetch.begin(cid)
    fetch.end(fetch.flights[0], fetch.flights[0].n_left, None)
    for _ in range(STRIKES_MAX):
        assert not fetch.gathering.is_hopeless
        fetch.begin(cid)
        fetch.end(fetch.flights[0], 2, Fault.SLOW)
    assert fetch.gathering.is_hopeless and not fetch.gathering.is_complete
    assert not fetch.gathering.may_ask(NodeId("nobody"))


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────


def read_answer(stream: bytes, cuts: list[int], bytes_max: int = 1000) -> tuple[Answer, bytes]:
    body = bytearray()

    def room(answer: Answer) -> memoryview:
        nonlocal body
        if answer.length > bytes_max:
            raise DecodeError("too large")
        body = bytearray(answer.length)
        return memoryview(body)

    reader = AnswerReader(room)
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for start, stop in pairwise(places):
        while start < stop:
            buffer = reader.buffer()
            assert len(buffer) > 0
            n_bytes = min(len(buffer), stop - start)
            buffer[:n_bytes] = stream[start : start + n_bytes]
            reader.filled(n_bytes)
            start += n_bytes
    assert reader.is_done and reader.answer is not None
    return reader.answer, bytes(body)


@given(st.binary(max_size=300), st.lists(st.integers(0, 10_000), max_size=12))
def test_an_answer_is_read_the_same_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    head = f'HTTP/1.1 206 Part\r\nETag: "x"\r\nContent-Length: {len(body)}\r\nEdgemesh-View: 0/0\r\n\r\n'
    answer, read = read_answer(head.encode() + body, cuts)
    assert (answer.status, answer.length, read) == (206, len(body), body)
    assert answer.fields == {"etag": '"x"', "content-length": str(len(body)), "edgemesh-view": "0/0"}


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: ٣\r\n\r\n".encode(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n Content-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 1\n\n" + b"x" * HEAD_BYTES_MAX,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxx",
        b"\0" * HEAD_BYTES_MAX,
        b"X: y\r\n" * HEAD_BYTES_MAX,
    ],
)
def test_an_answer_no_server_of_ours_gives_is_refused(stream: bytes) -> None:
    with pytest.raises(DecodeError):
        read_answer(stream, [])


@given(st.binary(max_size=6000), st.lists(st.integers(0, 6000), max_size=5))
def test_garbage_never_costs_more_than_a_refusal(stream: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(DecodeError, AssertionError):  # AssertionError: it simply ended too early
        read_answer(stream, cuts)


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────

DIGEST = st.binary(min_size=32, max_size=32)
ROW = st.one_of(
    st.builds(lambda size, digest: Row(BlockStatus.FOUND, size, digest), st.integers(0, 50), DIGEST),
    st.just(Row(BlockStatus.MISSING)),
    st.builds(lambda size: Row(BlockStatus.LEFT, size), st.integers(0, BLOCK_BYTES_MAX)),
)


@given(st.lists(ROW, min_size=1, max_size=20), st.lists(DIGEST, min_size=1, max_size=20))
def test_tables_come_back_as_they_were(rows: list[Row], keys: list[bytes]) -> None:
    n_bytes = sum(row.size for row in rows if row.status is BlockStatus.FOUND)
    assert decode_rows(encode_rows(rows), len(rows), n_bytes) == rows
    assert decode_keys(encode_keys(keys)) == keys
    for wrong in ((len(rows) + 1, n_bytes), (len(rows), n_bytes + 1)):
        with pytest.raises(DecodeError):
            decode_rows(encode_rows(rows), *wrong)


@given(st.lists(st.tuples(DIGEST, st.binary(max_size=20)), min_size=1, max_size=10))
def test_offers_come_back_as_they_were(pairs: list[tuple[bytes, bytes]]) -> None:
    blocks = [Block(key, digest_of(payload), payload) for key, payload in pairs]
    table = encode_offers(blocks)
    assert decode_count(table[:COUNT_BYTES]) == len(blocks)
    offers = decode_offers(table[COUNT_BYTES:], sum(len(payload) for _, payload in pairs))
    assert offers == [Offer(block.key, block.digest, len(block.payload)) for block in blocks]


@given(st.binary(max_size=300), st.integers(0, 400))
def test_tables_of_garbage_are_refused_or_within_bounds(content: bytes, n: int) -> None:
    for decode in (
        lambda: decode_keys(content),
        lambda: decode_rows(content, len(content) // ROW_BYTES, n),
        lambda: decode_offers(content[: len(content) // OFFER_BYTES * OFFER_BYTES], n),
        lambda: decode_count(content[:COUNT_BYTES]),
        lambda: decode_verdicts(content, n),
    ):
        try:
            decode()
        except DecodeError:
            continue
    with pytest.raises(DecodeError):
        decode_keys(bytes(32 * (KEYS_MAX + 1)))
    assert decode_verdicts(bytes([0, 3]), 2) == [PutVerdict.STORED, PutVerdict.WRONG_DIGEST]


@given(st.integers(1, 2**53 - 1), st.integers(0, 2**53 - 1))
def test_a_view_is_read_as_it_was_written(term: int, change: int) -> None:
    for view in (
        RingEpoch(Epoch(term, NodeId("pi-4-3f9a2c")), change),
        RingEpoch(Epoch(0, NodeId("")), change),
    ):
        assert parse_view(str(view)) == view


@pytest.mark.parametrize(
    "text", ["", "1", "1@pi", "1@pi/", "-1@pi/2", "1@PI/2", "1@pi/2 ", "٣@pi/1", f"{2**53}@pi/1"]
)
def test_what_is_no_view_is_refused(text: str) -> None:
    with pytest.raises(DecodeError):
        parse_view(text)


# ── waits ───────────────────────────────────────────────────────────────────────────────────────────


def test_patience_is_the_slowest_twentieth_of_recent_answers_within_bounds() -> None:
    config = WaitConfig(n_recent=100, n_needed=10, start_s=0.25, least_s=0.01, most_s=1.0)
    waits = Waits(config)
    assert waits.first_after_s == 0.25
    for wait_ms in range(20, 120):
        waits.began(wait_ms / 1000)
    assert waits.first_after_s == pytest.approx(0.114)
    for _ in range(100):
        waits.began(0.0001)
    assert waits.first_after_s == 0.01
    for _ in range(100):
        waits.began(30.0)  # everything is slow: patience grows, to a bound
    assert waits.first_after_s == 1.0


def test_the_rest_of_an_answer_may_take_what_its_size_usually_takes() -> None:
    waits = Waits(WaitConfig(start_bytes_per_s=1e6))
    assert waits.rest_after_s(500_000) == pytest.approx(0.5)
    for _ in range(200):
        waits.ended(0.1, 1_000_000)
    assert waits.rest_after_s(2_000_000) == pytest.approx(0.2)
    assert waits.rest_after_s(0) == WaitConfig().least_s
    waits.ended(5.0, 0)  # says nothing about bytes
    assert waits.rest_after_s(2_000_000) == pytest.approx(0.2)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300))
def test_p95_leaves_one_in_twenty_above(values: list[float]) -> None:
    assert sum(value > p95(values) for value in values) <= len(values) / 20
    assert sum(value >= p95(values) for value in values) >= math.floor(len(values) / 20)


@pytest.mark.parametrize(
    "wrong", [{"least_s": 0.0}, {"start_s": 2.0}, {"n_needed": 0}, {"start_bytes_per_s": math.nan}]
)
def test_waits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        WaitConfig(**wrong)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=5), st.integers(1, 30))
def test_a_gathering_goes_on_with_what_an_earlier_one_had(
    spans: list[tuple[int, int]], range_bytes: int
) -> None:
    had = Spans((min(span), max(span)) for span in spans)
    missing = {at for a, b in had.gaps(0, 60) for at in range(a, b)}
    gathering, asked = Gathering(60, HOLDERS, range_bytes, had), list[int]()
    while (flight := gathering.begin(HOLDERS[0], 0.0, 1.0)) is not None:
        asked += range(flight.start, flight.stop)
        gathering.arrived(flight, flight.n_left)
        gathering.ended(flight)
    assert sorted(asked) == sorted(missing), "each missing byte once, and no other"
    assert gathering.is_complete and list(had) == [(0, 60)], "what came is there for a third"
