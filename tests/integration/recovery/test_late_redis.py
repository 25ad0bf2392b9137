"""A producer that starts before Redis is reachable, or while it is full, waits and continues."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from tests.support.redis import DEADLINE_S, RedisProcess, environment, wait_for
from tests.support.workers import stub_worker

from embedq import Client
from embedq.errors import QueueFull, QueueUnavailable
from embedq.settings import ProducerSettings
from embedq.testing import stub_vectors

TEXTS = [f"text {i}" for i in range(20)]


def urls(folder: Path) -> dict[str, str]:
    """Return the settings for a Redis in a folder."""
    socket = folder / "redis.sock"
    return {
        "EMBEDQ_BROKER_URL": f"redis+socket://{socket}?virtual_host=0",
        "EMBEDQ_RESULTS_URL": f"unix://{socket}?db=1",
        "EMBEDQ_MODEL": "stub",
    }


@contextmanager
def embedding(folder: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command during the block; its standard error goes to the file `stderr`."""
    (folder / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedq", "embed", "in.txt", "-o", "out.npy", "--json"],
            cwd=folder,
            env=environment(**urls(folder), **settings),
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_stderr(folder: Path, words: str) -> str:
    """Wait until the standard error contains some words, and return it."""
    stderr = folder / "stderr"
    wait_for(lambda: words in stderr.read_text(), f"{words!r} on stderr")
    return stderr.read_text()


def test_command_waits_for_a_redis_that_starts_late(short_dir: Path) -> None:
    with embedding(short_dir) as process:
        stderr = wait_for_stderr(short_dir, "waiting (0 s so far)")
        redis = RedisProcess(short_dir)
        try:
            with stub_worker(redis, short_dir):
                out, _ = process.communicate(timeout=DEADLINE_S)
        finally:
            redis.stop()

    assert f"Redis cannot be reached at redis+socket://{short_dir}" in stderr
    assert "Start Redis" in stderr
    assert "Ctrl-C" in stderr
    assert process.returncode == 0
    assert json.loads(out)["ok"] == len(TEXTS)
    assert np.array_equal(np.load(short_dir / "out.npy"), stub_vectors(TEXTS))


def test_client_gives_up_on_redis_after_the_startup_timeout(short_dir: Path) -> None:
    waits: list[str] = []
    addresses = urls(short_dir)
    settings = ProducerSettings.load(
        broker_url=addresses["EMBEDQ_BROKER_URL"],
        results_url=addresses["EMBEDQ_RESULTS_URL"],
        model="stub",
        startup_timeout_s=1,
    )

    with (
        Client(settings=settings, on_wait=waits.append) as client,
        pytest.raises(QueueUnavailable, match=r"cannot be reached.*Start Redis"),
    ):
        client.encode("text")

    assert len(waits) == 1


def test_full_redis_refuses_a_job_and_the_command_waits(short_dir: Path) -> None:
    redis = RedisProcess(short_dir)
    try:
        with stub_worker(redis, short_dir), redis.open() as results:
            _fill(results)
            with Client(settings=redis.settings()) as client, pytest.raises(QueueFull) as caught:
                client.submit(TEXTS)
            with embedding(short_dir) as process:
                wait_for_stderr(short_dir, "full; publishing pauses")
                results.config_set("maxmemory", 0)
                process.communicate(timeout=DEADLINE_S)
    finally:
        redis.stop()

    assert caught.value.retry_after_s > 0
    assert process.returncode == 0
    assert np.array_equal(np.load(short_dir / "out.npy"), stub_vectors(TEXTS))


def _fill(redis: Redis) -> None:
    """Lower the memory limit so that nine tenths are used."""
    used = int(redis.info("memory")["used_memory"])
    redis.config_set("maxmemory", used * 10 // 9)
