"""A batch that cannot be served is answered: its producer hears why, and the worker goes on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from tests.support.forged_messages import MARKER, SPEC, batch_of, push, queued
from tests.support.redis import RedisProcess, wait_for, wait_until_acknowledged
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.errors import BatchFailed
from embedq.protocol.contract import MAX_BATCH_TEXTS, SCHEMA
from embedq.protocol.message import EmbedBatch
from embedq.store.ledger import Ledger
from embedq.testing import stub_vectors
from embedq_worker.pool_process.commit import REQUEUE_DELAY_S

SPECIFICATION = list(SPEC)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "newer schema": ("unknown_schema", {"v": SCHEMA + 1}),
    "newer schema of another shape": ("unknown_schema", {"v": SCHEMA + 1, "spec": {"a": 1}}),
    "no schema": ("malformed_message", {"v": MARKER}),
    "too many texts": ("batch_too_large", {"n": MAX_BATCH_TEXTS + 1}),
    "too many bytes": ("batch_too_large", {"raw": 2**31}),
    "texts are no frame": ("malformed_message", {"texts": MARKER.encode()}),
    "texts are no bytes": ("malformed_message", {"texts": MARKER}),
    "counts do not add up": ("malformed_message", {"n": 2}),
    "another model": ("wrong_model", {"spec": ["ab" * 32, *SPECIFICATION[1:]]}),
    "another dimension": ("wrong_model", {"spec": [SPEC.model, 768, *SPECIFICATION[2:]]}),
    "specification of text": ("malformed_message", {"spec": [MARKER] * 7}),
}


@pytest.mark.parametrize("name", CASES)
def test_producer_hears_why(
    name: str, worker: WorkerProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The producer gets BatchFailed with code and sentence; the log has one line with the code."""
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


def test_batch_of_no_job_is_dropped(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    """A batch whose job is not in the ledger is skipped and leaves nothing behind."""
    message = queued(shared_redis, batch_of([MARKER], job="nobodys"))

    push(shared_redis, message)
    client.encode(["after"], accuracy="exact")

    assert wait_for(lambda: worker.lines("batch_skipped", "nobodys", "gone"), "the skipped batch")
    with shared_redis.open() as redis:
        assert not list(redis.scan_iter("*nobodys*"))


def test_index_beyond_the_job_is_ignored_by_its_producer(
    worker: WorkerProcess,
    client: Client,
    shared_redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forged batch with an index that the job never sent does not disturb the job."""
    open_at_first = Ledger.open

    def open_and_forge(self: Ledger, **options: Any) -> None:
        open_at_first(self, **options)
        forged = queued(shared_redis, batch_of(["x"], job=self._job, index=999))
        push(shared_redis, forged)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "open", open_and_forge)
        vectors = client.encode(["a", "b"], accuracy="exact", timeout_s=20)

    assert np.array_equal(vectors, stub_vectors(["a", "b"]))
    with shared_redis.open() as redis:
        assert [key for key in redis.scan_iter("embedq:{*")] == []


def test_batch_that_redis_refuses_is_asked_for_now_and_then(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    """A ledger that is no hash, or a right that was taken away, costs neither a core nor a disk."""
    with shared_redis.open() as redis:
        redis.set("embedq:{broken}:meta", "not a hash")
        before = len(worker.lines("batch_requeued"))
        push(shared_redis, queued(shared_redis, batch_of(["x"], job="broken")))

        wait_for(lambda: len(worker.lines("batch_requeued")) > before, "the first refusal")
        began = time.monotonic()
        wait_for(lambda: len(worker.lines("batch_requeued")) > before + 2, "the third")
        took_s = time.monotonic() - began
        redis.delete("embedq:{broken}:meta")

    assert took_s > REQUEUE_DELAY_S
    wait_until_acknowledged(shared_redis)
