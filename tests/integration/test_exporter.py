"""What Prometheus gets to see of a fleet, from a real Redis through a real port."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from rich.console import Console
from tests.support.fake_fleet import add_jobs, add_messages, add_unacked_messages, add_workers
from tests.support.redis import RedisProcess

from embedq.cli.operations import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, render
from embedq.observability.exporter import serve
from embedq.observability.metrics import BY_NAME, MAX_JOB_SERIES, MAX_WORKER_SERIES, OTHER_JOBS
from embedq.observability.status import fetch_status
from embedq.protocol.contract import Queue
from embedq.store.connection import open_redis
from embedq.store.fleet import PAUSED_KEY, WORKERS_KEY
from embedq.store.ledger import JOBS_KEY, Ledger

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextmanager
def exporting(redis: RedisProcess) -> Iterator[str]:
    """Run an exporter and give its address."""
    broker, results = (
        open_redis(url, connect_timeout_s=CONNECT_TIMEOUT_S, timeout_s=ANSWER_TIMEOUT_S)
        for url in (redis.broker_url(), redis.results_url())
    )
    with serve(broker, results, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    for client in (broker, results):
        client.close()


def scrape(address: str) -> Series:
    """Return all series of a scrape: (name, labels) -> value."""
    with urlopen(f"{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one(series: Series, name: str, **labels: str) -> float:
    """Return the one series with this name and these labels among its labels."""
    wanted = set(labels.items())
    [value] = [v for (n, found), v in series.items() if n == name and wanted <= set(found)]
    return value


@pytest.fixture
def broker(redis: RedisProcess) -> Iterator[Redis]:
    """A client of the broker's database."""
    with redis.open(0) as client:
        yield client


def test_queues_are_told_by_length_and_age(redis: RedisProcess, broker: Redis) -> None:
    """What waits and what workers hold have their number, and the age of the oldest since
    publish.
    """
    add_messages(broker, Queue.NPU, [90.0, 20.0], size=200_000)
    add_unacked_messages(broker, [500.0, 7.0], lease_s=3.0)

    with exporting(redis) as address:
        series = scrape(address)

    assert one(series, "embedq_queue_ready_messages", queue="embed.npu") == 2
    assert one(series, "embedq_queue_ready_messages", queue="embed.cpu") == 0
    age_s = one(series, "embedq_queue_oldest_ready_age_seconds", queue="embed.npu")
    assert age_s == pytest.approx(90, abs=5)
    assert one(series, "embedq_queue_oldest_ready_age_seconds", queue="embed.cpu") == 0
    assert one(series, "embedq_unacked_messages") == 2
    assert one(series, "embedq_unacked_oldest_age_seconds") == pytest.approx(500, abs=5)
    assert one(series, "embedq_unacked_oldest_lease_age_seconds") == pytest.approx(3, abs=5)


def test_degraded_worker_is_told_with_since_and_code(redis: RedisProcess, results: Redis) -> None:
    """State, code, time and counters of a worker have its name; the sentence is in no label."""
    totals = {"texts": 40.0, "infer_s": 2.5, "inferences": 4, "news": 1}
    degraded = {"state": "degraded", "assigned_device": "npu", "reason": "It is gone: text?"}
    add_workers(results, 1, **degraded, code="device_lost", totals=totals)

    with exporting(redis) as address:
        series = scrape(address)

    assert one(series, "embedq_worker_state", worker="worker-000", state="degraded") == 1
    assert one(series, "embedq_worker_state", worker="worker-000", state="healthy") == 0
    assert one(series, "embedq_worker_reason", worker="worker-000", reason="device_lost") == 1
    since = one(series, "embedq_worker_state_since_timestamp_seconds", worker="worker-000")
    assert since == pytest.approx(time.time() - 30, abs=5)
    assert (
        one(series, "embedq_worker_info", worker="worker-000", assigned_device="npu", device="cpu")
        == 1
    )
    assert one(series, "embedq_worker_texts_total", worker="worker-000") == 40
    assert one(series, "embedq_worker_infer_seconds_sum", worker="worker-000") == 2.5
    assert one(series, "embedq_worker_infer_seconds_count", worker="worker-000") == 4
    assert "gone" not in str(series)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "none"),
        ({"state": "degraded", "reason": "a sentence"}, "other"),
        ({"state": "degraded", "reason": "x", "code": "not a code!"}, "other"),
        ({"state": "degraded", "reason": "x", "code": "c" * 41}, "other"),
    ],
)
def test_reason_is_a_word_of_ours(
    redis: RedisProcess, results: Redis, fields: dict[str, object], shown: str
) -> None:
    """Whatever a worker sends as its code, the label is a short word."""
    add_workers(results, 1, **fields)

    with exporting(redis) as address:
        assert one(scrape(address), "embedq_worker_reason", reason=shown) == 1


def test_silent_worker_is_down(redis: RedisProcess, results: Redis) -> None:
    """A worker that went without taking leave is down and counted as silent."""
    add_workers(results, 2)
    results.delete("embedq:worker:worker-001")

    with exporting(redis) as address:
        series = scrape(address)

    assert one(series, "embedq_worker_up", worker="worker-000") == 1
    assert one(series, "embedq_worker_up", worker="worker-001") == 0
    assert one(series, "embedq_workers", state="silent") == 1
    assert one(series, "embedq_workers", state="healthy") == 1


