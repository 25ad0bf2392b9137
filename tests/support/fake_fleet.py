"""Write heartbeats, jobs and messages into Redis as workers and producers do."""

from __future__ import annotations

import json
import time

from redis import Redis

from embedq.protocol.contract import Queue
from embedq.protocol.worker import ModelInfo, WorkerStatus
from embedq.store.fleet import publish_heartbeat
from embedq.store.ledger import Ledger
from embedq.store.queues import UNACKED_INDEX_KEY, UNACKED_KEY

MODEL_INFO = ModelInfo("org/model@abc123", "ab" * 32, 384, 256)


def add_workers(results: Redis, count: int, **fields: object) -> None:
    """Publish one heartbeat for each of `count` workers, 30 s after their last state change."""
    now = time.time()
    for number in range(count):
        values = {
            "state": "healthy",
            "device": "cpu",
            "assigned_device": "cpu",
            "model_info": MODEL_INFO,
            **fields,
        }
        worker = WorkerStatus(f"worker-{number:03}", at=now, state_since=now - 30, pid=1, **values)  # type: ignore[arg-type] # a test's keywords
        publish_heartbeat(results, worker)


def add_jobs(results: Redis, count: int, *, batches: int = 3, planned: int | None = 1000) -> None:
    """Open jobs with committed batches of ten texts each."""
    for number in range(count):
        ledger = Ledger(results, f"job{number:04}")
        ledger.open(fingerprint=b"x", ttl_s=600, label="secret/name.npy")
        for index in range(batches):
            ledger.commit(index, [b"vectors"], n_texts=10)
        ledger.report_progress(published=batches + 1, planned=planned)


def message(published: float, size: int = 100) -> str:
    """Return a message as kombu stores it in a queue: JSON, the body before the headers."""
    return json.dumps({"body": "A" * size, "headers": {"published": published, "task": "t"}})


def add_messages(broker: Redis, queue: Queue, ages_s: list[float], size: int = 100) -> None:
    """Publish messages of these ages; list the oldest first."""
    for age_s in ages_s:
        broker.lpush(str(queue), message(time.time() - age_s, size))


def add_unacked_messages(
    broker: Redis, ages_s: list[float], lease_s: float = 1.0, size: int = 100
) -> None:
    """Add unacknowledged messages of these ages, with leases renewed `lease_s` ago."""
    for number, age_s in enumerate(ages_s):
        held = json.dumps([json.loads(message(time.time() - age_s, size)), "", "embed.npu"])
        broker.hset(UNACKED_KEY, f"tag{number}", held)
        broker.zadd(UNACKED_INDEX_KEY, {f"tag{number}": time.time() - lease_s})
