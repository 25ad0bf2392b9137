"""Run the command embedq in a process of its own.

`embedq` run as a person runs it: in a folder, as a process, to the end.
"""

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
    """Runs `embedq` in a folder, against the shared stub worker."""

    def __init__(self, folder: Path, redis: RedisProcess) -> None:
        self.folder = folder
        self.urls = {
            "EMBEDQ_BROKER_URL": redis.broker_url(),
            "EMBEDQ_RESULTS_URL": redis.results_url(),
            "EMBEDQ_MODEL": "stub",
        }

    def __call__(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
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
        """Read the sidecar."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a failed command says."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    return line


#: The same for a child process.
SMALL_ENVIRONMENT = {"EMBEDQ_BATCH_TEXTS": "32", "EMBEDQ_MAX_IN_FLIGHT": "8"}


def start(redis: RedisProcess, *arguments: str | Path, **settings: str) -> subprocess.Popen[str]:
    """Start `embedq` as a child that talks to a stub worker through this Redis."""
    urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
    return subprocess.Popen(
        [sys.executable, "-m", "embedq", *(os.fspath(argument) for argument in arguments)],
        env=environment(**{**urls, "EMBEDQ_MODEL": "stub", **SMALL_ENVIRONMENT, **settings}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and so the child, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(child: subprocess.Popen[str], text: str | None = None) -> tuple[int, str, str]:
    """Wait for a child; return its exit code, stdout and stderr."""
    out, err = child.communicate(text, timeout=60)
    return child.returncode, out, err


def command(redis: RedisProcess, *arguments: str | Path, **settings: str) -> tuple[int, str, str]:
    """Run `embedq` as a child to its end; return its exit code, stdout and stderr."""
    return finish(start(redis, *arguments, **settings))


def kill_at(child: subprocess.Popen[str], output: Path, rows: int) -> int:
    """Kill -9 a command once so many rows are safe in its output; return how many were."""
    wait_for(lambda: safe_rows(output) >= rows or child.poll() is not None, f"{rows} rows")
    assert child.poll() is None, f"The command ended before it was killed:\n{finish(child)}"
    child.kill()
    finish(child)
    return safe_rows(output)


def wait_until_forgotten(redis: RedisProcess) -> None:
    """Wait until Redis holds nothing of any job: no ledger, no vectors, no queued batch."""

    def left() -> list[bytes]:
        return [
            key
            for db in (0, 1)
            for key in _keys(redis, db)
            if not key.startswith((b"_kombu", b"embedq:worker"))
        ]

    wait_for(lambda: not left(), "Redis to forget every job")


def _keys(redis: RedisProcess, db: int) -> list[bytes]:
    with redis.open(db) as client:
        return list(client.scan_iter("*", count=1000))
