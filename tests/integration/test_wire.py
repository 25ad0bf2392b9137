"""Invalid messages in a queue: the worker goes on, logs one line each, and quotes nothing."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from tests.support.forged_messages import (
    MARKER,
    open_job,
    payload,
    push,
    queued,
    with_batch,
    with_body,
    with_headers,
    with_payload,
    without_header,
)
from tests.support.redis import RedisProcess, wait_for
from tests.support.stub_batches import stub_batch
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.testing import stub_vectors

Message = dict[str, Any]
Forge = Callable[[Message], object]


class _Pickled:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, trace: str) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._trace,)


def _gzip_bomb(message: Message) -> Message:
    body = gzip.compress(bytes(64 * 1024 * 1024))
    return with_headers(with_body(message, body), compression="application/x-gzip")


def _nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


RAW: dict[str, Forge] = {
    "not JSON": lambda m: MARKER.encode() * 3,
    "not UTF-8": lambda m: b"\xff\xfe" + MARKER.encode(),
    "empty": lambda m: b"",
    "JSON list": lambda m: [MARKER],
    "JSON number": lambda m: 7,
    "deep JSON": lambda m: b"[" * 200_000,
    "20 MB": lambda m: with_body(m, MARKER.encode() * 1_100_000),
    "body is a map": lambda m: {**m, "body": {MARKER: 1}},
    "body is not base64": lambda m: {**m, "body": "%" + MARKER},
    "no headers": lambda m: {key: value for key, value in m.items() if key != "headers"},
    "no properties": lambda m: {**m, "properties": None},
    "no delivery tag": lambda m: {**m, "properties": {**m["properties"], "delivery_tag": None}},
    "delivery info is text": lambda m: {
        **m,
        "properties": {**m["properties"], "delivery_info": MARKER},
    },
    "JSON content": lambda m: {**m, "content-type": "application/json"},
    "other encoding": lambda m: {**m, "content-encoding": "utf-16"},
    "gzip bomb": _gzip_bomb,
    "zstd header": lambda m: with_headers(m, compression="application/zstd"),
    "unknown task": lambda m: with_headers(m, task=MARKER),
    "no task": lambda m: without_header(m, "task"),
    "no id": lambda m: without_header(m, "id"),
    "id is a list": lambda m: with_headers(m, id=[MARKER]),
    "time limit": lambda m: with_headers(m, timelimit=[MARKER, 1e-9]),
    "eta": lambda m: with_headers(m, eta=MARKER),
    "eta is a map": lambda m: with_headers(m, eta={MARKER: 1}),
    "eta far away": lambda m: with_headers(m, eta="9999-12-31T23:59:59+00:00"),
    "expires": lambda m: with_headers(m, expires=MARKER),
    "expired": lambda m: with_headers(m, expires="2001-01-01T00:00:00+00:00"),
    "retries": lambda m: with_headers(m, retries=MARKER),
    "shadow": lambda m: with_headers(m, shadow=[MARKER]),
    "callbacks": lambda m: with_payload(
        m, [*payload(m)[:2], {"callbacks": [{"task": MARKER}], "chain": [MARKER]}]
    ),
    "not msgpack": lambda m: with_body(m, b"\xc1" + MARKER.encode()),
    "truncated msgpack": lambda m: with_body(m, b"\xdd\xff\xff\xff\xff" + MARKER.encode()),
    "deep msgpack": lambda m: with_body(m, _nested(600)),
    "very deep msgpack": lambda m: with_body(m, _nested(100_000)),
    "payload is a number": lambda m: with_payload(m, 7),
    "payload is nothing": lambda m: with_payload(m, None),
    "payload is text": lambda m: with_payload(m, MARKER),
    "payload is a map": lambda m: with_payload(m, {"args": [MARKER], "kwargs": {}}),
    "payload is short": lambda m: with_payload(m, [[MARKER]]),
    "payload names args": lambda m: with_payload(m, ["args", MARKER, {}]),
    "args is a map": lambda m: with_payload(m, [{MARKER: 1}, {}, {}]),
    "args is empty": lambda m: with_payload(m, [[], {}, {}]),
    "args is two": lambda m: with_payload(m, [[*payload(m)[0], MARKER], {}, {}]),
    "args is text": lambda m: with_payload(m, [[MARKER], {}, {}]),
    "unknown keyword": lambda m: with_payload(m, [payload(m)[0], {MARKER: 1}, {}]),
    "keywords are text": lambda m: with_payload(m, [payload(m)[0], MARKER, {}]),
    "embed is text": lambda m: with_payload(m, [payload(m)[0], {}, MARKER]),
    "no job": lambda m: with_batch(m, job=f"../{MARKER}"),
    "index is too large": lambda m: with_batch(m, i=2**40),
    "index is text": lambda m: with_batch(m, i=MARKER),
}


@pytest.fixture
def message(shared_redis: RedisProcess, worker: WorkerProcess) -> Message:
    return queued(shared_redis, stub_batch([MARKER], job="forged"))


@pytest.mark.parametrize("name", RAW)
def test_forged_message_is_refused_with_one_line(
    name: str, message: Message, worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    """Main and pool process keep running, and the next batch is served."""
    before = worker.pids(), len(worker.lines("ERROR"))

    push(shared_redis, RAW[name](message))
    # An exact job uses the same queue, so the forged message is consumed before it.
    vectors = client.encode(["after"], accuracy="exact", timeout_s=20)

    assert np.array_equal(vectors, stub_vectors(["after"]))
    assert worker.pids() == before[0]
    [line] = wait_for(lambda: worker.lines("ERROR")[before[1] :], "the log line")
    assert "message_refused" in line
    assert MARKER not in worker.log()


def test_pickle_is_never_loaded(
    message: Message,
    worker: WorkerProcess,
    client: Client,
    shared_redis: RedisProcess,
    short_dir: Any,
) -> None:
    """Neither with the content type of pickle nor with that of msgpack."""
    trace = short_dir / "opened"
    forged = with_body(message, pickle.dumps(_Pickled(os.fspath(trace))))
    pickled = {**forged, "content-type": "application/x-python-serialize"}
    before = len(worker.lines("message_refused"))

    push(shared_redis, pickled)
    push(shared_redis, forged)
    client.encode(["after"], accuracy="exact", timeout_s=20)

    assert not trace.exists()
    assert len(worker.lines("message_refused")) == before + 2


GARBAGE: tuple[object, ...] = (MARKER, 7, -1.5, True, None, [MARKER], [[1], 2], {MARKER: {"a": 1}})


def test_worker_survives_garbage_in_any_field_of_the_envelope(
    message: Message, worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    before, traces = worker.pids(), worker.lines("Traceback")
    more = ("stamped_headers", "stamps", "chord", "replaced_task_nesting", "reply_to", "priority")
    forged = []
    for part in ("headers", "properties"):
        for key in (*message[part], *more):
            forged += [{**message, part: {**message[part], key: value}} for value in GARBAGE]
    for key in message:
        forged += [{**message, key: value} for value in GARBAGE]

    for forged_message in forged:
        push(shared_redis, forged_message)
    vectors = client.encode(["after"], accuracy="exact", timeout_s=60)

    assert np.array_equal(vectors, stub_vectors(["after"]))
    assert worker.pids() == before
    assert MARKER not in worker.log()
    assert worker.lines("Traceback") == traces  # those of earlier tests


def test_garbage_in_any_field_of_a_batch_is_answered(
    message: Message, worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    before, traces = worker.pids(), worker.lines("Traceback")
    [batch], _, _ = payload(message)
    ledger = open_job(shared_redis, "forged")
    values = (*GARBAGE, msgpack.Timestamp(1), b"\xff" * 40, 2**63)
    fields = [key for key in batch if key not in ("job", "i")]

    for index, (key, value) in enumerate(product(fields, values)):
        forged = {**batch, "i": index, key: value}
        push(shared_redis, with_payload(message, [[forged], {}, {}]))
    vectors = client.encode(["after"], accuracy="exact", timeout_s=60)

    assert np.array_equal(vectors, stub_vectors(["after"]))
    assert worker.pids() == before
    combinations = list(product(fields, values))
    assert [pair for index, pair in enumerate(combinations) if not ledger.is_committed(index)] == []
    assert MARKER not in worker.log()
    assert worker.lines("Traceback") == traces  # those of earlier tests


def test_base64_with_a_line_break_is_refused(
    message: Message, worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    before = len(worker.lines("message_refused"))
    body = base64.encodebytes(base64.b64decode(message["body"])).decode()

    push(shared_redis, json.dumps({**message, "body": body}).encode())
    client.encode(["after"], accuracy="exact", timeout_s=20)

    assert len(worker.lines("message_refused")) == before + 1


@pytest.mark.parametrize("key", ["embed.cpu.int8", "embed.cpu\x06\x163"])
def test_queue_key_of_the_wrong_type_is_deleted(
    key: str, redis: RedisProcess, short_dir: Path
) -> None:
    """A producer may write a set in place of an empty queue."""
    with stub_worker(redis, short_dir) as worker, Client(settings=redis.settings()) as client:
        main_pid, _ = worker.pids()
        with redis.open(0) as broker:
            broker.sadd(key, MARKER)
            wait_for(lambda: not broker.exists(key), "the set to be deleted")

        vectors = client.encode(["one"], accuracy="exact", timeout_s=20)

        assert np.array_equal(vectors, stub_vectors(["one"]))
        assert worker.pids()[0] == main_pid
        assert worker.lines("queue_refused")
        assert MARKER not in worker.log()
