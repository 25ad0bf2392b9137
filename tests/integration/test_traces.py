"""Traces of a batch from submit to result, with OpenTelemetry's instrumentation of Celery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.redis import RedisProcess, environment, wait_for
from tests.support.workers import WorkerProcess, stub_worker

from embedq_worker.engines.stub import FaultScript

TRACED = {
    "EMBEDQ_TRACES": "1",
    "OTEL_TRACES_EXPORTER": "console",
    "OTEL_BSP_SCHEDULE_DELAY": "100",  # ms
}
PROGRAM = """
from embedq import Client
with Client() as client:
    client.encode(["Zanzibar alpha", "Zanzibar beta"])
"""


def spans(text: str) -> list[dict[str, Any]]:
    """Parse the spans in the output of the console exporter."""
    found, at, decoder = [], 0, json.JSONDecoder()
    while (at := text.find('{\n    "name"', at)) >= 0:
        span, at = decoder.raw_decode(text, at)
        found.append(span)
    return found


def worker_spans(worker: WorkerProcess) -> dict[str, dict[str, Any]]:
    """Return the spans of a pool process by name, once that of the task is exported."""

    def with_task() -> dict[str, dict[str, Any]]:
        found = {span["name"]: span for span in spans(worker.log())}
        return found if "run/embedq.embed_batch" in found else {}

    return wait_for(with_task, "the worker's spans")


def run_program(redis: RedisProcess) -> str:
    """Run the traced program and return its output, which contains its spans."""
    urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment(**TRACED, **urls, EMBEDQ_MODEL="stub"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_batch_is_one_trace_from_submit_to_result(redis: RedisProcess, short_dir: Path) -> None:
    """No span contains a text."""
    with stub_worker(redis, short_dir, **TRACED) as worker:
        printed = run_program(redis)
        remote = worker_spans(worker)

    local = {span["name"]: span for span in spans(printed)}
    by_name = {**local, **remote}
    ids = {span["context"]["span_id"]: name for name, span in by_name.items()}
    parents = {name: ids.get(span["parent_id"] or "") for name, span in by_name.items()}
    assert len({span["context"]["trace_id"] for span in by_name.values()}) == 1
    assert parents == {
        "embedq.submit": None,
        "embedq.publish": "embedq.submit",
        "run/embedq.embed_batch": "embedq.publish",
        "embedq.engine": "run/embedq.embed_batch",
        "embedq.commit": "run/embedq.embed_batch",
        "embedq.collect": "embedq.submit",
    }
    assert "Zanzibar" not in printed + worker.log()


@pytest.mark.parametrize("fault", ["device_lost", "hang", "exit"])
def test_rerouted_or_requeued_batch_stays_in_its_trace(
    fault: str, redis: RedisProcess, short_dir: Path
) -> None:
    """Rerouted by the pool process or the main process, or requeued after a crash."""
    script = FaultScript(short_dir / "faults")
    script.replace()
    npu = {"EMBEDQ_STUB_DEVICE": "npu", "EMBEDQ_STUB_FAULTS": os.fspath(short_dir / "faults")}
    with stub_worker(redis, short_dir, **TRACED, **npu, EMBEDQ_ENGINE_TIMEOUT_S="2") as worker:
        script.replace(f"infer={fault} first=1")
        printed = run_program(redis)
        remote = wait_for(
            lambda: [span for span in spans(worker.log()) if span["name"] == "embedq.commit"],
            "the span of the commit",
        )

    [submit] = [span for span in spans(printed) if span["name"] == "embedq.submit"]
    assert {span["context"]["trace_id"] for span in remote} == {submit["context"]["trace_id"]}


def test_unknown_exporter_is_a_settings_error() -> None:
    program = subprocess.run(
        [sys.executable, "-c", "import embedq; embedq.Client()"],
        env=environment(**{**TRACED, "OTEL_TRACES_EXPORTER": "consol"}),
        capture_output=True,
        text=True,
    )

    assert "SettingsError: OTEL_TRACES_EXPORTER: expected one of console" in program.stderr


def test_opentelemetry_is_not_loaded_without_the_setting() -> None:
    # Except its metrics, which redis-py imports.
    program = """
import embedq, embedq_worker.main_process.app, sys
TRACING = ('opentelemetry.sdk.trace', 'opentelemetry.instrumentation')
embedq.Client(broker_url='redis://127.0.0.1:1/0')
print([name for name in sys.modules if name.startswith(TRACING)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "[]\n"
