"""Real Redis servers for tests.

Real servers for tests: a private Redis on a unix socket, real workers in their own groups.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NotThere
from redis.exceptions import TimeoutError as NoAnswer
from tests.support.binaries import program

from embedq.protocol.contract import Queue
from embedq.settings import ProducerSettings
from embedq.store.connection import open_redis

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
            wait_for(lambda: answers(client), "Redis to answer")

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


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except (NotThere, NoAnswer):
        return False
