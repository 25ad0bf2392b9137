"""Children that cannot come up: the first and the replacement, once and again and again."""

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
    """The fault script of the workers of a test."""
    return FaultScript(short_dir / "faults")


def with_faults(folder: Path) -> dict[str, str]:
    """Return the setting that makes a worker read the fault script."""
    return {"EMBEDQ_STUB_FAULTS": str(folder / "faults")}


def assert_serves(redis: RedisProcess) -> None:
    """Require that a job gets its vectors."""
    with Client(settings=redis.settings()) as client:
        assert np.array_equal(client.encode(TEXTS, timeout_s=DEADLINE_S), stub_vectors(TEXTS))


def replace_child(worker: WorkerProcess) -> None:
    """Kill the child and wait until another one is healthy."""
    dead = worker.pool_pid()
    os.kill(dead, signal.SIGKILL)

    def replaced() -> bool:
        heartbeat = worker.heartbeat()
        return (
            worker.pool_pid() not in (0, dead)
            and heartbeat is not None
            and heartbeat.state == "healthy"
            and bool(worker.lines("serving worker=", f" {worker.pool_pid()} "))
        )

    wait_for(replaced, f"the replacement; log:\n{worker.log()[-2000:]}")


@pytest.mark.parametrize("fault", ["exit", "segfault", "slow seconds=1"])
def test_first_child_may_fail_once(
    fault: str, redis: RedisProcess, short_dir: Path, script: FaultScript
) -> None:
    """A first child that ends before it is ready, or is slow, costs a start and no more."""
    script.replace(f"init={fault} first=1")

    with stub_worker(redis, short_dir, **with_faults(short_dir)) as worker:
        assert_serves(redis)

        assert (short_dir / "faults.struck").read_text().count("init") == 1
        assert len(worker.lines("serving worker=")) == 1


def test_replacement_child_may_fail_once(
    redis: RedisProcess, short_dir: Path, script: FaultScript
) -> None:
    """Raise, exit, segfault or be slow: the worker that has served serves again each time."""
    with stub_worker(redis, short_dir, **with_faults(short_dir)) as worker:
        for fault in ("exit", "segfault", "slow seconds=1", "raise"):
            script.replace(f"init={fault} first=1")
            replace_child(worker)
            assert_serves(redis)

        assert (
            len(worker.lines("worker_process_exited", "exit code 1")) == 1
        )  # of the one that raised
        assert worker.process.poll() is None


@pytest.mark.parametrize(
    ("fault", "code", "starts"),
    [
        ("init=segfault", exit_codes.CRASH_LOOP, CRASHES),
        ("init=raise", exit_codes.ENGINE, 2),
    ],
)
def test_child_that_never_comes_up_again_ends_the_worker(
    fault: str,
    code: int,
    starts: int,
    redis: RedisProcess,
    short_dir: Path,
    script: FaultScript,
) -> None:
    """A crash loop ends with its exit code after a few tries, and says why."""
    with stub_worker(redis, short_dir, **with_faults(short_dir)) as worker:
        script.replace(fault)
        os.kill(worker.pool_pid(), signal.SIGKILL)

        assert worker.process.wait(DEADLINE_S) == code
    struck = (short_dir / "faults.struck").read_text().count(fault)
    # A look may miss the first, which waits for nobody, and others begin until the worker has
    # ended.
    assert starts <= struck <= 2 * starts
    assert worker.lines("worker_shutdown")
