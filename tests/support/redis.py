"""Run a Redis server on a unix socket for tests."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tests.support.binaries import program

from embedq.protocol.contract import Queue
from embedq.settings import ProducerSettings
from embedq.store.connection import open_redis

T = TypeVar("T")

#: Timeout of one step of a test, seconds.
DEADLINE_S = 30.0
#: Time to live of the job of the fixture `ledger`, seconds.
JOB_TTL_S = 600
#: Seconds between two polls of `wait_for`.
POLL_INTERVAL_S = 0.02


def wait_for(poll: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Call `poll` until it returns a true value, and return that; fail after the deadline."""
    deadline = time.monotonic() + deadline_s
    while True:
        found = poll()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"Waited {deadline_s:.0f} s for {what}.")
        time.sleep(POLL_INTERVAL_S)


def environment(**variables: str) -> dict[str, str]:
    """Return an environment with only these settings and an absolute PYTHONPATH."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EMBEDQ_")}
    paths = clean.get("PYTHONPATH", "").split(os.pathsep)
    clean["PYTHONPATH"] = os.pathsep.join(os.fspath(Path(p).resolve()) for p in paths if p)
    return {**clean, "PYTHONFAULTHANDLER": "1", **variables}


class RedisProcess:
    """A Redis server on a unix socket, without persistence."""

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
            wait_for(lambda: answers(client), "Redis to answer")

    @property
    def pid(self) -> int:
        return self._process.pid

    def broker_url(self, db: int = 0) -> str:
        """Return the URL for kombu."""
        return f"redis+socket://{self._login}{self.socket}?virtual_host={db}"

    def results_url(self, db: int = 1) -> str:
        """Return the URL for redis-py."""
        return f"unix://{self._login}{self.socket}?db={db}"

    def open(self, db: int = 1) -> Redis:
        return open_redis(self.results_url(db))

    def settings(self, **others: object) -> ProducerSettings:
        """Return the settings of a producer for the model `stub`."""
        urls = {"broker_url": self.broker_url(), "results_url": self.results_url()}
        return ProducerSettings.load(**{**urls, "model": "stub", "startup_timeout_s": 20, **others})

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def wait_until_acknowledged(redis: RedisProcess) -> None:
    """Wait until no batch is queued or unacknowledged; this is after its vectors and log line."""
    with redis.open(0) as broker:
        wait_for(lambda: not broker.exists("unacked", "unacked_index", *Queue), "the last batch")


def delete_jobs(redis: RedisProcess) -> None:
    """Delete everything except the keys of kombu and the heartbeats of workers."""
    for db in (0, 1):
        with redis.open(db) as client:
            for key in client.scan_iter("*", count=1000):
                if not (key.startswith((b"_kombu", b"embedq:worker"))):
                    client.unlink(key)


def job_keys(results: Redis) -> set[bytes]:
    """Return the keys of all jobs."""
    return set(results.scan_iter("embedq:{*"))


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except (RedisConnectionError, RedisTimeoutError):
        return False
