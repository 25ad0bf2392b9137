"""Measure Flower's memory while it receives the events of many batches.

ops/bench/flower_memory.py [--tasks 300000]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import Celery
from celery.events import EventDispatcher

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.monitoring import Flower, fetch, flower
from tests.support.redis import RedisProcess, wait_for

#: Number of times that memory is measured.
PARTS = 10


def main() -> None:
    """Print the resident memory after each part of the tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=300_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eq-") as name:
        folder = Path(name)
        redis = RedisProcess(folder)
        try:
            with flower(redis, folder) as running:
                for part in range(1, PARTS + 1):
                    send(redis, options.tasks // PARTS)
                    sent = part * (options.tasks // PARTS)
                    wait_until_received(running, sent)
                    print(f"tasks={sent} rss_mb={rss_mb(running):.0f}", flush=True)
        finally:
            redis.stop()


def send(redis: RedisProcess, count: int) -> None:
    """Publish the events that a worker sends for this many batches."""
    app = Celery(broker=redis.broker_url(), set_as_current=False)
    with app.connection_for_write() as connection:
        dispatcher: Any = EventDispatcher(
            connection, "worker@bench", app=app, buffer_while_offline=False
        )
        for number in range(count):
            task = {"uuid": f"{uuid.uuid4().hex[:16]}:{number}:{uuid.uuid4().hex}"}
            dispatcher.send("task-received", **task, name="embedq.embed_batch", args="<256 texts>")
            dispatcher.send("task-started", **task)
            dispatcher.send("task-succeeded", **task, result="{'rows': 256}", runtime=0.1)
    app.close()


def wait_until_received(running: Flower, count: int) -> None:
    """Wait until Flower has counted this many finished tasks."""
    wait_for(lambda: received(running) >= count, "Flower to count the tasks", 600)


def received(running: Flower) -> float:
    """Return the number of task-succeeded events that Flower counted."""
    lines = fetch(f"http://{running.at}/metrics").splitlines()
    found = [x for x in lines if x.startswith("flower_events_total{") and "task-succeeded" in x]
    time.sleep(0.5)
    return sum(float(line.rpartition(" ")[2]) for line in found)


def rss_mb(running: Flower) -> float:
    """Return the resident memory of a running Flower, MB."""
    port = running.at.partition(":")[2]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process ended meanwhile
            if f"--port={port}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                pages = int((process / "statm").read_text().split()[1])
                return pages * resource.getpagesize() / 1e6
    raise RuntimeError(f"Flower on port {port} has ended. See its log.")


if __name__ == "__main__":
    main()
