"""Tests of the guard process: exit codes, shutdown and the end of its process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import embedq.local.fleet
from embedq.local.fleet import GUARD_MARGIN_S, ManagedProcess

GUARD = Path(embedq.local.fleet.__file__).with_name("process_guard.py")
#: Seconds after which a process that should have ended counts as left over.
DEADLINE_S = 20.0


def guard(grace_s: float, *command: str) -> subprocess.Popen[str]:
    """Start a command under a guard whose stdin is a pipe of this process."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), str(grace_s), "--", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)],
)
def test_guard_returns_the_exit_code_of_its_command(script: str, code: int) -> None:
    with guard(1, "sh", "-c", script) as process:
        assert process.wait(DEADLINE_S) == code


def test_command_that_cannot_run_exits_with_127() -> None:
    with guard(1, "/nowhere/redis-server") as process:
        assert process.stdout is not None
        log = process.stdout.read()

        assert process.wait(DEADLINE_S) == 127
    assert log == "/nowhere/redis-server cannot be run: No such file or directory.\n"


def test_end_of_stdin_sends_sigterm_to_the_command() -> None:
    with guard(
        DEADLINE_S, "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.stdin.close()

        assert process.wait(DEADLINE_S) == 5


def test_sigterm_at_the_guard_ends_the_command() -> None:
    with guard(DEADLINE_S, "sh", "-c", "echo up; exec sleep 600") as process:
        assert process.stdout is not None
        process.stdout.readline()

        process.terminate()

        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_guard_ignores_sigint() -> None:
    with guard(DEADLINE_S, "sh", "-c", "echo up; read line; exec sleep 600") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.send_signal(signal.SIGINT)
        process.stdin.close()

        assert process.wait(DEADLINE_S) != 128 + signal.SIGINT


def test_command_that_ignores_sigterm_is_killed_after_the_grace_period() -> None:
    started = time.monotonic()
    with guard(0.2, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 600; done") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.stdin.close()

        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert time.monotonic() - started < DEADLINE_S


def test_descendants_are_killed_when_the_command_ends() -> None:
    reader, writer = os.pipe()  # ends when no process of the group holds it
    script = "(trap '' TERM; sleep 600) & exit 3"
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(GUARD), "5", "--", "sh", "-c", script],
        stdin=subprocess.PIPE,
        pass_fds=[writer],
    )
    os.close(writer)

    with process, os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""
        assert process.wait(DEADLINE_S) == 3


def test_guard_imports_few_modules() -> None:
    # Each import delays the start of a local run.
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", str(GUARD), "1", "--", "true"],
        capture_output=True,
        text=True,
        check=True,
    )

    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "select" in imported
    assert not imported & {"re", "typing", "subprocess", "threading", "pathlib", "logging"}


def test_end_does_not_wait_for_a_fork_that_holds_stdin_open(tmp_path: Path) -> None:
    process = ManagedProcess(["sleep", "1000"], tmp_path / "log", grace_s=0)
    reader, writer = os.pipe()
    fork = os.fork()
    if fork == 0:
        os.read(reader, 1)
        os._exit(0)

    began = time.monotonic()
    process.end()
    took_s = time.monotonic() - began
    os.write(writer, b"x")
    os.waitpid(fork, 0)

    assert took_s < GUARD_MARGIN_S
