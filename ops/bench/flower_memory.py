"""Flower's memory over many tasks: a real Flower is sent the events of as many batches.

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

#: Parts into which the tasks are cut; memory is read after each.
PARTS = 10


def main() -> None:
    """Print the resident memory after each part; flat means that what is kept is bounded."""
    parser = argparse.ArgumentParser(description=__doc__)
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
                    wait_for(lambda n=sent: received(running) >= n, "Flower to keep up", 600)  # type: ignore[misc] # the default binds the loop variable
                    print(f"tasks={sent} rss_mb={rss_mb(running):.0f}", flush=True)
        finally:
            redis.stop()


def send(redis: RedisProcess, count: int) -> None:
    """Send what a worker tells of so many batches."""
    app = Celery(broker=redis.broker_url(), set_as_current=False)
    with app.connection_for_write() as connection:
        dispatcher: Any = EventDispatcher(
            connection, "worker@bench", app=app, buffer_while_offline=False
        )
        for number in range(count):
            told = {"uuid": f"{uuid.uuid4().hex[:16]}:{number}:{uuid.uuid4().hex}"}
            dispatcher.send("task-received", **told, name="embedq.embed_batch", args="<256 texts>")
            dispatcher.send("task-started", **told)
            dispatcher.send("task-succeeded", **told, result="{'rows': 256}", runtime=0.1)
    app.close()


def received(running: Flower) -> float:
    """Return how many ends of tasks Flower has counted."""
    lines = fetch(f"http://{running.at}/metrics").splitlines()
    found = [x for x in lines if x.startswith("flower_events_total{") and "task-succeeded" in x]
    time.sleep(0.5)
    return sum(float(line.rpartition(" ")[2]) for line in found)


def rss_mb(running: Flower) -> float:
    """Return the resident memory of the Flower that listens on this port."""
    port = running.at.partition(":")[2]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # one that has just ended
            if f"--port={port}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                pages = int((process / "statm").read_text().split()[1])
                return pages * resource.getpagesize() / 1e6
    raise RuntimeError("Flower is gone.")


if __name__ == "__main__":
    main()
