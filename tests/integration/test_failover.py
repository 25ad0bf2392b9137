"""A broker that takes no writes for a while, as one does that fails over."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from redis import Redis
from tests.servers import RedisProcess, stub_node, wait_for

from embedq import Client
from embedq.store import fleet
from embedq.testing import stub_vectors


def test_node_waits_for_a_broker_that_fails_over(short_dir: Path) -> None:
    """A replica refuses whoever asks it for a batch; the node lives on until it is a master."""
    redis = RedisProcess(short_dir)
    try:
        with stub_node(redis, short_dir, "patient") as node, redis.open(0) as broker:
            before = node.pids()
            broker.execute_command("REPLICAOF", "127.0.0.1", "1")
            # Celery pauses when it has connected five times within a second.
            wait_for(lambda: node.lines("Frequent restarts") or node.lines("node_died"), "tries")
            broker.execute_command("REPLICAOF", "NO", "ONE")

            with Client(settings=redis.settings()) as client:
                vectors = client.encode(["a text"])

            assert np.array_equal(vectors, stub_vectors(["a text"]))
            assert node.pids() == before
    finally:
        redis.stop()


def test_paused_node_waits_for_a_redis_that_cannot_write(short_dir: Path) -> None:
    """Such a Redis answers not even a ping, which is all that a node asks that takes no batch."""
    disk = short_dir / "disk"
    disk.mkdir()
    redis = RedisProcess(short_dir, "--dir", os.fspath(disk))
    try:
        with stub_node(redis, short_dir, "patient") as node, redis.open(0) as broker:
            before = node.child_pid()
            with redis.open() as results:
                fleet.pause(results, "A test.")
            wait_for(lambda: node.lines("Canceling queue embed.npu"), "the node to pause")
            broker.config_set("save", "3600 1")
            disk.rmdir()
            broker.execute_command("BGSAVE")
            wait_for(lambda: _cannot_write(broker), "Redis to fail")

            wait_for(
                lambda: node.lines("Connection to broker lost") or node.lines("node_died"),
                "the node to notice",
            )

            assert not node.lines("node_died")
            assert node.child_pid() == before
    finally:
        redis.stop()


def _cannot_write(broker: Redis) -> bool:
    return bool(broker.info("persistence")["rdb_last_bgsave_status"] == "err")
