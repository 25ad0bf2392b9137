"""A batch that cannot be served fails with a code at its producer, and the worker goes on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from tests.support.forged_messages import MARKER, push, queued
from tests.support.redis import RedisProcess, wait_for, wait_until_acknowledged
from tests.support.stub_batches import STUB_SPEC, stub_batch
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.errors import BatchFailed
from embedq.protocol.contract import MAX_BATCH_TEXTS, SCHEMA
from embedq.protocol.message import EmbedBatch
from embedq.store.ledger import Ledger
from embedq.testing import stub_vectors
from embedq_worker.pool_process.commit import REQUEUE_DELAY_S

SPECIFICATION = list(STUB_SPEC)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "newer schema": ("unknown_schema", {"v": SCHEMA + 1}),
    "newer schema of another shape": ("unknown_schema", {"v": SCHEMA + 1, "spec": {"a": 1}}),
    "no schema": ("malformed_message", {"v": MARKER}),
    "too many texts": ("batch_too_large", {"n": MAX_BATCH_TEXTS + 1}),
    "too many bytes": ("batch_too_large", {"raw": 2**31}),
    "texts are not a frame": ("malformed_message", {"texts": MARKER.encode()}),
    "texts are not bytes": ("malformed_message", {"texts": MARKER}),
    "counts do not add up": ("malformed_message", {"n": 2}),
    "another model": ("wrong_model", {"spec": ["ab" * 32, *SPECIFICATION[1:]]}),
    "another dimension": ("wrong_model", {"spec": [STUB_SPEC.model, 768, *SPECIFICATION[2:]]}),
    "specification of text": ("malformed_message", {"spec": [MARKER] * 7}),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_batch_fails_with_a_code(
    name: str, worker: WorkerProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchFailed carries code and detail; the log has one line with the code."""
    code, change = CASES[name]
    pids, before = worker.pids(), len(worker.lines("batch_failed"))
    good = EmbedBatch.to_message

    with monkeypatch.context() as patch:
        patch.setattr(EmbedBatch, "to_message", lambda self: {**good(self), **change})
        with pytest.raises(BatchFailed) as caught:
            client.encode([MARKER], timeout_s=20)

    assert caught.value.code == code
    assert caught.value.detail.endswith(".")
    [line] = worker.lines("batch_failed")[before:]
    assert f"code={code}" in line
    assert MARKER not in worker.log()
    assert np.array_equal(client.encode("after"), stub_vectors(["after"])[0])
    assert worker.pids() == pids


def test_batch_without_a_job_is_skipped(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    message = queued(shared_redis, stub_batch([MARKER], job="missing"))

    push(shared_redis, message)
    client.encode(["after"], accuracy="exact")

    assert wait_for(lambda: worker.lines("batch_skipped", "missing", "gone"), "the skipped batch")
    with shared_redis.open() as redis:
        assert not list(redis.scan_iter("*missing*"))


def test_producer_ignores_an_unknown_batch_index(
    worker: WorkerProcess,
    client: Client,
    shared_redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_at_first = Ledger.open

    def open_and_forge(self: Ledger, **options: Any) -> None:
        open_at_first(self, **options)
        forged = queued(shared_redis, stub_batch(["x"], job=self._job, index=999))
        push(shared_redis, forged)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "open", open_and_forge)
        vectors = client.encode(["a", "b"], accuracy="exact", timeout_s=20)

    assert np.array_equal(vectors, stub_vectors(["a", "b"]))
    with shared_redis.open() as redis:
        assert [key for key in redis.scan_iter("embedq:{*")] == []


def test_batch_that_redis_refuses_is_requeued_after_a_delay(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    """A ledger key of the wrong type causes neither a busy loop nor a flood of log lines."""
    with shared_redis.open() as redis:
        redis.set("embedq:{broken}:meta", "not a hash")
        before = len(worker.lines("batch_requeued"))
        push(shared_redis, queued(shared_redis, stub_batch(["x"], job="broken")))

        wait_for(lambda: len(worker.lines("batch_requeued")) > before, "the first refusal")
        started = time.monotonic()
        wait_for(lambda: len(worker.lines("batch_requeued")) > before + 2, "the third")
        elapsed_s = time.monotonic() - started
        redis.delete("embedq:{broken}:meta")

    assert elapsed_s > REQUEUE_DELAY_S
    wait_until_acknowledged(shared_redis)
