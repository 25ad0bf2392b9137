"""Heartbeats: who is alive, and who serves the model that was asked for."""

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

MODEL_INFO = ModelInfo("org/model@abc123", "ab" * 32, 384, 256)
WORKER = WorkerStatus(
    "worker",
    WorkerState.HEALTHY,
    at=time.time(),
    state_since=time.time(),
    pid=1,
    model_info=MODEL_INFO,
)


def test_heartbeat_survives_the_wire_and_newer_fields() -> None:
    """A heartbeat comes back, also from a version that knows more."""
    newer = msgpack.packb({**msgpack.unpackb(WORKER.to_message()), "mood": "good"})

    assert WorkerStatus.from_message(WORKER.to_message()) == WORKER
    assert WorkerStatus.from_message(newer) == WORKER
    assert (
        WorkerStatus.from_message(replace(WORKER, model_info=None).to_message()).model_info is None
    )


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x01", msgpack.packb({"worker": "x"})])
def test_garbage_is_no_heartbeat(raw: bytes) -> None:
    """What cannot be read is refused by its size."""
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
def test_heartbeat_with_a_field_of_another_type_is_none(change: dict[str, object]) -> None:
    """Whoever shows, sorts or counts heartbeats need not ask what is in them."""
    with pytest.raises(MalformedMessage):
        WorkerStatus.from_message(msgpack.packb({**asdict(WORKER), **change}))


def test_words_of_a_worker_move_no_cursor_and_end_no_line() -> None:
    """What a worker says of itself is shown on terminals and in logs, whoever wrote it."""
    words = "\x1b]0;owned\x07 one\r\nfake=line" + "x" * 9_999

    reason = WorkerStatus.from_message(replace(WORKER, reason=words).to_message()).reason

    assert reason.startswith(" ]0;owned  one fake=line")
    assert len(reason) <= 2_000


def test_card_of_a_newer_worker_is_read() -> None:
    """A newer worker whose card knows more is alive for an older producer."""
    newer = msgpack.packb({**asdict(WORKER), "model_info": {**asdict(MODEL_INFO), "mood": "good"}})

    assert WorkerStatus.from_message(newer) == WORKER


def test_name_that_is_no_text_hides_no_worker(results: Redis) -> None:
    """Anything may stand in the set of names."""
    results.zadd(WORKERS_KEY, {b"\xff\xfe": time.time()})
    publish_heartbeat(results, WORKER)

    assert [heartbeat.worker for heartbeat in list_live_workers(results)] == ["worker"]


def test_alive_is_who_beat_lately(results: Redis) -> None:
    """Workers are listed by name while their heartbeat lasts; it fades by itself."""
    for name in ("b", "a", "c"):
        publish_heartbeat(results, replace(WORKER, worker=name))
    deregister(results, "c")

    alive = list_live_workers(results)

    assert [heartbeat.worker for heartbeat in alive] == ["a", "b"]
    assert 0 < results.ttl("embedq:worker:a") <= 15


def test_faded_and_unreadable_workers_are_left_out(results: Redis) -> None:
    """A worker whose heartbeat ran out, or is of another version, hides no other."""
    for name in ("faded", "strange", "good"):
        publish_heartbeat(results, replace(WORKER, worker=name))
    results.delete("embedq:worker:faded")
    results.set("embedq:worker:strange", b"\xc1")

    assert [heartbeat.worker for heartbeat in list_live_workers(results)] == ["good"]


def test_silent_workers_are_forgotten(results: Redis) -> None:
    """A name that was silent for a day leaves the list with the next heartbeat of any worker."""
    results.zadd(WORKERS_KEY, {"old": time.time() - 100_000})

    publish_heartbeat(results, WORKER)

    assert results.zrange(WORKERS_KEY, 0, -1) == [b"worker"]


@pytest.mark.parametrize("asked", ["org/model", "org/model@abc123", "ab" * 6, "ab" * 32])
def test_model_is_found_by_label_or_identity(asked: str) -> None:
    """A label with or without revision, or twelve characters of the identity, name a model."""
    assert find_model([replace(WORKER, model_info=None), WORKER], asked) == MODEL_INFO


@pytest.mark.parametrize("asked", ["org", "model", "abab", "org/model@other", ""])
def test_other_names_find_nothing(asked: str) -> None:
    """Half a name is no name."""
    assert find_model([WORKER], asked) is None


def test_two_versions_of_a_model_are_not_chosen_between() -> None:
    """Workers that serve one label under two identities are an error that names both."""
    other = replace(WORKER, worker="other", model_info=replace(MODEL_INFO, identity="cd" * 32))

    with pytest.raises(NoWorker, match=r"abababababab, cdcdcdcdcdcd.*EMBEDQ_MODEL=<identity>"):
        find_model([WORKER, other], "org/model")
