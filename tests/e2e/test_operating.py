"""One worker of a fleet is degraded on purpose, and everybody who watches says so.

Real Redis, workers, exporter, Prometheus, Flower and browser, over one running job. Set
OPS_PICTURES to a folder to keep what the browser saw.
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

#: Seconds after which everybody must know: two scrapes or evaluations of 5 s, and some air.
ALL_KNOW_S = 15.0
#: Seconds until the first batch and the first scrape.
START_S = 60.0
#: Seconds for a rate of the last minute to have two samples and be recorded.
RATES_S = 60.0
REASON = "The stub lost its device, because a test says so."
TEXTS = 20_000
SECRET = "Zanzibar"


@dataclass(frozen=True)
class Watched:
    """A fleet at work with `sick` degraded, and those who watch it.

    Attributes:
        redis, sick: the servers.
        exporter: host and port.
        prometheus, flower: the watchers.
        asked, done: Unix times, in seconds, before and after the degrading.
    """

    redis: RedisProcess
    sick: WorkerProcess
    exporter: str
    prometheus: Prometheus
    flower: Flower
    asked: float
    done: float


def degrade(redis: RedisProcess, worker: str) -> None:
    """Take a worker out of service, as an operator does."""
    command = [sys.executable, "-m", "embedq_worker", "degrade", worker, "--reason", REASON]
    subprocess.run(command, env=environment(**urls(redis)), check=True, stdout=subprocess.DEVNULL)


def read(job: Job, ended: threading.Event) -> None:
    """Take the vectors of a job until somebody has seen enough."""
    for _ in job.batches():
        if ended.is_set():
            return


def computes(worker: WorkerProcess) -> bool:
    """Tell whether a worker has said that it computed something."""
    beat = worker.heartbeat()
    return bool(beat and beat.totals.get("texts"))


@pytest.fixture(scope="module")
def folder(shared_dir: Path) -> Path:
    """Make a folder for servers of this module."""
    made = shared_dir / "watched"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def watched_redis(folder: Path) -> Iterator[RedisProcess]:
    """Run a Redis with a limit."""
    server = RedisProcess(folder, "--maxmemory", "100mb")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def watched(watched_redis: RedisProcess, folder: Path) -> Iterator[Watched]:
    """Run a job of 20,000 texts over two workers, let all watch, and degrade one of the workers."""
    redis = watched_redis
    slow = {"EMBEDQ_STUB_TEXTS_PER_S": "150"}
    with (
        stub_worker(redis, folder, "sick", EMBEDQ_STUB_DEVICE="npu", **slow) as sick,
        stub_worker(redis, folder, "well", **slow),
        exporter(redis, folder) as address,
        prometheus(address, folder) as watching,
        flower(redis, folder) as blossom,
        Client(settings=redis.settings(batch_texts=256)) as client,
    ):
        job, ended = client.submit([f"{SECRET} {n}" for n in range(TEXTS)]), threading.Event()
        reading = threading.Thread(target=read, args=(job, ended))
        reading.start()
        try:
            wait_for(lambda: computes(sick), "the worker to compute", START_S)
            known = 'embedq_worker_state{worker="sick", state="healthy"} == 1'
            wait_for(lambda: watching.query(known), "a first scrape", START_S)
            asked = time.time()
            degrade(redis, sick.name)
            yield Watched(redis, sick, address, watching, blossom, asked, time.time())
        finally:
            ended.set()
            reading.join()


def status(redis: RedisProcess) -> dict[str, Any]:
    """Return what `embedq status --json` says."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq", "status", "--json"],
        env=environment(**urls(redis)),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def picture(tmp_path: Path, name: str) -> Path:
    """Return where a picture goes."""
    return Path(os.environ.get("OPS_PICTURES", tmp_path)) / f"{name}.png"


def test_all_who_watch_name_the_degraded_worker(watched: Watched) -> None:
    """Within 15 s metrics, alert, Flower and status say which worker, since when, and why."""
    left_s = watched.done + ALL_KNOW_S - time.time()

    alert = wait_for(
        lambda: watched.prometheus.firing().get("EmbedqWorkerDegraded"), "the alert", left_s
    )
    metrics = fetch(f"http://{watched.exporter}/metrics")
    stats = watched.flower.api("workers?refresh=1")
    [worker] = [worker for worker in status(watched.redis)["workers"] if worker["worker"] == "sick"]

    assert (alert["labels"]["worker"], alert["labels"]["reason"]) == ("sick", "operator")
    stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime(worker["state_since"]))
    assert f"since {stamp}" in alert["annotations"]["description"]
    assert 'embedq_worker_state{state="degraded",worker="sick"} 1.0' in metrics
    [since] = watched.prometheus.query('embedq_worker_state_since_timestamp_seconds{worker="sick"}')
    assert float(since["value"][1]) == pytest.approx(worker["state_since"], abs=0.1)
    [told] = [found["stats"]["embedq"] for name, found in stats.items() if "sick" in name]
    assert (told["state"], told["reason"]) == (worker["state"], worker["reason"])
    assert (worker["state"], worker["reason"]) == ("degraded", REASON)
    assert watched.asked - 1 <= worker["state_since"] <= time.time()
    assert SECRET not in metrics + json.dumps(stats)


def test_every_panel_of_the_dashboard_has_a_series(watched: Watched) -> None:
    """Each query of the Grafana dashboard returns something from a Prometheus that watches."""
    found = json.loads((DEPLOY / "grafana/dashboards/embedq.json").read_text(encoding="utf-8"))
    queries = [t["expr"] for panel in found["panels"] for t in panel.get("targets", [])]
    empty = set(queries)

    def all_answered() -> bool:
        empty.difference_update([each for each in empty if watched.prometheus.query(each)])
        return not empty

    deadline = time.monotonic() + RATES_S
    while not all_answered() and time.monotonic() < deadline:
        time.sleep(1)

    assert len(queries) >= 20
    assert empty == set()


def test_flower_shows_tasks_by_size_and_the_worker_with_its_reason(
    watched: Watched, tmp_path: Path
) -> None:
    """In a browser, tasks have readable arguments, the worker its state and reason, and no text."""
    wait_for(lambda: watched.flower.api("tasks?limit=5&state=SUCCESS"), "a task in Flower")

    tasks = browse(watched.flower.page("tasks"), picture(tmp_path, "flower-tasks"))
    worker = browse(watched.flower.page("worker/sick@" + host()), picture(tmp_path, "flower-node"))

    assert re.search(r"&lt;[\d,]+ texts, [\d,]+ kB&gt;", tasks)
    shown = worker[: worker.index("Max concurrency")]  # what the page opens with
    [told] = [worker for worker in status(watched.redis)["workers"] if worker["worker"] == "sick"]
    stamp = time.strftime("%d %b %Y %H:%M:%S UTC", time.gmtime(told["state_since"]))
    assert [words for words in ("Degraded", REASON, stamp) if words not in shown] == []
    assert SECRET not in tasks + worker


def test_flower_is_behind_its_password_and_only_looks(watched: Watched) -> None:
    """Without the password nothing is shown, and with it nothing can be stopped."""
    with pytest.raises(HTTPError, match="401") as nobody:
        fetch(f"http://{watched.flower.at}/tasks")
    nobody.value.close()
    pool = f"http://{watched.flower.at}/api/worker/shutdown/sick@{host()}"
    with pytest.raises(HTTPError, match=r"40[35]") as stopped:
        fetch(pool, user=USER, data=b"")
    stopped.value.close()
    assert watched.sick.process.poll() is None
