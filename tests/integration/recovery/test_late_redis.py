"""A producer that is started while Redis is away or full waits, says for what, and goes on."""

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
    """Return where the Redis of a folder is, or will be."""
    socket = folder / "redis.sock"
    return {
        "EMBEDQ_BROKER_URL": f"redis+socket://{socket}?virtual_host=0",
        "EMBEDQ_RESULTS_URL": f"unix://{socket}?db=1",
        "EMBEDQ_MODEL": "stub",
    }


@contextmanager
def embedding(folder: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command beside the block; what it says is in the file `said`."""
    (folder / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedq", "embed", "in.txt", "-o", "out.npy", "--json"],
            cwd=folder,
            env=environment(**urls(folder), **settings),
            stdout=subprocess.PIPE,
            stderr=said,
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_said(folder: Path, words: str) -> str:
    """Wait for words on the command's standard error, and return all of it."""
    said = folder / "said"
    wait_for(lambda: words in said.read_text(), f"the command to say {words!r}")
    return said.read_text()


def test_command_waits_for_a_redis_that_starts_late(short_dir: Path) -> None:
    """It says at once where nobody answers and what helps, and embeds when Redis is there."""
    with embedding(short_dir) as process:
        said = wait_until_said(short_dir, "waiting (0 s so far)")
        redis = RedisProcess(short_dir)
        try:
            with stub_worker(redis, short_dir):
                out, _ = process.communicate(timeout=DEADLINE_S)
        finally:
            redis.stop()

    assert f"Redis cannot be reached at redis+socket://{short_dir}" in said
    assert "Start Redis" in said
    assert "Ctrl-C" in said
    assert process.returncode == 0
    assert json.loads(out)["ok"] == len(TEXTS)
    assert np.array_equal(np.load(short_dir / "out.npy"), stub_vectors(TEXTS))


def test_client_waits_for_redis_no_longer_than_for_a_worker(short_dir: Path) -> None:
    """The SDK tells that it waits, and ends with the place and the way out."""
    told: list[str] = []
    where = urls(short_dir)
    settings = ProducerSettings.load(
        broker_url=where["EMBEDQ_BROKER_URL"],
        results_url=where["EMBEDQ_RESULTS_URL"],
        model="stub",
        startup_timeout_s=1,
    )

    with (
        Client(settings=settings, on_wait=told.append) as client,
        pytest.raises(QueueUnavailable, match=r"cannot be reached.*Start Redis"),
    ):
        client.encode("text")

    assert len(told) == 1


def test_full_redis_refuses_a_job_and_makes_the_command_wait(short_dir: Path) -> None:
    """`submit` is told when to ask again; the command says that it waits, and goes on by itself."""
    redis = RedisProcess(short_dir)
    try:
        with stub_worker(redis, short_dir), redis.open() as results:
            _fill(results)
            with Client(settings=redis.settings()) as client, pytest.raises(QueueFull) as caught:
                client.submit(TEXTS)
            with embedding(short_dir) as process:
                wait_until_said(short_dir, "full; publishing pauses")
                results.config_set("maxmemory", 0)
                process.communicate(timeout=DEADLINE_S)
    finally:
        redis.stop()

    assert caught.value.retry_after_s > 0
    assert process.returncode == 0
    assert np.array_equal(np.load(short_dir / "out.npy"), stub_vectors(TEXTS))


def _fill(redis: Redis) -> None:
    """Leave a tenth of the memory."""
    used = int(redis.info("memory")["used_memory"])
    redis.config_set("maxmemory", used * 10 // 9)
