"""Tests of validating raw messages before they are consumed."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection, compression
from kombu import transport as kombu_transport

from embedq.protocol.contract import MAX_BATCH_BYTES, MAX_RAW_BYTES, TASK_NAME
from embedq_worker.main_process import transport
from embedq_worker.main_process.transport import MAX_LEVELS, MAX_MESSAGE_BYTES, validate_message

BATCH = {"v": 1, "job": "job", "i": 0, "texts": b"packed"}
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def message(payload: object = None, body: bytes | None = None, **changes: Any) -> bytes:
    """Return a message as Celery writes it, with another payload, body or headers."""
    packed = msgpack.packb([[BATCH], {}, EMBED] if payload is None else payload)
    raw = {
        "body": base64.b64encode(packed if body is None else body).decode(),
        "content-encoding": "binary",
        "content-type": "application/x-msgpack",
        "headers": {
            "task": TASK_NAME,
            "id": "job:0:digest",
            "eta": None,
            "timelimit": [None, None],
            "retries": 0,
            "ignore_result": True,
            **changes,
        },
        "properties": {
            "delivery_tag": "tag",
            "delivery_info": {"exchange": "", "routing_key": "embed.npu"},
            "body_encoding": "base64",
            "priority": 0,
        },
    }
    return json.dumps(raw).encode()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the transport for one test."""
    monkeypatch.setattr(kombu_transport, "TRANSPORT_ALIASES", {**kombu_transport.TRANSPORT_ALIASES})
    monkeypatch.setattr(kombu_transport, "_transport_cache", {})
    for name in ("_aliases", "_decoders", "_encoders"):
        monkeypatch.setattr(compression, name, {**getattr(compression, name)})
    transport.install()


def test_message_of_the_sdk_passes() -> None:
    assert validate_message(message()) is None
    assert validate_message(message(retries=3, root_id="job:0:digest", shadow=None)) is None


def test_size_limit_is_just_above_the_largest_batch() -> None:
    largest = message(
        [[{**BATCH, "texts": bytes(MAX_RAW_BYTES + MAX_RAW_BYTES // 128)}], {}, EMBED]
    )

    assert validate_message(largest) is None
    assert validate_message(largest + b" " * (MAX_MESSAGE_BYTES - len(largest) + 1))
    assert 2 * MAX_BATCH_BYTES > MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "body", [pickle.dumps({"a": 1}), b"\xc1", b"", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000]
)
def test_body_that_is_not_msgpack_is_refused(body: bytes) -> None:
    assert validate_message(message(body=body)) == "its body is not msgpack in base64"


@pytest.mark.parametrize(
    "payload",
    [
        7,
        "args",
        {},
        [],
        [[BATCH], {}],
        [BATCH, {}, EMBED],
        [[BATCH, 1], {}, EMBED],
        [[], {}, EMBED],
    ],
    ids=repr,
)
def test_call_of_another_shape_is_refused(payload: object) -> None:
    assert validate_message(message(payload))


@pytest.mark.parametrize(
    "payload",
    [[[BATCH], {"more": 1}, EMBED], [[BATCH], {}, {"chain": [{"task": "x"}]}], [[BATCH], {}, []]],
    ids=repr,
)
def test_keywords_callbacks_and_chains_are_refused(payload: object) -> None:
    assert validate_message(message(payload)) == "it carries work for other tasks"


@pytest.mark.parametrize(
    "header",
    [
        {"eta": "2999-01-01T00:00:00"},
        {"expires": "x"},
        {"timelimit": [1, 1]},
        {"retries": -1},
        {"retries": True},
        {"ignore_result": False},
        {"argsrepr": "x" * 1000},
        {"shadow": ["x"]},
        {"stamps": {"a": 1}},
        {"compression": "application/zstd"},
        {"task": "other"},
        {"id": ""},
    ],
    ids=repr,
)
def test_unexpected_header_value_is_refused(header: dict[str, Any]) -> None:
    assert validate_message(message(**header))


def nested(levels: int) -> list[Any]:
    """Return a list nested to this depth."""
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [9, 100, 750, 900])
def test_deeply_nested_message_is_refused(levels: int) -> None:
    # It can be parsed as JSON but not pickled for the pool process, which would end the worker.
    assert "levels" in str(validate_message(message(x=nested(levels))))


def test_message_nested_up_to_the_limit_passes() -> None:
    assert validate_message(message(x=nested(MAX_LEVELS - 2))) is None


@pytest.mark.parametrize("key", ["delivery_tag", "routing_key", "exchange", "correlation_id", "id"])
def test_name_that_is_not_utf8_is_refused(key: str) -> None:
    raw = json.loads(message())
    places = (raw["properties"], raw["properties"]["delivery_info"], raw["headers"])
    place = next((place for place in places if key in place), raw["properties"])

    place[key] = "\ud800"

    assert validate_message(json.dumps(raw).encode()) is not None


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused_with_a_reason(raw: bytes) -> None:
    answer = validate_message(raw)

    assert answer is not None
    assert answer.startswith(("it ", "its ", "body"))


@given(st.binary(max_size=200))
def test_any_body_is_validated_without_an_exception(body: bytes) -> None:
    validate_message(message(body=body))


@pytest.mark.parametrize(
    "url", ["redis://h/0", "rediss://h/0", "redis+socket:///tmp/x.sock", "redis://a/0;redis://b/0"]
)
def test_every_redis_url_uses_the_validating_transport(url: str, installed: None) -> None:
    assert Connection(url).get_transport_cls() is transport.Transport


def test_compressed_messages_are_not_decompressed(installed: None) -> None:
    for name in ("gzip", "zlib", "bzip2", "lzma", "zstd", *compression.encoders()):
        with pytest.raises(
            (ValueError, KeyError), match=r"refuses messages that kombu compressed|zstd|lzma"
        ):
            compression.decompress(b"x", name)
