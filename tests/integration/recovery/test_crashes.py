"""Pool processes that crash while they start, once or repeatedly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tests.support.redis import DEADLINE_S, RedisProcess, wait_for
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.testing import stub_vectors
from embedq_worker import exit_codes
from embedq_worker.engines.stub import FaultScript
from embedq_worker.main_process.supervisor import CRASHES

TEXTS = [f"text {i}" for i in range(50)]


@pytest.fixture
def script(short_dir: Path) -> FaultScript:
    return FaultScript(short_dir / "faults")


def with_faults(folder: Path) -> dict[str, str]:
    return {"EMBEDQ_STUB_FAULTS": str(folder / "faults")}


def assert_serves(redis: RedisProcess) -> None:
    with Client(settings=redis.settings()) as client:
        assert np.array_equal(client.encode(TEXTS, timeout_s=DEADLINE_S), stub_vectors(TEXTS))


def replace_pool_process(worker: WorkerProcess) -> None:
    """Kill the pool process and wait until its replacement is healthy."""
    killed = worker.pool_pid()
    os.kill(killed, signal.SIGKILL)

    def replaced() -> bool:
        heartbeat = worker.heartbeat()
        return (
            worker.pool_pid() not in (0, killed)
            and heartbeat is not None
            and heartbeat.state == "healthy"
            and bool(worker.lines("serving worker=", f" {worker.pool_pid()} "))
        )

    wait_for(replaced, f"the replacement; log:\n{worker.log()[-2000:]}")


@pytest.mark.parametrize("fault", ["exit", "segfault", "slow seconds=1"])
def test_worker_survives_one_failure_of_its_first_pool_process(
    fault: str, redis: RedisProcess, short_dir: Path, script: FaultScript
) -> None:
    script.replace(f"init={fault} first=1")

    with stub_worker(redis, short_dir, **with_faults(short_dir)) as worker:
        assert_serves(redis)

        assert (short_dir / "faults.struck").read_text().count("init") == 1
        assert len(worker.lines("serving worker=")) == 1


def test_worker_survives_one_failure_of_a_replacement(
    redis: RedisProcess, short_dir: Path, script: FaultScript
) -> None:
    with stub_worker(redis, short_dir, **with_faults(short_dir)) as worker:
        for fault in ("exit", "segfault", "slow seconds=1", "raise"):
            script.replace(f"init={fault} first=1")
            replace_pool_process(worker)
            assert_serves(redis)

        # Caused by the fault `raise`.
        assert len(worker.lines("worker_process_exited", "exit code 1")) == 1
        assert worker.process.poll() is None


@pytest.mark.parametrize(
    ("fault", "code", "starts"),
    [
        ("init=segfault", exit_codes.CRASH_LOOP, CRASHES),
        ("init=raise", exit_codes.ENGINE, 2),
    ],
)
def test_crash_loop_ends_the_worker_with_an_exit_code(
    fault: str,
    code: int,
    starts: int,
    redis: RedisProcess,
    short_dir: Path,
    script: FaultScript,
) -> None:
    with stub_worker(redis, short_dir, **with_faults(short_dir)) as worker:
        script.replace(fault)
        os.kill(worker.pool_pid(), signal.SIGKILL)

        assert worker.process.wait(DEADLINE_S) == code
    injected = (short_dir / "faults.struck").read_text().count(fault)
    # The count is not exact: a poll may miss a start, and more follow until the worker has exited.
    assert starts <= injected <= 2 * starts
    assert worker.lines("worker_shutdown")
