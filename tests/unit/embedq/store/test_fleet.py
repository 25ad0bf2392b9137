"""Tests of heartbeats and of finding the workers that serve a model."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import msgpack
import pytest
from redis import Redis

from embedq.errors import MalformedMessage, NoWorker
from embedq.protocol.worker import ModelInfo, WorkerState, WorkerStatus
from embedq.store.fleet import (
    WORKERS_KEY,
    deregister,
    find_model,
    list_live_workers,
    publish_heartbeat,
)

MODEL_INFO = ModelInfo("org/model@abc123", "ab" * 32, 384, 256, prompts={"query": "query: "})
WORKER = WorkerStatus(
    "worker",
    WorkerState.HEALTHY,
    at=time.time(),
    state_since=time.time(),
    pid=1,
    model_info=MODEL_INFO,
)


def test_heartbeat_survives_the_wire_and_ignores_unknown_fields() -> None:
    newer = msgpack.packb({**msgpack.unpackb(WORKER.to_message()), "mood": "good"})

    assert WorkerStatus.from_message(WORKER.to_message()) == WORKER
    assert WorkerStatus.from_message(newer) == WORKER
    assert (
        WorkerStatus.from_message(replace(WORKER, model_info=None).to_message()).model_info is None
    )


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x01", msgpack.packb({"worker": "x"})])
def test_garbage_heartbeat_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedMessage):
        WorkerStatus.from_message(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"worker": 5},
        {"state": ["healthy"]},
        {"device": b"cpu"},
        {"state_since": "yesterday"},
        {"state_since": float("nan")},
        {"at": float("inf")},
        {"totals": [1]},
        {"totals": {"batches": "many"}},
        {"model_info": {**asdict(MODEL_INFO), "label": 5}},
        {"model_info": {**asdict(MODEL_INFO), "dim": 10**12}},
        {"model_info": {**asdict(MODEL_INFO), "dim": -1}},
        {"model_info": {**asdict(MODEL_INFO), "prompts": {"query": 5}}},
    ],
    ids=repr,
)
def test_heartbeat_with_a_field_of_another_type_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        WorkerStatus.from_message(msgpack.packb({**asdict(WORKER), **change}))


def test_control_characters_in_a_reason_become_spaces() -> None:
    escape_sequences = "\x1b]0;owned\x07 one\r\nfake=line" + "x" * 9_999

    reason = WorkerStatus.from_message(replace(WORKER, reason=escape_sequences).to_message()).reason

    assert reason.startswith(" ]0;owned  one fake=line")
    assert len(reason) <= 2_000


def test_unknown_field_of_the_model_info_is_ignored() -> None:
    newer = msgpack.packb({**asdict(WORKER), "model_info": {**asdict(MODEL_INFO), "mood": "good"}})

    assert WorkerStatus.from_message(newer) == WORKER


def test_worker_name_that_is_not_utf8_is_skipped(results: Redis) -> None:
    results.zadd(WORKERS_KEY, {b"\xff\xfe": time.time()})
    publish_heartbeat(results, WORKER)

    assert [heartbeat.worker for heartbeat in list_live_workers(results)] == ["worker"]


def test_workers_with_a_heartbeat_are_listed_by_name(results: Redis) -> None:
    for name in ("b", "a", "c"):
        publish_heartbeat(results, replace(WORKER, worker=name))
    deregister(results, "c")

    alive = list_live_workers(results)

    assert [heartbeat.worker for heartbeat in alive] == ["a", "b"]
    assert 0 < results.ttl("embedq:worker:a") <= 15


def test_expired_and_unreadable_heartbeats_are_skipped(results: Redis) -> None:
    for name in ("expired", "unreadable", "good"):
        publish_heartbeat(results, replace(WORKER, worker=name))
    results.delete("embedq:worker:expired")
    results.set("embedq:worker:unreadable", b"\xc1")

    assert [heartbeat.worker for heartbeat in list_live_workers(results)] == ["good"]


def test_worker_silent_for_a_day_is_removed(results: Redis) -> None:
    results.zadd(WORKERS_KEY, {"old": time.time() - 100_000})

    publish_heartbeat(results, WORKER)

    assert results.zrange(WORKERS_KEY, 0, -1) == [b"worker"]


@pytest.mark.parametrize("name", ["org/model", "org/model@abc123", "ab" * 6, "ab" * 32])
def test_model_is_found_by_label_or_identity(name: str) -> None:
    assert find_model([replace(WORKER, model_info=None), WORKER], name) == MODEL_INFO


@pytest.mark.parametrize("name", ["org", "model", "abab", "org/model@other", ""])
def test_partial_or_other_model_name_finds_nothing(name: str) -> None:
    assert find_model([WORKER], name) is None


def test_label_with_two_identities_is_refused_with_both() -> None:
    other = replace(WORKER, worker="other", model_info=replace(MODEL_INFO, identity="cd" * 32))

    with pytest.raises(NoWorker, match=r"abababababab, cdcdcdcdcdcd.*EMBEDQ_MODEL=<identity>"):
        find_model([WORKER, other], "org/model")
