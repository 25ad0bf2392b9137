"""Run the command `embedq` as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.files import safe_rows
from tests.support.redis import RedisProcess, environment, wait_for


class Command:
    """`embedq`, run in a folder against the shared stub worker."""

    def __init__(self, folder: Path, redis: RedisProcess) -> None:
        self.folder = folder
        self.urls = {
            "EMBEDQ_BROKER_URL": redis.broker_url(),
            "EMBEDQ_RESULTS_URL": redis.results_url(),
            "EMBEDQ_MODEL": "stub",
        }

    def __call__(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "embedq", *arguments],
            cwd=self.folder,
            env=environment(**{**self.urls, **settings}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def write(self, name: str, *lines: object) -> str:
        """Write a file of lines, as JSON unless they are text, and return its name."""
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / name).write_text("".join(f"{line}\n" for line in text), "utf-8")
        return name

    def items(self, name: str = "out.items.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the single line that a failed command printed to stderr."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    return line


#: files.SMALL as environment variables.
SMALL_ENVIRONMENT = {"EMBEDQ_BATCH_TEXTS": "32", "EMBEDQ_MAX_IN_FLIGHT": "8"}


def start(redis: RedisProcess, *arguments: str | Path, **settings: str) -> subprocess.Popen[str]:
    """Start `embedq` for the model `stub`, with small batches."""
    urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
    return subprocess.Popen(
        [sys.executable, "-m", "embedq", *(os.fspath(argument) for argument in arguments)],
        env=environment(**{**urls, "EMBEDQ_MODEL": "stub", **SMALL_ENVIRONMENT, **settings}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them, and this process, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], text: str | None = None) -> tuple[int, str, str]:
    """Wait for a process; return its exit code, stdout and stderr."""
    out, err = process.communicate(text, timeout=60)
    return process.returncode, out, err


def command(redis: RedisProcess, *arguments: str | Path, **settings: str) -> tuple[int, str, str]:
    """Run `embedq` to its end; return its exit code, stdout and stderr."""
    return finish(start(redis, *arguments, **settings))


def kill_at(process: subprocess.Popen[str], output: Path, rows: int) -> int:
    """Send SIGKILL once the manifest confirms so many rows; return how many it confirms."""
    wait_for(lambda: safe_rows(output) >= rows or process.poll() is not None, f"{rows} rows")
    assert process.poll() is None, f"The command ended before it was killed:\n{finish(process)}"
    process.kill()
    finish(process)
    return safe_rows(output)


def wait_until_redis_is_empty(redis: RedisProcess) -> None:
    """Wait until Redis holds no ledger, no vectors and no queued batch."""

    def left() -> list[bytes]:
        return [
            key
            for db in (0, 1)
            for key in _keys(redis, db)
            if not key.startswith((b"_kombu", b"embedq:worker"))
        ]

    wait_for(lambda: not left(), "all keys of jobs to be deleted")


def _keys(redis: RedisProcess, db: int) -> list[bytes]:
    with redis.open(db) as client:
        return list(client.scan_iter("*", count=1000))
