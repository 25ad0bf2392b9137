"""What a job costs in Redis, and that nothing of it is left."""

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
    """Open a client that has a whole job under way at once."""
    with Client(settings=shared_redis.settings(max_in_flight=1024)) as opened:
        yield opened


def test_vectors_fill_what_they_occupy(wide_client: Client, shared_redis: RedisProcess) -> None:
    """Values and stream entries take at most 2 % more than the vectors, and Redis 5 % more."""
    texts = [f"text {i} {'word ' * (i % 50)}" for i in range(5_000)]
    spec = wide_client.spec()
    slices = list(wide_client.split(texts, spec))
    job = wide_client.job(slices, spec)
    job.start()
    with shared_redis.open() as redis:
        prefix = f"embedq:{{{job.id}}}:"
        stream = f"{prefix}commits"
        wait_for(lambda: redis.xlen(stream) == len(slices), "all commits")

        values = list(redis.scan_iter(f"{prefix}v:*"))
        payload = sum(redis.strlen(key) for key in values)
        entries = sum(
            len(entry) + sum(len(k) + len(v) for k, v in body.items())
            for entry, body in redis.xrange(stream)
        )
        occupied = sum(redis.memory_usage(key, samples=0) for key in redis.scan_iter(f"{prefix}*"))
        job.cancel()

    print(f"{len(slices)} batches, {len(values)} values: ", end="")
    print(f"{payload + entries} bytes, {occupied} occupied, {len(texts) * RAW_BYTES} raw")
    assert payload + entries <= 1.02 * RAW_BYTES * len(texts)
    assert occupied <= 1.05 * RAW_BYTES * len(texts)


def test_message_is_smaller_than_its_texts(shared_redis: RedisProcess) -> None:
    """Of English prose a message, envelope and all, is at most 0.6 of the texts in UTF-8."""
    texts = docstrings()[:512]

    message = len(json.dumps(queued(shared_redis, stub_batch(texts))))

    share = message / sum(len(text.encode()) for text in texts)
    print(f"{message} bytes, {share:.3f} of the texts")
    assert share <= 0.6


def test_nothing_is_left_once_results_were_taken(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    """After a job no key of it, no queued and no unacknowledged message is left in Redis."""
    client.encode([f"text {i}" for i in range(3_000)])

    wait_until_acknowledged(shared_redis)
    with shared_redis.open(1) as results:
        assert list(results.scan_iter("embedq:{*")) == []
        assert results.zcard("embedq:jobs") == 0
        strangers = [key for key in results.scan_iter() if not key.startswith(b"embedq:worker")]
        assert strangers == []


def test_nothing_is_left_of_a_job_that_was_abandoned(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    """A caller who stops in the middle leaves nothing, not even what was under way."""
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
    """A value changed or evicted in Redis never reaches the caller, however fast the workers
    are.
    """
    texts = [f"text {i}" for i in range(600)]
    spec = wide_client.spec()
    slices = list(wide_client.split(texts, spec))
    job = wide_client.job(slices, spec)
    job.start()
    with shared_redis.open() as redis:
        wait_for(lambda: redis.xlen(f"embedq:{{{job.id}}}:commits") == len(slices), "all commits")
        first, second = sorted(redis.scan_iter(f"embedq:{{{job.id}}}:v:*"))[:2]
        redis.setrange(first, 1000, b"\xff")
        redis.delete(second)
        publish = BatchSender.publish

        def publish_and_wait(pump: BatchSender, piece: TextBatch, recomputes: int = 0) -> None:
            publish(pump, piece, recomputes)
            bits = f"embedq:{{{job.id}}}:bits"
            wait_for(lambda: redis.getbit(bits, piece.index), "the commit of what was published")

        if at_once:
            monkeypatch.setattr(BatchSender, "publish", publish_and_wait)
        vectors = [batch.vectors for batch in job.batches(timeout_s=20)]

    assert np.array_equal(np.concatenate(vectors), stub_vectors(texts))
