"""The process guard: exit codes, an orderly end, a hard end, and nothing left of the group."""

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
#: Seconds after which a process that should be gone counts as left behind.
DEADLINE_S = 20.0


def guard(grace_s: float, *command: str) -> subprocess.Popen[str]:
    """Start a command under a guard whose stdin is ours."""
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
def test_exit_code_is_the_commands(script: str, code: int) -> None:
    """A command's exit code comes through, and a signal n as 128 + n."""
    with guard(1, "sh", "-c", script) as process:
        assert process.wait(DEADLINE_S) == code


def test_command_that_cannot_run_is_named() -> None:
    """A command that does not exist gives 127 and a line in its log."""
    with guard(1, "/nowhere/redis-server") as process:
        assert process.stdout is not None
        log = process.stdout.read()

        assert process.wait(DEADLINE_S) == 127
    assert log == "/nowhere/redis-server cannot be run: No such file or directory.\n"


def test_end_of_stdin_ends_the_command_politely() -> None:
    """When the owner's end closes, the command gets SIGTERM and may finish."""
    with guard(
        DEADLINE_S, "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.stdin.close()

        assert process.wait(DEADLINE_S) == 5


def test_sigterm_at_the_guard_ends_the_command() -> None:
    """A guard that gets SIGTERM ends its command first."""
    with guard(DEADLINE_S, "sh", "-c", "echo up; exec sleep 600") as process:
        assert process.stdout is not None
        process.stdout.readline()

        process.terminate()

        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_interrupt_reaches_the_owner_only() -> None:
    """Ctrl-C at the guard changes nothing: the owner decides."""
    with guard(DEADLINE_S, "sh", "-c", "echo up; read line; exec sleep 600") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.send_signal(signal.SIGINT)
        process.stdin.close()

        assert process.wait(DEADLINE_S) != 128 + signal.SIGINT


def test_stubborn_command_is_killed_after_the_grace() -> None:
    """A command that ignores SIGTERM is killed once its time is up."""
    started = time.monotonic()
    with guard(0.2, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 600; done") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.stdin.close()

        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert time.monotonic() - started < DEADLINE_S


def test_grandchild_does_not_outlive_the_command() -> None:
    """What a command forked is killed when the command ends, even if it ignores SIGTERM."""
    reader, writer = os.pipe()  # at its end when no process of the group holds it any more
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


def test_it_imports_little() -> None:
    """A guard starts quickly, because it imports next to nothing."""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", str(GUARD), "1", "--", "true"],
        capture_output=True,
        text=True,
        check=True,
    )

    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "select" in imported
    assert not imported & {"re", "typing", "subprocess", "threading", "pathlib", "logging"}


def test_end_waits_for_no_fork_of_its_owner(tmp_path: Path) -> None:
    """A fork of the owner keeps the other end of stdin open; the command ends all the same."""
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
