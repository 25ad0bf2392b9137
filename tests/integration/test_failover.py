"""A broker that takes no writes for a while, as one does that fails over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.servers import RedisProcess, stub_node, wait_for

from embedq import Client
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
