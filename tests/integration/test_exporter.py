"""Metrics of the exporter, read from a real Redis and scraped over HTTP."""

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
    """Run an exporter and yield its URL."""
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
    """Return the value of the only series with this name and these labels."""
    wanted = set(labels.items())
    [value] = [v for (n, found), v in series.items() if n == name and wanted <= set(found)]
    return value


@pytest.fixture
def broker(redis: RedisProcess) -> Iterator[Redis]:
    with redis.open(0) as client:
        yield client


def test_queues_have_length_and_age(redis: RedisProcess, broker: Redis) -> None:
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


def test_degraded_worker_has_state_code_and_time(redis: RedisProcess, results: Redis) -> None:
    """The reason, a free text, is in no label."""
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
def test_unknown_reason_code_becomes_other(
    redis: RedisProcess, results: Redis, fields: dict[str, object], shown: str
) -> None:
    add_workers(results, 1, **fields)

    with exporting(redis) as address:
        assert one(scrape(address), "embedq_worker_reason", reason=shown) == 1


def test_worker_without_a_heartbeat_is_down_and_silent(redis: RedisProcess, results: Redis) -> None:
    add_workers(results, 2)
    results.delete("embedq:worker:worker-001")

    with exporting(redis) as address:
        series = scrape(address)

    assert one(series, "embedq_worker_up", worker="worker-000") == 1
    assert one(series, "embedq_worker_up", worker="worker-001") == 0
    assert one(series, "embedq_workers", state="silent") == 1
    assert one(series, "embedq_workers", state="healthy") == 1


def test_job_has_batches_and_texts(redis: RedisProcess, results: Redis) -> None:
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


def test_number_of_series_is_bounded(redis: RedisProcess, results: Redis) -> None:
    add_workers(results, MAX_WORKER_SERIES + 5)
    add_jobs(results, MAX_JOB_SERIES + 5, batches=2)

    with exporting(redis) as address:
        series = scrape(address)

    assert sum(name == "embedq_worker_up" for name, _ in series) == MAX_WORKER_SERIES
    assert one(series, "embedq_workers", state="healthy") == MAX_WORKER_SERIES + 5
    assert sum(name == "embedq_job_committed_batches" for name, _ in series) == MAX_JOB_SERIES + 1
    assert one(series, "embedq_job_committed_batches", job=OTHER_JOBS) == 10
    assert one(series, "embedq_jobs") == MAX_JOB_SERIES + 5


def test_scrape_has_every_documented_metric(redis: RedisProcess, results: Redis) -> None:
    add_workers(results, 1)
    add_jobs(results, 1)
    results.set(PAUSED_KEY, "1")

    with exporting(redis) as address:
        series = scrape(address)

    assert {re.sub("_(sum|count)$", "", name) for name, _ in series} == set(BY_NAME)
    assert one(series, "embedq_paused") == 1
    assert one(series, "embedq_up") == 1


def test_exporter_reports_a_redis_that_hangs_or_is_gone(redis: RedisProcess) -> None:
    with exporting(redis) as address:
        before = scrape(address)
        os.kill(redis.pid, signal.SIGSTOP)
        started = time.monotonic()
        hung = scrape(address)
        elapsed_s = time.monotonic() - started
        os.kill(redis.pid, signal.SIGCONT)
        back = scrape(address)
        redis.stop()
        gone = scrape(address)

    assert one(before, "embedq_up") == one(back, "embedq_up") == 1
    for without in (hung, gone):
        assert one(without, "embedq_up") == 0
        assert one(without, "embedq_redis_up", instance="broker") == 0
        assert ("embedq_paused", ()) not in without
    assert elapsed_s < 5  # the scrape timeout of Prometheus


def test_redis_that_refuses_a_command_is_up(redis: RedisProcess, results: Redis) -> None:
    """The exporter is down, Redis is not."""
    results.set(WORKERS_KEY, "not a sorted set")

    with exporting(redis) as address:
        series = scrape(address)

    assert one(series, "embedq_up") == 0
    assert one(series, "embedq_redis_up", instance="results") == 1


def test_health_check_needs_no_redis(redis: RedisProcess) -> None:
    with exporting(redis) as address:
        redis.stop()
        with urlopen(f"{address}/healthz", timeout=5) as answer:
            assert answer.read() == b"ok\n"
        with pytest.raises(HTTPError, match="404") as refused:
            urlopen(f"{address}/", timeout=5)
        refused.value.close()


def test_status_shows_workers_and_jobs(results: Redis, broker: Redis) -> None:
    """`embedq status` prints the state of workers with its reason and the progress of jobs."""
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
def test_invalid_job_does_not_hide_others(
    fields: dict[Any, Any], results: Redis, broker: Redis, ledger: Ledger
) -> None:
    results.hset("embedq:{forged}:meta", mapping=fields)
    results.set("embedq:{wrong}:meta", "not a hash")
    names: dict[Any, float] = {"forged": 1, "wrong": 2, b"\xff": 3}
    results.zadd(JOBS_KEY, names)

    found = fetch_status(broker, results)

    assert {job.id for job in found.jobs} == {"job", "forged"}
