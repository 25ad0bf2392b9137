"""Invalid broadcasts do not end a worker."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.support.redis import RedisProcess, wait_for
from tests.support.workers import stub_worker


def message(body: str, headers: object = None) -> str:
    """Return a broadcast with this body."""
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


def test_invalid_broadcasts_are_refused_with_a_log_line(
    redis: RedisProcess, short_dir: Path
) -> None:
    deep = "[" * 2000 + "]" * 2000
    invalid = ["[]", "7", "{}", deep, "not JSON", message(deep), message("not JSON")]
    invalid += [message("{}", headers) for headers in ([1], "text", 7)]
    with stub_worker(redis, short_dir, "listener") as worker, redis.open(0) as broker:
        before = worker.pids()

        for raw in invalid:
            broker.publish("/0.celery.pidbox", raw)

        wait_for(
            lambda: (
                len(worker.lines("broadcast_refused")) == len(invalid)
                or worker.lines("worker_process_exited")
            ),
            "one log line per broadcast",
        )
        assert worker.pids() == before
        assert not worker.lines("worker_process_exited")