def test_jobs_are_told_in_batches_and_texts(redis: RedisProcess, results: Redis) -> None:
    """A job shows what was published, committed and not taken, and its plan where it is known."""
    add_jobs(results, 1, batches=3, planned=77)

    with exporting(redis) as address:
        series = scrape(address)

    job = {"job": "job0000"}
    assert one(series, "embedq_job_published_batches", **job) == 4
    assert one(series, "embedq_job_committed_batches", **job) == 3
    assert one(series, "embedq_job_untaken_batches", **job) == 3
    assert one(series, "embedq_job_committed_texts", **job) == 30
    assert one(series, "embedq_job_planned_texts", **job) == 77
    assert "secret" not in str(series)


def test_labels_are_bounded(redis: RedisProcess, results: Redis) -> None:
    """More workers and jobs than have series of their own are counted, and jobs summed."""
    add_workers(results, MAX_WORKER_SERIES + 5)
    add_jobs(results, MAX_JOB_SERIES + 5, batches=2)

    with exporting(redis) as address:
        series = scrape(address)

    assert sum(name == "embedq_worker_up" for name, _ in series) == MAX_WORKER_SERIES
    assert one(series, "embedq_workers", state="healthy") == MAX_WORKER_SERIES + 5
    assert sum(name == "embedq_job_committed_batches" for name, _ in series) == MAX_JOB_SERIES + 1
    assert one(series, "embedq_job_committed_batches", job=OTHER_JOBS) == 10
    assert one(series, "embedq_jobs") == MAX_JOB_SERIES + 5


def test_every_metric_of_the_table_is_there(redis: RedisProcess, results: Redis) -> None:
    """A fleet with a worker and a job has a series of each metric that README lists, and no
    other.
    """
    add_workers(results, 1)
    add_jobs(results, 1)
    results.set(PAUSED_KEY, "1")

    with exporting(redis) as address:
        series = scrape(address)

    assert {re.sub("_(sum|count)$", "", name) for name, _ in series} == set(BY_NAME)
    assert one(series, "embedq_paused") == 1
    assert one(series, "embedq_up") == 1


def test_exporter_outlives_redis(redis: RedisProcess) -> None:
    """A Redis that hangs or is gone is a 0 within the time of a scrape, and 1 again when it is."""
    with exporting(redis) as address:
        before = scrape(address)
        os.kill(redis.pid, signal.SIGSTOP)
        began = time.monotonic()
        hung = scrape(address)
        took_s = time.monotonic() - began
        os.kill(redis.pid, signal.SIGCONT)
        back = scrape(address)
        redis.stop()
        gone = scrape(address)

    assert one(before, "embedq_up") == one(back, "embedq_up") == 1
    for without in (hung, gone):
        assert one(without, "embedq_up") == 0
        assert one(without, "embedq_redis_up", instance="broker") == 0
        assert ("embedq_paused", ()) not in without
    assert took_s < 5  # what Prometheus gives up after


def test_refused_look_is_told_from_a_dead_redis(redis: RedisProcess, results: Redis) -> None:
    """With a Redis that answers but refuses the look, it is up and the exporter is not."""
    results.set(WORKERS_KEY, "not a sorted set")

    with exporting(redis) as address:
        series = scrape(address)

    assert one(series, "embedq_up") == 0
    assert one(series, "embedq_redis_up", instance="results") == 1


def test_health_check_asks_nothing_of_redis(redis: RedisProcess) -> None:
    """/healthz answers without Redis, and a stranger's path is not found."""
    with exporting(redis) as address:
        redis.stop()
        with urlopen(f"{address}/healthz", timeout=5) as answer:
            assert answer.read() == b"ok\n"
        with pytest.raises(HTTPError, match="404") as refused:
            urlopen(f"{address}/", timeout=5)
        refused.value.close()


def test_status_draws_the_same_truth(results: Redis, broker: Redis) -> None:
    """The tables name silent and degraded workers with their reason, and jobs with their share."""
    add_workers(results, 2, state="degraded", reason="Its NPU is gone.")
    results.delete("embedq:worker:worker-001")
    add_jobs(results, 1, batches=3, planned=60)
    console = Console(width=160, record=True, file=io.StringIO())

    console.print(render(fetch_status(broker, results)))

    shown = console.export_text()
    assert re.search(r"worker-000 +degraded .* 30 s ago +Its NPU is gone\.", shown)
    assert re.search(r"worker-001 +silent", shown)
    assert re.search(r"job0000 +30 of 60 \(50%\) +3 of 4 sent", shown)


@pytest.mark.parametrize(
    "fields",
    [
        {"label": b"\xff"},
        {"label": "x", "created": "yesterday"},
        {"label": "x", "published": "many"},
        {"label": "x", "planned": "nan", "texts": "1e400"},
    ],
    ids=repr,
)
def test_forged_job_hides_no_other(
    fields: dict[Any, Any], results: Redis, broker: Redis, ledger: Ledger
) -> None:
    """A job with senseless fields, or under a name that is no text, is shown as far as it goes."""
    results.hset("embedq:{forged}:meta", mapping=fields)
    results.set("embedq:{wrong}:meta", "not a hash")
    names: dict[Any, float] = {"forged": 1, "wrong": 2, b"\xff": 3}
    results.zadd(JOBS_KEY, names)

    found = fetch_status(broker, results)

    assert {job.id for job in found.jobs} == {"job", "forged"}
