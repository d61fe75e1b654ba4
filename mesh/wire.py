"""Messages to bytes and back: msgpack between nodes, JSON at the public topics. Sole owner of both codecs.

    bytes ──msgpack / JSON──▶ plain data ──msgspec──▶ frozen dataclass ──its own checks──▶ message

``msgpack`` only turns bytes into plain data, under bounds; ``msgspec`` gives the plain data its shape,
and the message's ``__post_init__`` has the last word. Whatever goes wrong on the way in is one
``DecodeError`` whose text is for the sender.

Two kinds of strictness. Between nodes, unknown *fields* are ignored, so that a newer node can say more
to an older one; a change an old node must not ignore raises ``PROTOCOL``. What a client submits is
refused when it holds an unknown field: a misspelt ``deadline`` must not mean "no deadline".
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgpack
import msgspec

from mesh import messages
from mesh.core import Message
from mesh.errors import DecodeError
from mesh.ids import MeshName, TaskId, is_id
from mesh.messages import (
    ChatMessage,
    FeaturesSpec,
    Submit,
    TaskReply,
    TaskResult,
    TaskStatus,
    TuneSpec,
    Unacceptable,
)

__all__ = [
    "FRAME_BYTES_MAX",
    "JSON_BYTES_MAX",
    "MESH",
    "PROTOCOL",
    "PROTOCOL_MAX",
    "PROTOCOL_MIN",
    "Codec",
    "correlation_bytes",
    "correlation_text",
    "decode_json",
    "decode_reply",
    "encode_json",
    "encode_reply",
    "json_schemas",
    "plain_json",
    "read_submit",
    "to_plain",
]

PROTOCOL = 1
"""What this version writes."""
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
"""What it reads. A node outside this range is not understood, which its ``NodeInfo`` shows to all."""

# The largest message between nodes is a task's record: texts to embed (256 KiB; tuning data take 384 KiB and
# give little), other fields (about 45 KiB at their bounds), and what comes out: labels (64 KiB) and 40,000
# numbers (352 KiB, see mesh.messages.output), or an answer (192 KiB). It also bounds what a hostile frame
# makes us hold while it is decoded: the smallest msgpack object is one byte and becomes a Python object of at
# most 64, so 48 MiB for a moment. Bulk bytes never come this way; see mesh.transport.streams.
FRAME_BYTES_MAX = 768 * 1024

# JSON may spell one character with six bytes (\u00e9), so the same message can be up to three times as
# long as in UTF-8. Mosquitto 2.1 disconnects whoever publishes more than 2,000,000 bytes.
JSON_BYTES_MAX = 1_500_000

# Of v5 correlation data: twice as long in hexadecimal, it still fits Submit.correlation.
_CORRELATION_BYTES_MAX = 500

_ITEMS_MAX = 65_536  # elements of one msgpack array or map; the largest real one has 1024
_REASON_CHARS_MAX = 400  # a refusal repeats what the sender wrote, but not a megabyte of it
_HEX = "hex:"

_M = TypeVar("_M")

# All that the two codecs and the dataclasses' checks raise on hostile input (found by the fuzz tests).
_BAD_INPUT = (
    msgspec.MsgspecError,
    msgpack.UnpackException,
    ValueError,
    TypeError,
    RecursionError,
    OverflowError,
)


class Codec:
    """Messages of a closed set of kinds as msgpack maps ``{"type": its name, "v": PROTOCOL, ...fields}``."""

    def __init__(self, kinds: Iterable[type]) -> None:
        self._kinds: dict[str, type] = {kind.__name__: kind for kind in kinds}
        for kind in self._kinds.values():
            names = {field.name for field in fields(kind)}
            assert not names & {"type", "v"}, f"{kind.__name__} hides the envelope"

    @property
    def kinds(self) -> tuple[type, ...]:
        return tuple(self._kinds.values())

    def encode(self, message: Message) -> bytes:
        """Bytes of one message.

        Raises:
            ValueError: The message is larger than ``FRAME_BYTES_MAX`` or holds text that is not UTF-8.
        """
        name = type(message).__name__
        assert self._kinds.get(name) is type(message), f"{name} is no message of this codec"
        frame = _pack({"type": name, "v": PROTOCOL, **to_plain(message)})
        if len(frame) > FRAME_BYTES_MAX:
            raise ValueError(f"{name} of {len(frame)} bytes, a frame has at most {FRAME_BYTES_MAX}")
        return frame

    def decode(self, payload: bytes) -> Message:
        """The message in ``payload``.

        Raises:
            DecodeError: For whatever is wrong with it; the text says what.
        """
        if len(payload) > FRAME_BYTES_MAX:
            raise DecodeError(f"{len(payload)} bytes, a frame has at most {FRAME_BYTES_MAX}")
        try:
            plain = msgpack.unpackb(
                payload,
                raw=False,
                strict_map_key=True,
                max_str_len=FRAME_BYTES_MAX,
                max_bin_len=0,  # no message has binary fields
                max_ext_len=0,
                max_array_len=_ITEMS_MAX,
                max_map_len=_ITEMS_MAX,
            )
        except _BAD_INPUT as error:
            raise DecodeError(f"not msgpack: {_first_line(error)}") from None
        envelope = _object(plain)
        _check_version(envelope)
        name = envelope.get("type")
        kind = self._kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            raise DecodeError(f"unknown type of message {str(name)[:80]!r}")
        return _shape(envelope, kind)


def to_plain(message: Message) -> dict[str, Any]:
    """The message as dicts, lists, text and numbers, for ``--json`` output and for tests."""
    return cast(dict[str, Any], msgspec.to_builtins(message))


def plain_json(value: Any, *, indent: int | None = None) -> str:
    """Plain data as JSON text, one line unless ``indent`` is given."""
    text = msgspec.json.encode(value)
    return (msgspec.json.format(text, indent=indent) if indent else text).decode()


def encode_json(message: Message) -> bytes:
    """JSON object of the message's fields and ``"v"``, the protocol version.

    Raises:
        ValueError: The message is larger than ``JSON_BYTES_MAX`` or holds text that is not UTF-8.
    """
    return _json({"v": PROTOCOL, **to_plain(message)}, type(message).__name__)


def encode_reply(reply: TaskReply) -> bytes:
    """A reply's JSON: its body's fields, the body's kind as ``"type"``, and the client's ``"correlation"``.

    Raises:
        ValueError: As ``encode_json``.
    """
    name = type(reply.body).__name__
    head = {"v": PROTOCOL, "type": name, "correlation": reply.correlation}
    return _json({**head, **to_plain(reply.body)}, name)


def decode_reply(payload: bytes) -> tuple[TaskStatus | TaskResult, str | None]:
    """A reply's body and the correlation in it.

    Raises:
        DecodeError: It is neither a status nor a result.
    """
    plain = _json_object(payload)
    name, correlation = plain.get("type"), plain.get("correlation")
    for kind in (TaskStatus, TaskResult):
        if name == kind.__name__:
            body = cast(TaskStatus | TaskResult, _shape(plain, kind))
            return body, correlation if isinstance(correlation, str) else None
    raise DecodeError(f"a reply is a TaskStatus or a TaskResult, got type {str(name)[:80]!r}")


def decode_json(payload: bytes, kind: type[_M]) -> _M:
    """The message of ``kind`` in a JSON payload; unknown fields are ignored.

    Raises:
        DecodeError: For whatever is wrong with it; the text says what.
    """
    plain = _json_object(payload)
    _check_version(plain)
    return cast(_M, _shape(plain, kind))


def json_schemas(kinds: Sequence[type]) -> dict[str, Any]:
    """JSON Schema of each kind and of what it is made of, by name (``#/components/schemas/NAME``)."""
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return schemas


# ── submissions ─────────────────────────────────────────────────────────────────────────────────────


def read_submit(
    payload: bytes,
    *,
    mesh: MeshName,
    response_topic: str | None = None,
    correlation: bytes | None = None,
    expiry_s: float | None = None,
    replies_anywhere: bool = True,
) -> Submit | Unacceptable:
    """A client's submission, or why it is none, with as much as can be read of where to answer.

    What the JSON says wins over the MQTT 5 properties (``response_topic``, ``correlation``, ``expiry_s`` =
    seconds until the message expires); of two deadlines the earlier one counts.

    A reply goes to a topic below ``edgemesh/<mesh>/client/``, so that a submission cannot make the
    coordinator write where only nodes may. With ``replies_anywhere`` (the site's own broker) it may also
    go to any topic outside ``edgemesh/``; the mesh's own broker lets nodes write nowhere else.
    """
    try:
        plain = _json_object(payload)
        unreadable = ""
    except DecodeError as error:
        plain, unreadable = {}, f"the submission is not readable: {error}"
    plain.setdefault("reply_to", response_topic)
    if plain.get("correlation") is None and correlation is not None:
        if len(correlation) > _CORRELATION_BYTES_MAX:
            unreadable = unreadable or f"correlation data must be at most {_CORRELATION_BYTES_MAX} bytes"
        else:
            plain["correlation"] = correlation_text(correlation)
    if plain["reply_to"] is None:
        plain["reply_to"] = response_topic

    refused_reply = _reply_refusal(plain["reply_to"], mesh, replies_anywhere)
    sender = _Sender(plain, plain["reply_to"] if refused_reply is None else None)
    if unreadable or refused_reply:
        return sender.refuse(unreadable or refused_reply or "")
    try:
        _check_version(plain)
        plain.pop("v", None)
        _check_fields(plain, Submit, "")
        if isinstance(plain.get("tune"), dict):
            _check_fields(plain["tune"], TuneSpec, "tune.")
        if isinstance(plain.get("features"), dict):
            _check_fields(plain["features"], FeaturesSpec, "features.")
        for i, message in enumerate(plain["messages"] if isinstance(plain.get("messages"), list) else []):
            if isinstance(message, dict):
                _check_fields(message, ChatMessage, f"messages[{i}].")
        submit = cast(Submit, _shape(plain, Submit))
        if expiry_s is None:
            return submit
        if not expiry_s > 0:
            return sender.refuse("the submission expired before the mesh read it")
        return replace(submit, deadline_s=min(expiry_s, submit.deadline_s or expiry_s))
    except DecodeError as error:
        return sender.refuse(str(error))


def correlation_text(data: bytes) -> str:
    """MQTT 5 correlation data as text that ``correlation_bytes`` turns back: itself, or ``hex:…``."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and text and not text.startswith(_HEX):
        return text
    return _HEX + data.hex()


def correlation_bytes(text: str) -> bytes:
    """What to put into the correlation data of a reply: exactly the bytes that came."""
    if text.startswith(_HEX):
        try:
            return bytes.fromhex(text.removeprefix(_HEX))
        except ValueError:
            pass  # a client wrote "hex:..." into its JSON as plain text
    return text.encode()


class _Sender:
    """Where to answer a submission, read from what may be wrong in every other field."""

    def __init__(self, plain: dict[str, Any], reply_to: str | None) -> None:
        named, correlation = plain.get("id"), plain.get("correlation")
        self._id = TaskId(named) if isinstance(named, str) and is_id(named) else None
        self._reply_to = reply_to
        has_correlation = isinstance(correlation, str) and len(correlation.encode("utf-8", "replace")) <= 1024
        self._correlation = correlation if has_correlation else None

    def refuse(self, reason: str) -> Unacceptable:
        return Unacceptable(
            reason=reason[:_REASON_CHARS_MAX],
            id=self._id,
            reply_to=self._reply_to,
            correlation=self._correlation,
        )


def _reply_refusal(topic: object, mesh: MeshName, replies_anywhere: bool) -> str | None:
    """Why the coordinator does not write to ``topic``; ``None`` when it does, or when none is named."""
    if topic is None:
        return None
    if not isinstance(topic, str):
        return f"reply_to must be a string, got {_kind_of(topic)}"
    own = f"edgemesh/{mesh}/client/"
    if topic.startswith(own) and len(topic) > len(own):
        inside = True
    else:
        inside = replies_anywhere and topic != "edgemesh" and not topic.startswith("edgemesh/")
    if not inside:
        elsewhere = " (or outside edgemesh/)" if replies_anywhere else ""
        return f"reply_to must be a topic below {own}{elsewhere}, got {topic[:80]!r}"
    n_bytes = len(topic.encode("utf-8", "replace"))
    if not 0 < n_bytes <= 512 or topic[0] == "$" or any(c in topic for c in "+#\0"):
        return "reply_to must be a plain topic of at most 512 bytes, with no + or #, not starting with $"
    return None


def _check_fields(plain: dict[str, Any], kind: type, where: str) -> None:
    """Refuse names that ``kind`` does not have, with the nearest one it has."""
    known = [field.name for field in fields(kind)]
    for name in plain:
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"
            raise DecodeError(f"unknown field {(where + name)[:80]!r}{hint}")


# ── plain data and its faults ───────────────────────────────────────────────────────────────────────


def _pack(plain: dict[str, Any]) -> bytes:
    return cast(bytes, msgpack.packb(plain, use_bin_type=True))


def _json(plain: dict[str, Any], name: str) -> bytes:
    payload = msgspec.json.encode(plain)
    if len(payload) > JSON_BYTES_MAX:
        raise ValueError(f"{name} of {len(payload)} bytes is larger than JSON may be here ({JSON_BYTES_MAX})")
    return payload


def _json_object(payload: bytes) -> dict[str, Any]:
    if len(payload) > JSON_BYTES_MAX:
        raise DecodeError(f"{len(payload)} bytes, at most {JSON_BYTES_MAX} are read")
    try:
        plain = msgspec.json.decode(payload)
    except RecursionError:
        raise DecodeError("nested too deeply") from None
    except UnicodeDecodeError:
        raise DecodeError("the text is not UTF-8") from None
    except _BAD_INPUT as error:
        text = _first_line(error).replace("Input data was truncated", "the JSON ends too early")
        hint = "; JSON has no NaN and no Infinity" if b"NaN" in payload or b"Infinity" in payload else ""
        raise DecodeError(text.split(" - at ")[0] + hint) from None
    return _object(plain)


def _object(plain: object) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise DecodeError(f"a message is an object with named fields, got {_kind_of(plain)}")
    return plain


def _check_version(plain: dict[str, Any]) -> None:
    version = plain.get("v", PROTOCOL)
    if type(version) is not int or not PROTOCOL_MIN <= version <= PROTOCOL_MAX:
        raise DecodeError(
            f"protocol version {str(version)[:20]}, this node reads {PROTOCOL_MIN} to {PROTOCOL_MAX}:"
            " update one of the two"
        )


def _shape(plain: dict[str, Any], kind: type) -> Message:
    _check_finite(plain)
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise DecodeError(_sentence(str(error), kind)) from None
    except _BAD_INPUT as error:
        raise DecodeError(_first_line(error)) from None


def _check_finite(plain: object) -> None:
    """NaN and infinity compare with nothing: no message has them, so no rule needs to think of them."""
    stack = [plain]
    while stack:
        match stack.pop():
            case float(number) if not math.isfinite(number):
                raise DecodeError(f"numbers must be finite, got {number}")
            case dict(items):
                stack.extend(items.values())
            case list(items):
                stack.extend(items)


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
    "bytes": "binary data",
}
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(?P<path>[^`]*)`$")
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]+)`(?:, got `(?P<got>[^`]+)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]+)`")
_ENUM = re.compile(r"Invalid enum value (?P<value>.*)")


def _sentence(text: str, kind: type) -> str:
    """msgspec's ``Expected `int`, got `str` - at `$.max_tokens``` as a sentence for the sender."""
    found = _PATH.search(text)
    path, fault = (found["path"], text[: found.start()]) if found else ("", text)
    if expected := _EXPECTED.fullmatch(fault):
        wanted = " or ".join(_WORDS.get(word, word) for word in expected["expected"].split(" | "))
        got = f", got {_WORDS.get(expected['got'], expected['got'])}" if expected["got"] else ""
        return f"{path or 'the message'} must be {wanted}{got}"
    if missing := _MISSING.fullmatch(fault):
        return f"{path + '.' if path else ''}{missing['field']} is missing"
    if enum := _ENUM.fullmatch(fault):
        allowed = " or ".join(repr(value) for value in _allowed(kind, path))
        return f"{path} must be {allowed}, got {enum['value'][:80]}"
    return fault[:_REASON_CHARS_MAX] if not path or path in fault else f"{path}: {fault}"[:_REASON_CHARS_MAX]


def _allowed(kind: type, path: str) -> tuple[str, ...]:
    """The values of the ``Literal`` at ``path``, such as ``messages[0].role``."""
    at: Any = kind
    for name in re.findall(r"[a-z_]+", path):
        while not (is_dataclass(at) or get_origin(at) is Literal):
            at = next((arg for arg in get_args(at) if arg is not type(None)), Literal[""])
        at = get_type_hints(at)[name] if is_dataclass(at) else at
    while get_origin(at) is not Literal and (args := get_args(at)):
        at = args[0]
    return get_args(at)


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else "other data")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__


MESH = Codec(
    kind
    for name in messages.__all__
    if is_dataclass(kind := getattr(messages, name)) and isinstance(kind, type) and kind is not TaskReply
)
"""Every message, between nodes and in the journal. ``TaskReply`` is only ever a client's JSON."""
