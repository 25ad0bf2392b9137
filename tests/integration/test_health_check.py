"""`embedq-worker health` beside a real worker."""

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
    """Return exit code and output of a health check in the environment of a worker."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", "health", *options],
        env=environment(EMBEDQ_RUNTIME_DIR=os.fspath(worker.runtime_dir), EMBEDQ_NAME=worker.name),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.strip()


def wait_beat(
    worker: WorkerProcess, what: str, right: Callable[[liveness.Liveness], bool]
) -> liveness.Liveness:
    """Wait for a pulse of a kind."""

    def look() -> liveness.Liveness | None:
        found = next(liveness.read_all(worker.runtime_dir, worker.name), None)
        return found if found and right(found) else None

    return wait_for(look, what)


def _if_unwell(found: tuple[int, str]) -> str:
    return found[1] if found[0] == 1 else ""


def test_worker_that_hangs_is_stale_and_one_without_broker_lives(
    redis: RedisProcess, short_dir: Path
) -> None:
    """A stopped parent is stale within the age asked for; without Redis it beats, not ready."""
    with stub_worker(redis, short_dir) as worker:
        serving = wait_beat(worker, "a pulse of a worker that serves", liveness.Liveness.is_ready)
        well = check(worker)
        os.kill(serving.pid, signal.SIGSTOP)
        hung = wait_for(lambda: _if_unwell(check(worker, "--max-age-s", "3")), "a stale pulse")
        os.kill(serving.pid, signal.SIGCONT)
        redis.stop()
        lost = wait_beat(worker, "the broker to be missed", lambda found: not found.connected)
        wait_beat(worker, "beats without a broker", lambda found: found.at > lost.at + 2)
        code, shown = check(worker, "--json")

    answer: dict[str, Any] = json.loads(shown)
    assert well == (0, "stub healthy: alive")
    assert "the limit is 3 s" in hung
    assert (code, answer["alive"], answer["ready"]) == (0, True, False)
    assert answer["workers"][0]["age_s"] < 10


def test_worker_that_never_ran_is_unwell(worker: WorkerProcess, tmp_path: Path) -> None:
    """A folder without a pulse is a worker that is not there."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", "health"],
        env=environment(EMBEDQ_RUNTIME_DIR=os.fspath(tmp_path)),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stdout == f"no worker has run in {tmp_path} (EMBEDQ_RUNTIME_DIR)\n"


def test_worker_tells_what_it_has_computed(worker: WorkerProcess, client: Client) -> None:
    """Texts, tokens and inferences of a job arrive in the heartbeat, and nothing is at work."""

    def told() -> WorkerStatus | None:
        beat = worker.heartbeat()
        return beat if beat and beat.totals.get("texts", 0) >= before + 40 else None

    first = worker.heartbeat()
    before = first.totals.get("texts", 0) if first else 0
    client.encode([f"text {number}" for number in range(40)])
    totals = wait_for(told, "totals in the heartbeat").totals

    assert totals["texts"] == before + 40
    assert totals["tokens"] >= 80  # two special tokens each
    assert totals["inferences"] >= totals["batches"] >= 1
    assert totals["infer_s"] > 0
    assert {"duplicates", "refused"} <= totals.keys()  # of earlier tests, perhaps
    wait_beat(worker, "the engine to rest", lambda found: found.engine_since is None)


@pytest.mark.parametrize("arguments", [["health", "--help"], ["health", "--max-age-s", "x"]])
def test_help_and_mistakes_of_the_check(arguments: list[str]) -> None:
    """The check explains itself, and a wrong option is not taken for a sick worker."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == (0 if "--help" in arguments else 2)
    assert "--max-age-s" in done.stdout + done.stderr
