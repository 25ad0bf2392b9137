"""A degraded worker appears in metrics, alert, Flower and status, with real servers and a browser.

Set OPS_PICTURES to a folder to store the screenshots of the browser.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from tests.support.monitoring import (
    DEPLOY,
    USER,
    Flower,
    Prometheus,
    browse,
    exporter,
    fetch,
    flower,
    host,
    prometheus,
    urls,
)
from tests.support.redis import RedisProcess, environment, wait_for
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.jobs.job import Job

#: Seconds within which a degraded worker is reported: two intervals of 5 s and a margin.
REPORTED_WITHIN_S = 15.0
#: Seconds until the first batch and the first scrape.
START_S = 60.0
#: Seconds until the rates of the last minute are recorded.
RATES_S = 60.0
REASON = "The stub lost its device, because a test says so."
TEXTS = 20_000
SECRET = "Zanzibar"


@dataclass(frozen=True)
class Monitored:
    """A running job, two workers and their monitoring.

    Attributes:
        redis, npu_worker: the servers; the worker is degraded.
        exporter: host and port.
        prometheus, flower: clients of the monitoring.
        asked, done: Unix times before and after `embedq-worker degrade`, seconds.
    """

    redis: RedisProcess
    npu_worker: WorkerProcess
    exporter: str
    prometheus: Prometheus
    flower: Flower
    asked: float
    done: float


def degrade(redis: RedisProcess, worker: str) -> None:
    command = [sys.executable, "-m", "embedq_worker", "degrade", worker, "--reason", REASON]
    subprocess.run(command, env=environment(**urls(redis)), check=True, stdout=subprocess.DEVNULL)


def read(job: Job, ended: threading.Event) -> None:
    """Read the vectors of a job until `ended` is set."""
    for _ in job.batches():
        if ended.is_set():
            return


def computes(worker: WorkerProcess) -> bool:
    """Return whether a worker has reported computed texts."""
    beat = worker.heartbeat()
    return bool(beat and beat.totals.get("texts"))


@pytest.fixture(scope="module")
def folder(shared_dir: Path) -> Path:
    made = shared_dir / "monitored"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def watched_redis(folder: Path) -> Iterator[RedisProcess]:
    """Run a Redis with a memory limit."""
    server = RedisProcess(folder, "--maxmemory", "100mb")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def monitored(watched_redis: RedisProcess, folder: Path) -> Iterator[Monitored]:
    """Run a job on two workers with monitoring, and degrade one of the workers."""
    redis = watched_redis
    slow = {"EMBEDQ_STUB_TEXTS_PER_S": "150"}
    with (
        stub_worker(redis, folder, "npu0", EMBEDQ_STUB_DEVICE="npu", **slow) as npu_worker,
        stub_worker(redis, folder, "cpu0", **slow),
        exporter(redis, folder) as address,
        prometheus(address, folder) as prometheus_client,
        flower(redis, folder) as flower_client,
        Client(settings=redis.settings(batch_texts=256)) as client,
    ):
        job, ended = client.submit([f"{SECRET} {n}" for n in range(TEXTS)]), threading.Event()
        reading = threading.Thread(target=read, args=(job, ended))
        reading.start()
        try:
            wait_for(lambda: computes(npu_worker), "the worker to compute", START_S)
            known = 'embedq_worker_state{worker="npu0", state="healthy"} == 1'
            wait_for(lambda: prometheus_client.query(known), "a first scrape", START_S)
            asked = time.time()
            degrade(redis, npu_worker.name)
            yield Monitored(
                redis,
                npu_worker,
                address,
                prometheus_client,
                flower_client,
                asked,
                time.time(),
            )
        finally:
            ended.set()
            reading.join()


def status(redis: RedisProcess) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "embedq", "status", "--json"],
        env=environment(**urls(redis)),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def screenshot(tmp_path: Path, name: str) -> Path:
    """Return the path of a screenshot."""
    return Path(os.environ.get("OPS_PICTURES", tmp_path)) / f"{name}.png"


def test_metrics_alert_flower_and_status_name_the_degraded_worker(monitored: Monitored) -> None:
    left_s = monitored.done + REPORTED_WITHIN_S - time.time()

    alert = wait_for(
        lambda: monitored.prometheus.firing().get("EmbedqWorkerDegraded"), "the alert", left_s
    )
    metrics = fetch(f"http://{monitored.exporter}/metrics")
    stats = monitored.flower.api("workers?refresh=1")
    [worker] = [
        worker for worker in status(monitored.redis)["workers"] if worker["worker"] == "npu0"
    ]

    assert (alert["labels"]["worker"], alert["labels"]["reason"]) == ("npu0", "operator")
    stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime(worker["state_since"]))
    assert f"since {stamp}" in alert["annotations"]["description"]
    assert 'embedq_worker_state{state="degraded",worker="npu0"} 1.0' in metrics
    [since] = monitored.prometheus.query(
        'embedq_worker_state_since_timestamp_seconds{worker="npu0"}'
    )
    assert float(since["value"][1]) == pytest.approx(worker["state_since"], abs=0.1)
    [reported] = [found["stats"]["embedq"] for name, found in stats.items() if "npu0" in name]
    assert (reported["state"], reported["reason"]) == (worker["state"], worker["reason"])
    assert (worker["state"], worker["reason"]) == ("degraded", REASON)
    assert monitored.asked - 1 <= worker["state_since"] <= time.time()
    assert SECRET not in metrics + json.dumps(stats)


def test_every_dashboard_query_returns_a_series(monitored: Monitored) -> None:
    found = json.loads((DEPLOY / "grafana/dashboards/embedq.json").read_text(encoding="utf-8"))
    queries = [t["expr"] for panel in found["panels"] for t in panel.get("targets", [])]
    empty = set(queries)

    def all_answered() -> bool:
        empty.difference_update([each for each in empty if monitored.prometheus.query(each)])
        return not empty

    deadline = time.monotonic() + RATES_S
    while not all_answered() and time.monotonic() < deadline:
        time.sleep(1)

    assert len(queries) >= 20
    assert empty == set()


def test_flower_shows_task_sizes_and_the_reason_but_no_text(
    monitored: Monitored, tmp_path: Path
) -> None:
    wait_for(lambda: monitored.flower.api("tasks?limit=5&state=SUCCESS"), "a task in Flower")

    tasks = browse(monitored.flower.page("tasks"), screenshot(tmp_path, "flower-tasks"))
    worker = browse(
        monitored.flower.page("worker/npu0@" + host()),
        screenshot(tmp_path, "flower-node"),
    )

    assert re.search(r"&lt;[\d,]+ texts, [\d,]+ kB&gt;", tasks)
    shown = worker[: worker.index("Max concurrency")]  # the top of the page
    [reported] = [
        worker for worker in status(monitored.redis)["workers"] if worker["worker"] == "npu0"
    ]
    stamp = time.strftime("%d %b %Y %H:%M:%S UTC", time.gmtime(reported["state_since"]))
    assert [words for words in ("Degraded", REASON, stamp) if words not in shown] == []
    assert SECRET not in tasks + worker


def test_flower_needs_a_password_and_is_read_only(monitored: Monitored) -> None:
    with pytest.raises(HTTPError, match="401") as unauthorized:
        fetch(f"http://{monitored.flower.at}/tasks")
    unauthorized.value.close()
    pool = f"http://{monitored.flower.at}/api/worker/shutdown/npu0@{host()}"
    with pytest.raises(HTTPError, match=r"40[35]") as forbidden:
        fetch(pool, user=USER, data=b"")
    forbidden.value.close()
    assert monitored.npu_worker.process.poll() is None
