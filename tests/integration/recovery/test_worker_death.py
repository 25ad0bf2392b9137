"""Workers and children die in the middle of a batch; the batch is finished, once, by another."""

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

#: The shortest visibility timeout there is, so that a dead worker is missed soon.
LEASE = {"EMBEDQ_VISIBILITY_TIMEOUT_S": "4"}
TEXTS = [f"text {i}" for i in range(200)]


def embed_as_one_batch(redis: RedisProcess, texts: list[str], timeout_s: float = 60) -> Vectors:
    """Send all texts as a single batch and return its vectors."""
    with Client(settings=redis.settings()) as client:
        job = client.job([TextBatch(0, 0, texts, {})], client.spec())
        [batch] = job.batches(timeout_s=timeout_s)
        assert batch.failure is None
        return batch.vectors


@contextmanager
def in_background(action: Callable[[], Vectors]) -> Iterator[list[Vectors]]:
    """Run an action beside the block; its result is in the list when the block is left."""
    results: list[Vectors] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    try:
        yield results
    finally:
        thread.join()


def wait_until_begun(redis: RedisProcess) -> None:
    """Wait until a child has begun a batch."""
    with redis.open() as client:
        wait_for(lambda: list(client.scan_iter("embedq:{*}:tries")), "a batch to begin")


def assert_nothing_left(redis: RedisProcess) -> None:
    """Require that queues, unacknowledged messages and the job are gone."""
    wait_until_acknowledged(redis)
    with redis.open(1) as results:
        assert list(results.scan_iter("embedq:{*")) == []


def test_other_node_finishes_a_dead_workers_batch(redis: RedisProcess, short_dir: Path) -> None:
    """A worker killed with SIGKILL loses its lease; another computes its batch."""
    slow = {**LEASE, "EMBEDQ_STUB_TEXTS_PER_S": "40"}
    with stub_worker(redis, short_dir, "first", **slow) as first:
        with in_background(lambda: embed_as_one_batch(redis, TEXTS)) as results:
            wait_until_begun(redis)
            first.kill()
            with stub_worker(redis, short_dir, "second", **LEASE) as second:
                wait_for(lambda: results, "the vectors")
                assert_nothing_left(redis)  # acknowledged, so the log has the line about it

        assert np.array_equal(results[0], stub_vectors(TEXTS))
        assert not first.lines("batch_done")
        assert len(second.lines("batch_done")) == 1


def test_batch_longer_than_its_lease_runs_once(redis: RedisProcess, short_dir: Path) -> None:
    """Leases are renewed: a batch of more than two leases is not given to an idle worker."""
    slow = {**LEASE, "EMBEDQ_STUB_TEXTS_PER_S": "22"}  # 200 texts take 9 s
    with (
        stopped_worker(redis, short_dir, "one", **slow) as one,
        stopped_worker(redis, short_dir, "two", **slow) as two,
    ):
        vectors = embed_as_one_batch(redis, TEXTS)
        assert_nothing_left(redis)

    assert np.array_equal(vectors, stub_vectors(TEXTS))
    executions = [*one.lines("batch_"), *two.lines("batch_")]
    assert len(executions) == 1, executions


def test_replacement_child_finishes_the_batch(redis: RedisProcess, short_dir: Path) -> None:
    """A child killed with SIGKILL is replaced, and its batch comes back at once."""
    with stub_worker(redis, short_dir, EMBEDQ_STUB_TEXTS_PER_S="100") as worker:
        dead = worker.pool_pid()
        with in_background(lambda: embed_as_one_batch(redis, TEXTS, timeout_s=20)) as results:
            wait_until_begun(redis)
            os.kill(dead, signal.SIGKILL)

        assert np.array_equal(results[0], stub_vectors(TEXTS))
        assert worker.process.poll() is None
        assert worker.pool_pid() != dead
        assert_nothing_left(redis)  # acknowledged, so the log has the line about it
        assert len(worker.lines("batch_done")) == 1


def test_lost_batch_does_not_queue_up_again(redis: RedisProcess, short_dir: Path) -> None:
    """What lost its child is the next to be taken, with its age, however long the queue is."""

    def embed() -> Vectors:
        with Client(settings=redis.settings(batch_texts=20)) as client:
            return client.encode(TEXTS, timeout_s=30)

    with stub_worker(redis, short_dir, EMBEDQ_STUB_DELAY_S="0.3") as worker:
        with in_background(embed) as results:
            wait_until_begun(redis)
            os.kill(worker.pool_pid(), signal.SIGKILL)

        done = [line.partition("index=")[2].split()[0] for line in worker.lines("batch_done")]
        assert done == [str(index) for index in range(len(done))]
        assert np.array_equal(results[0], stub_vectors(TEXTS))


@pytest.mark.parametrize("fault", ["segfault", "raise"])
def test_poison_is_set_aside_and_the_worker_goes_on(
    fault: str, redis: RedisProcess, short_dir: Path
) -> None:
    """A text that fails every process is set aside; its neighbors and the next are served."""
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


def test_worker_that_ends_in_good_order_gives_its_batch_back(
    redis: RedisProcess, short_dir: Path
) -> None:
    """SIGTERM lets a worker finish what it has in hand; nothing is lost or computed twice."""
    with (
        in_background(lambda: embed_as_one_batch(redis, TEXTS)) as results,
        stub_worker(redis, short_dir, "leaving", EMBEDQ_STUB_TEXTS_PER_S="100") as worker,
    ):
        wait_until_begun(redis)
        worker.process.terminate()
        worker.process.wait(20)

    assert worker.process.returncode == 0
    assert np.array_equal(results[0], stub_vectors(TEXTS))
    assert len(worker.lines("batch_done")) == 1
    assert worker.heartbeat() is None


def test_duplicate_messages_deliver_once(
    worker: WorkerProcess,
    client: Client,
    shared_redis: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch that lies in the queue three times is delivered once and committed once."""
    publish = client._publisher.publish
    wait_until_acknowledged(shared_redis)
    before = len(worker.lines("committed=yes"))

    def three_times(*args: object) -> None:
        for _ in range(3):
            publish(*args)  # type: ignore[arg-type] # passed on as they came

    monkeypatch.setattr(client._publisher, "publish", three_times)
    spec = client.spec()
    slices = list(client.split(TEXTS, spec))
    batches = list(client.job(slices, spec).batches(timeout_s=20))

    assert [batch.slice.index for batch in batches] == list(range(len(slices)))
    assert np.array_equal(np.concatenate([b.vectors for b in batches]), stub_vectors(TEXTS))
    wait_until_acknowledged(shared_redis)
    assert len(worker.lines("committed=yes")) == before + len(slices)
