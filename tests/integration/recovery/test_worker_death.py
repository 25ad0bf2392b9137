"""A batch whose worker or pool process dies is finished once by another one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.support.redis import RedisProcess, wait_for, wait_until_acknowledged
from tests.support.workers import WorkerProcess, stopped_worker, stub_worker

from embedq import Client
from embedq.errors import TextsFailed
from embedq.jobs.batches import TextBatch
from embedq.protocol.values import Vectors
from embedq.testing import stub_vectors

#: The shortest visibility timeout that is allowed.
LEASE = {"EMBEDQ_VISIBILITY_TIMEOUT_S": "4"}
TEXTS = [f"text {i}" for i in range(200)]


def embed_as_one_batch(redis: RedisProcess, texts: list[str], timeout_s: float = 60) -> Vectors:
    """Publish all texts as a single batch and return its vectors."""
    with Client(settings=redis.settings()) as client:
        job = client.job([TextBatch(0, 0, texts, {})], client.spec())
        [batch] = job.batches(timeout_s=timeout_s)
        assert batch.failure is None
        return batch.vectors


@contextmanager
def in_background(action: Callable[[], Vectors]) -> Iterator[list[Vectors]]:
    """Run an action in a thread during the block; its result is appended to the list."""
    results: list[Vectors] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    try:
        yield results
    finally:
        thread.join()


def wait_for_an_attempt(redis: RedisProcess) -> None:
    """Wait until a pool process has counted its attempt at a batch."""
    with redis.open() as client:
        wait_for(lambda: list(client.scan_iter("embedq:{*}:tries")), "a batch to begin")


def assert_nothing_left(redis: RedisProcess) -> None:
    wait_until_acknowledged(redis)
    with redis.open(1) as results:
        assert list(results.scan_iter("embedq:{*")) == []


def test_second_worker_finishes_the_batch_of_a_killed_worker(
    redis: RedisProcess, short_dir: Path
) -> None:
    slow = {**LEASE, "EMBEDQ_STUB_TEXTS_PER_S": "40"}
    with stub_worker(redis, short_dir, "first", **slow) as first:
        with in_background(lambda: embed_as_one_batch(redis, TEXTS)) as results:
            wait_for_an_attempt(redis)
            first.kill()
            with stub_worker(redis, short_dir, "second", **LEASE) as second:
                wait_for(lambda: results, "the vectors")
                assert_nothing_left(redis)  # so the log line has been written

        assert np.array_equal(results[0], stub_vectors(TEXTS))
        assert not first.lines("batch_done")
        assert len(second.lines("batch_done")) == 1


def test_batch_longer_than_its_lease_runs_once(redis: RedisProcess, short_dir: Path) -> None:
    slow = {**LEASE, "EMBEDQ_STUB_TEXTS_PER_S": "22"}  # 200 texts take more than two leases
    with (
        stopped_worker(redis, short_dir, "one", **slow) as one,
        stopped_worker(redis, short_dir, "two", **slow) as two,
    ):
        vectors = embed_as_one_batch(redis, TEXTS)
        assert_nothing_left(redis)

    assert np.array_equal(vectors, stub_vectors(TEXTS))
    executions = [*one.lines("batch_"), *two.lines("batch_")]
    assert len(executions) == 1, executions


def test_replacement_pool_process_finishes_the_batch(redis: RedisProcess, short_dir: Path) -> None:
    with stub_worker(redis, short_dir, EMBEDQ_STUB_TEXTS_PER_S="100") as worker:
        killed = worker.pool_pid()
        with in_background(lambda: embed_as_one_batch(redis, TEXTS, timeout_s=20)) as results:
            wait_for_an_attempt(redis)
            os.kill(killed, signal.SIGKILL)

        assert np.array_equal(results[0], stub_vectors(TEXTS))
        assert worker.process.poll() is None
        assert worker.pool_pid() != killed
        assert_nothing_left(redis)  # so the log line has been written
        assert len(worker.lines("batch_done")) == 1


def test_batch_of_a_killed_pool_process_is_requeued_at_the_head(
    redis: RedisProcess, short_dir: Path
) -> None:
    def embed() -> Vectors:
        with Client(settings=redis.settings(batch_texts=20)) as client:
            return client.encode(TEXTS, timeout_s=30)

    with stub_worker(redis, short_dir, EMBEDQ_STUB_DELAY_S="0.3") as worker:
        with in_background(embed) as results:
            wait_for_an_attempt(redis)
            os.kill(worker.pool_pid(), signal.SIGKILL)

        done = [line.partition("index=")[2].split()[0] for line in worker.lines("batch_done")]
        assert done == [str(index) for index in range(len(done))]
        assert np.array_equal(results[0], stub_vectors(TEXTS))


@pytest.mark.parametrize("fault", ["segfault", "raise"])
def test_poisoned_text_is_dead_lettered_and_the_worker_goes_on(
    fault: str, redis: RedisProcess, short_dir: Path
) -> None:
    with (
        stub_worker(redis, short_dir) as worker,
        Client(settings=redis.settings()) as client,
    ):
        with pytest.raises(TextsFailed) as caught:
            client.encode(["before", f"embedq-fault:{fault}", "behind"], timeout_s=30)

        assert caught.value.failures == {1: "set_aside"}
        assert np.array_equal(caught.value.vectors[[0, 2]], stub_vectors(["before", "behind"]))
        assert np.array_equal(client.encode("after"), stub_vectors(["after"])[0])
        assert worker.process.poll() is None
        assert_nothing_left(redis)


def test_worker_finishes_its_batch_after_sigterm(redis: RedisProcess, short_dir: Path) -> None:
    with (
        in_background(lambda: embed_as_one_batch(redis, TEXTS)) as results,
        stub_worker(redis, short_dir, "stopping", EMBEDQ_STUB_TEXTS_PER_S="100") as worker,
    ):
        wait_for_an_attempt(redis)
        worker.process.terminate()
        worker.process.wait(20)

    assert worker.process.returncode == 0
    assert np.array_equal(results[0], stub_vectors(TEXTS))
    assert len(worker.lines("batch_done")) == 1
    assert worker.heartbeat() is None


def test_duplicate_messages_are_committed_once(
    worker: WorkerProcess,
    client: Client,
    shared_redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish = client._publisher.publish
    wait_until_acknowledged(shared_redis)
    before = len(worker.lines("committed=yes"))

    def three_times(*args: object) -> None:
        for _ in range(3):
            publish(*args)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(client._publisher, "publish", three_times)
    spec = client.spec()
    text_batches = list(client.split(TEXTS, spec))
    batches = list(client.job(text_batches, spec).batches(timeout_s=20))

    assert [batch.text_batch.index for batch in batches] == list(range(len(text_batches)))
    assert np.array_equal(np.concatenate([b.vectors for b in batches]), stub_vectors(TEXTS))
    wait_until_acknowledged(shared_redis)
    assert len(worker.lines("committed=yes")) == before + len(text_batches)
