"""Memory that a job needs in Redis, and keys that it leaves there."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from tests.support.forged_messages import queued
from tests.support.models import docstrings
from tests.support.redis import RedisProcess, wait_for, wait_until_acknowledged
from tests.support.stub_batches import stub_batch
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.jobs.batches import TextBatch
from embedq.jobs.sender import BatchSender
from embedq.testing import STUB_DIM, stub_vectors

#: Bytes of one vector.
RAW_BYTES = 4 * STUB_DIM


@pytest.fixture
def wide_client(worker: WorkerProcess, shared_redis: RedisProcess) -> Iterator[Client]:
    """Open a client whose window contains a whole job."""
    with Client(settings=shared_redis.settings(max_in_flight=1024)) as opened:
        yield opened


def test_results_need_little_more_memory_than_the_vectors(
    wide_client: Client, shared_redis: RedisProcess
) -> None:
    """Values and stream entries add at most 2 % to the vectors, and Redis at most 5 %."""
    texts = [f"text {i} {'word ' * (i % 50)}" for i in range(5_000)]
    spec = wide_client.spec()
    text_batches = list(wide_client.split(texts, spec))
    job = wide_client.job(text_batches, spec)
    job.start()
    with shared_redis.open() as redis:
        prefix = f"embedq:{{{job.id}}}:"
        stream = f"{prefix}commits"
        wait_for(lambda: redis.xlen(stream) == len(text_batches), "all commits")

        values = list(redis.scan_iter(f"{prefix}v:*"))
        payload = sum(redis.strlen(key) for key in values)
        entries = sum(
            len(entry) + sum(len(k) + len(v) for k, v in body.items())
            for entry, body in redis.xrange(stream)
        )
        occupied = sum(redis.memory_usage(key, samples=0) for key in redis.scan_iter(f"{prefix}*"))
        job.cancel()

    print(f"{len(text_batches)} batches, {len(values)} values: ", end="")
    print(f"{payload + entries} bytes, {occupied} occupied, {len(texts) * RAW_BYTES} raw")
    assert payload + entries <= 1.02 * RAW_BYTES * len(texts)
    assert occupied <= 1.05 * RAW_BYTES * len(texts)


def test_message_is_at_most_six_tenths_of_its_texts(shared_redis: RedisProcess) -> None:
    """For English prose, including the envelope of the message."""
    texts = docstrings()[:512]

    message = len(json.dumps(queued(shared_redis, stub_batch(texts))))

    share = message / sum(len(text.encode()) for text in texts)
    print(f"{message} bytes, {share:.3f} of the texts")
    assert share <= 0.6


def test_finished_job_leaves_no_key(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    client.encode([f"text {i}" for i in range(3_000)])

    wait_until_acknowledged(shared_redis)
    with shared_redis.open(1) as results:
        assert list(results.scan_iter("embedq:{*")) == []
        assert results.zcard("embedq:jobs") == 0
        others = [key for key in results.scan_iter() if not key.startswith(b"embedq:worker")]
        assert others == []


def test_abandoned_job_leaves_no_key(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    spec = client.spec()
    job = client.job(client.split((f"text {i}" for i in range(20_000)), spec), spec)

    for _ in job.batches(timeout_s=20):
        break

    wait_until_acknowledged(shared_redis)
    with shared_redis.open(1) as results:
        assert list(results.scan_iter("embedq:{*")) == []


@pytest.mark.parametrize("at_once", [False, True])
def test_damaged_and_lost_vectors_are_computed_again(
    wide_client: Client, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """With `at_once` the batch is committed again before `publish` returns."""
    texts = [f"text {i}" for i in range(600)]
    spec = wide_client.spec()
    text_batches = list(wide_client.split(texts, spec))
    job = wide_client.job(text_batches, spec)
    job.start()
    with shared_redis.open() as redis:
        wait_for(
            lambda: redis.xlen(f"embedq:{{{job.id}}}:commits") == len(text_batches), "all commits"
        )
        first, second = sorted(redis.scan_iter(f"embedq:{{{job.id}}}:v:*"))[:2]
        redis.setrange(first, 1000, b"\xff")
        redis.delete(second)
        publish = BatchSender.publish

        def publish_and_wait(sender: BatchSender, batch: TextBatch, recomputes: int = 0) -> None:
            publish(sender, batch, recomputes)
            bits = f"embedq:{{{job.id}}}:bits"
            wait_for(lambda: redis.getbit(bits, batch.index), "the commit of the batch")

        if at_once:
            monkeypatch.setattr(BatchSender, "publish", publish_and_wait)
        vectors = [result.vectors for result in job.batches(timeout_s=20)]

    assert np.array_equal(np.concatenate(vectors), stub_vectors(texts))
