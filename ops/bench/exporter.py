"""Measure scrapes of the exporter over HTTP, with many jobs and workers in a real Redis.

ops/bench/exporter.py [--jobs 100] [--workers 50] [--scrapes 200]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.fake_fleet import add_jobs, add_messages, add_unacked_messages, add_workers
from tests.support.redis import RedisProcess

from embedq.observability.exporter import serve
from embedq.protocol.contract import Queue

#: Size of a message of 256 docstrings in Redis, bytes.
MESSAGE_BYTES = 60_000


def main() -> None:
    """Print median, 95th percentile and maximum of the scrape times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--scrapes", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eq-") as folder:
        redis = RedisProcess(Path(folder))
        try:
            print(measure(redis, options.jobs, options.workers, options.scrapes))
        finally:
            redis.stop()


def measure(redis: RedisProcess, jobs: int, workers: int, scrapes: int) -> str:
    """Fill a Redis, scrape the exporter repeatedly and return the figures as one line."""
    with redis.open(0) as broker, redis.open() as results:
        add_jobs(results, jobs)
        add_workers(results, workers, totals={"texts": 1_000_000.0, "infer_s": 12.5})
        add_messages(broker, Queue.NPU, [60.0] * 4 * workers, size=MESSAGE_BYTES)
        add_unacked_messages(broker, [5.0] * workers, size=MESSAGE_BYTES)
        with serve(broker, results, "127.0.0.1", 0) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            took_ms = []
            for _ in range(scrapes):
                began = time.perf_counter()
                with urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
                    size = len(answer.read())
                took_ms.append(1e3 * (time.perf_counter() - began))
            server.shutdown()
            thread.join()
    took_ms.sort()
    return (
        f"jobs={jobs} workers={workers} scrapes={scrapes} bytes={size} "
        f"median_ms={statistics.median(took_ms):.1f} p95_ms={took_ms[int(scrapes * 0.95)]:.1f} "
        f"max_ms={took_ms[-1]:.1f}"
    )


if __name__ == "__main__":
    main()
