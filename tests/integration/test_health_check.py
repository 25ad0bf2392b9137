"""`embedq-worker health` with a real worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.redis import RedisProcess, environment, wait_for
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.protocol.worker import WorkerStatus
from embedq_worker.main_process import liveness


def check(worker: WorkerProcess, *options: str) -> tuple[int, str]:
    """Return exit code and output of `embedq-worker health` for a worker."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", "health", *options],
        env=environment(EMBEDQ_RUNTIME_DIR=os.fspath(worker.runtime_dir), EMBEDQ_NAME=worker.name),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.strip()


def wait_for_liveness(
    worker: WorkerProcess, what: str, condition: Callable[[liveness.Liveness], bool]
) -> liveness.Liveness:
    def matching() -> liveness.Liveness | None:
        found = next(liveness.read_all(worker.runtime_dir, worker.name), None)
        return found if found and condition(found) else None

    return wait_for(matching, what)


def _failure(found: tuple[int, str]) -> str:
    return found[1] if found[0] == 1 else ""


def test_stopped_worker_is_stale_and_worker_without_broker_is_alive(
    redis: RedisProcess, short_dir: Path
) -> None:
    """Without the broker a worker is alive, but not ready."""
    with stub_worker(redis, short_dir) as worker:
        serving = wait_for_liveness(worker, "the worker to serve", liveness.Liveness.is_ready)
        healthy = check(worker)
        os.kill(serving.pid, signal.SIGSTOP)
        hung = wait_for(
            lambda: _failure(check(worker, "--max-age-s", "3")), "a stale liveness file"
        )
        os.kill(serving.pid, signal.SIGCONT)
        redis.stop()
        lost = wait_for_liveness(worker, "the lost connection", lambda found: not found.connected)
        wait_for_liveness(worker, "liveness without a broker", lambda found: found.at > lost.at + 2)
        code, shown = check(worker, "--json")

    answer: dict[str, Any] = json.loads(shown)
    assert healthy == (0, "stub healthy: alive")
    assert "the limit is 3 s" in hung
    assert (code, answer["alive"], answer["ready"]) == (0, True, False)
    assert answer["workers"][0]["age_s"] < 10


def test_check_fails_without_a_liveness_file(worker: WorkerProcess, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", "health"],
        env=environment(EMBEDQ_RUNTIME_DIR=os.fspath(tmp_path)),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stdout == f"no worker has run in {tmp_path} (EMBEDQ_RUNTIME_DIR)\n"


def test_heartbeat_counts_what_was_computed(worker: WorkerProcess, client: Client) -> None:
    def with_new_texts() -> WorkerStatus | None:
        status = worker.heartbeat()
        return status if status and status.totals.get("texts", 0) >= before + 40 else None

    first = worker.heartbeat()
    before = first.totals.get("texts", 0) if first else 0
    client.encode([f"text {number}" for number in range(40)])
    totals = wait_for(with_new_texts, "totals in the heartbeat").totals

    assert totals["texts"] == before + 40
    assert totals["tokens"] >= 80  # two special tokens each
    assert totals["inferences"] >= totals["batches"] >= 1
    assert totals["infer_s"] > 0
    assert {"duplicates", "refused"} <= totals.keys()  # may count those of earlier tests
    wait_for_liveness(worker, "the engine to be idle", lambda found: found.engine_since is None)


@pytest.mark.parametrize("arguments", [["health", "--help"], ["health", "--max-age-s", "x"]])
def test_exit_code_of_help_and_of_a_wrong_option(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == (0 if "--help" in arguments else 2)
    assert "--max-age-s" in done.stdout + done.stderr
