"""Run worker processes for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from redis.exceptions import RedisError
from tests.support.redis import RedisProcess, environment, wait_for

from embedq.protocol import worker
from embedq.store import fleet
from embedq_worker.main_process.status import StatusFile


class WorkerProcess:
    """A worker under its supervisor, by default with the stub engine, in its own process group."""

    def __init__(self, redis: RedisProcess, folder: Path, name: str, **settings: str) -> None:
        self.name = name
        self.runtime_dir = folder / f"{name}-run"
        self.log_path = folder / f"{name}.log"
        self._redis = redis.open()
        urls = {
            "EMBEDQ_BROKER_URL": redis.broker_url(),
            "EMBEDQ_RESULTS_URL": redis.results_url(),
        }
        own = {
            "EMBEDQ_NAME": name,
            "EMBEDQ_DEVICE": "stub",
            "EMBEDQ_MODEL": "stub",
            "EMBEDQ_RUNTIME_DIR": os.fspath(self.runtime_dir),
            "EMBEDQ_HEARTBEAT_S": "1",
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "embedq_worker", "start"],
                env=environment(**{**urls, **own, **settings}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def heartbeat(self) -> worker.WorkerStatus | None:
        alive = fleet.list_live_workers(self._redis)
        return next((heartbeat for heartbeat in alive if heartbeat.worker == self.name), None)

    def pids(self) -> tuple[int, int]:
        """Return the process ids of the main process and of the pool process, 0 if unknown."""
        heartbeat = self.heartbeat()
        return heartbeat.pid if heartbeat else 0, self.pool_pid()

    def wait_healthy(self) -> WorkerProcess:
        """Wait until the heartbeat reports healthy; fail if the worker exits."""

        def healthy() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"Worker {self.name} exited:\n{self.log()}")
            heartbeat = self.heartbeat()
            return heartbeat is not None and heartbeat.state == "healthy"

        wait_for(healthy, f"worker {self.name} to be healthy; its log:\n{self.log()}")
        return self

    def pool_pid(self) -> int:
        """Return the process id of the pool process from its status file, or 0."""
        state = StatusFile(self.runtime_dir, self.name).read()
        return state.pool_pid if state is not None else 0

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def lines(self, *words: str) -> list[str]:
        """Return the log lines that contain all these words."""
        return [line for line in self.log().splitlines() if all(word in line for word in words)]

    def kill(self) -> None:
        """Send SIGKILL to all processes of the worker, and wait until they have exited."""
        os.killpg(self.process.pid, signal.SIGKILL)
        # Redis may still deliver a batch to a killed process that has not exited.
        wait_for(lambda: not _runs(self.process.pid), f"worker {self.name} to end")
        self.process.wait()

    def discard(self) -> None:
        """Kill the worker and delete its heartbeat."""
        if self.process.poll() is None:
            self.kill()
        with suppress(RedisError):
            fleet.deregister(self._redis, self.name)
        self._redis.close()

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after 10 s."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self._redis.close()


@contextmanager
def stub_worker(
    redis: RedisProcess, folder: Path, name: str = "stub", **settings: str
) -> Iterator[WorkerProcess]:
    """Run a healthy stub worker inside the block, and kill it at the end, to save time."""
    worker = WorkerProcess(redis, folder, name, **settings)
    try:
        yield worker.wait_healthy()
    finally:
        worker.discard()


@contextmanager
def stopped_worker(
    redis: RedisProcess, folder: Path, name: str = "stub", **settings: str
) -> Iterator[WorkerProcess]:
    """Run a stub worker that is stopped with SIGTERM, so that its log is complete afterwards."""
    with stub_worker(redis, folder, name, **settings) as worker:
        yield worker
        worker.stop()


def _runs(group: int) -> bool:
    """Return whether a process of a group runs; a zombie does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just exited
            state, _, pgid, *_ = path.read_text().rpartition(")")[2].split()
            if int(pgid) == group and state not in "ZX":
                return True
    return False
