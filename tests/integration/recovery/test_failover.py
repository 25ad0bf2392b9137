"""A broker that refuses writes for a while, as in a failover."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from redis import Redis
from tests.support.redis import RedisProcess, wait_for
from tests.support.workers import stub_worker

from embedq import Client
from embedq.store import fleet
from embedq.testing import stub_vectors


def test_worker_survives_a_failover_of_the_broker(short_dir: Path) -> None:
    # A replica refuses the commands that consume a batch.
    redis = RedisProcess(short_dir)
    try:
        with stub_worker(redis, short_dir, "patient") as worker, redis.open(0) as broker:
            before = worker.pids()
            broker.execute_command("REPLICAOF", "127.0.0.1", "1")
            # Celery pauses after five connects within a second.
            wait_for(
                lambda: worker.lines("Frequent restarts") or worker.lines("worker_process_exited"),
                "reconnects",
            )
            broker.execute_command("REPLICAOF", "NO", "ONE")

            with Client(settings=redis.settings()) as client:
                vectors = client.encode(["a text"])

            assert np.array_equal(vectors, stub_vectors(["a text"]))
            assert worker.pids() == before
    finally:
        redis.stop()


def test_paused_worker_survives_a_broker_that_cannot_write(short_dir: Path) -> None:
    # Such a Redis refuses even PING, the only command of a paused consumer.
    disk = short_dir / "disk"
    disk.mkdir()
    redis = RedisProcess(short_dir, "--dir", os.fspath(disk))
    try:
        with stub_worker(redis, short_dir, "patient") as worker, redis.open(0) as broker:
            before = worker.pool_pid()
            with redis.open() as results:
                fleet.pause(results, "A test.")
            wait_for(lambda: worker.lines("Canceling queue embed.npu"), "the worker to pause")
            broker.config_set("save", "3600 1")
            disk.rmdir()
            broker.execute_command("BGSAVE")
            wait_for(lambda: _cannot_write(broker), "Redis to fail")

            wait_for(
                lambda: (
                    worker.lines("Connection to broker lost")
                    or worker.lines("worker_process_exited")
                ),
                "the worker to notice",
            )

            assert not worker.lines("worker_process_exited")
            assert worker.pool_pid() == before
    finally:
        redis.stop()


def _cannot_write(broker: Redis) -> bool:
    return bool(broker.info("persistence")["rdb_last_bgsave_status"] == "err")
