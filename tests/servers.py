"""Real servers for tests: a private Redis on a unix socket, real workers in their own groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NotThere
from redis.exceptions import RedisError
from tests.programs import program

from embedq.protocol import worker
from embedq.protocol.contract import Queue
from embedq.settings import ProducerSettings
from embedq.store import fleet
from embedq.store.connection import open_redis
from embedq_worker.main_process.status import StatusFile

T = TypeVar("T")
#: Seconds that any one thing of a test may take on a busy machine.
DEADLINE_S = 30.0
#: Seconds that the job of the fixture `ledger` lives.
JOB_TTL_S = 600
#: Seconds between two looks at what is waited for.
LOOK_EVERY_S = 0.02


def wait_for(look: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true answer of a look; fail with what was waited for after the deadline."""
    deadline = time.monotonic() + deadline_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"Waited {deadline_s:.0f} s for {what}.")
        time.sleep(LOOK_EVERY_S)


def environment(**variables: str) -> dict[str, str]:
    """Return an environment without settings but these, in which a child finds the packages."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EMBEDQ_")}
    paths = clean.get("PYTHONPATH", "").split(os.pathsep)
    clean["PYTHONPATH"] = os.pathsep.join(os.fspath(Path(p).resolve()) for p in paths if p)
    return {**clean, "PYTHONFAULTHANDLER": "1", **variables}


class RedisProcess:
    """A Redis of our own on a unix socket, without persistence."""

    def __init__(self, folder: Path, *options: str, password: str = "") -> None:
        server = program("redis-server", "redis-server")
        self.socket = folder / "redis.sock"
        self._login = f":{password}@" if password else ""
        if password:
            options += ("--requirepass", password)
        common = ("--port", "0", "--save", "", "--appendonly", "no", "--dir", os.fspath(folder))
        self._process = subprocess.Popen(
            [server, "--unixsocket", os.fspath(self.socket), *common, *options],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        with self.open() as client:
            wait_for(lambda: _answers(client), "Redis to answer")

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def broker_url(self, db: int = 0) -> str:
        """Return the URL as kombu wants it."""
        return f"redis+socket://{self._login}{self.socket}?virtual_host={db}"

    def results_url(self, db: int = 1) -> str:
        """Return the URL as redis-py wants it."""
        return f"unix://{self._login}{self.socket}?db={db}"

    def open(self, db: int = 1) -> Redis:
        """Return a client of a database."""
        return open_redis(self.results_url(db))

    def settings(self, **others: object) -> ProducerSettings:
        """Return settings of a producer that talks to a stub worker through this Redis."""
        urls = {"broker_url": self.broker_url(), "results_url": self.results_url()}
        return ProducerSettings.load(**{**urls, "model": "stub", "startup_timeout_s": 20, **others})

    def stop(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()


class WorkerProcess:
    """A worker with the stub engine, in a process group of its own."""

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

    def heartbeat(self) -> worker.Heartbeat | None:
        """Return what this worker last said of itself."""
        alive = fleet.list_live_workers(self._redis)
        return next((heartbeat for heartbeat in alive if heartbeat.worker == self.name), None)

    def pids(self) -> tuple[int, int]:
        """Return the process ids of the Celery parent and of its child."""
        heartbeat = self.heartbeat()
        return heartbeat.pid if heartbeat else 0, self.child_pid()

    def wait_healthy(self) -> WorkerProcess:
        """Wait until the worker's heartbeat says healthy; fail with its log if it ends instead."""

        def healthy() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"Worker {self.name} ended:\n{self.log()}")
            heartbeat = self.heartbeat()
            return heartbeat is not None and heartbeat.state == "healthy"

        wait_for(healthy, f"worker {self.name} to be healthy; its log:\n{self.log()}")
        return self

    def child_pid(self) -> int:
        """Return the process id of the child, from the state file it wrote."""
        state = StatusFile(self.runtime_dir, self.name).read()
        return state.pid if state is not None else 0

    def log(self) -> str:
        """Return all that the worker has said."""
        return self.log_path.read_text(errors="replace")

    def lines(self, *words: str) -> list[str]:
        """Return the lines of the log that hold all these words."""
        return [line for line in self.log().splitlines() if all(word in line for word in words)]

    def kill(self) -> None:
        """Kill all processes of the worker with SIGKILL, and wait until none holds a socket."""
        os.killpg(self.process.pid, signal.SIGKILL)
        # Redis would still give a batch to one that is killed but has not ended.
        wait_for(lambda: not _runs(self.process.pid), f"worker {self.name} to end")
        self.process.wait()

    def discard(self) -> None:
        """Kill the worker and let the fleet forget it."""
        if self.process.poll() is None:
            self.kill()
        with suppress(RedisError):
            fleet.deregister(self._redis, self.name)
        self._redis.close()

    def stop(self) -> None:
        """Ask the worker to end, and end its group if it does not."""
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
    """Run a healthy stub worker for as long as the block lasts; it is killed then, to save time."""
    worker = WorkerProcess(redis, folder, name, **settings)
    try:
        yield worker.wait_healthy()
    finally:
        worker.discard()


@contextmanager
def leaving_worker(
    redis: RedisProcess, folder: Path, name: str = "stub", **settings: str
) -> Iterator[WorkerProcess]:
    """Run one that ends in good order, so that its log is whole when it is judged afterwards."""
    with stub_worker(redis, folder, name, **settings) as worker:
        yield worker
        worker.stop()


def wait_until_acknowledged(redis: RedisProcess) -> None:
    """Wait until no batch is queued or in hand.

    A worker acknowledges a batch after the line about it, which comes after the vectors.
    """
    with redis.open(0) as broker:
        wait_for(lambda: not broker.exists("unacked", "unacked_index", *Queue), "the last batch")


def forget_all(redis: RedisProcess) -> None:
    """Empty the queues and the results, but leave what workers say of themselves."""
    for db in (0, 1):
        with redis.open(db) as client:
            for key in client.scan_iter("*", count=1000):
                if not (key.startswith((b"_kombu", b"embedq:worker"))):
                    client.unlink(key)


def _runs(group: int) -> bool:
    """Tell whether a process of a group is alive; the dead that nobody waited for are not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, pgid, *_ = path.read_text().rpartition(")")[2].split()
            if int(pgid) == group and state not in "ZX":
                return True
    return False


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except NotThere:
        return False
