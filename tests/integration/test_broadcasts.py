"""What is published to all workers at once, and none of them may end over."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.support.redis import RedisProcess, wait_for
from tests.support.workers import stub_worker


def message(body: str, headers: object = None) -> str:
    """Return a broadcast with a body of one's own."""
    info = {"exchange": "celery.pidbox", "routing_key": ""}
    properties = {"body_encoding": "base64", "delivery_tag": "tag", "delivery_info": info}
    encoded = base64.b64encode(body.encode()).decode()
    return json.dumps(
        {
            "body": encoded,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {} if headers is None else headers,
            "properties": properties,
        }
    )


def test_no_broadcast_ends_a_worker(redis: RedisProcess, short_dir: Path) -> None:
    """Each is refused with a line; a worker reads them in the loop that serves everything else."""
    deep = "[" * 2000 + "]" * 2000
    bad = ["[]", "7", "{}", deep, "no JSON", message(deep), message("no JSON")]
    bad += [message("{}", headers) for headers in ([1], "text", 7)]
    with stub_worker(redis, short_dir, "hearer") as worker, redis.open(0) as broker:
        before = worker.pids()

        for raw in bad:
            broker.publish("/0.celery.pidbox", raw)

        wait_for(
            lambda: (
                len(worker.lines("broadcast_refused")) == len(bad)
                or worker.lines("worker_process_exited")
            ),
            "the worker to refuse them",
        )
        assert worker.pids() == before
        assert not worker.lines("worker_process_exited")
